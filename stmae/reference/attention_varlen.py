import torch

from .attention import attention


def attention_varlen(
    q: torch.Tensor,  # [total_q, H, D]
    k: torch.Tensor,  # [total_k, H, D]
    v: torch.Tensor,  # [total_k, H, D]
    cu_seqlens_q: torch.Tensor,  # [S + 1]
    cu_seqlens_k: torch.Tensor | None = None,  # [S + 1]
    *,
    scale: float | None = None,
) -> torch.Tensor:  # [total_q, H, D]
    q_offsets = cu_seqlens_q.tolist()
    k_offsets = q_offsets if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outputs = [q[:0]]
    for q0, q1, k0, k1 in zip(q_offsets, q_offsets[1:], k_offsets, k_offsets[1:]):
        outputs.append(attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], scale=scale)[0])
    return torch.cat(outputs)


def attention_varlen_qkvpacked(
    qkv: torch.Tensor,  # [total, 3, H, D]
    cu_seqlens: torch.Tensor,  # [S + 1]
    *,
    scale: float | None = None,
) -> torch.Tensor:  # [total, H, D]
    q, k, v = qkv.unbind(1)
    return attention_varlen(q, k, v, cu_seqlens, scale=scale)
