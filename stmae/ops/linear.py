import functools
import math
import os
import re

import torch
import torch.nn.functional as F

from . import checks, library

BACKENDS = ("auto", "stmae", "onednn", "torch")
_backend = os.environ.get("STMAE_LINEAR", "auto")
if _backend not in BACKENDS:
    raise ValueError(f"STMAE_LINEAR: expected one of {', '.join(map(repr, BACKENDS))}, got {_backend!r}")
# Below, packing the other operand costs more than the better product gains.
FEWEST_ROWS = {torch.bfloat16: 64, torch.float32: 512}


def set_linear_backend(name: str) -> None:
    """What multiplies the matrices of linear layers on CPUs.

    "stmae": the kernels of this package, which read float32 weights for a bfloat16 product as they pack them, and add a weight's
    gradient up in float32; their results are the same at any number of threads. "onednn": oneDNN for float32, too, where
    torch takes MKL. "torch": its default. "auto": by processor, not by a timing, so that a run resumed on the same kind of
    processor repeats its bits.

    Measured: in AMD's family 25 (Zen 4), whose AVX-512 units have half the width, the kernels here are 1.0 to 1.3 times as fast
    as the better of the libraries, and "auto" takes them for large products. In family 26 (Zen 5) oneDNN's float32 products are
    1.8 to 2.6 times as fast as MKL's, which does not use AVX-512 there, and "auto" takes them. The initial value is that of
    STMAE_LINEAR in the environment.
    """
    global _backend  # noqa: PLW0603
    if name not in BACKENDS:
        raise ValueError(f"set_linear_backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    _backend = name
    uses_kernels.cache_clear()
    uses_onednn.cache_clear()


@functools.cache
def uses_kernels() -> bool:
    """Whether the kernels here multiply large matrices on a CPU."""
    return _backend == "stmae" or (_backend == "auto" and _amd_avx512() == 25)


@functools.cache
def uses_onednn() -> bool:
    """Whether other float32 products on a CPU go through oneDNN."""
    if _backend in ("torch", "onednn"):
        return _backend == "onednn"
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return available and _amd_avx512() >= 25


def _amd_avx512():
    """The family of an AMD processor with AVX-512 (25: Zen 4, 26: Zen 5); 0 for others."""
    return _amd_family() if "avx512" in library.best_cpu_capability() else 0


def _amd_family():
    """AMD's processor family (25: Zen 3 and 4, 26: Zen 5); 0 for others."""
    try:
        with open("/proc/cpuinfo") as file:
            text = file.read()
    except OSError:
        return 0
    match = re.search(r"^cpu family\s*:\s*(\d+)", text, re.MULTILINE)
    return int(match[1]) if match and "AuthenticAMD" in text else 0


def takes(x: torch.Tensor) -> bool:
    """Whether the kernels here multiply a matrix like x."""
    return uses_kernels() and x.shape[0] >= FEWEST_ROWS.get(x.dtype, math.inf)


def product(x, weight, bias=None, *, transposed=False, out=None):
    """x [M, K] times weight [N, K] transposed, or weight [K, N] where ``transposed``, plus bias [N]: [M, N], written to ``out``
    if there is one. weight and bias may be float32 where x is bfloat16."""
    columns = weight.shape[1 if transposed else 0]
    if takes(x) and x.shape[1] and (x.dtype == torch.float32 or x.shape[1] % 2 == 0):  # a bfloat16 product sums pairs
        out = x.new_empty(x.shape[0], columns) if out is None else out
        weight = weight if weight.dtype in (x.dtype, torch.float32) else weight.to(x.dtype)
        _product(out, x.contiguous(), weight.contiguous(), None if bias is None else bias.float().contiguous(), transposed)
        return out
    weight = weight.to(x.dtype).t() if transposed else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype).contiguous()  # oneDNN reads a bias as if it were dense
    if x.dtype == torch.float32 and x.numel() and columns and uses_onednn():
        result = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    elif out is None:
        return F.linear(x, weight, bias)
    elif bias is None:
        return torch.mm(x, weight.t(), out=out)
    else:
        return torch.addmm(bias, x, weight.t(), out=out)
    return result if out is None else out.copy_(result)


