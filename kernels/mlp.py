"""The MLP: torch's products, with GELU between them, whose backward sums the bias gradient in the same pass.

Of each of the hidden layer's elements, in bfloat16, GELU reads and writes 4 bytes forward and 6 backward. Both its input and its
output are kept: making the output again in the backward would write 2 bytes more. GELU is not in the product's epilogue: the one
that cuBLAS has is the tanh approximation.

An H100 issues 35 instructions in the time that memory takes for an element of the forward, and 53 of the backward; a B200 half as
many. `erf` alone takes 25, so that in half precision Phi comes from a shorter formula.
"""

import torch
import triton
import triton.language as tl

from .launching import columns_tile, launch, one
from .linear import bias_gradient, cast, kept, product, weight_gradient
from .sum_rows import parts_of, sum_rows

_FEWEST_ROWS = 64  # in a part: with fewer, the partial sums would weigh


@triton.jit
def _normal(h, EXACT: tl.constexpr):
    """Phi(h) and phi(h) of the standard normal distribution.

    Not EXACT: Abramowitz and Stegun 7.1.26, Phi(-|h|) = (a1 t + ... + a5 t^5) exp(-h^2 / 2) / 2 and t = 1 / (1 + p |h| / sqrt2),
    off by 7.5e-8 at most, and relatively by less than `erf` where Phi is small. One exponential serves both.
    """
    e = tl.exp2(h * h * -0.7213475204444817)  # exp(-h^2 / 2)
    if EXACT:
        cdf = 0.5 + 0.5 * tl.math.erf(h * 0.7071067811865476)
    else:
        t = 1.0 + 0.23164190 * tl.abs(h)
        t = tl.rsqrt(t * t)  # its reciprocal: a division would take three instructions more for ranges that t does not reach
        tail = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t * e
        cdf = tl.where(h < 0, tail, 1.0 - tail)
    return cdf, e * 0.3989422804014327


@triton.jit
def _gelu(hidden_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out = h Phi(h), of dense arrays."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(hidden_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    cdf, _ = _normal(h, hidden_ptr.dtype.element_ty == tl.float32)
    tl.store(out_ptr + i, (h * cdf).to(out_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def _gelu_backward(
    hidden_ptr,  # [rows, columns]
    grad_ptr,  # [rows, columns]
    grad_hidden_ptr,  # [rows, columns]
    partial_ptr,  # [parts, columns], or None
    rows,
    columns,
    rows_in_part,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_hidden = grad (Phi(h) + h phi(h)), and its sums over the rows of each part."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    inside = column < columns
    first = part * rows_in_part
    last = tl.minimum(first + rows_in_part, rows)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < last)[:, None] & inside[None, :]
        where = row[:, None].to(tl.int64) * columns + column[None, :]
        h = tl.load(hidden_ptr + where, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + where, mask=mask, other=0.0).to(tl.float32)
        cdf, density = _normal(h, hidden_ptr.dtype.element_ty == tl.float32)
        grad *= cdf + h * density
        tl.store(grad_hidden_ptr + where, grad.to(grad_hidden_ptr.dtype.element_ty), mask=mask)
        total += grad
    if partial_ptr is not None:
        tl.store(partial_ptr + part.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=inside)


def gelu(hidden):
    out = torch.empty_like(hidden)
    if out.numel():
        count = hidden.numel()
        launch(_gelu, (triton.cdiv(count, 2048),), hidden, out, count, configs=one(4, BLOCK=2048))
    return out


def gelu_backward(hidden, grad, dtype):
    """hidden, grad [rows, columns], dense -> the gradient of hidden, and its column sums in `dtype` (None: not needed, [0])."""
    rows, columns = hidden.shape
    grad_hidden = torch.empty_like(hidden)
    if not hidden.numel():
        return grad_hidden, hidden.new_zeros(0 if dtype is None else columns, dtype=dtype)
    parts, rows_in_part = parts_of(rows, _FEWEST_ROWS)
    partial = None if dtype is None else hidden.new_empty(parts, columns, dtype=torch.float32)
    tile = columns_tile(columns, largest=256)
    launch(
        _gelu_backward,
        (triton.cdiv(columns, tile), parts),
        hidden,
        grad,
        grad_hidden,
        partial,
        rows,
        columns,
        rows_in_part,
        configs=one(4, BLOCK_R=max(1, 2048 // tile), BLOCK_C=tile),
    )
    return grad_hidden, hidden.new_empty(0) if dtype is None else sum_rows(partial, dtype)


def mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    # x [M, D], weights [F, D] and [D, F] -> out [M, D], hidden [M, F] before its GELU and after, the weights' casts or [0]
    fc1, fc1_bias = cast(fc1_weight, fc1_bias, x.dtype)
    fc2, fc2_bias = cast(fc2_weight, fc2_bias, x.dtype)
    hidden = product(x, fc1, fc1_bias)
    activation = gelu(hidden)
    return product(activation, fc2, fc2_bias), hidden, activation, kept(fc1, fc1_weight), kept(fc2, fc2_weight)


def mlp_backward(
    grad_out, x, hidden, activation, fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc1_dtype, fc2_dtype, output_mask
):  # fmt: skip
    # grad_out [M, D], weights as the products took them -> gradients of x and the four parameters; [0] where not needed
    needs_x, needs_fc1, needs_fc1_bias, needs_fc2, needs_fc2_bias = output_mask
    grad_x, grad_fc1, grad_fc1_bias, grad_fc2, grad_fc2_bias = (x.new_empty(0) for _ in range(5))
    if needs_fc2_bias:
        grad_fc2_bias = bias_gradient(grad_out, fc2_bias.dtype)
    if needs_fc2:
        grad_fc2 = weight_gradient(grad_out, activation, fc2_dtype)
    if needs_x or needs_fc1 or needs_fc1_bias:
        grad = torch.mm(grad_out, fc2_weight.to(x.dtype))
        grad_hidden, grad_fc1_bias = gelu_backward(hidden, grad, fc1_bias.dtype if needs_fc1_bias else None)
        del grad
        if needs_x:
            grad_x = torch.mm(grad_hidden, fc1_weight.to(x.dtype))
        if needs_fc1:
            grad_fc1 = weight_gradient(grad_hidden, x, fc1_dtype)
    return grad_x, grad_fc1, grad_fc1_bias, grad_fc2, grad_fc2_bias
