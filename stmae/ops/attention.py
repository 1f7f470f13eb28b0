import warnings

import torch

from . import checks, library


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, impl: str = "auto"
) -> torch.Tensor:
    """Exact softmax attention, softmax(scale * q k^T) v per head, with no N x N matrix in memory, forward or backward.

    Args:
        q: [B, N, H, D] float32 or bfloat16. Any strides, as long as the last dimension is dense: views of one packed
            projection are read in place. D a multiple of 8, at most 128.
        k, v: [B, Nk, H, D], q's dtype. Nk is N for self-attention.
        scale: what the scores are multiplied by; D ** -0.5 when None.
        impl: "auto": the project's own kernels (where they cannot run, on a GPU below sm_80 or without Triton 3.6
            or later, SDPA). By name: "triton", "sdpa", "flash_attn",
            "xformers".

    Returns:
        [B, N, H, D] in q's dtype (or autocast's); sums and the softmax are float32. Contiguous from the project's own kernels.

    Raises:
        ValueError: wrong shape, dtype, device or stride, or an `impl` that cannot serve here.

    Source: Dao et al. 2022 (FlashAttention), algorithm 1, and Dao 2023 for the backward.
    """
    op = "attention"
    if isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor):
        q, k, v = checks.autocast(op, q, k, v)
    checks.tensor(op, "q", q, "[B, N, H, D]", (None,) * 4)
    B, N, H, D = q.shape
    checks.tensor(op, "k", k, "[B, Nk, H, D]", (B, None, H, D), (q.dtype,))
    checks.tensor(op, "v", v, "[B, Nk, H, D]", tuple(k.shape), (q.dtype,))
    _head_dim(op, D)
    if k.shape[1] == 0 and q.numel():
        raise ValueError(f"{op}: expected at least one key, got k {checks.describe(k)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.rows(op, name, x)
    checks.same_device(op, q=q, k=k, v=v)
    scale = _scale(op, scale, D)
    adapter = _adapter(impl, q.device, q.dtype)
    return _op(q, k, v, scale)[0] if adapter is None else adapter(q, k, v, scale)


def attention_qkvpacked(qkv: torch.Tensor, *, scale: float | None = None, impl: str = "auto") -> torch.Tensor:
    """`attention` on a packed projection: q, k, v = qkv.unbind(2), and one packed gradient instead of three copied together.

    Args:
        qkv: [B, N, 3, H, D] float32 or bfloat16, dense in the last dimension.
        scale: what the scores are multiplied by; D ** -0.5 when None.
        impl: as for `attention`.

    Returns:
        [B, N, H, D] in qkv's dtype (or autocast's).

    Raises:
        ValueError: wrong shape, dtype or stride.
    """
    op = "attention_qkvpacked"
    if isinstance(qkv, torch.Tensor):
        (qkv,) = checks.autocast(op, qkv)
    checks.tensor(op, "qkv", qkv, "[B, N, 3, H, D]", (None, None, 3, None, None))
    checks.rows(op, "qkv", qkv)
    _head_dim(op, qkv.shape[4])
    scale = _scale(op, scale, qkv.shape[4])
    adapter = _adapter(impl, qkv.device, qkv.dtype)
    return _packed_op(qkv, scale)[0] if adapter is None else adapter(*qkv.unbind(2), scale)


def packed_attention(qkv: torch.Tensor, *, scale: float | None = None, impl: str = "auto") -> torch.Tensor:
    """The name of `attention_qkvpacked` up to 0.1."""
    warnings.warn("stmae.ops.packed_attention is now attention_qkvpacked", DeprecationWarning, stacklevel=2)
    return attention_qkvpacked(qkv, scale=scale, impl=impl)


def _adapter(impl, device, dtype):
    """The function that stands in for the project's kernels; None for these."""
    if impl == "auto" and device.type != "cuda":
        return None
    from stmae.kernels import attention_backends

    chosen, _ = attention_backends.choose(impl, device_type=device.type, dtype=dtype, device_index=device.index)
    return attention_backends.ADAPTERS.get(chosen)


def takes_head_dim(D):
    """Whether there is a kernel for heads of D values."""
    return D % 8 == 0 and 8 <= D <= 128


def _head_dim(op, D):
    if not takes_head_dim(D):
        raise ValueError(f"{op}: expected a head dim D that is a multiple of 8 and at most 128, got {D}")


def _scale(op, scale, D):
    if scale is None:
        return D**-0.5
    if not isinstance(scale, (int, float)) or scale != scale or scale in (float("inf"), float("-inf")):
        raise ValueError(f"{op}: expected scale a finite number or None, got {checks.describe(scale)}")
    return float(scale)


def _fake(q, k, v, scale):
    B, N, H, D = q.shape
    return q.new_empty(B, N, H, D), q.new_empty(B, H, N, dtype=torch.float32)


def _packed_fake(qkv, scale):
    B, N, _, H, D = qkv.shape
    return qkv.new_empty(B, N, H, D), qkv.new_empty(B, H, N, dtype=torch.float32)


def _backward_fake(grad_out, q, k, v, out, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _packed_backward_fake(grad_out, qkv, out, lse, scale):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for lse


def _backward(ctx, grad_out, _):
    if grad_out is None:  # what is behind it has no gradient
        return (None,) * 4
    return *_backward_op(checks.dense_rows(grad_out), *ctx.saved_tensors, ctx.scale), None


def _packed_backward(ctx, grad_out, _):
    if grad_out is None:
        return None, None
    return _packed_backward_op(checks.dense_rows(grad_out), *ctx.saved_tensors, ctx.scale), None


_op = library.define(
    "attention", "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)", fake=_fake, kernels="attention"
)
_backward_op = library.define(
    "attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernels="attention",
)
_packed_op = library.define(
    "attention_qkvpacked", "(Tensor qkv, float scale) -> (Tensor, Tensor)", fake=_packed_fake, kernels="attention"
)
_packed_backward_op = library.define(
    "attention_qkvpacked_backward",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
    fake=_packed_backward_fake,
    kernels="attention",
)
_op = library.differentiable(_op, _backward, _setup_context)
_packed_op = library.differentiable(_packed_op, _packed_backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)
_packed_backward_op = library.not_twice_differentiable(_packed_backward_op)
