import torch


def normalized_pixels(video, mean, std, dtype=torch.float32):
    """uint8 video [B, C, T, H, W] to (x / 255 - mean) / std; floating video is taken as it is."""
    if video.dtype != torch.uint8:
        return video.to(dtype)
    mean, std = (torch.as_tensor(x, dtype=torch.float32, device=video.device).view(-1, 1, 1, 1) for x in (mean, std))
    return ((video.float() / 255 - mean) / std).to(dtype)
