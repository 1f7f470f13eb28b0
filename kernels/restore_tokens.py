import torch
import triton
import triton.language as tl

from .inverse_ids import inverse_ids
from .launching import columns_tile, launch, one
from .sum_rows import sum_rows


@triton.jit
def _restore_tokens(
    tokens_ptr,
    inverse_ptr,
    mask_token_ptr,
    position_ptr,
    out_ptr,
    B,
    N,
    D,
    tokens_b,
    tokens_k,
    tokens_d,
    mask_token_d,
    position_n,
    position_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b, n] = (tokens[b, inverse[b, n]] if inverse[b, n] >= 0 else mask_token) + position[n]. One program a tile of rows.

    Programs that differ in b only are neighbours: they share their tile of position in the L2 cache.
    """
    program = tl.program_id(0)
    column_tiles = tl.cdiv(D, BLOCK_D)
    b = (program % B).to(tl.int64)
    column = (program // B % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (program // B // column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < N)[:, None] & (column < D)[None, :]
    j = tl.load(inverse_ptr + b * N + row, mask=row < N, other=-1)
    visible = (j >= 0)[:, None]
    token = tl.load(
        tokens_ptr + b * tokens_b + j[:, None].to(tl.int64) * tokens_k + column[None, :].to(tl.int64) * tokens_d,
        mask=visible & inside,
        other=0.0,
    ).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + column.to(tl.int64) * mask_token_d, mask=column < D, other=0.0).to(tl.float32)
    position = tl.load(
        position_ptr + row[:, None].to(tl.int64) * position_n + column[None, :].to(tl.int64) * position_d, mask=inside, other=0.0
    ).to(tl.float32)
    x = tl.where(visible, token, mask_token[None, :]) + position
    where = out_ptr + (b * N + row[:, None]) * D + column[None, :]
    tl.store(where, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _restore_tokens_backward(
    grad_out_ptr,
    inverse_ptr,
    grad_tokens_ptr,
    partial_ptr,
    grad_position_ptr,
    B,
    N,
    K,
    D,
    grad_b,
    grad_n,
    grad_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All three gradients in one pass over grad_out. One program for a tile of tokens and columns, over the batch.

    partial[tile] is the sum of the tile's masked rows: summed over tiles, the gradient of the mask token.
    """
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = tl.program_id(1)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < N)[:, None] & (column < D)[None, :]
    grad_out_ptr += row[:, None].to(tl.int64) * grad_n + column[None, :].to(tl.int64) * grad_d
    position = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    masked = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b = tl.full([], 0, tl.int64)
    for _ in range(B):
        j = tl.load(inverse_ptr + b * N + row, mask=row < N, other=-1)
        grad = tl.load(grad_out_ptr + b * grad_b, mask=inside, other=0.0)
        visible = (j >= 0)[:, None]
        where = grad_tokens_ptr + (b * K + j[:, None]) * D + column[None, :]
        tl.store(where, grad.to(grad_tokens_ptr.dtype.element_ty), mask=visible & inside)
        position += grad.to(tl.float32)
        masked += tl.where(visible, 0.0, grad.to(tl.float32))
        b += 1
    where = grad_position_ptr + row[:, None].to(tl.int64) * D + column[None, :]
    tl.store(where, position.to(grad_position_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tile.to(tl.int64) * D + column, tl.sum(masked, axis=0), mask=column < D)


def restore_tokens(tokens, keep, mask_token, position):  # [B, K, D], [B, K], [D], [N, D] -> [B, N, D]
    B, _, D = tokens.shape
    N = position.shape[0]
    out = position.new_empty(B, N, D)
    if out.numel():
        tile = columns_tile(D)
        rows = max(1, 4096 // tile)
        grid = (B * triton.cdiv(D, tile) * triton.cdiv(N, rows),)
        strides = (*tokens.stride(), *mask_token.stride(), *position.stride())
        inverse = inverse_ids(keep, N)
        launch(
            _restore_tokens,
            grid,
            tokens,
            inverse,
            mask_token,
            position,
            out,
            B,
            N,
            D,
            *strides,
            configs=one(4, BLOCK_N=rows, BLOCK_D=tile),
        )
    return out


def restore_tokens_backward(grad_out, keep, tokens_dtype):  # [B, N, D], [B, K] -> [B, K, D], [D], [N, D]
    B, N, D = grad_out.shape
    K = keep.shape[1]
    grad_tokens = grad_out.new_empty(B, K, D, dtype=tokens_dtype)
    grad_position = grad_out.new_empty(N, D)
    if not grad_out.numel():
        return grad_tokens.zero_(), grad_out.new_zeros(D), grad_position.zero_()
    # Small tiles, as N / rows programs have to fill the device; but not so small that the partial sums weigh.
    tile = columns_tile(D, largest=256)
    rows = max(1, 4096 // tile)
    tiles = triton.cdiv(N, rows)
    partial = grad_out.new_empty(tiles, D, dtype=torch.float32)
    inverse = inverse_ids(keep, N, clear=grad_tokens)
    launch(
        _restore_tokens_backward,
        (triton.cdiv(D, tile), tiles),
        grad_out,
        inverse,
        grad_tokens,
        partial,
        grad_position,
        B,
        N,
        K,
        D,
        *grad_out.stride(),
        configs=one(8, BLOCK_N=rows, BLOCK_D=tile),
    )
    return grad_tokens, sum_rows(partial, grad_out.dtype), grad_position
