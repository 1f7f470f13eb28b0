import torch
import torch.nn.functional as F

from . import checks, library
from .linear import column_sum, product


def mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """The transformer's MLP, fc2(gelu(fc1(x))) with the exact GELU; on CPUs one op that keeps only the hidden layer before its GELU.

    The backward recomputes the activation in the same pass that multiplies its derivative in and sums the bias gradient.

    Args:
        x: [..., D] float32 or bfloat16.
        fc1_weight, fc1_bias: [F, D] and [F].
        fc2_weight, fc2_bias: [D, F] and [D].

    Returns:
        [..., D] in x's dtype, or autocast's.

    Raises:
        ValueError: wrong shape, dtype or device.

    Source: Vaswani et al. 2017, section 3.3; Hendrycks and Gimpel 2016 for the GELU.
    """
    checks.linear_layer("mlp", x, fc1_weight, fc1_bias, prefix="fc1_")
    checks.tensor("mlp", "fc2_weight", fc2_weight, "[D, F]", (None, fc1_weight.shape[0]))
    checks.tensor("mlp", "fc1_bias", fc1_bias, "[F]", (fc1_weight.shape[0],))
    checks.tensor("mlp", "fc2_bias", fc2_bias, "[D]", (fc2_weight.shape[0],))
    checks.same_device("mlp", x=x, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    (x,) = checks.autocast(x)
    if x.device.type != "cpu":
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (p.to(x.dtype) for p in (fc1_weight, fc1_bias, fc2_weight, fc2_bias))
        return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    out, _ = _op(x.reshape(-1, x.shape[-1]), fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return out.view(*x.shape[:-1], fc2_weight.shape[0])


def _cpu(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    hidden = product(x, fc1_weight.to(x.dtype), fc1_bias.to(x.dtype))
    return product(_gelu(hidden), fc2_weight.to(x.dtype), fc2_bias.to(x.dtype)), hidden


def _fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    return x.new_empty(x.shape[0], fc2_weight.shape[0]), x.new_empty(x.shape[0], fc1_weight.shape[0])


def _backward_cpu(grad_out, x, hidden, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    dtype = x.dtype
    grad_activation = product(grad_out, fc2_weight.to(dtype).t())
    activation, grad_hidden, grad_fc1_bias = _gelu_backward(hidden, grad_activation)
    del grad_activation
    grad_fc2_weight = product(grad_out.t(), activation.t()).to(fc2_weight.dtype)
    del activation
    grad_x = product(grad_hidden, fc1_weight.to(dtype).t())
    grad_fc1_weight = product(grad_hidden.t(), x.t()).to(fc1_weight.dtype)
    return grad_x, grad_fc1_weight, grad_fc1_bias.to(fc1_bias.dtype), grad_fc2_weight, column_sum(grad_out).to(fc2_bias.dtype)


def _backward_fake(grad_out, x, hidden, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    return tuple(torch.empty_like(tensor) for tensor in (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias))


def _setup_context(ctx, inputs, output):
    x, *parameters = inputs
    ctx.save_for_backward(x, output[1], *parameters)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    return _backward_op(grad_out.contiguous(), *ctx.saved_tensors)


_op = library.define(
    "mlp",
    "(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias) -> (Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
)
_backward_op = library.define(
    "mlp_backward",
    "(Tensor grad_out, Tensor x, Tensor hidden, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cpu=_backward_cpu,
)
library.differentiable(_op, _backward, _setup_context)
library.not_twice_differentiable(_backward_op)

_gelu = library.define("gelu", "(Tensor hidden) -> Tensor", fake=torch.empty_like)
# (activation, gradient of hidden, its column sums in float32)
_gelu_backward = library.define(
    "gelu_backward",
    "(Tensor hidden, Tensor grad) -> (Tensor, Tensor, Tensor)",
    fake=lambda hidden, grad: (
        torch.empty_like(hidden),
        torch.empty_like(hidden),
        hidden.new_empty(hidden.shape[1], dtype=torch.float32),
    ),
)
