import torch

from . import checks, library


def restore_tokens(tokens: torch.Tensor, keep: torch.Tensor, mask_token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Put visible tokens back to their places, the mask token everywhere else, and add positions: the decoder's input.

    out[b, n] = (tokens[b, i] if keep[b, i] == n else mask_token) + position[n]            (MAE-ST, section 3.2)

    A class token is one more visible token: put it first, give it a row of `position`, and shift the ids by one.

    Args:
        tokens: [B, K, D] float32 or bfloat16, dense in the last dimension.
        keep: [B, K] int64 in [0, N), no id twice in a row.
        mask_token: [D].
        position: [N, D].

    Returns:
        [B, N, D] in the dtype that the three promote to.

    Raises:
        ValueError: wrong shape, dtype, device or stride.
        RuntimeError: an id out of range or repeated (on CPUs; see STMAE_DEBUG for GPUs).
    """
    op = "restore_tokens"
    checks.tensor(op, "tokens", tokens, "[B, K, D]", (None, None, None))
    B, K, D = tokens.shape
    checks.rows(op, "tokens", tokens)
    checks.tensor(op, "mask_token", mask_token, "[D]", (D,))
    checks.tensor(op, "position", position, "[N, D]", (None, D))
    checks.ids(op, "keep", keep, B, position.shape[0])
    checks.tensor(op, "keep", keep, "[B, K]", (B, K), (torch.int64,))
    checks.same_device(op, tokens=tokens, keep=keep, mask_token=mask_token, position=position)
    dtype = torch.promote_types(torch.promote_types(tokens.dtype, mask_token.dtype), position.dtype)
    if dtype not in (tokens.dtype, torch.float32):  # float16 with bfloat16 promotes to float32
        tokens = tokens.to(dtype)
    return _op(tokens, keep.contiguous(), mask_token.to(dtype).contiguous(), position.to(dtype).contiguous())


def _fake(tokens, keep, mask_token, position):
    return position.new_empty(tokens.shape[0], *position.shape)


def _backward_fake(grad_out, keep, tokens_dtype):
    B, N, D = grad_out.shape
    return grad_out.new_empty(B, keep.shape[1], D, dtype=tokens_dtype), grad_out.new_empty(D), grad_out.new_empty(N, D)


def _setup_context(ctx, inputs, output):
    tokens, keep, mask_token, position = inputs
    ctx.save_for_backward(keep)
    ctx.tokens_dtype = tokens.dtype


def _backward(ctx, grad_out):
    (keep,) = ctx.saved_tensors
    grad_tokens, grad_mask_token, grad_position = _backward_op(checks.dense_rows(grad_out), keep, ctx.tokens_dtype)
    return grad_tokens, None, grad_mask_token, grad_position


_op = library.define(
    "restore_tokens",
    "(Tensor tokens, Tensor keep, Tensor mask_token, Tensor position) -> Tensor",
    fake=_fake,
    kernels="restore_tokens",
)
_backward_op = library.define(
    "restore_tokens_backward",
    "(Tensor grad_out, Tensor keep, ScalarType tokens_dtype) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernels="restore_tokens",
)
_op = library.differentiable(_op, _backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)
