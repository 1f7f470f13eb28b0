from collections.abc import Sequence

import torch

from .masked_patchify import masked_patchify


def masked_patchify_varlen(
    videos: Sequence[torch.Tensor],  # S of [C, T, H, W]
    keep: torch.Tensor,  # [sum K]
    cu_seqlens: torch.Tensor,  # [S + 1]
    weight: torch.Tensor,  # [D, C, pt, ph, pw]
    bias: torch.Tensor | None,  # [D]
    position: torch.Tensor | None,  # [sum N, D]
    *,
    mean: float | Sequence[float] = 0.45,
    std: float | Sequence[float] = 0.225,
) -> torch.Tensor:  # [sum K, D]
    offsets, first = cu_seqlens.tolist(), 0
    dtype = weight.dtype if position is None else torch.promote_types(weight.dtype, position.dtype)
    outputs = [weight.new_empty(0, weight.shape[0], dtype=dtype)]
    for video, start, end in zip(videos, offsets, offsets[1:]):
        tokens = video[0].numel() // weight[0, 0].numel()
        own = None if position is None else position[first : first + tokens]
        outputs.append(masked_patchify(video[None], keep[None, start:end] - first, weight, bias, own, mean=mean, std=std)[0])
        first += tokens
    return torch.cat(outputs)
