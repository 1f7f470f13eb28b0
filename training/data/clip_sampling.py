"""Which frames of a video make a clip."""

import numpy as np


def clip_span(frames, stride, spacing="stride"):
    """How many consecutive frames a clip reaches over, and so what a video must hold at least."""
    if spacing == "segments":
        return frames
    return frames * stride if spacing == "linspace" else (frames - 1) * stride + 1


def clip_indices(start, frames, stride, spacing="stride"):
    """Frame numbers [frames] int64 of the clip that begins at ``start``.

    ``stride``: every ``stride``-th frame. ``linspace``: ``frames`` evenly spread over ``frames * stride`` frames and
    rounded down,
    as in the published code of the paper: at 16 frames and stride 4 its frames lie 4.2 apart, not 4.
    """
    if spacing == "linspace":
        return np.linspace(start, start + frames * stride - 1, frames).astype(np.int64)
    if spacing != "stride":
        raise ValueError(f"clip_indices: expected spacing 'stride' or 'linspace', got {spacing!r}")
    return start + stride * np.arange(frames, dtype=np.int64)


def random_clip(rng, length, frames, stride, spacing="stride"):
    """A clip from a uniformly drawn start; None when the video is too short. ``segments``: a random frame of each part."""
    last_start = length - clip_span(frames, stride, spacing)
    if last_start < 0:
        return None
    if spacing == "segments":
        edges = segment_edges(length, frames)
        return rng.integers(edges[:-1], edges[1:])
    return clip_indices(int(rng.integers(0, last_start + 1)), frames, stride, spacing)


def spaced_clips(count, length, frames, stride, spacing="stride", single=0.5):
    """``count`` clips whose starts are spread evenly from the first possible to the last; a single one lies at ``single``
    in [0, 1].

    Deterministic: the temporal views of an evaluation. None when the video is too short.
    """
    last_start = length - clip_span(frames, stride, spacing)
    if last_start < 0:
        return None
    if spacing == "segments":  # the frame at the same place in each of the parts
        edges = segment_edges(length, frames)
        places = [single] if count == 1 else [(i + 0.5) / count for i in range(count)]
        return [
            edges[:-1] + np.minimum((edges[1:] - edges[:-1]) * place, edges[1:] - edges[:-1] - 1).astype(np.int64)
            for place in places
        ]
    starts = [round(last_start * single)] if count == 1 else [last_start * i // (count - 1) for i in range(count)]
    return [clip_indices(start, frames, stride, spacing) for start in starts]


def segment_edges(length, frames):
    """Where the ``frames`` equal parts of a video of ``length`` frames begin, and the end: [frames + 1] int64, strictly growing.

    Segment-based sampling, as is usual on Something-Something v2 (TSN: Wang et al., 2016, arXiv 1608.00859).
    """
    return np.arange(frames + 1, dtype=np.int64) * length // frames
