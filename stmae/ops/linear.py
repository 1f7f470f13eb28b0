import functools
import os
import platform

import torch
import torch.nn.functional as F

from . import checks, library

_backend = os.environ.get("STMAE_LINEAR", "auto")


def set_linear_backend(name):
    """Which library multiplies float32 matrices on CPUs: "onednn", "torch" (its default, often MKL), or "auto".

    "auto" takes oneDNN where MKL does not use AVX-512, which it does on Intel's processors only: there float32 products run 1.8 to
    2.6 times faster through oneDNN. The choice is by vendor, not by a timing, so that a run resumed elsewhere on the same kind of
    processor repeats its bits. The initial value is that of STMAE_LINEAR in the environment.
    """
    global _backend
    if name not in ("auto", "onednn", "torch"):
        raise ValueError(f"set_linear_backend: expected 'auto', 'onednn' or 'torch', got {name!r}")
    _backend = name
    use_onednn.cache_clear()


@functools.cache
def use_onednn():
    """Whether float32 products on CPUs go through oneDNN."""
    if _backend != "auto":
        return _backend == "onednn"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return "avx512" in library.best_cpu_capability() and not _is_intel()


def _is_intel():
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return "GenuineIntel" in cpuinfo.read()
    except OSError:
        return "Intel" in platform.processor()


def product(x, weight, bias=None):
    """x [M, K] times weight [N, K] transposed, plus bias [N]; transposed views are read in place."""
    if x.dtype == torch.float32 and x.numel() and weight.numel() and use_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear(x, weight, bias=None):
    """x @ weight.T + bias, as `torch.nn.functional.linear`; on CPUs with the faster matrix library and a fused bias gradient.

    Parameters stay in their own dtype: under autocast a CPU product casts them as it runs, and nothing cast is kept for the backward.

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
    (x,) = checks.autocast(x)
    if x.device.type != "cpu":
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    out = _op(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _cpu(x, weight, bias):
    return product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _fake(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward_cpu(grad_out, x, weight, bias):
    grad_x = product(grad_out, weight.to(grad_out.dtype).t())
    grad_weight = product(grad_out.t(), x.t()).to(weight.dtype)
    return grad_x, grad_weight, grad_out.new_empty(0) if bias is None else column_sum(grad_out).to(bias.dtype)


def _backward_fake(grad_out, x, weight, bias):
    return torch.empty_like(x), torch.empty_like(weight), grad_out.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    grad_x, grad_weight, grad_bias = _backward_op(grad_out.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_weight, None if ctx.saved_tensors[2] is None else grad_bias


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
