from collections.abc import Sequence

import torch

from .gather_tokens import gather_tokens
from .pixels import normalized_pixels


def patchify(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """[B, C, T, H, W] -> [B, N, P], values of a patch in the order (frame, row, column, channel)"""
    B, C, T, H, W = video.shape
    u, p, q = patch_size
    x = video.reshape(B, C, T // u, u, H // p, p, W // q, q)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, (T // u) * (H // p) * (W // q), u * p * q * C)


def patch_loss(
    pred: torch.Tensor,  # [B, M, P]
    video: torch.Tensor,  # [B, C, T, H, W]
    masked: torch.Tensor,  # [B, M]
    *,
    patch_size: Sequence[int],
    frames: Sequence[int] | None = None,
    normalize: bool | str = True,
    mean: float | Sequence[float] = 0.45,
    std: float | Sequence[float] = 0.225,
    reduction: str = "mean",
) -> torch.Tensor:  # scalar, or [B, M]
    video = normalized_pixels(video, mean, std)
    if frames is not None:
        video = video.index_select(2, torch.as_tensor(frames, device=video.device))
    target = gather_tokens(patchify(video, patch_size), masked)
    if normalize == "channel":
        target = target.unflatten(-1, (-1, video.shape[1]))  # [B, M, u * p * q, C]
        target = (target - target.mean(-2, keepdim=True)) / (target.var(-2, keepdim=True) ** 0.5 + 1e-6)
        target = target.flatten(-2)
    elif normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    loss = (pred.float() - target).square().mean(-1)
    if reduction == "none":
        return loss
    return loss.sum() / max(1, loss.numel())
