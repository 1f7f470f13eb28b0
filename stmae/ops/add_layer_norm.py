import math

import torch
import torch.nn.functional as F

from . import checks, library


def add_layer_norm(
    x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual sum and the LayerNorm that follows it: sum = x + branch, out = layer_norm(sum) * weight + bias.

    Args:
        x: [..., D] float32 or bfloat16, the residual stream.
        branch: what is added to it, x's shape; or None.
        weight, bias: [D] float32.
        eps: added to the variance.

    Returns:
        sum in x's dtype (x itself without a branch), and out in x's dtype, or autocast's: what the next product takes.
        Statistics are float32.

    Raises:
        ValueError: wrong shape, dtype or device.

    Source: Ba et al. 2016, equation 4.
    """
    op = "add_layer_norm"
    if not isinstance(x, torch.Tensor) or x.dim() < 1:
        raise ValueError(f"{op}: expected x [..., D] float32 or bfloat16, got {checks.describe(x)}")
    checks.tensor(op, "x", x, "[..., D]", tuple(x.shape))
    if branch is not None:
        checks.tensor(op, "branch", branch, "[..., D] as x", tuple(x.shape))
    for name, parameter in (("weight", weight), ("bias", bias)):
        checks.tensor(op, name, parameter, "[D]", (x.shape[-1],))
    checks.same_device(op, x=x, branch=branch, weight=weight, bias=bias)
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"{op}: expected eps a number of at least 0, got {eps!r}")
    dtype = checks.autocast_dtype(op, x) or x.dtype
    on_cpu = x.device.type == "cpu"
    if not checks.has_kernels(x) or (on_cpu and branch is None):
        x = x if branch is None else x + branch.to(x.dtype)
        return x, F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(dtype)
    if branch is None:
        return x, _layer_norm(x, weight, bias, eps, dtype)[0]
    if on_cpu:
        x, branch, weight, bias = x.contiguous(), branch.contiguous(), weight.float().contiguous(), bias.float().contiguous()
    return _op(x, branch, weight, bias, eps, dtype)[:2]


def _fake(x, branch, weight, bias, eps, dtype):
    return x.new_empty(x.shape), *_layer_norm_fake(x, weight, bias, eps, dtype)


def _layer_norm_fake(x, weight, bias, eps, dtype):
    rows = math.prod(x.shape[:-1]) if x.shape[-1] else 0
    return x.new_empty(x.shape, dtype=dtype), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


def _backward_fake(grad_sum, grad_out, sum, mean, rstd, weight, branch_dtype):
    grad_branch = sum.new_empty(0 if branch_dtype == sum.dtype else sum.shape, dtype=branch_dtype)
    return sum.new_empty(sum.shape), grad_branch, *(weight.new_empty(weight.shape) for _ in range(2))


def _setup_context(ctx, inputs, output):
    _, branch, weight, _, _, _ = inputs
    sum, _, mean, rstd = output
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(sum, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # the last block's sum has no further use: no zeros are made for it


def _backward(ctx, grad_sum, grad_out, *_):
    sum, mean, rstd, weight = ctx.saved_tensors
    if grad_out is None:
        return grad_sum, None if grad_sum is None else grad_sum.to(ctx.branch_dtype), None, None, None, None
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    grad_x, grad_branch, grad_weight, grad_bias = _backward_op(
        grad_sum, grad_out.contiguous(), sum, mean, rstd, weight, ctx.branch_dtype
    )
    return grad_x, grad_x if ctx.branch_dtype == sum.dtype else grad_branch, grad_weight, grad_bias, None, None


def _layer_norm_setup_context(ctx, inputs, output):
    x, weight, *_ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _layer_norm_backward(ctx, grad_out, *_):
    x, mean, rstd, weight = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 5
    grad_x, _, grad_weight, grad_bias = _backward_op(None, grad_out.contiguous(), x, mean, rstd, weight, x.dtype)
    return grad_x, grad_weight, grad_bias, None, None


_op = library.define(
    "add_layer_norm",
    "(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    kernels="add_layer_norm",
)
# Without a branch, on GPUs: the first norm of a stack.
_layer_norm = library.define(
    "_layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    fake=_layer_norm_fake,
    kernels="add_layer_norm",
)
_backward_op = library.define(
    "add_layer_norm_backward",
    "(Tensor? grad_sum, Tensor grad_out, Tensor sum, Tensor mean, Tensor rstd, Tensor weight, ScalarType branch_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernels="add_layer_norm",
)
_op = library.differentiable(_op, _backward, _setup_context)
_layer_norm = library.differentiable(_layer_norm, _layer_norm_backward, _layer_norm_setup_context, public="add_layer_norm")
_backward_op = library.not_twice_differentiable(_backward_op)
