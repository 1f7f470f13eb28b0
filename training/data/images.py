"""Images as videos: a photo is a still clip, every frame the same; an animation is a video; a folder of numbered images is a
video taken apart.

All have the interface of ``Video``. Images are read by Pillow and turned as their EXIF says: regular files alone, in the formats
of FORMATS alone, whatever their names say, and within the limits on pixels of ``video``, which are checked before decoding.
"""

import contextlib
import functools
import os
import re

import numpy as np
from PIL import Image, ImageOps

from ..config.wording import counted
from .pixels import ClipWriter, crop_rgb, match_size
from .video import (
    MAX_CLIP_PIXELS,
    VideoError,
    file_size,
    reason_of,
    require_pixels,
    require_time,
    system_errno,
    time_limit,
)

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2")
IMAGE_EXTENSIONS = frozenset((*_JPEG, ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"))

# Of the formats that Pillow reads, those that hold pixels and nothing that is run: no PostScript, which it hands to Ghostscript.
FORMATS = ("JPEG", "JPEG2000", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "AVIF")
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")  # whose further images are later ones, and not other views or pages


def open_image(path):
    """The image as a Still, or as an Animation where it moves. Raises VideoError."""
    with _opened(path) as image:
        if image.format in ANIMATED and getattr(image, "n_frames", 1) > 1:
            return Animation(path, image)
        return Still(path, _rgb(image))


class Still:
    """An image: a video of one frame that a clip of any length can be taken from (``still`` is true).

    pixels: uint8 [H, W, 3]; None: they are read.
    """

    still = True

    def __init__(self, path, pixels=None):
        self.path = os.fspath(path)
        self._pixels = read_image(self.path) if pixels is None else pixels
        self.size = self._pixels.shape[:2]
        self.times, self.rate = np.zeros(1), float("nan")

    def __len__(self):
        return 1

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def frames(self, indices):
        """uint8 [len(indices), H, W, 3], whatever the indices: the image over and over, a view with stride 0."""
        return np.broadcast_to(self._pixels, (len(indices), *self._pixels.shape))

    def clips(self, indices, crops, out):
        """As ``Video.clips``: the image is cropped once for each clip."""
        for clip, crop in zip(out, crops(*self.size)):
            crop_rgb(self._pixels, crop, clip[0])
            clip[1:] = clip[0]


class Animation:
    """An animated PNG, WebP, GIF or AVIF, whose opened image is ``image``: a video of its frames, whatever their durations."""

    still = False

    def __init__(self, path, image):
        self.path = os.fspath(path)
        self._first = int(bool(image.info.get("default_image")))  # a PNG's picture for programs that know no animations
        self._length = image.n_frames - self._first
        self.size = (image.height, image.width)
        self.times, self.rate = np.arange(self._length, dtype=np.float64), float("nan")  # unknown

    def __len__(self):
        return self._length

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def frames(self, indices):
        """uint8 [len(indices), H, W, 3], in one pass over the file."""
        indices = [int(i) for i in indices]
        found = dict(self._each(indices))
        return np.stack([found[index] for index in indices])

    def clips(self, indices, crops, out):
        """As ``Video.clips``."""
        writer = ClipWriter(indices, crops, out)
        for index, pixels in self._each(np.concatenate(indices).tolist()):
            writer.write(index, pixels)

    def _each(self, indices):
        """(index, pixels) in order, each once."""
        require_pixels(self.path, self.size, len(indices))
        wanted, until = set(indices), time_limit()
        with _opened(self.path) as image:
            for index in range(max(indices) + 1):  # each is drawn upon the one before, whether it is wanted or not
                require_time(self.path, until)
                image.seek(self._first + index)
                image.load()
                if index in wanted:
                    yield index, np.array(image.convert("RGB"))


class FrameFolder:
    """The first ``count`` of a folder's numbered images (img_00001.jpg, ...), in the order of their numbers, whatever they
    start at.

    Raises VideoError where there are fewer, or where the folder holds several series of them (but for optical flow, which is
    passed over).
    """

    still = False

    def __init__(self, path, count):
        self.path = os.fspath(path)
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise VideoError(self.path, f"cannot be opened ({error.strerror})", error.errno) from error
        series = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            numbered = re.fullmatch(r"(.*?)(\d+)", stem)
            if numbered and suffix.lower() in IMAGE_EXTENSIONS and not numbered[1].startswith(("flow", ".")):
                series.setdefault(numbered[1] + "*" + suffix, []).append((int(numbered[2]), name))
        if len(series) > 1:
            raise VideoError(self.path, f"several series of frames: {', '.join(sorted(series))}")
        found = sorted(*series.values()) if series else []
        if len(found) < count:
            raise VideoError(
                self.path, f"the list says {counted(count, 'frame')}, and the folder has {counted(len(found), 'numbered image')}"
            )
        self._files = [os.path.join(self.path, name) for _, name in found[:count]]
        self.times, self.rate = np.arange(count, dtype=np.float64), float("nan")  # unknown
        self.size = read_image(self._files[0]).shape[:2]

    def __len__(self):
        return len(self._files)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def frames(self, indices):
        """uint8 [len(indices), H, W, 3]; every image wanted is read once."""
        indices = [int(i) for i in indices]
        found = dict(self._each(indices))
        size = found[min(found)].shape[:2]
        return np.stack([match_size(found[index], size) for index in indices])

    def clips(self, indices, crops, out):
        """As ``Video.clips``."""
        writer = ClipWriter(indices, crops, out)
        for index, pixels in self._each(np.concatenate(indices).tolist()):
            writer.write(index, pixels)

    def _each(self, indices):
        """(index, pixels) in order, each once."""
        require_pixels(self.path, self.size, len(indices))
        left, until = MAX_CLIP_PIXELS, time_limit()
        for index in sorted(set(indices)):
            require_time(self.path, until)
            pixels = read_image(self._files[index], left)
            left -= pixels.shape[0] * pixels.shape[1]
            yield index, pixels


def read_image(path, max_pixels=MAX_CLIP_PIXELS):
    """The image as uint8 [H, W, 3], RGB; grey, palette and 16-bit ones too, transparency left out. Raises VideoError; of more
    than ``max_pixels`` pixels, before it is decoded."""
    with _opened(path) as image:
        if image.width * image.height > max_pixels:
            raise VideoError(path, f"the frames asked for together are over the limit of {MAX_CLIP_PIXELS:,} pixels")
        return _rgb(image)


@contextlib.contextmanager
def _opened(path):
    """Pillow's image; every error that reading it raises becomes a VideoError."""
    try:
        file_size(path)
        with Image.open(path, formats=_formats()) as image:
            require_pixels(path, (image.height, image.width))
            yield image
    except VideoError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over, SyntaxError too
        raise VideoError(path, f"cannot be read as an image ({reason_of(error)})", system_errno(error, path)) from error


@functools.cache
def _formats():
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # older Pillow has no AVIF


def _rgb(image):
    upright = ImageOps.exif_transpose(image)  # as a telephone was held
    if upright.mode == "F" or (upright.mode == "I" and image.format == "TIFF"):
        raise ValueError(f"its pixels are {'floats' if upright.mode == 'F' else '32-bit integers'}, which do not define white")
    if upright.mode.startswith("I"):  # 16 bits, which convert() would clip to 255 instead of scaling
        grey = (np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(upright.convert("RGB"))
