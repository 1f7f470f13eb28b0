import torch

from . import checks, library


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Take tokens by id: out[b, i] = x[b, ids[b, i]].

    Args:
        x: [B, N, D] float32 or bfloat16, dense in the last dimension.
        ids: [B, M] int64 in [0, N), no id twice in a row of ids.

    Returns:
        [B, M, D] in x's dtype. The gradient of x is zero at tokens that were not taken.

    Raises:
        ValueError: wrong shape, dtype, device or stride.
        RuntimeError: an id out of range or repeated (on CPUs; see STMAE_DEBUG for GPUs).
    """
    checks.tensor("gather_tokens", "x", x, "[B, N, D]", (None, None, None))
    checks.rows("gather_tokens", "x", x)
    checks.ids("gather_tokens", "ids", ids, x.shape[0], x.shape[1])
    checks.same_device("gather_tokens", x=x, ids=ids)
    return _op(x, ids.contiguous())


def _fake(x, ids):
    return x.new_empty(x.shape[0], ids.shape[1], x.shape[2])


def _backward_fake(grad_out, ids, num_tokens):
    return grad_out.new_empty(grad_out.shape[0], num_tokens, grad_out.shape[2])


def _setup_context(ctx, inputs, output):
    x, ids = inputs
    ctx.save_for_backward(ids)
    ctx.num_tokens = x.shape[1]


def _backward(ctx, grad_out):
    return _backward_op(checks.dense_rows(grad_out), ctx.saved_tensors[0], ctx.num_tokens), None


_op = library.define("gather_tokens", "(Tensor x, Tensor ids) -> Tensor", fake=_fake, kernels="gather_tokens")
_backward_op = library.define(
    "gather_tokens_backward",
    "(Tensor grad_out, Tensor ids, SymInt num_tokens) -> Tensor",
    fake=_backward_fake,
    kernels="gather_tokens",
)
_op = library.differentiable(_op, _backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)
