import functools

import torch
import triton
import triton.language as tl

from . import launching
from .inverse_ids import inverse_ids
from .launching import columns_tile, configs, dot_precision, launch, one
from .pixels import channel_constants, is_channels_last, mean_scale
from .sum_rows import sum_rows

# The product's inner dimension, the values of one patch, is walked in an order that keeps the work of addressing and normalising
# off the single value. A run is what lies densely in a row of pixels: pw * C bytes of a decoder's [T, H, W, C] frames, pw of
# anything else. It is cut into pieces of E values, E a power of two, 16 for a ViT's patch and one 128-bit load of bytes. The
# order is (piece, u, p, e): piece of the run (with the channel before it, where that is not in the run), frame, row, value of
# the piece. Then a tile of the inner dimension
#   has a place that is one number, and within it offsets that are the same for every tile (ALIGNED: it holds rows of one piece);
#   has its channels by e and one number, too.
# The weight is given in the same order.


@triton.jit
def _constants(e, piece, mean_scale, C: tl.constexpr, E: tl.constexpr, PIECES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Scale and shift of values e of a piece; where channels are not interleaved, a piece has one channel."""
    if CHANNELS_LAST:
        return channel_constants(e, piece * E % C, mean_scale, C)
    else:
        return channel_constants(tl.zeros_like(piece), piece // PIECES, mean_scale, C)


@triton.jit
def _place(
    line,
    video_c,
    video_t,
    video_h,
    video_w,
    PT: tl.constexpr,
    PH: tl.constexpr,
    E: tl.constexpr,
    PIECES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Where a line, E values of the order above, lies relative to the patch's first value, and its piece."""
    piece = line // (PT * PH)
    offset = (line // PH % PT).to(tl.int64) * video_t + (line % PH).to(tl.int64) * video_h
    if CHANNELS_LAST:
        offset += piece * E
    else:
        offset += (piece // PIECES).to(tl.int64) * video_c + (piece % PIECES * E).to(tl.int64) * video_w
    return offset, piece


@triton.jit
def _patch_origins(
    b,
    j,
    keep_ptr,
    N,
    keep_b,
    keep_k,
    video_b,
    video_t,
    video_h,
    video_w,
    TH: tl.constexpr,
    TW: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """Where the patch keep[b, j] begins in the video, its token, and whether it is one of the video's (else: the first is)."""
    b = b.to(tl.int64)
    token = tl.load(keep_ptr + b * keep_b + j.to(tl.int64) * keep_k)
    valid = (token >= 0) & (token < N)
    token = tl.where(valid, token, 0).to(tl.int32)
    it = (token // (TH * TW) * PT).to(tl.int64)
    ih = (token // TW % TH * PH).to(tl.int64)
    iw = (token % TW * PW).to(tl.int64)
    return b * video_b + it * video_t + ih * video_h + iw * video_w, token, valid


@triton.jit
def _load_patches(where, valid, inside, scale, shift, dtype: tl.constexpr, EVEN: tl.constexpr):
    """A tile of normalised patch values [rows, values]; bytes become the operand of the product without leaving registers.

    A row that is not valid is 0, or (bytes) anything: what becomes of it is for the caller to leave out.
    """
    if where.dtype.element_ty == tl.uint8:
        x = tl.load(where) if EVEN else tl.load(where, mask=inside[None, :], other=0)
        x = x.to(tl.float32) * scale + shift
        return x.to(dtype) if EVEN else tl.where(inside[None, :], x, 0.0).to(dtype)
    else:
        mask = valid[:, None] if EVEN else valid[:, None] & inside[None, :]
        return tl.load(where, mask=mask, other=0).to(dtype)


@triton.jit
def _masked_patchify(
    video_ptr,
    keep_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    out_ptr,
    rows,
    K,
    N,
    D,
    video_b,
    video_c,
    video_t,
    video_h,
    video_w,
    keep_b,
    keep_k,
    position_n,
    position_d,
    mean_scale,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    E: tl.constexpr,
    PIECES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b * K + j, d] = sum_k x[patch(keep[b, j]), k] weight[d, k] + bias[d] + position[keep[b, j], d].

    Rows run over the batch, so that no tile ends with a clip. Neighbouring programs share rows, hence pixels, in the cache.

    Args:
        video_ptr: [B, C, T, H, W]. keep_ptr: [B, K] int64. weight_ptr: [D, Q], its values in the order above, dense.
        bias_ptr: [D], dense, or None. position_ptr: [N, D] or None. out_ptr: [rows = B * K, D], dense.
        mean_scale: of each channel 1 / (255 std) and -mean / std.
    """
    Q: tl.constexpr = C * PT * PH * PW
    EVEN: tl.constexpr = Q % BLOCK_K == 0
    ALIGNED: tl.constexpr = E * PH % BLOCK_K == 0
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    column_tiles = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    row = (program // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = (program % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    taken = tl.minimum(row, rows - 1)
    origin, token, valid = _patch_origins(
        taken // K, taken % K, keep_ptr, N, keep_b, keep_k, video_b, video_t, video_h, video_w, TH, TW, PT, PH, PW
    )
    k = tl.arange(0, BLOCK_K)
    e = k % E
    along = e if CHANNELS_LAST else e * video_w
    if ALIGNED:
        video_tile = video_ptr + origin[:, None] + ((k // E).to(tl.int64) * video_h + along)[None, :]
    else:
        video_tile = video_ptr + origin[:, None] + along[None, :]
    weight_tile = weight_ptr + d[None, :].to(tl.int64) * Q + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, Q, BLOCK_K):
        inside = start + k < Q
        if ALIGNED:
            line = tl.full([], 0, tl.int32) + start // E
            offset, piece = _place(line, video_c, video_t, video_h, video_w, PT, PH, E, PIECES, CHANNELS_LAST)
            where = video_tile + offset
        else:
            offset, piece = _place((start + k) // E, video_c, video_t, video_h, video_w, PT, PH, E, PIECES, CHANNELS_LAST)
            where = video_tile + offset[None, :]
        scale, shift = _constants(e, piece, mean_scale, C, E, PIECES, CHANNELS_LAST)
        if CHANNELS_LAST or not ALIGNED:
            scale = scale[None, :]
            shift = shift[None, :]
        x = _load_patches(where, valid, inside, scale, shift, dtype, EVEN)
        mask = (d < D)[None, :] if EVEN else (d < D)[None, :] & inside[:, None]
        weight = tl.load(weight_tile + start, mask=mask, other=0.0)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
    total = tl.where(valid[:, None], total, 0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    written = (row < rows)[:, None] & (d < D)[None, :]
    if position_ptr is not None:
        where = position_ptr + token[:, None].to(tl.int64) * position_n + d[None, :] * position_d
        total += tl.load(where, mask=written & valid[:, None], other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None].to(tl.int64) * D + d[None, :], total.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit
def _grad_weight(
    grad_ptr,
    video_ptr,
    keep_ptr,
    out_ptr,
    rows,
    rows_per_part,
    K,
    N,
    D,
    grad_b,
    grad_k,
    grad_d,
    video_b,
    video_c,
    video_t,
    video_h,
    video_w,
    keep_b,
    keep_k,
    mean_scale,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    E: tl.constexpr,
    PIECES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[part, d, k] = sum over the part's rows of grad[row, d] x[row, k]; parts are summed in a second kernel, in order.

    Args:
        grad_ptr: [B, K, D]. video_ptr: [B, C, T, H, W]. keep_ptr: [B, K] int64. out_ptr: [parts, D, Q], dense, k in the order
        above. LONG: whether K >= BLOCK_K, so that a tile of rows ends in the same clip as the one before, or in the next.
    """
    Q: tl.constexpr = C * PT * PH * PW
    EVEN: tl.constexpr = Q % BLOCK_Q == 0
    column_tiles = tl.cdiv(Q, BLOCK_Q)
    program = tl.program_id(0)
    part = tl.program_id(1)
    d = (program // column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = (program % column_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    e = k % E
    offset, piece = _place(k // E, video_c, video_t, video_h, video_w, PT, PH, E, PIECES, CHANNELS_LAST)
    offset += e if CHANNELS_LAST else e.to(tl.int64) * video_w
    scale, shift = _constants(e, piece, mean_scale, C, E, PIECES, CHANNELS_LAST)
    total = tl.zeros([BLOCK_D, BLOCK_Q], tl.float32)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, rows)
    row = first + tl.arange(0, BLOCK_K)
    b = row // K
    j = row % K
    for start in range(first, last, BLOCK_K):
        there = start + tl.arange(0, BLOCK_K) < last
        clip = tl.where(there, b, 0)
        origin, token, valid = _patch_origins(
            clip, tl.where(there, j, 0), keep_ptr, N, keep_b, keep_k, video_b, video_t, video_h, video_w, TH, TW, PT, PH, PW
        )
        x = _load_patches(
            video_ptr + (origin[:, None] + offset[None, :]), valid, k < Q, scale[None, :], shift[None, :], DTYPE, EVEN
        )
        where = b.to(tl.int64) * grad_b + j.to(tl.int64) * grad_k
        mask = (there & valid)[:, None] & (d < D)[None, :]
        grad = tl.load(grad_ptr + (where[:, None] + d[None, :] * grad_d), mask=mask, other=0.0)
        total = tl.dot(tl.trans(grad.to(DTYPE)), x, total, input_precision=PRECISION)
        j += BLOCK_K
        if LONG:
            b = tl.where(j >= K, b + 1, b)
            j = tl.where(j >= K, j - K, j)
        else:
            b += j // K
            j = j % K
    where = out_ptr + (part.to(tl.int64) * D + d[:, None]) * Q + k[None, :]
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=(d < D)[:, None] & (k < Q)[None, :])


@triton.jit
def _grad_position(grad_ptr, inverse_ptr, out_ptr, B, N, D, grad_b, grad_k, grad_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[n] = sum over clips b that keep token n of grad[b, inverse[b, n]]. One program a tile of tokens, over the batch."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < N)[:, None] & (d < D)[None, :]
    grad_ptr += d[None, :] * grad_d
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b = tl.full([], 0, tl.int64)
    for _ in range(B):
        j = tl.load(inverse_ptr + b * N + n, mask=n < N, other=-1)
        where = grad_ptr + b * grad_b + j[:, None].to(tl.int64) * grad_k
        total += tl.load(where, mask=(j >= 0)[:, None] & inside, other=0.0).to(tl.float32)
        b += 1
    tl.store(out_ptr + n[:, None].to(tl.int64) * D + d[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


def _layout(video, weight):
    """The patch grid, and the constants that both directions need."""
    _, C, T, H, W = video.shape
    _, _, pt, ph, pw = weight.shape
    channels_last = is_channels_last(video)
    grid = (T // pt, H // ph, W // pw)
    run = pw * C if channels_last else pw
    E = min(16, run & -run)  # the largest power of two in it
    constants = dict(C=C, PT=pt, PH=ph, PW=pw, TH=grid[1], TW=grid[2], E=E, PIECES=run // E, CHANNELS_LAST=channels_last)
    return grid, constants | dict(PRECISION=dot_precision(weight.dtype))


def _in_order(weight, constants):
    """A view of weight [D, C, pt, ph, pw] as [D, (C,) pieces, pt, ph, E]: the order in which the kernels walk."""
    D, C, pt, ph, pw = weight.shape
    pieces, E = constants["PIECES"], constants["E"]
    if not constants["CHANNELS_LAST"]:
        return weight.unflatten(4, (pieces, E)).permute(0, 1, 4, 2, 3, 5)
    return weight.permute(0, 2, 3, 4, 1).reshape(D, pt, ph, pieces, E).permute(0, 3, 1, 2, 4)


def _out_of_order(weight, shape, constants):
    """The inverse of _in_order, from [D, Q]."""
    D, C, pt, ph, pw = shape
    pieces, E = constants["PIECES"], constants["E"]
    if not constants["CHANNELS_LAST"]:
        return weight.view(D, C, pieces, pt, ph, E).permute(0, 1, 3, 4, 2, 5).reshape(shape)
    return weight.view(D, pieces, pt, ph, E).permute(0, 2, 3, 1, 4).reshape(D, pt, ph, pw, C).permute(0, 4, 1, 2, 3)


# Of each target, for a few clips and for many. A byte is made an operand once for every tile of columns, and what is done once
# for a step of the inner dimension counts as much: wide tiles of columns and long steps, as far as registers reach.
_TILES = {  # warps, stages, BLOCK_M, BLOCK_D, BLOCK_K
    "sm_80": ((4, 3, 64, 64, 64), (8, 2, 128, 128, 64)),
    "sm_90": ((4, 2, 64, 64, 128), (8, 3, 128, 128, 64), (4, 2, 64, 128, 128)),
    "sm_100": ((4, 3, 64, 64, 64), (8, 3, 128, 128, 64)),
    "gfx942": ((4, 2, 64, 64, 64), (8, 2, 128, 128, 32)),
}
_PROGRAMS = 256  # of large tiles, that fill a device


@functools.lru_cache(1024)
def _forward_tiles(float32, target, rows, D):
    if float32:
        return configs((4, 2, dict(BLOCK_M=64, BLOCK_D=64, BLOCK_K=16)))
    options = [(warps, stages, dict(BLOCK_M=m, BLOCK_D=d, BLOCK_K=k)) for warps, stages, m, d, k in _TILES[target]]
    few = triton.cdiv(rows, 128) * triton.cdiv(D, 128) < _PROGRAMS
    return configs(*(options if few else options[1:] + options[:1]))


def masked_patchify(video, keep, weight, bias, position, mean, std):
    # video [B, C, T, H, W], keep [B, K], weight [D, C, pt, ph, pw], bias [D], position [N, D] -> [B, K, D]
    B, K = keep.shape
    D = weight.shape[0]
    out = (weight if position is None else position).new_empty(B, K, D)
    if not out.numel():
        return out
    (t, h, w), constants = _layout(video, weight)
    weight = _in_order(weight, constants).contiguous()
    rows = B * K
    launch(
        _masked_patchify,
        lambda tiles: (triton.cdiv(rows, tiles["BLOCK_M"]) * triton.cdiv(D, tiles["BLOCK_D"]),),
        video,
        keep,
        weight,
        bias,
        position,
        out,
        rows,
        K,
        t * h * w,
        D,
        *video.stride(),
        *keep.stride(),
        *((0, 0) if position is None else position.stride()),
        mean_scale(mean, std),
        configs=_forward_tiles(weight.dtype == torch.float32, launching.target(video.device), rows, D),
        key=("rows", "D", "C", "PT", "PH", "PW"),
        **constants,
    )
    return out


def _parts(rows, tiles, block):
    """Into how many parts the sum over rows is split, so that there are some 256 programs, and the rows of a part."""
    parts = max(1, min(256 // tiles, triton.cdiv(rows, 4 * block)))
    rows_per_part = triton.cdiv(triton.cdiv(rows, parts), block) * block
    return triton.cdiv(rows, rows_per_part), rows_per_part


def masked_patchify_backward(grad_out, video, keep, weight, bias, position, mean, std):
    # grad_out [B, K, D] -> weight's [D, C, pt, ph, pw], bias' [D], position's [N, D]
    B, K = keep.shape
    D = weight.shape[0]
    (t, h, w), constants = _layout(video, weight)
    N = t * h * w
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    grad_position = weight.new_empty(0) if position is None else position.new_empty(N, D)
    if not grad_out.numel():
        return grad_weight.zero_(), grad_bias.zero_(), grad_position.zero_()

    rows, Q = B * K, weight[0].numel()
    float32 = weight.dtype == torch.float32
    tiles = dict(BLOCK_D=64, BLOCK_Q=64, BLOCK_K=32) if float32 else dict(BLOCK_D=128, BLOCK_Q=128, BLOCK_K=32)
    programs = triton.cdiv(D, tiles["BLOCK_D"]) * triton.cdiv(Q, tiles["BLOCK_Q"])
    parts, rows_per_part = _parts(rows, programs, tiles["BLOCK_K"])
    partial = weight.new_empty(parts, D * Q, dtype=torch.float32 if parts > 1 else weight.dtype)
    # Rounded to the operands' dtype once, not by each of the programs that read it; the sums below take it as it is.
    grad = grad_out.to(weight.dtype)
    launch(
        _grad_weight,
        (programs, parts),
        grad,
        video,
        keep,
        partial,
        rows,
        rows_per_part,
        K,
        N,
        D,
        *grad.stride(),
        *video.stride(),
        *keep.stride(),
        mean_scale(mean, std),
        LONG=tiles["BLOCK_K"] <= K,
        DTYPE=tl.float32 if float32 else tl.bfloat16 if weight.dtype == torch.bfloat16 else tl.float16,
        configs=configs((4, 2, tiles) if float32 else (8, 3, tiles)),
        **constants,
    )
    total = sum_rows(partial, weight.dtype) if parts > 1 else partial
    grad_weight.copy_(_out_of_order(total, weight.shape, constants))

    if bias is not None:
        grad_bias = sum_rows(grad_out.reshape(rows, D), bias.dtype)
    if position is not None:
        tile = columns_tile(D, largest=256)
        block = max(1, 2048 // tile)
        grid = (triton.cdiv(D, tile), triton.cdiv(N, block))
        inverse = inverse_ids(keep, N)
        launch(
            _grad_position,
            grid,
            grad_out,
            inverse,
            grad_position,
            B,
            N,
            D,
            *grad_out.stride(),
            configs=one(4, BLOCK_N=block, BLOCK_D=tile),
        )
    return grad_weight, grad_bias, grad_position
