import torch
import triton
import triton.language as tl

from .inverse_ids import inverse_ids
from .launching import columns_tile, configs, dot_precision, launch, one
from .sum_rows import sum_rows

# The product's inner dimension, the values of one patch, is walked in the order in which the video has them in memory:
#   dense columns and channels (a decoder's [T, H, W, C] frames): (u, p, (q, c)), runs of pw * C neighbouring bytes;
#   anything else: (c, u, p, q), runs of pw bytes where the rows are dense.
# Either way 16 neighbouring values of a ViT's patch are one 128-bit load of bytes. The weight is given in the same order.


@triton.jit
def _patch_values(
    k,
    video_c,
    video_t,
    video_h,
    video_w,
    mean_scale,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Where value k of a patch lies relative to the patch's first, and the scale and shift that normalise it."""
    if CHANNELS_LAST:
        run: tl.constexpr = PW * C
        c = k % C
        offset = k // (run * PH) * video_t + k // run % PH * video_h + k % run
    else:
        c = k // (PW * PH * PT)
        offset = c.to(tl.int64) * video_c + k // (PW * PH) % PT * video_t + k // PW % PH * video_h + k % PW * video_w
    scale = tl.zeros_like(k).to(tl.float32)
    shift = scale
    for i in tl.static_range(C):
        scale = tl.where(c == i, mean_scale[2 * i], scale)
        shift = tl.where(c == i, mean_scale[2 * i + 1], shift)
    return offset, scale, shift


@triton.jit
def _patch_origins(
    row,
    rows,
    keep_ptr,
    K,
    N,
    TH,
    TW,
    keep_b,
    keep_k,
    video_b,
    video_t,
    video_h,
    video_w,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """Where the patch of row b * K + j begins in the video, its token, and whether it is a patch of the video at all."""
    b = (row // K).to(tl.int64)
    token = tl.load(keep_ptr + b * keep_b + (row % K).to(tl.int64) * keep_k, mask=row < rows, other=-1)
    valid = (token >= 0) & (token < N)
    token = tl.where(valid, token, 0).to(tl.int32)
    it = (token // (TH * TW) * PT).to(tl.int64)
    ih = (token // TW % TH * PH).to(tl.int64)
    iw = (token % TW * PW).to(tl.int64)
    return b * video_b + it * video_t + ih * video_h + iw * video_w, token, valid


@triton.jit
def _load_patches(video_ptr, origin, valid, offset, scale, shift, inside, dtype: tl.constexpr, EVEN: tl.constexpr):
    """A tile of normalised patch values [rows, values]; bytes become the operand of the product without leaving registers."""
    mask = valid[:, None] if EVEN else valid[:, None] & inside[None, :]
    x = tl.load(video_ptr + origin[:, None] + offset[None, :], mask=mask, other=0)
    if video_ptr.dtype.element_ty == tl.uint8:
        x = tl.where(mask, x.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
    return x.to(dtype)


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
    TH,
    TW,
    D,
    Q,
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
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b * K + j, d] = sum_k x[patch(keep[b, j]), k] weight[d, k] + bias[d] + position[keep[b, j], d].

    Rows run over the batch, so that no tile ends with a clip. Neighbouring programs share rows, hence pixels, in the cache.
    """
    column_tiles = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    row = (program // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = (program % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    origin, token, valid = _patch_origins(
        row, rows, keep_ptr, K, N, TH, TW, keep_b, keep_k, video_b, video_t, video_h, video_w, PT, PH, PW
    )
    EVEN: tl.constexpr = (C * PT * PH * PW) % BLOCK_K == 0
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    weight_ptr += d[None, :].to(tl.int64) * Q
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, Q, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < Q
        offset, scale, shift = _patch_values(k, video_c, video_t, video_h, video_w, mean_scale, C, PT, PH, PW, CHANNELS_LAST)
        x = _load_patches(video_ptr, origin, valid, offset, scale, shift, inside, dtype, EVEN)
        mask = (d < D)[None, :] if EVEN else (d < D)[None, :] & inside[:, None]
        weight = tl.load(weight_ptr + k[:, None], mask=mask, other=0.0)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
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
    TH,
    TW,
    D,
    Q,
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
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[part, d, k] = sum over the part's rows of grad[row, d] x[row, k]; parts are summed in a second kernel, in order."""
    column_tiles = tl.cdiv(Q, BLOCK_Q)
    program = tl.program_id(0)
    part = tl.program_id(1)
    d = (program // column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = (program % column_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offset, scale, shift = _patch_values(k, video_c, video_t, video_h, video_w, mean_scale, C, PT, PH, PW, CHANNELS_LAST)
    EVEN: tl.constexpr = (C * PT * PH * PW) % BLOCK_Q == 0
    total = tl.zeros([BLOCK_D, BLOCK_Q], tl.float32)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, rows)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        origin, token, valid = _patch_origins(
            row, last, keep_ptr, K, N, TH, TW, keep_b, keep_k, video_b, video_t, video_h, video_w, PT, PH, PW
        )
        x = _load_patches(video_ptr, origin, valid, offset, scale, shift, k < Q, DTYPE, EVEN)
        where = (row // K).to(tl.int64) * grad_b + (row % K).to(tl.int64) * grad_k
        grad = tl.load(grad_ptr + where[:, None] + d[None, :] * grad_d, mask=(row < last)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(tl.trans(grad.to(DTYPE)), x, total, input_precision=PRECISION)
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
    """The inner order (see above), and the strides, constants and grid that both directions need."""
    _, C, T, H, W = video.shape
    _, _, pt, ph, pw = weight.shape
    channels_last = C > 1 and video.stride(1) == 1 and video.stride(4) == C
    constants = dict(C=C, PT=pt, PH=ph, PW=pw, CHANNELS_LAST=channels_last, PRECISION=dot_precision(weight.dtype))
    return (T // pt, H // ph, W // pw), constants


def _normalisation(mean, std):
    return tuple(x for m, s in zip(mean, std) for x in (1 / (255 * s), -m / s))


def _forward_tiles(float32):
    if float32:
        return configs((4, 2, dict(BLOCK_M=64, BLOCK_D=64, BLOCK_K=16)))
    # A batch of a few clips does not fill a device with large tiles, a large batch is faster with them: which is which
    # depends on the device, so it is timed there.
    return configs((4, 3, dict(BLOCK_M=64, BLOCK_D=64, BLOCK_K=64)), (8, 3, dict(BLOCK_M=128, BLOCK_D=128, BLOCK_K=32)))


def masked_patchify(video, keep, weight, bias, position, mean, std):
    # video [B, C, T, H, W], keep [B, K], weight [D, C, pt, ph, pw], bias [D], position [N, D] -> [B, K, D]
    B, K = keep.shape
    D = weight.shape[0]
    out = (weight if position is None else position).new_empty(B, K, D)
    if not out.numel():
        return out
    (t, h, w), constants = _layout(video, weight)
    if constants["CHANNELS_LAST"]:
        weight = weight.permute(0, 2, 3, 4, 1)
    weight = weight.contiguous().view(D, -1)
    rows, Q = B * K, weight.shape[1]
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
        h,
        w,
        D,
        Q,
        *video.stride(),
        *keep.stride(),
        *((0, 0) if position is None else position.stride()),
        _normalisation(mean, std),
        configs=_forward_tiles(weight.dtype == torch.float32),
        key=("rows", "D", "Q"),
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
        h,
        w,
        D,
        Q,
        *grad.stride(),
        *video.stride(),
        *keep.stride(),
        _normalisation(mean, std),
        DTYPE=tl.float32 if float32 else tl.bfloat16 if weight.dtype == torch.bfloat16 else tl.float16,
        configs=configs((4, 2, tiles) if float32 else (8, 3, tiles)),
        **constants,
    )
    total = sum_rows(partial, weight.dtype) if parts > 1 else partial
    _, C, pt, ph, pw = weight.shape
    if constants["CHANNELS_LAST"]:
        grad_weight.copy_(total.view(D, pt, ph, pw, C).permute(0, 4, 1, 2, 3))
    else:
        grad_weight = total.view(weight.shape)

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
