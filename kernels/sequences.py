"""What the kernels share that work on sequences one after another, and on lists of videos."""

import torch
import triton
import triton.language as tl

from .launching import configs, launch
from .pixels import is_channels_last


@triton.jit
def sequence(cu_ptr, s, rows):
    """Of sequence s in cu_ptr [S + 1] the first row and the length: 0 for s = -1, and within the rows for any offsets."""
    place = tl.maximum(s, 0)
    begin = tl.load(cu_ptr + place).to(tl.int64)
    end = tl.load(cu_ptr + place + 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    end = tl.minimum(tl.maximum(end, begin), rows)
    return begin, tl.where(s >= 0, end - begin, 0).to(tl.int32)


# A list of videos is a table on the device, [S + 1, _COLUMNS] int64, a row for each: its address, the strides of channel, frame,
# row and column, its first token, the grid's h and w, and its first entry in a list of frames. The last row has the number of all
# tokens for a first token. A row is written by a launch, from its arguments: nothing is uploaded, and a CUDA graph keeps it.
_COLUMNS = tl.constexpr(9)


@triton.jit(do_not_specialize=["row", "c", "t", "h", "w", "first", "after", "grid_h", "grid_w", "frame"])
def _video_row(video_ptr, table_ptr, row, c, t, h, w, first, after, grid_h, grid_w, frame):
    table_ptr += row * _COLUMNS
    tl.store(table_ptr, video_ptr.to(tl.int64))
    tl.store(table_ptr + 1, tl.cast(c, tl.int64))
    tl.store(table_ptr + 2, tl.cast(t, tl.int64))
    tl.store(table_ptr + 3, tl.cast(h, tl.int64))
    tl.store(table_ptr + 4, tl.cast(w, tl.int64))
    tl.store(table_ptr + 5, tl.cast(first, tl.int64))
    tl.store(table_ptr + 6, tl.cast(grid_h, tl.int64))
    tl.store(table_ptr + 7, tl.cast(grid_w, tl.int64))
    tl.store(table_ptr + 8, tl.cast(frame, tl.int64))
    tl.store(table_ptr + _COLUMNS + 5, tl.cast(after, tl.int64))


@triton.jit(do_not_specialize=["count", "a", "b", "c", "d", "e", "f", "g", "h"])
def _frame_list(frames_ptr, count, a, b, c, d, e, f, g, h):
    i = tl.arange(0, 8)
    x = tl.where(i < 2, tl.where(i == 0, a, b), tl.where(i == 2, c, d))
    y = tl.where(i < 6, tl.where(i == 4, e, f), tl.where(i == 6, g, h))
    tl.store(frames_ptr + i, tl.where(i < 4, x, y).to(tl.int32), mask=i < count)


@triton.jit
def video_of(table_ptr, id, S, STEPS: tl.constexpr):
    """(the row in the table, the token in its own video, whether it is one) of ids [rows]; of an id that is none, the first's."""
    total = tl.load(table_ptr + S * _COLUMNS + 5)
    valid = (id >= 0) & (id < total)
    id = tl.where(valid, id, 0)
    low = tl.zeros_like(id).to(tl.int32)
    for step in tl.static_range(STEPS):
        middle = low + (1 << (STEPS - 1 - step))
        there = middle < S
        first = tl.load(table_ptr + tl.where(there, middle, 0) * _COLUMNS + 5)
        low = tl.where(there & (first <= id), middle, low)
    row = table_ptr + low * _COLUMNS
    return row, (id - tl.load(row + 5)).to(tl.int32), valid


@triton.jit
def strides_of(row, C: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """The address and the strides of channel, frame, row and column. WIDTH: the columns' where it is the same for all, else 0."""
    address = tl.load(row)
    c = tl.load(row + 1)
    t = tl.load(row + 2)
    h = tl.load(row + 3)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
        t = tl.multiple_of(t, 16)
        h = tl.multiple_of(h, 16)
        if WIDTH != C or C == 1:
            c = tl.multiple_of(c, 16)
    if WIDTH > 0:
        w = tl.zeros_like(h) + WIDTH
    else:
        w = tl.load(row + 4)
    return address, c, t, h, w


def video_table(videos, patch, frames=None):
    """(table, list of frames or None, constants): what describes videos of [C, T, H, W] in patches (u, ph, pw).

    frames: for each video those that its tokens cover; None: all.
    """
    device, S = videos[0].device, len(videos)
    _, ph, pw = patch
    table = torch.empty(S + 1, _COLUMNS.value, dtype=torch.int64, device=device)
    tiles = configs((1, 1, {}))
    first = at = 0
    for row, video in enumerate(videos):
        _, T, H, W = video.shape
        count = T if frames is None else len(frames[row])
        after = first + count // patch[0] * (H // ph) * (W // pw)
        launch(_video_row, (1,), video, table, row, *video.stride(), first, after, H // ph, W // pw, at, configs=tiles)
        first, at = after, at + count
    listed = None
    if frames is not None:
        every = [frame for own in frames for frame in own]
        listed = torch.empty(len(every), dtype=torch.int32, device=device)
        for i in range(0, len(every), 8):
            some = every[i : i + 8]
            launch(_frame_list, (1,), listed[i:], len(some), *some, *(0,) * (8 - len(some)), configs=tiles)
    C, size = videos[0].shape[0], videos[0].element_size()
    channels_last = all(is_channels_last(video[None]) for video in videos)
    widths = {video.stride(3) for video in videos}
    aligned = all(
        x * size % 16 == 0
        for video in videos
        for x in (video.data_ptr() // size, *(video.stride(d) for d in ((1, 2) if channels_last else (0, 1, 2))))
    )
    constants = dict(
        STEPS=S.bit_length(),
        CHANNELS_LAST=channels_last,
        WIDTH=widths.pop() if len(widths) == 1 else 0,
        ALIGNED=aligned and size == 1,
        PIXEL={1: tl.uint8, 2: tl.bfloat16 if videos[0].dtype == torch.bfloat16 else tl.float16, 4: tl.float32}[size],
        C=C,
    )
    return table, listed, constants
