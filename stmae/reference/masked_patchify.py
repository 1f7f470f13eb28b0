from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .gather_tokens import gather_tokens
from .pixels import normalized_pixels


def masked_patchify(
    video: torch.Tensor,  # [B, C, T, H, W]
    keep: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [D, C, pt, ph, pw]
    bias: torch.Tensor | None,  # [D]
    position: torch.Tensor | None,  # [N, D]
    *,
    mean: float | Sequence[float] = 0.45,
    std: float | Sequence[float] = 0.225,
) -> torch.Tensor:  # [B, K, D]
    x = normalized_pixels(video, mean, std, weight.dtype)
    x = F.conv3d(x, weight, None if bias is None else bias.to(weight.dtype), stride=weight.shape[2:])  # [B, D, t, h, w]
    x = gather_tokens(x.flatten(2).transpose(1, 2), keep)
    return x if position is None else x + position[keep]
