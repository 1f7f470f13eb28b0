"""Mixup, CutMix and label smoothing: a batch of clips and labels becomes a batch of mixed clips and soft targets."""

import math

import torch


def smooth_targets(labels, classes, smoothing):
    """labels int64 [B] -> float32 [B, classes]: 1 - smoothing on the label, smoothing spread evenly over all."""
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return targets.scatter_add_(1, labels[:, None], torch.full((len(labels), 1), 1 - smoothing, device=labels.device))


def mix(clips, targets, mixup, cutmix):
    """Each clip mixed with the clip at the other end of the batch; draws from PyTorch's global generator.

    clips: uint8 [B, T, H, W, C]; targets: [B, classes]; mixup, cutmix: parameters of the Beta distributions, 0 for never.
    Where both are
    set, one of them is taken, each with probability one half. The mixed clips are uint8 again, rounded.
    Sources: Zhang et al., 2017 (arXiv 1710.09412); Yun et al., 2019 (arXiv 1905.04899).
    """
    if mixup <= 0 and cutmix <= 0:
        return clips, targets
    cut = cutmix > 0 and (mixup <= 0 or torch.rand(()).item() < 0.5)
    alpha = cutmix if cut else mixup
    ratio = torch.distributions.Beta(alpha, alpha).sample().item()  # of a clip's own pixels
    other = clips.flip(0)
    if cut:
        height, width = clips.shape[2:4]
        h, w = int(height * math.sqrt(1 - ratio)), int(width * math.sqrt(1 - ratio))
        y, x = int(torch.randint(height, ()).item()), int(torch.randint(width, ()).item())
        top, bottom = max(0, y - h // 2), min(height, y - h // 2 + h)
        left, right = max(0, x - w // 2), min(width, x - w // 2 + w)
        clips = clips.clone()
        clips[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        ratio = 1 - (bottom - top) * (right - left) / (height * width)  # what was really cut
    else:
        clips = torch.lerp(other.float(), clips.float(), ratio).round().to(torch.uint8)
    return clips, ratio * targets + (1 - ratio) * targets.flip(0)
