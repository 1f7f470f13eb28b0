import triton
import triton.language as tl

from .inverse_ids import inverse_ids
from .launching import columns_tile, launch, one


@triton.jit
def _gather_rows(x_ptr, ids_ptr, out_ptr, N, M, D, x_b, x_n, x_d, ids_b, ids_m, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[b, m] = x[b, ids[b, m]], zero where the id is outside [0, N). One program for a tile of rows and columns."""
    column_tiles = tl.cdiv(D, BLOCK_D)
    row_tiles = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    column = (program % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (program // column_tiles % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (program // (column_tiles * row_tiles)).to(tl.int64)
    token = tl.load(ids_ptr + b * ids_b + row.to(tl.int64) * ids_m, mask=row < M, other=-1)
    taken = (token >= 0) & (token < N)
    inside = column < D
    x = tl.load(
        x_ptr + b * x_b + token[:, None].to(tl.int64) * x_n + column[None, :].to(tl.int64) * x_d,
        mask=taken[:, None] & inside[None, :],
        other=0.0,
    )
    where = out_ptr + (b * M + row[:, None]) * D + column[None, :]
    tl.store(where, x, mask=(row < M)[:, None] & inside[None, :])


def gather_tokens(x, ids):  # x [B, N, D], ids [B, M] -> [B, M, D]
    B, N, D = x.shape
    M = ids.shape[1]
    out = x.new_empty(B, M, D)
    if out.numel():
        tile = columns_tile(D)
        rows = max(1, 4096 // tile)
        grid = (triton.cdiv(D, tile) * triton.cdiv(M, rows) * B,)
        launch(_gather_rows, grid, x, ids, out, N, M, D, *x.stride(), *ids.stride(), configs=one(4, BLOCK_M=rows, BLOCK_D=tile))
    return out


def gather_tokens_backward(grad_out, ids, num_tokens):  # grad_out [B, M, D] -> [B, N, D]
    # The gradient is gathered, too, through the inverse of ids: -1, a token that was not taken, gives a row of zeros.
    return gather_tokens(grad_out, inverse_ids(ids, num_tokens))
