"""From a decoded frame to a frame of a clip: the box cut out, resized with antialiasing, mirrored, as RGB.

Two paths, which ``clips.pixels`` chooses between and a run's config records, for their bytes differ by a few levels:

- ``exact``: straight from the decoder's planes (csrc/video), with nothing rounded on the way, chroma interpolated from where its
  samples lie, and the colour matrix and range that the frame names. Formats that it does not know take the other.
- ``swscale``: FFmpeg's RGB, whose chroma is repeated and which is rounded, then torch's interpolation. What runs before 0.2 used.
"""

import functools
import struct
import warnings

import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from .transforms import resized_crop

# (bits of a sample, chroma rows halved, chroma columns halved, grey) of the formats that the exact path reads.
EXACT_FORMATS = {
    "gray": (8, 0, 0, True),
    "gray10le": (10, 0, 0, True),
    **{f"yuv{j}420p": (8, 1, 1, False) for j in ("", "j")},
    **{f"yuv{j}422p": (8, 0, 1, False) for j in ("", "j")},
    **{f"yuv{j}444p": (8, 0, 0, False) for j in ("", "j")},
    "yuv420p10le": (10, 1, 1, False),
    "yuv422p10le": (10, 0, 1, False),
    "yuv444p10le": (10, 0, 0, False),
}

# The weights of red and blue in luma, by FFmpeg's AVColorSpace (Rec. ITU-T H.273, table 4). Where a file names none, as
# swscale has it: Rec. 601.
LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),  # Rec. 709
    2: (0.299, 0.114),  # unspecified
    4: (0.30, 0.11),  # FCC
    5: (0.299, 0.114),  # Rec. 601, 625 lines
    6: (0.299, 0.114),  # Rec. 601, 525 lines
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # Rec. 2020, non-constant luminance
}
FULL_RANGE = 2  # FFmpeg's AVColorRange

# Chroma samples lie between two luma columns in JPEG and MPEG-1, on every second column else, and always between two rows.
CENTRED_CHROMA = frozenset(["mjpeg", "mpeg1video"])

# Converting a 320x180 frame takes 0.03 ms with one converter for the file and one thread, and 0.3 to 5 ms as ``frame.to_ndarray``
# does it, with a new converter and a thread for each core every time. Older PyAV has no choice of threads, and uses one.
_ONE_THREAD = {"threads": 1} if "threads" in (VideoReformatter.reformat.__doc__ or "") else {}


@functools.cache
def video_module():
    """(stmae._video, None), or (None, why there is none): it is built for one version of Python."""
    try:
        from stmae import _video
    except ImportError as error:
        return None, str(error)
    return _video, None


def choose_pixels(name):
    """'exact' or 'swscale'; the latter, with a warning, in the place of an exact path that is not there."""
    if name not in ("exact", "swscale"):
        raise ValueError(f"pixels: expected 'exact' or 'swscale', got {name!r}")
    module, reason = video_module()
    if name == "exact" and module is None:
        warnings.warn(
            f"clips.pixels: swscale in the place of exact, for the module stmae._video cannot be imported ({reason}); "
            "it is built for one version of Python: install stmae from its source",
            stacklevel=2,
        )
        return "swscale"
    return name


