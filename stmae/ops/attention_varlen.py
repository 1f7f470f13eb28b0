import torch

from . import checks, library
from .attention import _head_dim, _scale, _setup_context


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """`attention` of sequences of any lengths that lie one after another: nothing is padded, nothing computed for padding.

    The queries of sequence s, rows cu_seqlens_q[s] : cu_seqlens_q[s + 1] of q, attend to the keys of the same sequence. On CPUs
    the output has the bits of each sequence by itself, at any number of threads. The host does not wait for a GPU.

    Args:
        q: [total_q, H, D] float32 or bfloat16, dense in the last dimension. D a multiple of 8, at most 128.
        k, v: [total_k, H, D], q's dtype.
        cu_seqlens_q: [S + 1] int32 or int64 on q's device, the offsets of the S sequences: from 0, ascending, up to total_q. A
            sequence may be empty.
        cu_seqlens_k: the same for k and v, up to total_k; None: cu_seqlens_q. A sequence with queries has a key at least.
        scale: what the scores are multiplied by; D ** -0.5 when None.

    Returns:
        [total_q, H, D] in q's dtype (or autocast's), contiguous.

    Raises:
        ValueError: wrong shape, dtype, device or stride.
        RuntimeError: offsets that do not start at 0, ascend and end at the total, or a sequence with queries and no keys (on
            CPUs; see STMAE_DEBUG for GPUs, where such offsets lead to wrong values, never outside of the tensors).

    Source: Dao 2023 (FlashAttention-2), whose `flash_attn_varlen_func` has these arguments.
    """
    op = "attention_varlen"
    if all(isinstance(x, torch.Tensor) for x in (q, k, v)):
        q, k, v = checks.autocast(op, q, k, v)
    checks.tensor(op, "q", q, "[total_q, H, D]", (None,) * 3)
    checks.tensor(op, "k", k, "[total_k, H, D]", (None, *q.shape[1:]), (q.dtype,))
    checks.tensor(op, "v", v, "[total_k, H, D]", tuple(k.shape), (q.dtype,))
    _head_dim(op, q.shape[2])
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.rows(op, name, x)
    checks.offsets(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"{op}: expected cu_seqlens_k for k of other lengths than q, got None for {k.shape[0]} keys")
    checks.offsets(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0], "k", cu_seqlens_q.shape[0])
    checks.same_device(op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return _op(q, k, v, cu_seqlens_q, cu_seqlens_k, _scale(op, scale, q.shape[2]))[0]


def attention_varlen_qkvpacked(qkv: torch.Tensor, cu_seqlens: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """`attention_varlen` on a packed projection: q, k, v = qkv.unbind(1), and one packed gradient.

    Args:
        qkv: [total, 3, H, D] float32 or bfloat16, dense in the last dimension.
        cu_seqlens: [S + 1] int32 or int64 on qkv's device: from 0, ascending, up to total.
        scale: what the scores are multiplied by; D ** -0.5 when None.

    Returns:
        [total, H, D] in qkv's dtype (or autocast's), contiguous.

    Raises:
        ValueError, RuntimeError: as `attention_varlen`.
    """
    op = "attention_varlen_qkvpacked"
    if isinstance(qkv, torch.Tensor):
        (qkv,) = checks.autocast(op, qkv)
    checks.tensor(op, "qkv", qkv, "[total, 3, H, D]", (None, 3, None, None))
    checks.rows(op, "qkv", qkv)
    _head_dim(op, qkv.shape[3])
    checks.offsets(op, "cu_seqlens", cu_seqlens, qkv.shape[0], "qkv")
    checks.same_device(op, qkv=qkv, cu_seqlens=cu_seqlens)
    return _packed_op(qkv, cu_seqlens, _scale(op, scale, qkv.shape[3]))[0]


def _fake(q, k, v, cu_seqlens_q, cu_seqlens_k, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _packed_fake(qkv, cu_seqlens, scale):
    total, _, H, D = qkv.shape
    return qkv.new_empty(total, H, D), qkv.new_empty(H, total, dtype=torch.float32)


def _backward_fake(grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _packed_backward_fake(grad_out, qkv, out, lse, cu_seqlens, scale):
    return qkv.new_empty(qkv.shape)


def _backward(ctx, grad_out, _):
    if grad_out is None:  # what is behind it has no gradient
        return (None,) * 6
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    grads = _backward_op(checks.dense_rows(grad_out), q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.scale)
    return *grads, None, None, None


def _packed_backward(ctx, grad_out, _):
    if grad_out is None:
        return None, None, None
    qkv, cu_seqlens, out, lse = ctx.saved_tensors
    return _packed_backward_op(checks.dense_rows(grad_out), qkv, out, lse, cu_seqlens, ctx.scale), None, None


_op = library.define(
    "attention_varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale) -> (Tensor, Tensor)",
    fake=_fake,
    kernels="attention",
)
_backward_op = library.define(
    "attention_varlen_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernels="attention",
)
_packed_op = library.define(
    "attention_varlen_qkvpacked",
    "(Tensor qkv, Tensor cu_seqlens, float scale) -> (Tensor, Tensor)",
    fake=_packed_fake,
    kernels="attention",
)
_packed_backward_op = library.define(
    "attention_varlen_qkvpacked_backward",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, float scale) -> Tensor",
    fake=_packed_backward_fake,
    kernels="attention",
)
_op = library.differentiable(_op, _backward, _setup_context)
_packed_op = library.differentiable(_packed_op, _packed_backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)
_packed_backward_op = library.not_twice_differentiable(_packed_backward_op)
