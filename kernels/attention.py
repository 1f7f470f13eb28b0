import math

import torch
import triton
import triton.language as tl

from . import launching
from .launching import configs, dot_precision, launch

# A head dim that is no power of two is taken in two pieces, D0 the largest power of two in it and D1 what remains
# (80 = 64 + 16, 96 = 64 + 32), each an operand of its own: the products then do no work for padding, where one padded to 128
# would waste 38 % at 80. D1 is 0 where D0 is all; what belongs to the second piece is then a copy of the first that no
# instruction uses.
#
# Below, an array of one head is a tuple (pointer, its rows, stride of a row, stride of a column), and strides are those of
# [B, N, H, D].

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _head(ptr, strides, rows, b, h):
    return ptr + b * strides[0] + h * strides[2], rows, strides[1], strides[3]


@triton.jit
def _where(x, row, column):
    return x[0] + row[:, None].to(tl.int64) * x[2] + column[None, :].to(tl.int64) * x[3]


@triton.jit
def _load(x, row, first, WIDTH: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """x[row, first : first + WIDTH], zero outside its rows and its D columns."""
    column = first + tl.arange(0, WIDTH)
    where = _where(x, row, column)
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(where, mask=(row < x[1])[:, None] & (column < D)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(where, mask=(row < x[1])[:, None], other=0.0)
    elif MASK_COLUMNS:
        return tl.load(where, mask=(column < D)[None, :], other=0.0)
    else:
        return tl.load(where)


@triton.jit
def _load2(x, row, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK_ROWS: tl.constexpr):
    x0 = _load(x, row, 0, D0, D, MASK_ROWS, D0 > D)
    if D1 > 0:
        return x0, _load(x, row, D0, D1, D, MASK_ROWS, D0 + D1 > D)
    else:
        return x0, x0


@triton.jit
def _store2(x, x0, x1, row, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    column = tl.arange(0, D0)
    tl.store(_where(x, row, column), x0.to(x[0].dtype.element_ty), mask=(row < x[1])[:, None] & (column < D)[None, :])
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        tl.store(_where(x, row, column), x1.to(x[0].dtype.element_ty), mask=(row < x[1])[:, None] & (column < D)[None, :])


@triton.jit
def _scores(
    a,
    a_row,
    a0,
    a1,
    b,
    b_row,
    b0,
    b1,
    D: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a b^T over the head dim, from the rows already loaded, or (CHUNK > 0) from memory, that is the L1 cache, piece by piece:
    float32 operands of a whole head dim, split for tf32x3, do not fit the registers."""
    if CHUNK > 0:
        s = tl.zeros([a_row.shape[0], b_row.shape[0]], tl.float32)
        for first in range(0, D, CHUNK):
            x = _load(a, a_row, first, CHUNK, D, True, D % CHUNK != 0)
            y = _load(b, b_row, first, CHUNK, D, True, D % CHUNK != 0)
            s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
    else:
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
    q,
    m,
    q0,
    q1,
    k,
    v,
    start,
    scale,
    highest,
    total,
    acc0,
    acc1,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys of the online softmax; scores are in units of log 2, `highest` and `total` are those of each query."""
    n = start + tl.arange(0, BLOCK_N)
    if CHUNK > 0:
        s = _scores(q, m, q0, q1, k, n, q0, q1, D, D1, CHUNK, PRECISION)
    else:
        k0, k1 = _load2(k, n, D, D0, D1, MASKED)
        s = _scores(q, m, q0, q1, k, n, k0, k1, D, D1, CHUNK, PRECISION)
    if MASKED:
        s = tl.where((n < k[1])[None, :], s * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(s, axis=1))
        p = tl.exp2(s - new_highest[:, None])
    else:  # one multiplication less: that by the scale is fused with the subtraction
        new_highest = tl.maximum(highest, tl.max(s, axis=1) * scale if POSITIVE else tl.min(s, axis=1) * scale)
        p = tl.exp2(s * scale - new_highest[:, None])
    correction = tl.exp2(highest - new_highest)
    total = total * correction + tl.sum(p, axis=1)
    acc0 *= correction[:, None]
    if D1 > 0:
        acc1 *= correction[:, None]
    v0, v1 = _load2(v, n, D, D0, D1, MASKED)
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
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
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
    q = _head(q_ptr, q_strides, queries, b, h)
    k = _head(k_ptr, k_strides, keys, b, h)
    v = _head(v_ptr, v_strides, keys, b, h)
    if CHUNK > 0:
        q0 = m
        q1 = m
    else:
        q0, q1 = _load2(q, m, D, D0, D1, True)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    scale *= _LOG2E
    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        highest, total, acc0, acc1 = _attend(
            q, m, q0, q1, k, v, start, scale, highest, total, acc0, acc1, D, D0, D1, CHUNK, POSITIVE, PRECISION, BLOCK_N, False
        )
    if whole < keys:
        highest, total, acc0, acc1 = _attend(
            q, m, q0, q1, k, v, whole, scale, highest, total, acc0, acc1, D, D0, D1, CHUNK, POSITIVE, PRECISION, BLOCK_N, True
        )
    acc0 /= total[:, None]
    if D1 > 0:
        acc1 /= total[:, None]
    _store2(_head(out_ptr, out_strides, queries, b, h), acc0, acc1, m, D, D0, D1)
    tl.store(lse_ptr + bh * queries + m, (highest + tl.log2(total)) * _LN2, mask=m < queries)


@triton.jit
def _grad_q_tile(
    q,
    grad,
    m,
    q0,
    q1,
    grad0,
    grad1,
    k,
    v,
    start,
    scale,
    lse,
    delta,
    acc0,
    acc1,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    n = start + tl.arange(0, BLOCK_N)
    k0, k1 = _load2(k, n, D, D0, D1, MASKED)
    p = tl.exp2(_scores(q, m, q0, q1, k, n, k0, k1, D, D1, CHUNK, PRECISION) * scale - lse[:, None])
    if MASKED:
        p = tl.where((n < k[1])[None, :], p, 0.0)
    if CHUNK > 0:
        grad_p = _scores(grad, m, grad0, grad1, v, n, grad0, grad1, D, D1, CHUNK, PRECISION)
    else:
        v0, v1 = _load2(v, n, D, D0, D1, MASKED)
        grad_p = _scores(grad, m, grad0, grad1, v, n, v0, v1, D, D1, CHUNK, PRECISION)
    return _accumulate(p * (grad_p - delta[:, None]), k0, k1, acc0, acc1, D1, PRECISION)


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
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    grad_q_strides,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
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
    q = _head(q_ptr, q_strides, queries, b, h)
    k = _head(k_ptr, k_strides, keys, b, h)
    v = _head(v_ptr, v_strides, keys, b, h)
    grad = _head(grad_ptr, grad_strides, queries, b, h)
    grad0, grad1 = _load2(grad, m, D, D0, D1, True)
    out0, out1 = _load2(_head(out_ptr, out_strides, queries, b, h), m, D, D0, D1, True)
    delta = tl.sum(grad0.to(tl.float32) * out0.to(tl.float32), axis=1)
    if D1 > 0:
        delta += tl.sum(grad1.to(tl.float32) * out1.to(tl.float32), axis=1)
    tl.store(delta_ptr + bh * queries + m, delta, mask=m < queries)
    if CHUNK > 0:
        q0 = m
        q1 = m
    else:
        q0, q1 = _load2(q, m, D, D0, D1, True)
    lse = tl.load(lse_ptr + bh * queries + m, mask=m < queries, other=float("inf")) * _LOG2E
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc0, acc1 = _grad_q_tile(
            q,
            grad,
            m,
            q0,
            q1,
            grad0,
            grad1,
            k,
            v,
            start,
            scale * _LOG2E,
            lse,
            delta,
            acc0,
            acc1,
            D,
            D0,
            D1,
            CHUNK,
            PRECISION,
            BLOCK_N,
            False,
        )
    if whole < keys:
        acc0, acc1 = _grad_q_tile(
            q,
            grad,
            m,
            q0,
            q1,
            grad0,
            grad1,
            k,
            v,
            whole,
            scale * _LOG2E,
            lse,
            delta,
            acc0,
            acc1,
            D,
            D0,
            D1,
            CHUNK,
            PRECISION,
            BLOCK_N,
            True,
        )
    acc0 *= scale
    if D1 > 0:
        acc1 *= scale
    _store2(_head(grad_q_ptr, grad_q_strides, queries, b, h), acc0, acc1, m, D, D0, D1)


@triton.jit
def _grad_kv_tile(
    k,
    v,
    n,
    k0,
    k1,
    v0,
    v1,
    q,
    grad,
    lse_ptr,
    delta_ptr,
    start,
    scale,
    grad_k0,
    grad_k1,
    grad_v0,
    grad_v1,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    m = start + tl.arange(0, BLOCK_M)
    q0, q1 = _load2(q, m, D, D0, D1, MASKED)
    if MASKED:  # a query that is not there has lse = inf, hence weight 0 for every key
        lse = tl.load(lse_ptr + m, mask=m < q[1], other=float("inf"))
        delta = tl.load(delta_ptr + m, mask=m < q[1], other=0.0)
    else:
        lse = tl.load(lse_ptr + m)
        delta = tl.load(delta_ptr + m)
    # Everything here is transposed, [keys, queries]: what is summed over queries is then a left operand as it stands.
    p = tl.exp2(_scores(k, n, k0, k1, q, m, q0, q1, D, D1, CHUNK, PRECISION) * scale - (lse * _LOG2E)[None, :])
    grad0, grad1 = _load2(grad, m, D, D0, D1, MASKED)
    grad_v0, grad_v1 = _accumulate(p, grad0, grad1, grad_v0, grad_v1, D1, PRECISION)
    grad_s = p * (_scores(v, n, v0, v1, grad, m, grad0, grad1, D, D1, CHUNK, PRECISION) - delta[None, :])
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
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_k_strides,
    grad_v_strides,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
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
    q = _head(q_ptr, q_strides, queries, b, h)
    k = _head(k_ptr, k_strides, keys, b, h)
    v = _head(v_ptr, v_strides, keys, b, h)
    grad = _head(grad_ptr, grad_strides, queries, b, h)
    lse_ptr += bh * queries
    delta_ptr += bh * queries
    if CHUNK > 0:
        k0 = n
        k1 = n
        v0 = n
        v1 = n
    else:
        k0, k1 = _load2(k, n, D, D0, D1, True)
        v0, v1 = _load2(v, n, D, D0, D1, True)
    grad_k0 = tl.zeros([BLOCK_N, D0], tl.float32)
    grad_k1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
    grad_v0 = tl.zeros([BLOCK_N, D0], tl.float32)
    grad_v1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
    whole = queries // BLOCK_M * BLOCK_M
    for start in range(0, whole, BLOCK_M):
        grad_k0, grad_k1, grad_v0, grad_v1 = _grad_kv_tile(
            k, v, n, k0, k1, v0, v1, q, grad, lse_ptr, delta_ptr, start, scale * _LOG2E, grad_k0, grad_k1, grad_v0, grad_v1,
            D, D0, D1, CHUNK, PRECISION, BLOCK_M, False,
        )  # fmt: skip
    if whole < queries:
        grad_k0, grad_k1, grad_v0, grad_v1 = _grad_kv_tile(
            k, v, n, k0, k1, v0, v1, q, grad, lse_ptr, delta_ptr, whole, scale * _LOG2E, grad_k0, grad_k1, grad_v0, grad_v1,
            D, D0, D1, CHUNK, PRECISION, BLOCK_M, True,
        )  # fmt: skip
    grad_k0 *= scale
    if D1 > 0:
        grad_k1 *= scale
    _store2(_head(grad_k_ptr, grad_k_strides, keys, b, h), grad_k0, grad_k1, n, D, D0, D1)
    _store2(_head(grad_v_ptr, grad_v_strides, keys, b, h), grad_v0, grad_v1, n, D, D0, D1)


def _pieces(D, float32):
    """80 -> (64, 16): see the top of this file. 16 is the least that a product of matrices takes.

    In float32 what is summed over the head dim goes by pieces of 32, anyway, and the registers are better off with one
    accumulator of 128 columns than with two.
    """
    if float32:
        return max(16, triton.next_power_of_2(D)), 0
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


def _forward_configs(queries, keys, D, float32):
    if float32:
        choices = [(4, 2, _tiles(32, 32))]
    elif D <= 96:
        choices = [(8, 3, _tiles(128, 64)), (4, 2, _tiles(64, 64)), (2, 3, _tiles(32, 16))]
    else:
        choices = [(8, 3, _tiles(128, 64)), (8, 3, _tiles(64, 64)), (2, 3, _tiles(32, 16))]
    return _pick(choices, queries, keys)


def _backward_configs(queries, keys, D, float32, own):
    """own: the side a program keeps in registers; it walks over the other. The largest tiles that no target spills with."""
    if float32:
        choices = [(4 if D <= 64 or launching.backend() == "hip" else 8, 1, 32, 32)]
    elif launching.backend() == "hip":
        choices = [(4, 2, 64, 32), (4, 2, 32, 16)]
    elif D <= 96:
        choices = [(8, 2, 128, 32), (4, 2, 64, 32), (4, 2, 32, 16)]
    else:
        choices = [(8, 2, 128, 32 if own == "BLOCK_M" else 16), (8, 2, 32, 32)]
    choices = [(warps, stages, _tiles(*((m, n) if own == "BLOCK_M" else (n, m)))) for warps, stages, m, n in choices]
    return _pick(choices, queries, keys)


def _constants(q):
    D = q.shape[3]
    float32 = q.dtype == torch.float32
    D0, D1 = _pieces(D, float32)
    chunk = min(32, D0) if float32 else 0
    return dict(D=D, D0=D0, D1=D1, CHUNK=chunk, PRECISION=dot_precision(q.dtype), key=("queries", "keys", "D"))


def _forward(q, k, v, scale):
    B, queries, H, D = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, queries, dtype=torch.float32, device=q.device)
    if out.numel():
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
            q.stride(),
            k.stride(),
            v.stride(),
            out.stride(),
            POSITIVE=scale >= 0,
            configs=_forward_configs(queries, keys, D, q.dtype == torch.float32),
            **_constants(q),
        )
    return out, lse


def _backward(grad_out, q, k, v, out, lse, scale, grad_q, grad_k, grad_v):
    B, queries, H, D = q.shape
    keys = k.shape[1]
    if not out.numel():
        grad_k.zero_()
        grad_v.zero_()
        return
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    float32 = q.dtype == torch.float32
    strides = (grad_out.stride(), q.stride(), k.stride(), v.stride())
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
        *strides,
        out.stride(),
        grad_q.stride(),
        configs=_backward_configs(queries, keys, D, float32, "BLOCK_M"),
        **_constants(q),
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
        *strides,
        grad_k.stride(),
        grad_v.stride(),
        configs=_backward_configs(queries, keys, D, float32, "BLOCK_N"),
        **_constants(q),
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
