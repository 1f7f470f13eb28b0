"""What a clip of a file costs to decode: a rule by what the file is, and a measurement.

To show frame i a decoder begins at the key frame before it, or, in a file whose time stamps cannot be trusted, at the very start.
So a clip at a random place costs the frames from there on, times their pixels: that counts what is decoded, whichever the codec,
and depends on the file alone. What ``stmae data prepare`` would make of the file has small frames and a key frame every few.
"""

import time
from typing import NamedTuple

import numpy as np

from .clip_sampling import clip_span
from .prepare import PREPARED, prepared_size
from .transforms import Crop, view_box

SLOW = 3.0  # times the decoding of the prepared file; what is left below gains less than encoding is worth
SIZE = (224, 224)  # of the clips that are measured


class DecodeCost(NamedTuple):
    """Of one video: its ``codec``; ``gop``, frames from a key frame to the next, on average (None: decoded from the start, as
    frames are counted); ``pixels`` decoded for a clip at a random place; ``prepared``, the same after preparing;
    ``milliseconds`` of a processor that opening it and one clip took, measured."""

    codec: str
    gop: float | None
    pixels: float
    prepared: float
    milliseconds: float

    @property
    def ratio(self):
        return self.pixels / self.prepared

    @property
    def slow(self):
        """By the rule, not by the measurement: the same on every machine."""
        return self.ratio >= SLOW


def decoded_pixels(length, size, gop, span):
    """Expected for a clip over ``span`` frames at a random place of a video of ``length`` frames of ``size`` (height, width)."""
    span = min(span, length)
    before = (length - span) / 2 if gop is None else (min(gop, length) - 1) / 2
    return min(before + span, length) * size[0] * size[1]


def measured_cost(video, clips, frames, stride, opening):
    """The DecodeCost of an open Video, whose ``clips`` (frame numbers [T] each) are decoded to measure it. opening: seconds of
    this thread's processor time that opening it took."""
    out = np.empty((1, len(clips[0]), *SIZE, 3), np.uint8)

    def crops(height, width):
        return [Crop(view_box(height, width, SIZE, 0.5, 1.0), SIZE)]

    started = time.thread_time()
    for clip in clips:
        video.clips([clip], crops, out)
    seconds = opening + (time.thread_time() - started) / len(clips)
    span = clip_span(frames, stride)
    small = prepared_size(*video.size, PREPARED.short_side)
    return DecodeCost(
        video.codec,
        video.gop,
        decoded_pixels(len(video), video.size, video.gop, span),
        decoded_pixels(len(video), small, PREPARED.gop, span),
        1e3 * seconds,
    )
