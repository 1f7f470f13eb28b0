import math

import torch
import triton
import triton.language as tl

from .launching import configs, dot_precision, launch

# A head dim that is no power of two is taken in two pieces, D0 the largest power of two in it and D1 what remains (80 = 64 + 16,
# 96 = 64 + 32), each an operand of its own: the products then do no work for padding, where one padded to 128 would waste 38 % at 80.
# D1 is 0 where D0 is all; what belongs to the second piece is then a copy of the first that no instruction uses.

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _load(ptr, row, rows, stride_n, stride_d, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """x[row, FIRST : FIRST + WIDTH], zero outside [rows, D]. ptr + row * stride must have been moved near `row` in 64 bits."""
    column = FIRST + tl.arange(0, WIDTH)
    where = ptr + row[:, None].to(tl.int64) * stride_n + column[None, :].to(tl.int64) * stride_d
    if FIRST + WIDTH > D:
        if MASKED:
            return tl.load(where, mask=(row < rows)[:, None] & (column < D)[None, :], other=0.0)
        else:
            return tl.load(where, mask=(column < D)[None, :], other=0.0)
    else:
        if MASKED:
            return tl.load(where, mask=(row < rows)[:, None], other=0.0)
        else:
            return tl.load(where)


@triton.jit
def _load2(ptr, row, rows, stride_n, stride_d, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr):
    x0 = _load(ptr, row, rows, stride_n, stride_d, D, 0, D0, MASKED)
    if D1 > 0:
        return x0, _load(ptr, row, rows, stride_n, stride_d, D, D0, D1, MASKED)
    else:
        return x0, x0


@triton.jit
def _store(ptr, x, row, rows, stride_n, stride_d, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    where = ptr + row[:, None].to(tl.int64) * stride_n + column[None, :].to(tl.int64) * stride_d
    tl.store(where, x.to(ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < D)[None, :])


@triton.jit
def _store2(ptr, x0, x1, row, rows, stride_n, stride_d, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    _store(ptr, x0, row, rows, stride_n, stride_d, D, 0, D0)
    if D1 > 0:
        _store(ptr, x1, row, rows, stride_n, stride_d, D, D0, D1)


@triton.jit
def _scores(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the head dim."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)
    return s


@triton.jit
def _accumulate(p, x0, x1, acc0, acc1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """acc += p x, p rounded to the dtype of x for the product."""
    acc0 = tl.dot(p.to(x0.dtype), x0, acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(p.to(x1.dtype), x1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _attend(
    q0,
    q1,
    k_ptr,
    v_ptr,
    start,
    keys,
    scale,
    highest,
    total,
    acc0,
    acc1,
    k_n,
    k_d,
    v_n,
    v_d,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys of the online softmax; scores are in units of log 2, `highest` and `total` are those of each query."""
    n = start + tl.arange(0, BLOCK_N)
    k0, k1 = _load2(k_ptr, n, keys, k_n, k_d, D, D0, D1, MASKED)
    s = _scores(q0, q1, k0, k1, D1, PRECISION)
    if MASKED:
        s = tl.where((n < keys)[None, :], s, float("-inf") if POSITIVE else float("inf"))
    tile_highest = tl.max(s, axis=1) * scale if POSITIVE else tl.min(s, axis=1) * scale
    new_highest = tl.maximum(highest, tile_highest)
    p = tl.exp2(s * scale - new_highest[:, None])
    correction = tl.exp2(highest - new_highest)
    total = total * correction + tl.sum(p, axis=1)
    acc0 *= correction[:, None]
    if D1 > 0:
        acc1 *= correction[:, None]
    v0, v1 = _load2(v_ptr, n, keys, v_n, v_d, D, D0, D1, MASKED)
    acc0, acc1 = _accumulate(p, v0, v1, acc0, acc1, D1, PRECISION)
    return new_highest, total, acc0, acc1


@triton.jit
def _attention(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale,
    H,
    queries,
    keys,
    q_b,
    q_n,
    q_h,
    q_d,
    k_b,
    k_n,
    k_h,
    k_d,
    v_b,
    v_n,
    v_h,
    v_d,
    out_b,
    out_n,
    out_h,
    out_d,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = softmax(scale q k^T) v and lse = log sum exp(scale q k^T), one program for a tile of queries of one head.

    Programs of one head are neighbours, so that its keys and values are read from memory once.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    bh = (program // tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    m = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    q0, q1 = _load2(q_ptr + b * q_b + h * q_h, m, queries, q_n, q_d, D, D0, D1, True)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    scale *= _LOG2E
    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        highest, total, acc0, acc1 = _attend(
            q0, q1, k_ptr, v_ptr, start, keys, scale, highest, total, acc0, acc1, k_n, k_d, v_n, v_d, D, D0, D1, POSITIVE, PRECISION, BLOCK_N, False
        )
    if whole < keys:
        highest, total, acc0, acc1 = _attend(
            q0, q1, k_ptr, v_ptr, whole, keys, scale, highest, total, acc0, acc1, k_n, k_d, v_n, v_d, D, D0, D1, POSITIVE, PRECISION, BLOCK_N, True
        )
    acc0 /= total[:, None]
    if D1 > 0:
        acc1 /= total[:, None]
    _store2(out_ptr + b * out_b + h * out_h, acc0, acc1, m, queries, out_n, out_d, D, D0, D1)
    tl.store(lse_ptr + bh * queries + m, (highest + tl.log2(total)) * _LN2, mask=m < queries)


@triton.jit
def _grad_q_tile(
    q0,
    q1,
    grad0,
    grad1,
    k_ptr,
    v_ptr,
    start,
    keys,
    scale,
    lse,
    delta,
    acc0,
    acc1,
    k_n,
    k_d,
    v_n,
    v_d,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    n = start + tl.arange(0, BLOCK_N)
    k0, k1 = _load2(k_ptr, n, keys, k_n, k_d, D, D0, D1, MASKED)
    v0, v1 = _load2(v_ptr, n, keys, v_n, v_d, D, D0, D1, MASKED)
    p = tl.exp2(_scores(q0, q1, k0, k1, D1, PRECISION) * scale - lse[:, None])
    if MASKED:
        p = tl.where((n < keys)[None, :], p, 0.0)
    grad_s = p * (_scores(grad0, grad1, v0, v1, D1, PRECISION) - delta[:, None])
    return _accumulate(grad_s, k0, k1, acc0, acc1, D1, PRECISION)


@triton.jit
def _grad_q(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    scale,
    H,
    queries,
    keys,
    grad_b,
    grad_n,
    grad_h,
    grad_d,
    q_b,
    q_n,
    q_h,
    q_d,
    k_b,
    k_n,
    k_h,
    k_d,
    v_b,
    v_n,
    v_h,
    v_d,
    out_b,
    out_n,
    out_h,
    out_d,
    grad_q_b,
    grad_q_n,
    grad_q_h,
    grad_q_d,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_q = scale dS k with dS = P (grad v^T - delta), delta = rowsum(grad out), which it leaves for _grad_kv.

    One program for a tile of queries of one head.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    bh = (program // tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    m = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    grad0, grad1 = _load2(grad_ptr + b * grad_b + h * grad_h, m, queries, grad_n, grad_d, D, D0, D1, True)
    out0, out1 = _load2(out_ptr + b * out_b + h * out_h, m, queries, out_n, out_d, D, D0, D1, True)
    delta = tl.sum(grad0.to(tl.float32) * out0.to(tl.float32), axis=1)
    if D1 > 0:
        delta += tl.sum(grad1.to(tl.float32) * out1.to(tl.float32), axis=1)
    tl.store(delta_ptr + bh * queries + m, delta, mask=m < queries)
    q0, q1 = _load2(q_ptr + b * q_b + h * q_h, m, queries, q_n, q_d, D, D0, D1, True)
    lse = tl.load(lse_ptr + bh * queries + m, mask=m < queries, other=float("inf")) * _LOG2E
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc0, acc1 = _grad_q_tile(
            q0, q1, grad0, grad1, k_ptr, v_ptr, start, keys, scale * _LOG2E, lse, delta, acc0, acc1, k_n, k_d, v_n, v_d, D, D0, D1, PRECISION, BLOCK_N, False
        )
    if whole < keys:
        acc0, acc1 = _grad_q_tile(
            q0, q1, grad0, grad1, k_ptr, v_ptr, whole, keys, scale * _LOG2E, lse, delta, acc0, acc1, k_n, k_d, v_n, v_d, D, D0, D1, PRECISION, BLOCK_N, True
        )
    acc0 *= scale
    if D1 > 0:
        acc1 *= scale
    _store2(grad_q_ptr + b * grad_q_b + h * grad_q_h, acc0, acc1, m, queries, grad_q_n, grad_q_d, D, D0, D1)


@triton.jit
def _grad_kv_tile(
    k0,
    k1,
    v0,
    v1,
    grad_ptr,
    q_ptr,
    lse_ptr,
    delta_ptr,
    start,
    queries,
    scale,
    grad_k0,
    grad_k1,
    grad_v0,
    grad_v1,
    grad_n,
    grad_d,
    q_n,
    q_d,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    m = start + tl.arange(0, BLOCK_M)
    q0, q1 = _load2(q_ptr, m, queries, q_n, q_d, D, D0, D1, MASKED)
    if MASKED:  # a query that is not there has lse = inf, hence weight 0 for every key
        lse = tl.load(lse_ptr + m, mask=m < queries, other=float("inf"))
        delta = tl.load(delta_ptr + m, mask=m < queries, other=0.0)
    else:
        lse = tl.load(lse_ptr + m)
        delta = tl.load(delta_ptr + m)
    p = tl.exp2(_scores(k0, k1, q0, q1, D1, PRECISION) * scale - (lse * _LOG2E)[None, :])  # transposed: [keys, queries]
    grad0, grad1 = _load2(grad_ptr, m, queries, grad_n, grad_d, D, D0, D1, MASKED)
    grad_v0, grad_v1 = _accumulate(p, grad0, grad1, grad_v0, grad_v1, D1, PRECISION)
    grad_s = p * (_scores(v0, v1, grad0, grad1, D1, PRECISION) - delta[None, :])
    grad_k0, grad_k1 = _accumulate(grad_s, q0, q1, grad_k0, grad_k1, D1, PRECISION)
    return grad_k0, grad_k1, grad_v0, grad_v1


@triton.jit
def _grad_kv(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    scale,
    H,
    queries,
    keys,
    grad_b,
    grad_n,
    grad_h,
    grad_d,
    q_b,
    q_n,
    q_h,
    q_d,
    k_b,
    k_n,
    k_h,
    k_d,
    v_b,
    v_n,
    v_h,
    v_d,
    grad_k_b,
    grad_k_n,
    grad_k_h,
    grad_k_d,
    grad_v_b,
    grad_v_n,
    grad_v_h,
    grad_v_d,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_v = P^T grad and grad_k = scale dS^T q. One program owns a tile of keys of one head: no two add to one address."""
    tiles = tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0)
    bh = (program // tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += b * q_b + h * q_h
    grad_ptr += b * grad_b + h * grad_h
    lse_ptr += bh * queries
    delta_ptr += bh * queries
    k0, k1 = _load2(k_ptr + b * k_b + h * k_h, n, keys, k_n, k_d, D, D0, D1, True)
    v0, v1 = _load2(v_ptr + b * v_b + h * v_h, n, keys, v_n, v_d, D, D0, D1, True)
    grad_k0 = tl.zeros([BLOCK_N, D0], tl.float32)
    grad_k1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
    grad_v0 = tl.zeros([BLOCK_N, D0], tl.float32)
    grad_v1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
    whole = queries // BLOCK_M * BLOCK_M
    for start in range(0, whole, BLOCK_M):
        grad_k0, grad_k1, grad_v0, grad_v1 = _grad_kv_tile(
            k0, k1, v0, v1, grad_ptr, q_ptr, lse_ptr, delta_ptr, start, queries, scale * _LOG2E, grad_k0, grad_k1, grad_v0, grad_v1,
            grad_n, grad_d, q_n, q_d, D, D0, D1, PRECISION, BLOCK_M, False,
        )  # fmt: skip
    if whole < queries:
        grad_k0, grad_k1, grad_v0, grad_v1 = _grad_kv_tile(
            k0, k1, v0, v1, grad_ptr, q_ptr, lse_ptr, delta_ptr, whole, queries, scale * _LOG2E, grad_k0, grad_k1, grad_v0, grad_v1,
            grad_n, grad_d, q_n, q_d, D, D0, D1, PRECISION, BLOCK_M, True,
        )  # fmt: skip
    grad_k0 *= scale
    if D1 > 0:
        grad_k1 *= scale
    _store2(grad_k_ptr + b * grad_k_b + h * grad_k_h, grad_k0, grad_k1, n, keys, grad_k_n, grad_k_d, D, D0, D1)
    _store2(grad_v_ptr + b * grad_v_b + h * grad_v_h, grad_v0, grad_v1, n, keys, grad_v_n, grad_v_d, D, D0, D1)


def _pieces(D):
    """80 -> (64, 16): see the top of this file. 16 is the least that a product of matrices takes."""
    first = max(16, 1 << (D.bit_length() - 1))
    rest = D - first
    return first, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


def _useful(length, tile):
    return length / (triton.cdiv(length, tile) * tile)


def _pick(choices, queries, keys):
    """Those of `choices` (largest tiles first) that waste at most a tenth of their products on the ragged ends.

    Where none does, as between lengths of 64 and 128 or so, the one that wastes least.
    """
    share = [_useful(queries, tiles["BLOCK_M"]) * _useful(keys, tiles["BLOCK_N"]) for _, _, tiles in choices]
    fitting = [choice for choice, useful in zip(choices, share) if useful >= 0.9]
    return configs(*(fitting or [choices[share.index(max(share))]]))


def _tiles(M, N):
    return dict(BLOCK_M=M, BLOCK_N=N)


def _forward_configs(queries, keys, float32):
    if float32:
        choices = [(4, 2, _tiles(64, 32)), (4, 2, _tiles(32, 32))]
    else:
        choices = [(8, 3, _tiles(128, 64)), (4, 3, _tiles(64, 64)), (2, 3, _tiles(32, 32))]
    return _pick(choices, queries, keys)


def _backward_configs(queries, keys, float32, own):
    """own: the side a program keeps in registers, of which it takes the larger tile; it walks over the other."""
    if float32:
        choices = [(4, 1, 32, 32)]
    else:
        choices = [(8, 2, 128, 64), (4, 2, 64, 32), (4, 2, 32, 32)]
    return _pick(
        [(warps, stages, _tiles(kept, walked) if own == "BLOCK_M" else _tiles(walked, kept)) for warps, stages, kept, walked in choices],
        queries,
        keys,
    )


def _forward(q, k, v, scale):
    B, queries, H, D = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, queries, dtype=torch.float32, device=q.device)
    if out.numel():
        D0, D1 = _pieces(D)
        launch(
            _attention,
            lambda tiles: (triton.cdiv(queries, tiles["BLOCK_M"]) * B * H,),
            q,
            k,
            v,
            out,
            lse,
            scale,
            H,
            queries,
            keys,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            D=D,
            D0=D0,
            D1=D1,
            POSITIVE=scale >= 0,
            PRECISION=dot_precision(q.dtype),
            configs=_forward_configs(queries, keys, q.dtype == torch.float32),
            key=("queries", "keys", "D"),
        )
    return out, lse


def _backward(grad_out, q, k, v, out, lse, scale, grad_q, grad_k, grad_v):
    B, queries, H, D = q.shape
    keys = k.shape[1]
    if not out.numel():
        grad_k.zero_()
        grad_v.zero_()
        return
    D0, D1 = _pieces(D)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    float32 = q.dtype == torch.float32
    constants = dict(D=D, D0=D0, D1=D1, PRECISION=dot_precision(q.dtype), key=("queries", "keys", "D"))
    inputs = (*grad_out.stride(), *q.stride(), *k.stride(), *v.stride())
    launch(
        _grad_q,
        lambda tiles: (triton.cdiv(queries, tiles["BLOCK_M"]) * B * H,),
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        delta,
        grad_q,
        scale,
        H,
        queries,
        keys,
        *inputs,
        *out.stride(),
        *grad_q.stride(),
        configs=_backward_configs(queries, keys, float32, "BLOCK_M"),
        **constants,
    )
    launch(
        _grad_kv,
        lambda tiles: (triton.cdiv(keys, tiles["BLOCK_N"]) * B * H,),
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        grad_k,
        grad_v,
        scale,
        H,
        queries,
        keys,
        *inputs,
        *grad_k.stride(),
        *grad_v.stride(),
        configs=_backward_configs(queries, keys, float32, "BLOCK_N"),
        **constants,
    )


def attention(q, k, v, scale):  # q [B, N, H, D], k, v [B, Nk, H, D] -> out [B, N, H, D], lse [B, H, N] float32
    return _forward(q, k, v, scale)


def attention_backward(grad_out, q, k, v, out, lse, scale):  # grad_out [B, N, H, D] -> the shapes of q, k, v
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _backward(grad_out, q, k, v, out, lse, scale, *grads)
    return grads


def packed_attention(qkv, scale):  # [B, N, 3, H, D] -> out [B, N, H, D], lse [B, H, N] float32
    return _forward(*qkv.unbind(2), scale)


def packed_attention_backward(grad_out, qkv, out, lse, scale):  # grad_out [B, N, H, D] -> [B, N, 3, H, D]
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _backward(grad_out, *qkv.unbind(2), out, lse, scale, *grad_qkv.unbind(2))
    return grad_qkv
