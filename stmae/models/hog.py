"""Histograms of oriented gradients, as a target of reconstruction.

Sources: Dalal and Triggs 2005, for the feature; Wei et al. 2021, "Masked Feature Prediction" (arXiv 2112.09133), for its use as
a target: 9 unsigned orientations, cells of 8x8 pixels, each colour channel by itself, each histogram normalised to length 1. It
is one of the targets of MAE-ST's ablation.
"""

import math

import torch
import torch.nn.functional as F

BINS = 9  # of 20 degrees each
CELL = 8  # pixels


def hog(frames: torch.Tensor) -> torch.Tensor:
    """frames [..., H, W] of any dtype -> histograms [..., H / 8, W / 8, 9] float32.

    A pixel's gradient is the difference of its two neighbours along each axis (at the border, none across it); its length is
    counted in the bin of its direction, which is the same for opposite directions. Brightness and contrast of the frames do not
    matter; an even cell has a histogram of zeros.
    """
    x = frames.float().flatten(0, -3)  # [frames, H, W]
    across = F.pad(x[:, :, 2:] - x[:, :, :-2], (1, 1))
    down = F.pad(x[:, 2:] - x[:, :-2], (0, 0, 1, 1))
    length = (across.square() + down.square()).sqrt()
    bins = (torch.atan2(down, across) / math.pi * BINS).floor().long() % BINS
    # Bin by bin: a scatter would add up in another order at every run on a GPU, and a one-hot tensor is nine times as large.
    histogram = torch.stack([_sum_of_cells(length * (bins == number)) for number in range(BINS)], dim=-1)
    histogram = F.normalize(histogram, dim=-1)
    return histogram.unflatten(0, frames.shape[:-2])


def hog_patches(video: torch.Tensor, frames: list[int], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """video [B, C, T, H, W] -> [B, N, P], the histograms in each patch of its frames ``frames``.

    patch_size: (u, ph, pw), ph and pw multiples of 8. Values of a patch in the order (frame, cell's row, cell's column, channel,
    bin): P = u * (ph / 8) * (pw / 8) * C * 9.
    """
    u, p, q = patch_size[0], patch_size[1] // CELL, patch_size[2] // CELL
    cells = hog(video.index_select(2, torch.tensor(frames, device=video.device)))  # [B, C, F, H / 8, W / 8, 9]
    x = cells.unflatten(4, (-1, q)).unflatten(3, (-1, p)).unflatten(2, (-1, u))  # [B, C, t, u, h, p, w, q, 9]
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1, 8).flatten(4).flatten(1, 3)


def hog_loss(
    pred: torch.Tensor, video: torch.Tensor, masked: torch.Tensor, frames: list[int], patch_size: tuple[int, int, int]
) -> torch.Tensor:
    """Mean squared error of pred [B, M, P] against the histograms of the patches masked [B, M]: a float32 scalar, 0 for an
    empty batch."""
    return (pred.float() - _targets(video, masked, frames, patch_size)).square().sum() / max(1, pred.numel())


def hog_errors(
    pred: torch.Tensor, video: torch.Tensor, masked: torch.Tensor, frames: list[int], patch_size: tuple[int, int, int]
) -> torch.Tensor:
    """The same of each patch: [B, M] float32."""
    return (pred.float() - _targets(video, masked, frames, patch_size)).square().mean(dim=-1)


@torch.no_grad()
def _targets(video: torch.Tensor, masked: torch.Tensor, frames: list[int], patch_size: tuple[int, int, int]) -> torch.Tensor:
    target = hog_patches(video, frames, patch_size)
    return target.gather(1, masked[:, :, None].expand(-1, -1, target.shape[2]))


def draw(histograms: torch.Tensor) -> torch.Tensor:
    """histograms [..., h, w, 9] -> pictures [..., 8 h, 8 w] in [0, 1]: in each cell, for each bin, a stroke along the edge that
    makes such a gradient, as bright as the bin is full."""
    place = torch.arange(CELL, device=histograms.device) - (CELL - 1) / 2
    y, x = place[:, None], place[None, :]
    angle = (torch.arange(BINS, device=histograms.device) + 0.5) * (math.pi / BINS)  # of the gradient: the edge is across it
    distance = (x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]).abs()
    strokes = (1 - distance).clamp(min=0)  # [9, 8, 8]
    cells = torch.einsum("...hwb,byx->...hywx", histograms.float().clamp(min=0), strokes)
    return cells.flatten(-2).flatten(-3, -2).clamp(0, 1)


def _sum_of_cells(x: torch.Tensor) -> torch.Tensor:
    """[frames, H, W] -> [frames, H / 8, W / 8]."""
    return x.unflatten(2, (-1, CELL)).unflatten(1, (-1, CELL)).sum(dim=(2, 4))
