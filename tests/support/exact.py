"""What the ops compute from, in float64."""

import torch


def pixels(video, mean, std):
    """As stmae.reference's normalized_pixels, in float64 from the bytes on."""
    if video.dtype != torch.uint8:
        return video.double()
    mean, std = (torch.as_tensor(x, dtype=torch.float64).view(-1, 1, 1, 1) for x in (mean, std))
    return (video.double() / 255 - mean) / std
