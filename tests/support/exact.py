"""What the ops compute from, in float64."""

import torch

from stmae import reference
from stmae.reference.patch_loss import patchify


def pixels(video, mean, std):
    """As stmae.reference's normalized_pixels, in float64 from the bytes on."""
    if video.dtype != torch.uint8:
        return video.double()
    mean, std = (torch.as_tensor(x, dtype=torch.float64).view(-1, 1, 1, 1) for x in (mean, std))
    return (video.double() / 255 - mean) / std


def masked_patchify(video, keep, weight, bias, position):
    return reference.masked_patchify(pixels(video, 0.45, 0.225), keep, weight, bias, position)


def patch_loss(pred, video, masked, *, patch_size, normalize=True, reduction="none"):
    """The reference's without its rounding to float32: [B, M]."""
    target = reference.gather_tokens(patchify(pixels(video, 0.45, 0.225), patch_size), masked)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    return (pred - target).square().mean(-1)
