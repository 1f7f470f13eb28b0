from collections.abc import Sequence

import torch

from .patch_loss import patch_loss


def patch_loss_varlen(
    pred: torch.Tensor,  # [sum M, P]
    videos: Sequence[torch.Tensor],  # S of [C, T, H, W]
    masked: torch.Tensor,  # [sum M]
    cu_seqlens: torch.Tensor,  # [S + 1]
    *,
    patch_size: Sequence[int],
    frames: Sequence[Sequence[int]] | None = None,
    normalize: bool | str = True,
    mean: float | Sequence[float] = 0.45,
    std: float | Sequence[float] = 0.225,
    reduction: str = "mean",
) -> torch.Tensor:  # scalar, or [sum M]
    offsets, first, losses = cu_seqlens.tolist(), 0, [pred.new_empty(0, dtype=pred.float().dtype)]
    u, p, q = patch_size
    for index, (video, start, end) in enumerate(zip(videos, offsets, offsets[1:])):
        own = range(video.shape[1]) if frames is None else frames[index]
        losses.append(
            patch_loss(
                pred[None, start:end],
                video[None],
                masked[None, start:end] - first,
                patch_size=patch_size,
                frames=list(own),
                normalize=normalize,
                mean=mean,
                std=std,
                reduction="none",
            )[0]
        )
        first += len(own) // u * (video.shape[2] // p) * (video.shape[3] // q)
    loss = torch.cat(losses)
    return loss if reduction == "none" else loss.sum() / max(1, loss.numel())
