import torch
import triton
import triton.language as tl

from .launching import launch, one

_ROWS_IN_ONE_PASS = 256


@triton.jit
def _sum_rows(
    x_ptr,
    out_ptr,
    rows,
    columns,
    rows_per_program,
    stride_row,
    stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[s, c] = sum of x[r, c] over the rows r of part s, in float32; part s has `rows_per_program` rows."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.program_id(1)
    inside = column < columns
    first = part * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    x_ptr += column[None, :].to(tl.int64) * stride_column
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        total += tl.load(
            x_ptr + row[:, None].to(tl.int64) * stride_row, mask=(row < last)[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
    total = tl.sum(total, axis=0)
    tl.store(out_ptr + part.to(tl.int64) * columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_rows(x, dtype):
    """x [R, C] -> [C] in `dtype`, summed in float32 and always in the same order: the second stage of every reduction here."""
    rows, columns = x.shape
    parts = triton.cdiv(rows, _ROWS_IN_ONE_PASS)
    if parts > 1:
        partial = x.new_empty(parts, columns, dtype=torch.float32)
        _launch(x, partial, _ROWS_IN_ONE_PASS, parts)
        return sum_rows(partial, dtype)
    out = x.new_empty(columns, dtype=dtype)
    _launch(x, out, rows, 1)
    return out


def _launch(x, out, rows_per_program, parts):
    rows, columns = x.shape
    narrow = columns <= 4096  # few columns: short tiles of columns and long ones of rows, so that there are programs enough
    tiles = dict(BLOCK_ROWS=32, BLOCK_COLUMNS=64) if narrow else dict(BLOCK_ROWS=4, BLOCK_COLUMNS=1024)
    grid = (triton.cdiv(columns, tiles["BLOCK_COLUMNS"]), parts)
    launch(_sum_rows, grid, x, out, rows, columns, rows_per_program, *x.stride(), configs=one(4, **tiles))