class FrameConverter:
    """What turns the frames of one open video into RGB, or into frames of clips.

    exact: take the exact path where the frame's format allows. codec: FFmpeg's name of it.
    """

    def __init__(self, codec, *, exact):
        self._module = video_module()[0] if exact else None
        self._chroma_x = 0.5 if codec in CENTRED_CHROMA else 0.0
        self._reformatter = VideoReformatter()
        self._plans, self._orientations = {}, {}

    def orientation(self, frame):
        """``orientation`` of the first frame with the same rotation. A frame whose side data were read is freed by the garbage
        collector alone, and a clip's worth of them may be hundreds of megabytes."""
        if frame.rotation not in self._orientations:
            self._orientations[frame.rotation] = orientation(frame)
        return self._orientations[frame.rotation]

    def size(self, frame):
        """(height, width) as shown."""
        return (frame.width, frame.height) if self.orientation(frame)[0] else (frame.height, frame.width)

    def rgb(self, frame):
        """uint8 [H, W, 3], turned as the frame's display matrix says; grey, 10-bit and subsampled formats become 8-bit RGB. What
        is that already stays as it is."""
        if isinstance(frame, np.ndarray):
            return frame
        pixels = self._reformatter.reformat(frame, format="rgb24", **_ONE_THREAD).to_ndarray()
        swap, mirror_x, mirror_y = self.orientation(frame)
        if swap:
            pixels = pixels.transpose(1, 0, 2)
        return pixels[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]

    def crop(self, frame, crop, out):
        """Writes the ``crop`` (a Crop) of the frame to ``out``, uint8 [h, w, 3]. False: this format is not one that it reads."""
        swap, mirror_x, mirror_y = self.orientation(frame)
        key = (crop, frame.format.name, frame.height, frame.width, frame.colorspace, frame.color_range, swap, mirror_x, mirror_y)
        if key not in self._plans:
            self._plans[key] = self._plan(frame, crop, swap, mirror_x, mirror_y)
        plan = self._plans[key]
        if plan is None:
            return False
        planes = frame.planes
        strides = [plane.line_size for plane in planes]
        if min(strides) <= 0:  # bottom-up
            return False
        if swap:
            turned = np.empty((out.shape[1], out.shape[0], 3), np.uint8)
            plan(planes, strides, turned)
            out[:] = turned.transpose(1, 0, 2)
        else:
            plan(planes, strides, out)
        return True

    def _plan(self, frame, crop, swap, mirror_x, mirror_y):
        known = EXACT_FORMATS.get(frame.format.name)
        if self._module is None or known is None:
            return None
        depth, half_rows, half_columns, grey = known
        weights = LUMA_WEIGHTS.get(2 if grey else int(frame.colorspace))
        if weights is None:
            return None
        if grey:  # where a file says nothing, as swscale has it: full
            full_range = int(frame.color_range) in (0, FULL_RANGE)
        else:
            full_range = int(frame.color_range) == FULL_RANGE or frame.format.name.startswith("yuvj")
        # The box and the mirroring as stored, from those as shown.
        top, left, h, w = crop.box
        height, width = (frame.width, frame.height) if swap else (frame.height, frame.width)
        top, left = height - top - h if mirror_y else top, width - left - w if mirror_x else left
        box, size, mirror = (top, left, h, w), crop.size, (mirror_y, mirror_x ^ crop.flip)
        if swap:
            box, size, mirror = (left, top, w, h), size[::-1], mirror[::-1]
        return self._module.CropResize(
            size=(frame.height, frame.width),
            box=box,
            out_size=size,
            mirror=mirror,
            chroma_shift=(half_rows, half_columns),
            chroma_place=(0.5, self._chroma_x),
            luma_weights=weights,
            full_range=full_range,
            depth=depth,
            grey=grey,
        )


class ClipWriter:
    """Writes frames as they come to the clips that hold them.

    indices: for each clip the numbers of its frames [T]. crops: called with the first frame's (height, width) as shown, gives a
    Crop for each clip. out: uint8 [clips, T, h, w, 3], or a list of [T, h, w, 3], which ``crops`` may fill. converter: a
    FrameConverter; None: frames come as RGB.
    """

    def __init__(self, indices, crops, out, converter=None):
        self._places = {}  # index -> [(clip, position)]
        for clip, numbers in enumerate(indices):
            for position, index in enumerate(numbers):
                self._places.setdefault(int(index), []).append((clip, position))
        self._make_crops, self._out, self._converter = crops, out, converter
        self.restart()

    def restart(self):
        """All frames come again, from the first."""
        self._crops = self._size = None

    def write(self, index, frame):
        """frame: an av.VideoFrame, or uint8 [H, W, 3] as shown. A stream that changes its frames' size goes on in the first's."""
        pixels = frame if isinstance(frame, np.ndarray) else None
        size = pixels.shape[:2] if pixels is not None else self._converter.size(frame)
        if self._size is None:
            self._size, self._crops = size, self._make_crops(*size)
        for clip, position in self._places[index]:
            out, crop = self._out[clip][position], self._crops[clip]
            if pixels is None and size == self._size and self._converter.crop(frame, crop, out):
                continue
            if pixels is None:
                pixels = self._converter.rgb(frame)
            crop_rgb(match_size(pixels, self._size), crop, out)


def match_size(pixels, size):
    """Some streams change their frame size on the way: nearest rows and columns, to the ``size`` (height, width) of the first."""
    if pixels.shape[:2] == size:
        return pixels
    rows = np.arange(size[0]) * pixels.shape[0] // size[0]
    columns = np.arange(size[1]) * pixels.shape[1] // size[1]
    return pixels[rows][:, columns]


def crop_rgb(pixels, crop, out):
    """As FrameConverter.crop, of pixels uint8 [H, W, 3]."""
    clip = resized_crop(np.ascontiguousarray(pixels)[None], crop.box, crop.size)  # which turned frames are not
    torch.from_numpy(out)[None].copy_(clip.flip(2) if crop.flip else clip)


def orientation(frame):
    """(swap, mirror_x, mirror_y) of a frame's display matrix: exchange rows and columns, then mirror left and right, then top
    and bottom. All false where there is none. A matrix that turns by other than quarter turns gives the nearest of the eight.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    # A stored point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    swap = abs(b) + abs(c) > abs(a) + abs(d)
    return (True, c < 0, b < 0) if swap else (False, a < 0, d < 0)
