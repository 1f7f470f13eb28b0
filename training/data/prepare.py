"""A video encoded once more, so that clips of it cost little to decode: small, a key frame every few frames, no sound, upright.

What comes out has the same frames at the same times. Every result is read again and compared with its source before it takes its
name, so that a file in place is complete, and right.
"""

import fractions
import os
import re
import tempfile
from typing import NamedTuple

import av
import av.error
import numpy as np

from ..config.sources import is_url
from ..config.wording import counted
from .images import IMAGE_EXTENSIONS
from .shards import split_member
from .video import Video, VideoError, reason_of


class Preparation(NamedTuple):
    """How videos are encoded: the short side at most, frames from a key frame to the next, x264's quality."""

    short_side: int = 256
    gop: int = 12
    crf: float = 20.0


PREPARED = Preparation()
TIME_BASE = fractions.Fraction(1, 90_000)
COMPARED = 3  # frames of a result
MIN_PSNR = 25.0  # dB, of luma; what the encoder loses at its usual settings leaves 35 and more


def prepare_video(source, target, *, short_side, gop, crf):
    """Writes ``source`` to ``target``, an mp4 of H.264, its short side at most ``short_side``; returns the number of its frames.
    Raises VideoError where the source cannot be read whole, or the result is not as it should be."""
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    os.close(descriptor)
    try:
        with Video(source) as video:
            encoder = _Encoder(video, temporary, short_side, gop, crf)
            try:
                video.each_frame(encoder.restart, encoder.write)
                encoder.finish()
            finally:
                encoder.close()
            _compare(source, video.times, encoder, temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
            return len(video)
    except av.error.FFmpegError as error:
        raise VideoError(source, f"cannot be encoded ({reason_of(error)})") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def prepared_size(height, width, short_side):
    """(height, width), both even, in the same proportion: no side is made longer but by a last odd pixel."""
    scale = min(1.0, short_side / min(height, width))
    return tuple(max(2, 2 * round(side * scale / 2)) for side in (height, width))


class _Encoder:
    """Writes a video's frames as they come, and keeps the luma of a few to compare."""

    def __init__(self, video, path, short_side, gop, crf):
        self.video, self.path, self.short_side, self.gop, self.crf = video, path, short_side, gop, crf
        count = len(video)
        self.kept = dict.fromkeys(sorted({i * (count - 1) // max(COMPARED - 1, 1) for i in range(COMPARED)}))
        self.first = float(video.times[0])
        self.file = self.size = None

    def restart(self):
        self.close()
        self.size, self.last = None, -1

    def write(self, index, frame):
        converter = self.video.converter
        if converter.orientation(frame) != (False, False, False):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(converter.rgb(frame)), format="rgb24")
        if self.size is None:
            self._open(frame)
        height, width = self.size
        small = frame.reformat(width, height, "yuv420p", interpolation="BICUBIC")
        self.last = max(round((float(self.video.times[index]) - self.first) / TIME_BASE), self.last + 1)
        before = small.pts, small.time_base, small.pict_type  # where nothing is to convert, it is the decoder's own frame
        small.pts, small.time_base, small.pict_type = self.last, TIME_BASE, 0  # 0: the encoder's choice
        if index in self.kept:
            self.kept[index] = _luma(small)
        self.file.mux(self.stream.encode(small))
        if small is frame:
            small.pts, small.time_base, small.pict_type = before

    def _open(self, frame):
        self.size = prepared_size(frame.height, frame.width, self.short_side)
        self.file = av.open(self.path, "w", format="mp4")
        options = {"preset": "medium", "tune": "fastdecode", "crf": str(self.crf), "keyint_min": str(self.gop)}
        rate = fractions.Fraction(self.video.rate).limit_denominator(1001) if self.video.rate > 0 else 25
        self.stream = self.file.add_stream("libx264", rate=rate, options=options)
        self.stream.height, self.stream.width, self.stream.pix_fmt = *self.size, "yuv420p"
        context = self.stream.codec_context
        context.gop_size, context.thread_count, context.time_base = self.gop, 1, TIME_BASE
        context.color_range, context.colorspace = frame.color_range, frame.colorspace

    def finish(self):
        self.file.mux(self.stream.encode(None))

    def close(self):
        file, self.file = self.file, None
        if file is not None:
            file.close()


def _compare(source, times, encoder, path):
    """Raises VideoError where the result lacks a frame, shows one at another time, or looks otherwise."""
    with Video(path) as result:
        if len(result) != len(times) or result.size != encoder.size:
            raise VideoError(source, f"encoded anew it has {counted(len(result), 'frame')}, not {len(times)}")
        shift = np.abs((result.times - result.times[0]) - (times - times[0])).max()
        if shift > 1e-3:
            raise VideoError(source, f"encoded anew its frames lie {shift:.3f} s from where they were")

        def look(index, frame):
            if encoder.kept.get(index) is not None:
                error = np.mean((_luma(frame).astype(np.float64) - encoder.kept[index]) ** 2)
                psnr = 10 * np.log10(255**2 / max(error, 1e-9))
                if psnr < MIN_PSNR:
                    raise VideoError(source, f"encoded anew frame {index} differs: {psnr:.0f} dB")

        result.each_frame(lambda: None, look)


def _luma(frame):
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width].copy()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def tree_path(path):
    """A path from the root on for an absolute path or a URL: ``/HOST/...`` for the latter, and for videos in a shard a folder of
    its name."""
    member = split_member(path)
    if member is not None:
        path = f"{os.path.splitext(member[0])[0]}/{member[1]}"
    return "/" + re.sub(r"^[^/]+://", "", path) if is_url(path) else path


def target_names(entries, root):
    """For each entry its file below the output folder: the path below ``root`` with the suffix .mp4; where two would have the
    same one, with their own suffix before it. An image keeps its name."""
    names = [os.path.relpath(tree_path(entry.path), root) for entry in entries]
    stems = [os.path.splitext(name)[0] for name in names]
    taken = {}
    for stem in stems:
        taken[stem] = taken.get(stem, 0) + 1
    return [
        name if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS else (stem if taken[stem] == 1 else name) + ".mp4"
        for name, stem in zip(names, stems)
    ]
