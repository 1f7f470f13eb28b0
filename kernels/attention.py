import functools
import math

import torch
import triton
import triton.language as tl

from . import attention_tiles, launching
from .launching import configs, dot_precision, launch, one
from .sequences import sequence

# A head dim that is no power of two is taken in two pieces, D0 the largest power of two in it and D1 what remains
# (80 = 64 + 16, 96 = 64 + 32), each an operand of its own: the products then do no work for padding, where one padded to 128
# would waste 38 % at 80. D1 is 0 where D0 is all; what belongs to the second piece is then a copy of the first that no
# instruction uses.
#
# Below, an array of one head is a tuple (pointer, its rows, stride of a row, stride of a column), and strides are those of
# [B, N, H, D]. Offsets within a head are 32 bits, half the instructions and registers of 64, except in an array so spread out
# that they do not fit (WIDE): its strides are then 64 bits.
#
# What is walked over is taken in tiles of a constant size and a last, smaller one: the least power of two that holds the rest.
#
# Sequences that lie one after another (VARLEN) take the same kernels: a program's tile belongs to the sequence that a table says,
# and what is B above is then the sequence's first row, with the stride of rows for that of B. Sequence s has the places from
# cu_seqlens[s] // BLOCK + s on in the table: enough for its tiles, with at most one left over. Nothing has to be summed to make
# it, so that each place is found by a search of its own, and the size of the launch follows from the total and S.

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _head(ptr, strides, rows, b, h, WIDE: tl.constexpr):
    ptr += b * strides[0] + h * strides[2]
    if WIDE:
        return ptr, rows, tl.cast(strides[1], tl.int64), tl.cast(strides[3], tl.int64)
    else:
        return ptr, rows, strides[1], strides[3]


@triton.jit
def _where(x, row, column):
    return x[0] + (row[:, None] * x[2] + column[None, :] * x[3])


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
    float32 operands of a full head dim, split for tf32x3, do not fit the registers."""
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
def _exp2_polynomial(x):
    """2^x for x < 128 by multiplications and additions alone, with a relative error of at most 1.1e-4 (that of rounding to
    float16 is 4.9e-4, to bfloat16 3.9e-3). Below -126 it is 2^-126.

    2^x = 2^i 2^f with i the integer nearest x. Adding 1.5 * 2^23 leaves i in the last bits; from there it is added to the
    exponent of 2^f: the polynomial of degree 3 that is 1 at 0 and has the least largest relative error on [-1/2, 1/2].
    """
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)  # of a NaN comes what rounds to an infinity
    shifted = x + 12582912.0
    f = x - (shifted - 12582912.0)
    power = ((0.0550089313 * f + 0.24221096) * f + 0.693282927) * f + 1.0
    return (power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x):
    """The first and the last half of the columns. In the layout of a product's result both are registers that a thread has."""
    x = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(x, (0, 2, 1)))


@triton.jit
def _beside(x, y):
    """The inverse of _halves."""
    both = tl.permute(tl.join(x, y), (0, 2, 1))
    return tl.reshape(both, [x.shape[0], 2 * x.shape[1]])