def weight_gradient(grad_out, x, *, to=None):
    """grad_out [M, N] transposed times x [M, K]: [N, K] float32, added to ``to`` if there is one."""
    if takes(x):
        out = x.new_empty(grad_out.shape[1], x.shape[1], dtype=torch.float32) if to is None else to
        _weight_gradient(out, grad_out.contiguous(), x.contiguous(), to is not None)
        return out
    if x.dtype == torch.float32 and x.numel() and grad_out.numel() and uses_onednn():
        result = torch.ops.mkldnn._linear_pointwise(grad_out.t(), x.t(), None, "none", [], "")
    else:
        result = grad_out.t() @ x
    return result.float().contiguous() if to is None else to.add_(result)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, as `torch.nn.functional.linear`; on CPUs by the fastest of several ways (`set_linear_backend`).

    Parameters stay in their own dtype: under autocast a CPU product casts them as it runs, and nothing cast is kept; on a GPU a
    weight is cast once, for forward and backward.

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
    if not checks.has_kernels(x):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    out, _ = _op(checks.matrix(x), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _check(op, x, weight, bias, grad_out=None):
    """What torch.ops.stmae.linear and its backward take, which someone may call directly: everything that the products read."""
    checks.tensor(op, "x", x, "[M, K]", (None, None))
    checks.tensor(op, "weight", weight, "[N, K]", (None, x.shape[1]))
    if bias is not None:
        checks.tensor(op, "bias", bias, "[N]", (weight.shape[0],))
    if op == "linear_backward":
        checks.tensor(op, "grad_out", grad_out, "[M, N]", (x.shape[0], weight.shape[0]), (x.dtype,))
    for name, operand in (("x", x), ("weight", weight), ("bias", bias), ("grad_out", grad_out)):
        if operand is not None:
            check_matrix(operand, op, name)


def _cpu(x, weight, bias):
    _check("linear", x, weight, bias)
    return product(x, weight, bias), weight.new_empty(0)


def _fake(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0]), cast_fake(x, weight)


def cast_fake(x, weight):
    """A weight in x's dtype where a GPU's product needs a cast one: an output, so that it is cast once for forward and backward.
    Else nothing, [0]."""
    if x.device.type == "cpu" or x.dtype == weight.dtype:
        return weight.new_empty(0)
    return weight.new_empty(weight.shape, dtype=x.dtype)


def used(weight, cast):
    """The weight as the product took it."""
    return cast if cast.dim() == 2 else weight


def _backward_cpu(grad_out, x, weight, bias, weight_dtype, output_mask):
    _check("linear_backward", x, weight, bias, grad_out)
    checks.gradient_dtype("linear_backward", "weight_dtype", weight_dtype)
    checks.output_mask("linear_backward", output_mask, (True, True, bias is not None))
    return (
        product(grad_out, weight, transposed=True) if output_mask[0] else x.new_empty(0),
        weight_gradient(grad_out, x).to(weight_dtype) if output_mask[1] else x.new_empty(0),
        column_sum(grad_out).to(bias.dtype) if output_mask[2] else x.new_empty(0),
    )


def _backward_fake(grad_out, x, weight, bias, weight_dtype, output_mask):
    return empty_gradients((x, weight, bias), output_mask, (None, weight_dtype, None))


def empty_gradients(inputs, output_mask, dtypes):
    """What a backward op returns: gradients of the ``inputs`` where ``output_mask``, in these dtypes (None: the input's), and
    nothing in place of the others."""
    return tuple(
        x.new_empty(x.shape, dtype=dtype) if want else inputs[0].new_empty(0)
        for x, want, dtype in zip(inputs, output_mask, dtypes)
    )


def select_gradients(gradients, output_mask):
    return tuple(gradient if want else None for gradient, want in zip(gradients, output_mask))


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(x, used(weight, output[1]), bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 3
    output_mask = list(ctx.needs_input_grad)  # nothing is computed for frozen weights
    return select_gradients(_backward_op(grad_out.contiguous(), *ctx.saved_tensors, ctx.weight_dtype, output_mask), output_mask)


_op = library.define(
    "linear", "(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)", fake=_fake, cpu=_cpu, kernels="linear"
)
_backward_op = library.define(
    "linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, ScalarType weight_dtype, bool[] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cpu=_backward_cpu,
    kernels="linear",
)
_op = library.differentiable(_op, _backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)

_product = library.define(
    "linear_product",
    "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, bool transposed) -> ()",
    fake=lambda out, x, weight, bias, transposed: None,
)
_weight_gradient = library.define(
    "linear_weight_gradient",
    "(Tensor(a!) out, Tensor grad_out, Tensor x, bool add) -> ()",
    fake=lambda out, grad_out, x, add: None,
)

# x lies within its storage, aligned: what the kernels check on their own, for operands of products that a library multiplies.
check_matrix = library.define("_check_matrix", "(Tensor x, str op, str name) -> ()", fake=lambda x, op, name: None)

# Sum over the rows of a matrix, float32: the bias gradient.
column_sum = library.define("column_sum", "(Tensor x) -> Tensor", fake=lambda x: x.new_empty(x.shape[1], dtype=torch.float32))
