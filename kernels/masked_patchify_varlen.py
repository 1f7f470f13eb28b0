import torch
import triton
import triton.language as tl

from . import launching
from .inverse_ids import inverse_ids
from .launching import columns_tile, configs, dot_precision, launch, one
from .masked_patchify import _constants, _grad_position, _in_order, _load_patches, _out_of_order, _parts
from .pixels import mean_scale
from .sequences import strides_of, video_of, video_table
from .sum_rows import sum_rows

# As masked_patchify, but a row of a tile, a patch, has the strides of its own video: the place of a value is no longer a row's
# part plus a column's, and takes two multiplications more. The order of the inner dimension is the same.


@triton.jit
def _origins(keep_ptr, row, table_ptr, S, STEPS: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
             PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, PIXEL: tl.constexpr):  # fmt: skip
    """Of the patches keep[row]: pointers to their first values, their videos' strides, ids and whether valid."""
    id = tl.load(keep_ptr + row)
    entry, token, valid = video_of(table_ptr, id, S, STEPS)
    address, c, t, h, w = strides_of(entry, C, WIDTH, ALIGNED)
    grid_h = tl.load(entry + 6).to(tl.int32)
    grid_w = tl.load(entry + 7).to(tl.int32)
    it = (token // (grid_h * grid_w) * PT).to(tl.int64)
    ih = (token // grid_w % grid_h * PH).to(tl.int64)
    iw = (token % grid_w * PW).to(tl.int64)
    pixels = address.to(tl.pointer_type(PIXEL)) + (it * t + ih * h + iw * w)
    if ALIGNED and PW * WIDTH % 16 == 0:
        pixels = tl.multiple_of(pixels, 16)
    return pixels, c, t, h, w, tl.where(valid, id, 0), valid


@triton.jit
def _places(pixels, c, t, h, w, k, PT: tl.constexpr, PH: tl.constexpr, E: tl.constexpr, PIECES: tl.constexpr,
            CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Pointers [rows, values] to values k of the patches, and the pieces that these belong to."""
    line = k // E
    piece = line // (PT * PH)
    where = (
        pixels[:, None] + (line // PH % PT).to(tl.int64)[None, :] * t[:, None] + (line % PH).to(tl.int64)[None, :] * h[:, None]
    )
    if CHANNELS_LAST:
        where += (piece * E + k % E)[None, :]
    else:
        where += (piece // PIECES).to(tl.int64)[None, :] * c[:, None]
        where += (piece % PIECES * E + k % E).to(tl.int64)[None, :] * w[:, None]
    return where, piece


@triton.jit
def _masked_patchify_varlen(
    table_ptr, keep_ptr, weight_ptr, bias_ptr, position_ptr, out_ptr, rows, S, D, mean_scale,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, E: tl.constexpr, PIECES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, PIXEL: tl.constexpr, STEPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[row, d] = sum_k x[patch(keep[row]), k] weight[d, k] + bias[d] + position[keep[row], d].

    Args:
        table_ptr: see sequences.py. keep_ptr: [rows] int64. weight_ptr: [D, Q], dense. bias_ptr: [D] or None.
        position_ptr: [tokens of all videos, D], dense, or None. out_ptr: [rows, D], dense.
    """
    Q: tl.constexpr = C * PT * PH * PW
    EVEN: tl.constexpr = Q % BLOCK_K == 0
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    column_tiles = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    row = (program // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = (program % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    pixels, c, t, h, w, token, valid = _origins(
        keep_ptr, tl.minimum(row, rows - 1), table_ptr, S, STEPS, C, WIDTH, ALIGNED, PT, PH, PW, PIXEL
    )
    offset = tl.arange(0, BLOCK_K)
    weight_tile = weight_ptr + d[None, :].to(tl.int64) * Q + offset[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, Q, BLOCK_K):
        inside = start + offset < Q
        k = start + offset if EVEN else tl.where(inside, start + offset, 0)
        where, piece = _places(pixels, c, t, h, w, k, PT, PH, E, PIECES, CHANNELS_LAST)
        scale, shift = _constants(offset % E, piece, mean_scale, C, E, PIECES, CHANNELS_LAST)
        x = _load_patches(where, valid, inside, scale[None, :], shift[None, :], dtype, EVEN)
        mask = (d < D)[None, :] if EVEN else (d < D)[None, :] & inside[:, None]
        weight = tl.load(weight_tile + start, mask=mask, other=0.0)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
    total = tl.where(valid[:, None], total, 0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    written = (row < rows)[:, None] & (d < D)[None, :]
    if position_ptr is not None:
        where = position_ptr + token[:, None] * D + d[None, :]
        total += tl.load(where, mask=written & valid[:, None], other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None].to(tl.int64) * D + d[None, :], total.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit
def _grad_weight_varlen(
    grad_ptr, table_ptr, keep_ptr, out_ptr, rows, rows_per_part, S, D, mean_scale,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, E: tl.constexpr, PIECES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, PIXEL: tl.constexpr, STEPS: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[part, d, k] = sum over the part's rows of grad[row, d] x[row, k]; parts are summed in a second kernel, in order.

    Args:
        grad_ptr: [rows, D], dense. keep_ptr: [rows] int64. out_ptr: [parts, D, Q], dense.
    """
    Q: tl.constexpr = C * PT * PH * PW
    EVEN: tl.constexpr = Q % BLOCK_Q == 0
    column_tiles = tl.cdiv(Q, BLOCK_Q)
    program = tl.program_id(0)
    part = tl.program_id(1)
    d = (program // column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = (program % column_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    taken = k if EVEN else tl.where(k < Q, k, 0)
    total = tl.zeros([BLOCK_D, BLOCK_Q], tl.float32)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, rows)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        there = row < last
        pixels, c, t, h, w, token, valid = _origins(
            keep_ptr, tl.where(there, row, 0), table_ptr, S, STEPS, C, WIDTH, ALIGNED, PT, PH, PW, PIXEL
        )
        where, piece = _places(pixels, c, t, h, w, taken, PT, PH, E, PIECES, CHANNELS_LAST)
        scale, shift = _constants(k % E, piece, mean_scale, C, E, PIECES, CHANNELS_LAST)
        x = _load_patches(where, valid, k < Q, scale[None, :], shift[None, :], DTYPE, EVEN)
        mask = (there & valid)[:, None] & (d < D)[None, :]
        grad = tl.load(grad_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
        total = tl.dot(tl.trans(grad.to(DTYPE)), x, total, input_precision=PRECISION)
    where = out_ptr + (part.to(tl.int64) * D + d[:, None]) * Q + k[None, :]
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=(d < D)[:, None] & (k < Q)[None, :])


def _layout(videos, weight):
    """The table of the videos and the constants that both directions need."""
    C, pt, ph, pw = weight.shape[1:]
    table, _, constants = video_table(videos, (pt, ph, pw))
    run = pw * C if constants["CHANNELS_LAST"] else pw
    E = min(16, run & -run)  # the largest power of two in it
    return table, constants | dict(PT=pt, PH=ph, PW=pw, E=E, PIECES=run // E, PRECISION=dot_precision(weight.dtype))


def masked_patchify_varlen(videos, keep, cu_seqlens, weight, bias, position, mean, std):
    # videos S of [C, T, H, W], keep [sum K], weight [D, C, pt, ph, pw], bias [D], position [sum N, D] -> [sum K, D]
    rows, D = keep.shape[0], weight.shape[0]
    out = (weight if position is None else position).new_empty(rows, D)
    if not out.numel():
        return out
    table, constants = _layout(videos, weight)
    launch(
        _masked_patchify_varlen,
        lambda tiles: (triton.cdiv(rows, tiles["BLOCK_M"]) * triton.cdiv(D, tiles["BLOCK_D"]),),
        table,
        keep,
        _in_order(weight, constants).contiguous(),
        bias,
        position,
        out,
        rows,
        len(videos),
        D,
        mean_scale(mean, std),
        configs=_tiles(weight.dtype == torch.float32, launching.target(keep.device)),
        **constants,
    )
    return out


def _tiles(float32, target):
    """One configuration: each batch has other rows, and would be timed anew."""
    if float32:
        return configs((4, 2, dict(BLOCK_M=64, BLOCK_D=64, BLOCK_K=16)))
    return configs((8, 2, dict(BLOCK_M=64, BLOCK_D=128, BLOCK_K=32 if target == "gfx942" else 64)))


def masked_patchify_varlen_backward(grad_out, videos, keep, cu_seqlens, weight, bias, position, mean, std):
    # grad_out [sum K, D] -> weight's [D, C, pt, ph, pw], bias' [D], position's [sum N, D]
    rows, D = grad_out.shape
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    grad_position = weight.new_empty(0) if position is None else torch.empty_like(position)
    if not grad_out.numel():
        return grad_weight.zero_(), grad_bias.zero_(), grad_position.zero_()
    table, constants = _layout(videos, weight)
    Q = weight[0].numel()
    float32 = weight.dtype == torch.float32
    tiles = dict(BLOCK_D=64, BLOCK_Q=64, BLOCK_K=32) if float32 else dict(BLOCK_D=128, BLOCK_Q=64, BLOCK_K=32)
    programs = triton.cdiv(D, tiles["BLOCK_D"]) * triton.cdiv(Q, tiles["BLOCK_Q"])
    parts, rows_per_part = _parts(rows, programs, tiles["BLOCK_K"])
    partial = weight.new_empty(parts, D * Q, dtype=torch.float32 if parts > 1 else weight.dtype)
    launch(
        _grad_weight_varlen,
        (programs, parts),
        grad_out.to(weight.dtype),
        table,
        keep,
        partial,
        rows,
        rows_per_part,
        len(videos),
        D,
        mean_scale(mean, std),
        DTYPE=tl.float32 if float32 else tl.bfloat16 if weight.dtype == torch.bfloat16 else tl.float16,
        configs=configs((4 if float32 else 8, 2, tiles)),
        **constants,
    )
    total = sum_rows(partial, weight.dtype) if parts > 1 else partial
    grad_weight.copy_(_out_of_order(total, weight.shape, constants))
    if bias is not None:
        grad_bias = sum_rows(grad_out, bias.dtype)
    if position is not None:
        N = position.shape[0]
        tile = columns_tile(D, largest=256)
        block = max(1, 2048 // tile)
        grid = (triton.cdiv(D, tile), triton.cdiv(N, block))
        inverse, grad = inverse_ids(keep[None], N), grad_out[None]
        launch(
            _grad_position,
            grid,
            grad,
            inverse,
            grad_position,
            1,
            N,
            D,
            *grad.stride(),
            configs=one(4, BLOCK_N=block, BLOCK_D=tile),
        )
    return grad_weight, grad_bias, grad_position
