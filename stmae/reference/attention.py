import warnings

import torch


def attention(
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,  # [B, N, H, D]
    v: torch.Tensor,  # [B, N, H, D]
    *,
    scale: float | None = None,
) -> torch.Tensor:  # [B, N, H, D]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    weights = (scale * q @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, H, N, N]
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def attention_qkvpacked(qkv: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:  # [B, N, 3, H, D] -> [B, N, H, D]
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale=scale)


def packed_attention(qkv: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """The name of `attention_qkvpacked` up to 0.1."""
    warnings.warn("stmae.reference.packed_attention is now attention_qkvpacked", DeprecationWarning, stacklevel=2)
    return attention_qkvpacked(qkv, scale=scale)
