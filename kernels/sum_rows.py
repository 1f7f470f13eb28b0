import torch
import triton
import triton.language as tl

from .launching import launch, one

_ROWS_IN_ONE_PASS = 256


@triton.jit
def _sum_rows(
    x_ptr,  # [rows, columns]
    out_ptr,  # [parts, columns], or [split]
    rest_ptr,  # [columns - split], or None
    rows,
    columns,
    rows_in_part,
    split,
    stride_row,
    stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[s, c] = sum of x[r, c] over the rows r of part s, in float32; part s has `rows_in_part` rows."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.program_id(1)
    inside = column < columns
    first = part * rows_in_part
    last = tl.minimum(first + rows_in_part, rows)
    x_ptr += column[None, :].to(tl.int64) * stride_column
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        total += tl.load(
            x_ptr + row[:, None].to(tl.int64) * stride_row, mask=(row < last)[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
    total = tl.sum(total, axis=0)
    if rest_ptr is None:
        tl.store(out_ptr + part.to(tl.int64) * columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=column < split)
        tl.store(rest_ptr + column - split, total.to(rest_ptr.dtype.element_ty), mask=inside & (column >= split))


def parts_of(rows, fewest):
    """(parts, rows in each) for partial sums over ``rows``: parts of at least ``fewest`` rows, and no more than one launch of
    `sum_rows` adds up. By the rows alone, so that the order of a sum is the same on every GPU."""
    rows_in_part = max(fewest, triton.cdiv(rows, _ROWS_IN_ONE_PASS))
    return triton.cdiv(rows, rows_in_part), rows_in_part


def sum_rows(x, dtype, *, split=None):
    """x [R, C] -> [C] in `dtype`, summed in float32 and always in the same order: the second stage of every reduction here.

    split: the sums of the first `split` columns and those of the rest are two tensors, written by the same launch.
    """
    rows, columns = x.shape
    parts = triton.cdiv(rows, _ROWS_IN_ONE_PASS)
    if parts > 1:
        partial = x.new_empty(parts, columns, dtype=torch.float32)
        _launch(x, partial, None, _ROWS_IN_ONE_PASS, parts)
        return sum_rows(partial, dtype, split=split)
    out = x.new_empty(columns if split is None else split, dtype=dtype)
    rest = None if split is None else x.new_empty(columns - split, dtype=dtype)
    _launch(x, out, rest, rows, 1)
    return out if split is None else (out, rest)


def _launch(x, out, rest, rows_in_part, parts):
    rows, columns = x.shape
    if parts == 1 and columns <= 16384:  # a program for 16 columns, all rows at once: programs enough, and one wait for memory
        tiles = dict(BLOCK_ROWS=min(_ROWS_IN_ONE_PASS, max(8, triton.next_power_of_2(rows))), BLOCK_COLUMNS=16)
    elif columns <= 4096:  # few columns: short tiles of columns and long ones of rows, so that there are programs enough
        tiles = dict(BLOCK_ROWS=32, BLOCK_COLUMNS=64)
    else:
        tiles = dict(BLOCK_ROWS=4, BLOCK_COLUMNS=1024)
    grid = (triton.cdiv(columns, tiles["BLOCK_COLUMNS"]), parts)
    split = out.numel() if rest is not None else 0
    launch(_sum_rows, grid, x, out, rest, rows, columns, rows_in_part, split, *x.stride(), configs=one(4, **tiles))
