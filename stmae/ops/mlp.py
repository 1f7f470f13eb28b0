import torch
import torch.nn.functional as F

from . import checks, library
from .linear import cast_fake, check_matrix, column_sum, empty_gradients, product, select_gradients, used, weight_gradient


def mlp(
    x: torch.Tensor, fc1_weight: torch.Tensor, fc1_bias: torch.Tensor, fc2_weight: torch.Tensor, fc2_bias: torch.Tensor
) -> torch.Tensor:
    """The transformer's MLP, fc2(gelu(fc1(x))) with the exact GELU.

    The backward multiplies GELU's derivative in and sums the bias gradient in one pass. On CPUs only the hidden layer before its
    GELU is kept, and that pass recomputes the activation; on GPUs, where it would be bound by memory, both are kept.

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
    (x,) = checks.autocast("mlp", x)
    if not checks.has_kernels(x):
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (p.to(x.dtype) for p in (fc1_weight, fc1_bias, fc2_weight, fc2_bias))
        return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    out, *_ = _op(checks.matrix(x), fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return out.view(*x.shape[:-1], fc2_weight.shape[0])


# Most rows that go through the MLP at a time: enough for the products' full speed, few enough that the activation between
# them stays in the cache and no second tensor of the hidden layer's size is ever allocated.
ROWS = 2048


def pieces(*matrices):
    """The matrices' rows in pieces of at most ROWS, all about as long: a short last one would cost as much as a full one."""
    rows = matrices[0].shape[0]
    count = max(1, -(-rows // ROWS))
    return zip(*(matrix.split(max(1, -(-rows // count))) for matrix in matrices))


def _check(op, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, hidden=None, grad_out=None):
    """What torch.ops.stmae.mlp and its backward take, which someone may call directly: everything that the products read."""
    checks.tensor(op, "x", x, "[M, D]", (None, None))
    checks.tensor(op, "fc1_weight", fc1_weight, "[F, D]", (None, x.shape[1]))
    width = fc1_weight.shape[0]
    checks.tensor(op, "fc1_bias", fc1_bias, "[F]", (width,))
    checks.tensor(op, "fc2_weight", fc2_weight, "[D, F]", (None, width))
    checks.tensor(op, "fc2_bias", fc2_bias, "[D]", (fc2_weight.shape[0],))
    operands = {"x": x, "fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    if op == "mlp_backward":
        checks.tensor(op, "grad_out", grad_out, "[M, D]", (x.shape[0], fc2_weight.shape[0]), (x.dtype,))
        checks.tensor(op, "hidden", hidden, "[M, F]", (x.shape[0], width), (x.dtype,))
        operands |= {"grad_out": grad_out, "hidden": hidden}
    for name, operand in operands.items():
        check_matrix(operand, op, name)


def _cpu(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    _check("mlp", x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    hidden = product(x, fc1_weight, fc1_bias)
    out = x.new_empty(x.shape[0], fc2_weight.shape[0])
    for hidden_rows, out_rows in pieces(hidden, out):
        product(_gelu(hidden_rows), fc2_weight, fc2_bias, out=out_rows)
    return out, hidden, x.new_empty(0), fc1_weight.new_empty(0), fc2_weight.new_empty(0)


def _fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    hidden = x.new_empty(x.shape[0], fc1_weight.shape[0])
    activation = x.new_empty(0 if x.device.type == "cpu" else hidden.shape)
    return (
        x.new_empty(x.shape[0], fc2_weight.shape[0]),
        hidden,
        activation,
        cast_fake(x, fc1_weight),
        cast_fake(x, fc2_weight),
    )


def _backward_cpu(
    grad_out, x, hidden, activation, fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc1_dtype, fc2_dtype, output_mask
):  # fmt: skip
    _check("mlp_backward", x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, hidden, grad_out)
    checks.tensor("mlp_backward", "activation", activation, "[0] (the CPU's backward computes it)", (0,), (x.dtype,))
    checks.gradient_dtype("mlp_backward", "fc1_dtype", fc1_dtype)
    checks.gradient_dtype("mlp_backward", "fc2_dtype", fc2_dtype)
    checks.output_mask("mlp_backward", output_mask, (True,) * 5)
    grad_out, hidden = grad_out.contiguous(), hidden.contiguous()
    needs_x, needs_fc1, needs_fc1_bias, needs_fc2, needs_fc2_bias = output_mask
    grad_x = x.new_empty(x.shape if needs_x else 0)
    fc1 = fc2 = None
    fc1_biases, fc2_biases = [], []
    for g, x_rows, hidden_rows, grad_x_rows in pieces(grad_out, x, hidden, grad_x if needs_x else x):
        if needs_fc2_bias:
            fc2_biases.append(column_sum(g))
        activation, grad_hidden, grad_fc1_bias = _gelu_backward(hidden_rows, product(g, fc2_weight, transposed=True))
        fc1_biases.append(grad_fc1_bias)
        if needs_fc2:
            fc2 = weight_gradient(g, activation, to=fc2)
        del activation
        if needs_x:
            product(grad_hidden, fc1_weight, transposed=True, out=grad_x_rows)
        if needs_fc1:
            fc1 = weight_gradient(grad_hidden, x_rows, to=fc1)
    return (
        grad_x,
        fc1.to(fc1_dtype) if fc1 is not None else x.new_empty(0),
        torch.stack(fc1_biases).sum(0).to(fc1_bias.dtype) if needs_fc1_bias else x.new_empty(0),
        fc2.to(fc2_dtype) if fc2 is not None else x.new_empty(0),
        torch.stack(fc2_biases).sum(0).to(fc2_bias.dtype) if needs_fc2_bias else x.new_empty(0),
    )


def _backward_fake(
    grad_out, x, hidden, activation, fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc1_dtype, fc2_dtype, output_mask
):  # fmt: skip
    inputs = x, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    return empty_gradients(inputs, output_mask, (None, fc1_dtype, None, fc2_dtype, None))


def _setup_context(ctx, inputs, output):
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs
    _, hidden, activation, fc1_cast, fc2_cast = output
    ctx.dtypes = fc1_weight.dtype, fc2_weight.dtype
    parameters = used(fc1_weight, fc1_cast), fc1_bias, used(fc2_weight, fc2_cast), fc2_bias
    ctx.save_for_backward(x, hidden, activation, *parameters)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the hidden layer's size


def _backward(ctx, grad_out, *_):
    if grad_out is None:  # what is behind it has no gradient
        return (None,) * 5
    output_mask = list(ctx.needs_input_grad)  # nothing is computed for frozen weights
    return select_gradients(_backward_op(grad_out.contiguous(), *ctx.saved_tensors, *ctx.dtypes, output_mask), output_mask)


_op = library.define(
    "mlp",
    "(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias)"
    " -> (Tensor out, Tensor hidden, Tensor activation, Tensor fc1_cast, Tensor fc2_cast)",
    fake=_fake,
    cpu=_cpu,
    kernels="mlp",
)
_backward_op = library.define(
    "mlp_backward",
    "(Tensor grad_out, Tensor x, Tensor hidden, Tensor activation, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight,"
    " Tensor fc2_bias, ScalarType fc1_dtype, ScalarType fc2_dtype, bool[] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cpu=_backward_cpu,
    kernels="mlp",
)
_op = library.differentiable(_op, _backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)

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
