"""What an entry of a data set is opened as: a video, by one of two decoders, a still image, or a folder of frames.

PyAV is the default and reads everything. torchcodec, where it is installed and finds an FFmpeg, gives the same bytes for the
formats in SAME_IN_BOTH; every frame's time stamp is compared with what PyAV's scan of the file says, and PyAV decodes
where they differ or torchcodec gives up. So the decoder is a matter of speed alone.
"""

import contextlib
import functools
import os

import numpy as np

from ..config.sources import suffix_of
from .images import IMAGE_EXTENSIONS, FrameFolder, open_image
from .local_copy import is_elsewhere, local_copy
from .pixels import choose_pixels, orientation
from .video import PROGRESSIVE, Video, VideoError, reason_of

DECODERS = ("pyav", "torchcodec", "auto")

# What both FFmpegs turn into RGB in the same way, compared bit for bit: progressive frames with an even height in these formats.
# Elsewhere (10-bit, NV12, odd heights) their roundings differ by a few levels, and PyAV decodes.
SAME_IN_BOTH = frozenset(["yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gray"])


def open_entry(entry, decoder="pyav", pixels="swscale"):
    """The opened ``entry`` (video_list.Entry): a Video, a Still, an Animation or a FrameFolder, to be used as a context manager.

    decoder: 'pyav', 'torchcodec', or 'auto', torchcodec where it works; of videos alone.
    pixels: 'exact' or 'swscale', of the clips (see ``pixels``); torchcodec, which gives RGB alone, decodes for the latter.

    Raises VideoError where the file cannot be used, ValueError for a decoder that there is not.
    """
    if entry.frames:
        return FrameFolder(entry.path, entry.frames)
    if is_elsewhere(entry):
        return _open_copy(entry, decoder, pixels)
    return _open_file(entry.path, suffix_of(entry.path), decoder, pixels)


def _open_file(path, suffix, decoder, pixels, index_name=None):
    if suffix in IMAGE_EXTENSIONS:
        return open_image(path)
    exact = choose_pixels(pixels) == "exact"
    kind = Video if exact or choose_decoder(decoder) == "pyav" else TorchcodecVideo
    return kind(path, exact=exact, index_name=index_name)


@contextlib.contextmanager
def _open_copy(entry, decoder, pixels):
    """An entry from elsewhere, whose errors bear its own name and not its copy's."""
    with local_copy(entry) as copy:
        try:
            with _open_file(copy.path, suffix_of(entry.path), decoder, pixels, copy.name) as video:
                yield video
        except VideoError as error:
            if error.file != copy.path:
                raise
            raise VideoError(entry.path, error.reason) from error


def choose_decoder(name):
    """'pyav' or 'torchcodec'. Raises ValueError for an unknown one, or where torchcodec is requested and does not work."""
    if name not in DECODERS:
        raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, got {name!r}")
    if name == "pyav":
        return name
    decoder, reason = _torchcodec()
    if name == "torchcodec" and decoder is None:
        raise ValueError(f"decoder: torchcodec was requested and cannot be used: {reason}")
    return "pyav" if decoder is None else "torchcodec"


@functools.cache
def _torchcodec():
    """(its VideoDecoder, None), or (None, why not)."""
    try:
        from torchcodec.decoders import VideoDecoder
    except Exception as error:  # not installed; no FFmpeg that it can load; built for another torch
        return None, reason_of(error)
    return VideoDecoder, None


class TorchcodecVideo(Video):
    """A Video whose frames torchcodec decodes, where it is known to give the same as PyAV."""

    _decoder = _mirrored = None

    def close(self):
        super().close()
        self._decoder = None

    def _by_stamp(self, wanted, restart, take):
        found = self._by_torchcodec(wanted)
        if found is None:
            return super()._by_stamp(wanted, restart, take)
        restart()
        for index in wanted:
            take(index, found[index])

    def _by_torchcodec(self, wanted):
        """{index: frame}, or None: PyAV has to decode."""
        if self._mirrored is None:  # torchcodec turns frames and mirrors none
            self._open()
            first = next(self._decode(), None)
            swap, mirror_x, mirror_y = orientation(first) if first is not None else (False, False, True)
            self._mirrored = swap ^ mirror_x ^ mirror_y
        context = self._stream.codec_context
        if (
            self._mirrored
            or context.pix_fmt not in SAME_IN_BOTH
            or context.height % 2
            or getattr(context, "field_order", 0) not in PROGRESSIVE
        ):
            return None
        try:
            if self._decoder is None:
                path = os.path.abspath(self.path)  # so that a name with a colon is no protocol
                options = {"stream_index": self._stream.index, "num_ffmpeg_threads": 1, "seek_mode": "exact"}
                self._decoder = _torchcodec()[0](path, dimension_order="NHWC", **options)
            batch = self._decoder.get_frames_at(indices=wanted)
        except Exception:  # IndexError, RuntimeError and more: a damaged file, or one whose frames it counts otherwise
            return None
        if not np.allclose(batch.pts_seconds.numpy(), self.times[wanted], rtol=0, atol=0.5 * self._seconds):
            return None  # other frames than those asked for
        return dict(zip(wanted, batch.data.numpy()))
