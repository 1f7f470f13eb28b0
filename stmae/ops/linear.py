import functools
import os
import re

import torch
import torch.nn.functional as F

from . import checks, library

_backend = os.environ.get("STMAE_LINEAR", "auto")


def set_linear_backend(name):
    """Which library multiplies float32 matrices on CPUs: "onednn", "torch" (its default, often MKL), or "auto".

    MKL does not use AVX-512 on AMD's processors. From family 26 on (Zen 5), whose AVX-512 units have their full width,
    oneDNN's products are 1.8 to 2.6 times faster, and "auto" takes it for all three products of a layer. In the AVX-512
    families before, it is 1.1 to 1.4 times faster for the forward and the gradient of the input, and slower for the
    weight's, which stays with MKL. The choice is by processor, not by a timing, so that a run resumed on the same kind of
    processor repeats its bits. The initial value is that of STMAE_LINEAR in the environment.
    """
    global _backend  # noqa: PLW0603
    if name not in ("auto", "onednn", "torch"):
        raise ValueError(f"set_linear_backend: expected 'auto', 'onednn' or 'torch', got {name!r}")
    _backend = name
    uses_onednn.cache_clear()


@functools.cache
def uses_onednn(reduces_rows=False):
    """Whether a float32 product on a CPU goes through oneDNN; reduces_rows: that of a weight's gradient, which sums over rows."""
    if _backend != "auto":
        return _backend == "onednn"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    family = _amd_family()
    return "avx512" in library.best_cpu_capability() and family >= (26 if reduces_rows else 25)


def _amd_family():
    """AMD's processor family (25: Zen 3 and 4, 26: Zen 5); 0 for others."""
    try:
        with open("/proc/cpuinfo") as file:
            text = file.read()
    except OSError:
        return 0
    match = re.search(r"^cpu family\s*:\s*(\d+)", text, re.MULTILINE)
    return int(match[1]) if match and "AuthenticAMD" in text else 0


def product(x, weight, bias=None):
    """x [M, K] times weight [N, K] transposed, plus bias [N]; transposed views are read in place."""
    if x.dtype == torch.float32 and x.numel() and weight.numel() and uses_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product_into(out, x, weight, bias=None):
    """``product`` written to out [M, N]."""
    if x.dtype == torch.float32 and uses_onednn():
        out.copy_(product(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def weight_gradient(grad_out, x):
    """grad_out [M, N] transposed times x [M, K]: [N, K]."""
    if x.dtype == torch.float32 and x.numel() and grad_out.numel() and uses_onednn(reduces_rows=True):
        return torch.ops.mkldnn._linear_pointwise(grad_out.t(), x.t(), None, "none", [], "")
    return grad_out.t() @ x


def linear(x, weight, bias=None):
    """x @ weight.T + bias, as `torch.nn.functional.linear`; on CPUs with the faster matrix library and a fused bias gradient.

    Parameters stay in their own dtype: under autocast a CPU product casts them as it runs, and nothing cast is kept.

    Args:
        x: [..., K] float32 or bfloat16.
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype, or autocast's.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    checks.linear_layer("linear", x, weight, bias)
    (x,) = checks.autocast("linear", x)
    if x.device.type != "cpu":
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    out = _op(checks.matrix(x), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _cpu(x, weight, bias):
    return product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _fake(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward_cpu(grad_out, x, weight, bias):
    grad_x = product(grad_out, weight.to(grad_out.dtype).t())
    grad_weight = weight_gradient(grad_out, x).to(weight.dtype).contiguous()
    return grad_x, grad_weight, grad_out.new_empty(0) if bias is None else column_sum(grad_out).to(bias.dtype)


def _backward_fake(grad_out, x, weight, bias):
    grad_bias = grad_out.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    saved = ctx.saved_tensors  # read once: under activation checkpointing a second reading is refused
    grad_x, grad_weight, grad_bias = _backward_op(grad_out.contiguous(), *saved)
    return grad_x, grad_weight, None if saved[2] is None else grad_bias


_op = library.define("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", fake=_fake, cpu=_cpu)
_backward_op = library.define(
    "linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cpu=_backward_cpu,
)
library.differentiable(_op, _backward, _setup_context)
library.not_twice_differentiable(_backward_op)

# Sum over the rows of a matrix, float32: the bias gradient.
column_sum = library.define(
    "column_sum", "(Tensor x) -> Tensor", fake=lambda x: x.new_empty(x.shape[1], dtype=torch.float32)
)
