"""Crop, resize and flip, on uint8 frames as the decoder gives them: [T, H, W, C].

The resize sees a permuted view [T, C, H, W], which is channels-last memory: uint8 bilinear with antialias then takes 0.9 ms for
16 frames to 224x224, a third of what planar memory and a quarter of what float frames take. Normalisation is left to the kernel.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Crop(NamedTuple):
    """What a clip shows of the frames: the ``box`` (top, left, h, w), resized to ``size`` (h, w) and, with ``flip``, mirrored."""

    box: tuple
    size: tuple
    flip: bool = False


def random_crop_box(rng, height, width, scale, aspect):
    """A random box (top, left, h, w): area ``scale`` of the frame, width / height log-uniform in ``aspect``.

    As torchvision's RandomResizedCrop: ten draws, then the largest central box whose aspect is allowed.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def view_box(height, width, size, position=0.5, crop_pct=1.0):
    """The largest box (top, left, h, w) with the aspect of ``size`` (h, w), times ``crop_pct``: deterministic, for evaluation.

    ``position`` in [0, 1] slides it along the longer side: 0 top or left, 0.5 centre, 1 bottom or right (the spatial views).
    Along the other side it is in the middle.
    """
    down, right = height / size[0], width / size[1]
    scale = min(down, right) * crop_pct
    h, w = min(height, max(1, round(size[0] * scale))), min(width, max(1, round(size[1] * scale)))
    top, left = (position if down >= right else 0.5), (position if right >= down else 0.5)
    return round((height - h) * top), round((width - w) * left), h, w


def resized_crop(frames, box, size):
    """Cut ``box`` out of frames uint8 [T, H, W, C] and resize it to ``size`` (h, w): uint8 [T, h, w, C], contiguous."""
    top, left, h, w = box
    cut = torch.as_tensor(frames)[:, top : top + h, left : left + w]
    if (h, w) != tuple(size):
        cut = F.interpolate(cut.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    return cut.contiguous()


def random_erasing(rng, clip, probability):
    """With ``probability``, one box of 2 to 33 % of the frame (aspect 0.3 to 3.3), the same in all frames, becomes noise.

    In place on clip uint8 [T, H, W, C]. Source: Zhong et al., 2017 (arXiv 1708.04896), mode "pixel".
    """
    if probability <= 0 or rng.random() >= probability:
        return clip
    top, left, h, w = random_crop_box(rng, clip.shape[1], clip.shape[2], (0.02, 1 / 3), (0.3, 3.3))
    noise = rng.integers(0, 256, (clip.shape[0], h, w, clip.shape[3]), dtype="uint8")
    clip[:, top : top + h, left : left + w] = torch.from_numpy(noise)
    return clip


def random_crop(rng, height, width, size, scale, aspect, flip):
    """The pre-training augmentation: random resized crop, then a horizontal flip with probability one half if ``flip``."""
    box = random_crop_box(rng, height, width, scale, aspect)
    return Crop(box, tuple(size), bool(flip and rng.random() < 0.5))
