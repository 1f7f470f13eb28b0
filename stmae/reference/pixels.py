from collections.abc import Sequence

import torch


def normalized_pixels(
    video: torch.Tensor,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 video [B, C, T, H, W] to (x / 255 - mean) / std; floating video is taken as it is."""
    if video.dtype != torch.uint8:
        return video.to(dtype)
    shift, scale = (torch.as_tensor(x, dtype=torch.float32, device=video.device).view(-1, 1, 1, 1) for x in (mean, std))
    return ((video.float() / 255 - shift) / scale).to(dtype)
