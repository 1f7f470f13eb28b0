"""Linear layers: torch's matrix products, with what surrounds them left to their epilogues.

The bias is added by the product (`addmm`), the gradient of a float32 weight comes out of a half-precision product as float32,
and a layer's weight and bias are cast once, in one launch, to serve forward and backward.
"""

import torch
import triton
import triton.language as tl

from . import launching
from .launching import launch, one

_BLOCK = 2048


@triton.jit
def _cast(x_ptr, x_out_ptr, y_ptr, y_out_ptr, x_count, y_count, BLOCK: tl.constexpr):
    """Two dense arrays to another dtype: the first programs take x, the others y (None: there is none)."""
    program = tl.program_id(0)
    programs = tl.cdiv(x_count, BLOCK)
    if program < programs:
        i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < x_count, other=0.0)
        tl.store(x_out_ptr + i, x.to(x_out_ptr.dtype.element_ty), mask=i < x_count)
    elif y_ptr is not None:
        i = (program - programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(y_ptr + i, mask=i < y_count, other=0.0)
        tl.store(y_out_ptr + i, y.to(y_out_ptr.dtype.element_ty), mask=i < y_count)


def cast(weight, bias, dtype):
    """(weight, bias) in `dtype`, bias None where it is; themselves where they are already."""
    if weight.dtype == dtype or bias is None or bias.dtype == dtype or not weight.numel():
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    weight, bias = weight.contiguous(), bias.contiguous()
    outs = tuple(x.new_empty(x.shape, dtype=dtype) for x in (weight, bias))
    counts = weight.numel(), bias.numel()
    grid = (sum(triton.cdiv(count, _BLOCK) for count in counts),)
    launch(_cast, grid, weight, outs[0], bias, outs[1], *counts, configs=one(4, BLOCK=_BLOCK))
    return outs


def product(x, weight, bias):  # x [M, K], weight [N, K], bias [N] or None, all of one dtype -> [M, N]
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def weight_gradient(grad_out, x, dtype):
    """grad_out [M, N] transposed times x [M, K]: [N, K] in `dtype`."""
    grad_out = grad_out.t()
    if dtype == torch.float32 != x.dtype and not x.is_cpu and launching.backend() == "cuda":
        return torch.mm(grad_out, x, out_dtype=dtype)  # neither on AMD's GPUs nor on CPUs
    return torch.mm(grad_out, x).to(dtype)


def kept(used, weight):
    """What the backward needs besides `weight`: its cast, or nothing where the product took itself."""
    return weight.new_empty(0) if used is weight else used


def linear(x, weight, bias):  # x [M, K], weight [N, K], bias [N] or None -> [M, N] and the weight's cast [N, K] or [0]
    used, bias = cast(weight, bias, x.dtype)
    return product(x, used, bias), kept(used, weight)


def linear_backward(grad_out, x, weight, bias, weight_dtype, output_mask):
    # grad_out [M, N], x [M, K], weight [N, K] as the product took it -> gradients of x, weight, bias; [0] where not needed
    return (
        torch.mm(grad_out, weight.to(x.dtype)) if output_mask[0] else x.new_empty(0),
        weight_gradient(grad_out, x, weight_dtype) if output_mask[1] else x.new_empty(0),
        bias_gradient(grad_out, bias.dtype) if output_mask[2] else x.new_empty(0),
    )


def bias_gradient(grad_out, dtype):
    """The column sums of grad_out [M, N]: [N], summed in float32."""
    return grad_out.sum(0, dtype=torch.float32).to(dtype)