@triton.jit
def exp2(x, EIGHTHS: tl.constexpr):
    """2^x, of the last EIGHTHS (0, 1, 2 or 4) of eight columns by the polynomial.

    A multiprocessor takes 16 exponentials a clock and 128 of anything else; what waits for exponentials gains where some
    are made of multiplications (Shah et al. 2026, FlashAttention-4, section 3).
    """
    if EIGHTHS == 0 or x.shape[1] < 64:
        return tl.exp2(x)
    else:
        first, last = _halves(x)
        if EIGHTHS == 4:
            return _beside(tl.exp2(first), _exp2_polynomial(last))
        else:
            third, fourth = _halves(last)
            if EIGHTHS == 2:
                return _beside(tl.exp2(first), _beside(tl.exp2(third), _exp2_polynomial(fourth)))
            else:
                seventh, eighth = _halves(fourth)
                fourth = _beside(tl.exp2(seventh), _exp2_polynomial(eighth))
                return _beside(tl.exp2(first), _beside(tl.exp2(third), fourth))


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
    EIGHTHS: tl.constexpr,
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
):
    """One tile of keys of the online softmax; scores are in units of log 2, `highest` and `total` are those of each query.

    Beyond the last key, that key stands again: it changes no maximum, and has no weight where it is summed.
    """
    n = start + tl.arange(0, WIDTH)
    key = tl.minimum(n, k[1] - 1) if LAST else n
    if CHUNK > 0:
        s = _scores(q, m, q0, q1, k, key, q0, q1, D, D1, CHUNK, PRECISION)
    else:
        k0, k1 = _load2(k, key, D, D0, D1, False)
        s = _scores(q, m, q0, q1, k, key, k0, k1, D, D1, CHUNK, PRECISION)
    # The scale is multiplied into the maximum of a row, not into every score: there it is fused with the subtraction.
    new_highest = tl.maximum(highest, (tl.max(s, axis=1) if POSITIVE else tl.min(s, axis=1)) * scale)
    p = exp2(s * scale - new_highest[:, None], EIGHTHS)
    correction = tl.exp2(highest - new_highest)
    acc0 *= correction[:, None]
    if D1 > 0:
        acc1 *= correction[:, None]
    if SUMS > 0:  # on the tensor cores: the weights as they are rounded for v, times ones
        ones = (
            tl.where((n < k[1])[:, None], tl.full([WIDTH, SUMS], 1.0, tl.float32), 0.0)
            if LAST
            else tl.full([WIDTH, SUMS], 1.0, tl.float32)
        )
        dtype: tl.constexpr = v[0].dtype.element_ty
        total = tl.dot(p.to(dtype), ones.to(dtype), total * correction[:, None], input_precision=PRECISION)
    else:
        if LAST:
            p = tl.where((n < k[1])[None, :], p, 0.0)
        total = total * correction + tl.sum(p, axis=1)
    v0, v1 = _load2(v, n, D, D0, D1, LAST)
    acc0, acc1 = _accumulate(p, v0, v1, acc0, acc1, D1, PRECISION)
    return new_highest, total, acc0, acc1


