"""RandAugment on clips: the same random operations, at the same strength, for every frame of a clip.

Source: Cubuk et al., 2019 (arXiv 1909.13719), with the operations and strengths that timm names ``rand-mM-mstdS-inc1``, which
fine-tuning
recipes quote: strength M with deviation S out of 10, every operation growing with it, each applied with probability one half.
"""

import torch
import torch.nn.functional as F

GREY = 116  # the fill value of translations, shears and rotations: about the mean of natural images


def rand_augment(rng, clip, operations, magnitude, deviation):
    """``operations`` random operations on clip uint8 [T, H, W, 3]; 0 for none."""
    for name in rng.choice(sorted(OPERATIONS), operations):
        if rng.random() < 0.5:
            strength = min(max(rng.normal(magnitude, deviation), 0.0), 10.0) / 10
            sign = 1 if rng.random() < 0.5 else -1
            clip = OPERATIONS[name](clip, strength, sign)
    return clip


def auto_contrast(clip, strength, sign):
    low, high = clip.amin((1, 2), keepdim=True).float(), clip.amax((1, 2), keepdim=True).float()
    return to_uint8((clip - low) * (255 / (high - low).clamp(min=1)))


def equalize(clip, strength, sign):
    """Each channel of each frame to an even histogram."""
    frames = clip.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)  # [T * C, H * W]
    counts = torch.zeros(frames.shape[0], 256).scatter_add_(1, frames.long(), torch.ones(frames.shape))
    fraction = counts.cumsum(1) - counts / 2
    table = to_uint8(fraction / frames.shape[1] * 255)
    shape = (clip.shape[0], clip.shape[3], clip.shape[1], clip.shape[2])
    return table.gather(1, frames.long()).reshape(shape).permute(0, 2, 3, 1).contiguous()


def invert(clip, strength, sign):
    return 255 - clip


def posterize(clip, strength, sign):
    bits = 4 - int(strength * 4)  # 4 kept at strength 0, none at 10
    return clip & (0xFF << (8 - bits) & 0xFF)


def solarize(clip, strength, sign):
    return torch.where(clip >= 256 - int(strength * 256), 255 - clip, clip)


def solarize_add(clip, strength, sign):
    return torch.where(clip < 128, to_uint8(clip.float() + int(strength * 110)), clip)


def color(clip, strength, sign):
    return blend(grey(clip), clip, 1 + sign * strength * 0.9)


def contrast(clip, strength, sign):
    return blend(grey(clip).mean((1, 2), keepdim=True), clip, 1 + sign * strength * 0.9)


def brightness(clip, strength, sign):
    return blend(torch.zeros(()), clip, 1 + sign * strength * 0.9)


def sharpness(clip, strength, sign):
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    planes = clip.permute(0, 3, 1, 2).float().flatten(0, 1)[:, None]
    smooth = F.conv2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), kernel[None, None])
    shape = (clip.shape[0], clip.shape[3], clip.shape[1], clip.shape[2])
    return blend(smooth.reshape(shape).permute(0, 2, 3, 1), clip, 1 + sign * strength * 0.9)


def rotate(clip, strength, sign):
    angle = torch.tensor(sign * strength * 30.0).deg2rad()
    return warp(clip, [[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]])


def shear_x(clip, strength, sign):
    return warp(clip, [[1, sign * strength * 0.3, 0], [0, 1, 0]])


def shear_y(clip, strength, sign):
    return warp(clip, [[1, 0, 0], [sign * strength * 0.3, 1, 0]])


def translate_x(clip, strength, sign):
    return warp(clip, [[1, 0, sign * strength * 0.45 * 2], [0, 1, 0]])


def translate_y(clip, strength, sign):
    return warp(clip, [[1, 0, 0], [0, 1, sign * strength * 0.45 * 2]])


OPERATIONS = {
    f.__name__: f
    for f in (
        auto_contrast, equalize, invert, posterize, solarize, solarize_add, color, contrast, brightness, sharpness,
        rotate, shear_x, shear_y, translate_x, translate_y,
    )
}  # fmt: skip


def blend(other, clip, factor):
    """``other`` at factor 0, ``clip`` at 1, beyond it at more."""
    return to_uint8(other + (clip.float() - other) * factor)


def grey(clip):
    return (clip.float() * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)


def warp(clip, matrix):
    """Frames sampled at matrix @ (x, y, 1), in pixels scaled so that half the frame is 1 in each direction."""
    height, width = clip.shape[1:3]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    scale = width / height  # turn and shear in pixels, not in the frame's own stretched coordinates
    (a, b, c), (d, e, f) = matrix
    grid = torch.stack([a * x + b * y / scale + c, d * x * scale + e * y + f], dim=-1)
    frames = clip.permute(0, 3, 1, 2).float() - GREY
    out = F.grid_sample(frames, grid.expand(len(clip), -1, -1, -1), mode="bilinear", padding_mode="zeros", align_corners=True)
    return to_uint8(out.permute(0, 2, 3, 1) + GREY).contiguous()


def to_uint8(values):
    return values.round().clamp(0, 255).to(torch.uint8)