@triton.jit
def _tile_table(cu_ptr, table_ptr, S, places, STEPS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """table[place] = the sequence whose tile of BLOCK rows has this place, or -1.

    Args:
        cu_ptr: [S + 1] int32 or int64. table_ptr: [places] int32. STEPS: 2^STEPS > S.
    """
    place = tl.program_id(0) * LANES + tl.arange(0, LANES)
    low = tl.zeros([LANES], tl.int32)  # the last sequence that begins at this place or before it
    for step in tl.static_range(STEPS):
        middle = low + (1 << (STEPS - 1 - step))
        first = tl.load(cu_ptr + middle, mask=middle < S, other=0) // BLOCK + middle
        low = tl.where((middle < S) & (first <= place), middle, low)
    begin = tl.load(cu_ptr + low)
    end = tl.load(cu_ptr + low + 1)
    tile = place - (begin // BLOCK + low)
    tl.store(table_ptr + place, tl.where(tile * BLOCK < end - begin, low, -1), mask=place < places)


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
    table_ptr,
    cu_q_ptr,
    cu_k_ptr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    EIGHTHS: tl.constexpr,
    SUMS: tl.constexpr,
    WIDE: tl.constexpr,
    VARLEN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = softmax(scale q k^T) v and lse = log sum exp(scale q k^T), one program for a tile of queries of one head.

    Programs of one head are neighbours, so that its keys and values are read from memory once.

    Args:
        q_ptr, out_ptr: [B, queries, H, D]. k_ptr, v_ptr: [B, keys, H, D]. lse_ptr: [B, H, queries] float32, dense.
        VARLEN: B is one row of sequences, table_ptr: [places] int32, cu_q_ptr, cu_k_ptr: [S + 1].
        REST: keys % 128, rounded up to a multiple of 16.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    bh = b * H + h
    kb = b
    tile = program % tiles
    if VARLEN:
        s = tl.load(table_ptr + program)
        b, length = sequence(cu_q_ptr, s, queries)
        lse_ptr += h * queries + b
        tile = tl.maximum(program - s - b // BLOCK_M, 0).to(tl.int32)
        queries = length
        kb, keys = sequence(cu_k_ptr, s, keys)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _head(q_ptr, q_strides, queries, b, h, WIDE)
    k = _head(k_ptr, k_strides, keys, kb, h, WIDE)
    v = _head(v_ptr, v_strides, keys, kb, h, WIDE)
    if CHUNK > 0:
        q0 = m
        q1 = m
    else:
        q0, q1 = _load2(q, m, D, D0, D1, True)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SUMS > 0:
        total = tl.zeros([BLOCK_M, SUMS], tl.float32)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    scale *= _LOG2E
    full = keys // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        highest, total, acc0, acc1 = _attend(
            q, m, q0, q1, k, v, start, scale, highest, total, acc0, acc1,
            D, D0, D1, CHUNK, POSITIVE, PRECISION, EIGHTHS, SUMS, BLOCK_N, False,
        )  # fmt: skip
    LEFT: tl.constexpr = (REST - 1) % BLOCK_N + 1
    TAIL: tl.constexpr = (
        max(BLOCK_N // 2, 16) if VARLEN else 16 if LEFT <= 16 else 32 if LEFT <= 32 else 64 if LEFT <= 64 else 128
    )
    if VARLEN and BLOCK_N >= 32 and full + BLOCK_N // 2 < keys:  # half a tile at a time, for what is left
        highest, total, acc0, acc1 = _attend(
            q, m, q0, q1, k, v, full, scale, highest, total, acc0, acc1,
            D, D0, D1, CHUNK, POSITIVE, PRECISION, 0, SUMS, BLOCK_N // 2, False,
        )  # fmt: skip
        full += BLOCK_N // 2
    if full < keys:
        highest, total, acc0, acc1 = _attend(
            q, m, q0, q1, k, v, full, scale, highest, total, acc0, acc1,
            D, D0, D1, CHUNK, POSITIVE, PRECISION, 0, SUMS, TAIL, True,
        )  # fmt: skip
    if SUMS > 0:
        total = tl.max(total, axis=1)  # all columns are the same
    inverse = 1.0 / total
    acc0 *= inverse[:, None]
    if D1 > 0:
        acc1 *= inverse[:, None]
    _store2(_head(out_ptr, out_strides, queries, b, h, WIDE), acc0, acc1, m, D, D0, D1)
    if VARLEN:
        tl.store(lse_ptr + m, (highest + tl.log2(total)) * _LN2, mask=m < queries)
    else:
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
    EIGHTHS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
):
    n = start + tl.arange(0, WIDTH)
    k0, k1 = _load2(k, n, D, D0, D1, LAST)
    p = exp2(_scores(q, m, q0, q1, k, n, k0, k1, D, D1, CHUNK, PRECISION) * scale - lse[:, None], EIGHTHS)
    if LAST:
        p = tl.where((n < k[1])[None, :], p, 0.0)
    if CHUNK > 0:
        grad_p = _scores(grad, m, grad0, grad1, v, n, grad0, grad1, D, D1, CHUNK, PRECISION)
    else:
        v0, v1 = _load2(v, n, D, D0, D1, LAST)
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
    rows_ptr,
    grad_q_ptr,
    scale,
    B,
    H,
    queries,
    keys,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    grad_q_strides,
    table_ptr,
    cu_q_ptr,
    cu_k_ptr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    EIGHTHS: tl.constexpr,
    WIDE: tl.constexpr,
    VARLEN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_q = scale dS k with dS = P (grad v^T - delta), delta = rowsum(grad out). One program a tile of queries of one head.

    It leaves for _grad_kv what that needs of every query: lse in units of log 2, and delta.

    Args:
        grad_ptr, q_ptr, out_ptr, grad_q_ptr: [B, queries, H, D]. k_ptr, v_ptr: [B, keys, H, D].
        lse_ptr: [B, H, queries] float32. rows_ptr: [2, B, H, queries] float32. Both dense.
        VARLEN: as in _attention.
        REST: keys % 128, rounded up to a multiple of 16.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    bh = b * H + h
    kb = b
    tile = program % tiles
    if VARLEN:
        s = tl.load(table_ptr + program)
        b, length = sequence(cu_q_ptr, s, queries)
        row = h * queries + b
        delta_row = H * queries.to(tl.int64) + row
        tile = tl.maximum(program - s - b // BLOCK_M, 0).to(tl.int32)
        queries = length
        kb, keys = sequence(cu_k_ptr, s, keys)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _head(q_ptr, q_strides, queries, b, h, WIDE)
    k = _head(k_ptr, k_strides, keys, kb, h, WIDE)
    v = _head(v_ptr, v_strides, keys, kb, h, WIDE)
    grad = _head(grad_ptr, grad_strides, queries, b, h, WIDE)
    grad0, grad1 = _load2(grad, m, D, D0, D1, True)
    out0, out1 = _load2(_head(out_ptr, out_strides, queries, b, h, WIDE), m, D, D0, D1, True)
    delta = tl.sum(grad0.to(tl.float32) * out0.to(tl.float32), axis=1)
    if D1 > 0:
        delta += tl.sum(grad1.to(tl.float32) * out1.to(tl.float32), axis=1)
    inside = m < queries
    if VARLEN:
        lse = tl.load(lse_ptr + row + m, mask=inside, other=float("inf")) * _LOG2E
        tl.store(rows_ptr + row + m, lse, mask=inside)
        tl.store(rows_ptr + delta_row + m, delta, mask=inside)
    else:
        lse = tl.load(lse_ptr + bh * queries + m, mask=inside, other=float("inf")) * _LOG2E
        tl.store(rows_ptr + bh * queries + m, lse, mask=inside)
        tl.store(rows_ptr + (B * H + bh) * queries + m, delta, mask=inside)
    if CHUNK > 0:
        q0 = m
        q1 = m
    else:
        q0, q1 = _load2(q, m, D, D0, D1, True)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    log_scale = scale * _LOG2E
    full = keys // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        acc0, acc1 = _grad_q_tile(
            q, grad, m, q0, q1, grad0, grad1, k, v, start, log_scale, lse, delta, acc0, acc1,
            D, D0, D1, CHUNK, PRECISION, EIGHTHS, BLOCK_N, False,
        )  # fmt: skip
    LEFT: tl.constexpr = (REST - 1) % BLOCK_N + 1
    TAIL: tl.constexpr = (
        max(BLOCK_N // 2, 16) if VARLEN else 16 if LEFT <= 16 else 32 if LEFT <= 32 else 64 if LEFT <= 64 else 128
    )
    if VARLEN and BLOCK_N >= 32 and full + BLOCK_N // 2 < keys:
        acc0, acc1 = _grad_q_tile(
            q, grad, m, q0, q1, grad0, grad1, k, v, full, log_scale, lse, delta, acc0, acc1,
            D, D0, D1, CHUNK, PRECISION, 0, BLOCK_N // 2, False,
        )  # fmt: skip
        full += BLOCK_N // 2
    if full < keys:
        acc0, acc1 = _grad_q_tile(
            q, grad, m, q0, q1, grad0, grad1, k, v, full, log_scale, lse, delta, acc0, acc1,
            D, D0, D1, CHUNK, PRECISION, 0, TAIL, True,
        )  # fmt: skip
    acc0 *= scale
    if D1 > 0:
        acc1 *= scale
    _store2(_head(grad_q_ptr, grad_q_strides, queries, b, h, WIDE), acc0, acc1, m, D, D0, D1)


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
    EIGHTHS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
):
    m = start + tl.arange(0, WIDTH)
    q0, q1 = _load2(q, m, D, D0, D1, LAST)
    if LAST:  # a query that is not there has lse = inf, hence weight 0 for every key
        lse = tl.load(lse_ptr + m, mask=m < q[1], other=float("inf"))
        delta = tl.load(delta_ptr + m, mask=m < q[1], other=0.0)
    else:
        lse = tl.load(lse_ptr + m)
        delta = tl.load(delta_ptr + m)
    # Everything here is transposed, [keys, queries]: what is summed over queries is then a left operand as it stands.
    p = exp2(_scores(k, n, k0, k1, q, m, q0, q1, D, D1, CHUNK, PRECISION) * scale - lse[None, :], EIGHTHS)
    grad0, grad1 = _load2(grad, m, D, D0, D1, LAST)
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
    rows_ptr,
    grad_k_ptr,
    grad_v_ptr,
    scale,
    B,
    H,
    queries,
    keys,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_k_strides,
    grad_v_strides,
    table_ptr,
    cu_q_ptr,
    cu_k_ptr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    EIGHTHS: tl.constexpr,
    WIDE: tl.constexpr,
    VARLEN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_v = P^T grad and grad_k = scale dS^T q. One program owns a tile of keys of one head: no two add to one address.

    Args:
        grad_ptr, q_ptr: [B, queries, H, D]. k_ptr, v_ptr, grad_k_ptr, grad_v_ptr: [B, keys, H, D].
        rows_ptr: [2, B, H, queries] float32, dense, what _grad_q left there.
        VARLEN: as in _attention, the table of tiles of keys.
        REST: queries % 128, rounded up to a multiple of 16.
    """
    tiles = tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    bh = b * H + h
    kb = b
    tile = program % tiles
    if VARLEN:
        s = tl.load(table_ptr + program)
        kb, length = sequence(cu_k_ptr, s, keys)
        tile = tl.maximum(program - s - kb // BLOCK_N, 0).to(tl.int32)
        keys = length
        b, length = sequence(cu_q_ptr, s, queries)
        row = h * queries + b
        delta_row = H * queries.to(tl.int64) + row
        queries = length
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _head(q_ptr, q_strides, queries, b, h, WIDE)
    k = _head(k_ptr, k_strides, keys, kb, h, WIDE)
    v = _head(v_ptr, v_strides, keys, kb, h, WIDE)
    grad = _head(grad_ptr, grad_strides, queries, b, h, WIDE)
    if VARLEN:
        lse_ptr = rows_ptr + row
        delta_ptr = rows_ptr + delta_row
    else:
        lse_ptr = rows_ptr + bh * queries
        delta_ptr = rows_ptr + (B * H + bh) * queries
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
    log_scale = scale * _LOG2E
    full = queries // BLOCK_M * BLOCK_M
    for start in range(0, full, BLOCK_M):
        grad_k0, grad_k1, grad_v0, grad_v1 = _grad_kv_tile(
            k, v, n, k0, k1, v0, v1, q, grad, lse_ptr, delta_ptr, start, log_scale, grad_k0, grad_k1, grad_v0, grad_v1,
            D, D0, D1, CHUNK, PRECISION, EIGHTHS, BLOCK_M, False,
        )  # fmt: skip
    LEFT: tl.constexpr = (REST - 1) % BLOCK_M + 1
    TAIL: tl.constexpr = (
        max(BLOCK_M // 2, 16) if VARLEN else 16 if LEFT <= 16 else 32 if LEFT <= 32 else 64 if LEFT <= 64 else 128
    )
    if VARLEN and BLOCK_M >= 32 and full + BLOCK_M // 2 < queries:
        grad_k0, grad_k1, grad_v0, grad_v1 = _grad_kv_tile(
            k, v, n, k0, k1, v0, v1, q, grad, lse_ptr, delta_ptr, full, log_scale, grad_k0, grad_k1, grad_v0, grad_v1,
            D, D0, D1, CHUNK, PRECISION, 0, BLOCK_M // 2, False,
        )  # fmt: skip
        full += BLOCK_M // 2
    if full < queries:
        grad_k0, grad_k1, grad_v0, grad_v1 = _grad_kv_tile(
            k, v, n, k0, k1, v0, v1, q, grad, lse_ptr, delta_ptr, full, log_scale, grad_k0, grad_k1, grad_v0, grad_v1,
            D, D0, D1, CHUNK, PRECISION, 0, TAIL, True,
        )  # fmt: skip
    grad_k0 *= scale
    if D1 > 0:
        grad_k1 *= scale
    _store2(_head(grad_k_ptr, grad_k_strides, keys, kb, h, WIDE), grad_k0, grad_k1, n, D, D0, D1)
    _store2(_head(grad_v_ptr, grad_v_strides, keys, kb, h, WIDE), grad_v0, grad_v1, n, D, D0, D1)


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


@functools.lru_cache(4096)
def _configurations(kernel, target, D, float32, queries, keys, only_the_default=False):
    """The tiles of `kernel` that do not spill on `target`, the default (see attention_tiles) first."""
    if float32:
        tiles = dict(BLOCK_M=32, BLOCK_N=32, EIGHTHS=0)
        if kernel == "attention":
            return configs((4, 2, tiles))
        if kernel == "grad_q" and 32 < D <= 64 and target in ("sm_90", "sm_100") and attention_tiles.VERSION < (3, 8):
            tiles["BLOCK_M"] = 16  # 32 rows spill there
        if D <= 64 or target == "gfx942":
            return configs((4, 1, tiles))
        if D < 128:  # what masks the columns beyond D takes the registers that 32 rows of both sides need
            tiles["BLOCK_M" if kernel == "grad_q" else "BLOCK_N"] = 16
        return configs((8, 1, tiles))
    tiles = attention_tiles.ordered(kernel, target, D, queries, keys)
    return configs(*tiles[:1] if only_the_default else tiles)


def _constants(kernel, q, k, walked, *arrays, sequences=None):
    """Constants of a kernel and its configurations; `walked` is the length of the side that a program walks over.

    sequences: how many lie one after another. Tiles are then those of their mean length, and are not timed: each batch has
    another mixture, and would be timed anew.
    """
    D, queries, keys = q.shape[3], q.shape[1], k.shape[1]
    if sequences is not None:
        queries, keys = (max(1, rows // sequences) for rows in (queries, keys))
    float32 = q.dtype == torch.float32
    D0, D1 = _pieces(D, float32)
    chosen_for = launching.target(q.device)
    constants = dict(
        D=D,
        D0=D0,
        D1=D1,
        CHUNK=min(32, D0) if float32 else 0,
        PRECISION=dot_precision(q.dtype),
        WIDE=any((x.shape[1] - 1) * x.stride(1) + (D - 1) * x.stride(3) >= 2**31 for x in arrays),
        VARLEN=sequences is not None,
        REST=0 if sequences is not None else triton.cdiv(walked % 128, 16) * 16,
        configs=_configurations(kernel, chosen_for, D, float32, queries, keys, sequences is not None),
        key=("queries", "keys", "D"),
    )
    if kernel == "attention":
        constants["SUMS"] = 8 if not float32 and chosen_for in ("sm_80", "sm_90") else 0
    return constants


def _table(cu_seqlens, rows, block):
    """Of every place for a tile of `block` rows the sequence, or -1: [rows // block + S] int32."""
    S = cu_seqlens.shape[0] - 1
    places = rows // block + S
    table = torch.empty(places, dtype=torch.int32, device=cu_seqlens.device)
    grid = (triton.cdiv(places, 128),)
    launch(_tile_table, grid, cu_seqlens, table, S, places, S.bit_length(), configs=one(4, BLOCK=block, LANES=128))
    return table


def _places(side, rows, B, offsets, constants):
    """(the grid, table and offsets) of a kernel whose programs own tiles of `rows` rows of B clips, or of sequences."""
    name = "BLOCK_N" if side == "k" else "BLOCK_M"
    if offsets is None:
        return lambda tiles: triton.cdiv(rows, tiles[name]) * B, (None, None, None)
    block = constants["configs"].default[name]
    table = _table(offsets[side == "k"], rows, block)
    return lambda tiles: table.shape[0], (table, *offsets)


def _forward(q, k, v, scale, offsets=None):
    B, queries, H, D = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, queries, dtype=torch.float32, device=q.device)
    if out.numel():
        constants = _constants("attention", q, k, keys, q, k, v, out, sequences=_count(offsets))
        places, tables = _places("q", queries, B, offsets, constants)
        strides = [_strides(x, offsets) for x in (q, k, v, out)]
        launch(
            _attention,
            lambda tiles: (places(tiles), H),
            q,
            k,
            v,
            out,
            lse,
            scale,
            H,
            queries,
            keys,
            *strides,
            *tables,
            POSITIVE=scale >= 0,
            **constants,
        )
    return out, lse


def _count(offsets):
    return None if offsets is None else offsets[0].shape[0] - 1


def _strides(x, offsets):
    """Of [B, N, H, D]; of sequences, which lie one after another in the one B, with rows in the place of B."""
    strides = x.stride()
    return strides if offsets is None else (strides[1], *strides[1:])


def _backward(grad_out, q, k, v, out, lse, scale, grad_q, grad_k, grad_v, offsets=None):
    B, queries, H, D = q.shape
    keys = k.shape[1]
    if not out.numel():
        grad_k.zero_()
        grad_v.zero_()
        return
    sequences = _count(offsets)
    rows = torch.empty(2, B, H, queries, dtype=torch.float32, device=q.device)
    strides = [_strides(x, offsets) for x in (grad_out, q, k, v)]
    constants = _constants("grad_q", q, k, keys, grad_out, q, k, v, out, grad_q, sequences=sequences)
    places, tables = _places("q", queries, B, offsets, constants)
    launch(
        _grad_q,
        lambda tiles: (places(tiles), H),
        grad_out,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        rows,
        grad_q,
        scale,
        B,
        H,
        queries,
        keys,
        *strides,
        _strides(out, offsets),
        _strides(grad_q, offsets),
        *tables,
        **constants,
    )
    constants = _constants("grad_kv", q, k, queries, grad_out, q, k, v, grad_k, grad_v, sequences=sequences)
    places, tables = _places("k", keys, B, offsets, constants)
    launch(
        _grad_kv,
        lambda tiles: (places(tiles), H),
        grad_out,
        q,
        k,
        v,
        rows,
        grad_k,
        grad_v,
        scale,
        B,
        H,
        queries,
        keys,
        *strides,
        _strides(grad_k, offsets),
        _strides(grad_v, offsets),
        *tables,
        **constants,
    )


def attention(q, k, v, scale):  # q [B, N, H, D], k, v [B, Nk, H, D] -> out [B, N, H, D], lse [B, H, N] float32
    return _forward(q, k, v, scale)


def attention_backward(grad_out, q, k, v, out, lse, scale):  # grad_out [B, N, H, D] -> the shapes of q, k, v
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _backward(grad_out, q, k, v, out, lse, scale, *grads)
    return grads


def attention_qkvpacked(qkv, scale):  # [B, N, 3, H, D] -> out [B, N, H, D], lse [B, H, N] float32
    return _forward(*qkv.unbind(2), scale)


def attention_qkvpacked_backward(grad_out, qkv, out, lse, scale):  # grad_out [B, N, H, D] -> [B, N, 3, H, D]
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _backward(grad_out, *qkv.unbind(2), out, lse, scale, *grad_qkv.unbind(2))
    return grad_qkv


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, scale):
    # q [total_q, H, D], k, v [total_k, H, D], offsets [S + 1] -> out [total_q, H, D], lse [H, total_q] float32
    out, lse = _forward(q[None], k[None], v[None], scale, (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()))
    return out[0], lse[0]


def attention_varlen_backward(grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale):
    # grad_out [total_q, H, D] -> the shapes of q, k, v
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    offsets = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    _backward(*(x[None] for x in (grad_out, q, k, v, out, lse)), scale, *(x[None] for x in grads), offsets)
    return grads


def attention_varlen_qkvpacked(qkv, cu_seqlens, scale):  # [total, 3, H, D], [S + 1] -> out [total, H, D], lse [H, total] float32
    return attention_varlen(*qkv.unbind(1), cu_seqlens, cu_seqlens, scale)


def attention_varlen_qkvpacked_backward(grad_out, qkv, out, lse, cu_seqlens, scale):  # grad_out [total, H, D] -> [total, 3, H, D]
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    offsets = (cu_seqlens.contiguous(),) * 2
    tensors = (grad_out, *qkv.unbind(1), out, lse)
    _backward(*(x[None] for x in tensors), scale, *(x[None] for x in grad_qkv.unbind(1)), offsets)
    return grad_qkv
