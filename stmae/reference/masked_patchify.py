import torch.nn.functional as F

from .gather_tokens import gather_tokens
from .pixels import normalized_pixels


def masked_patchify(video, keep, weight, bias, position, *, mean=0.45, std=0.225):  # [B, C, T, H, W] -> [B, K, D]
    x = normalized_pixels(video, mean, std, weight.dtype)
    x = F.conv3d(x, weight, None if bias is None else bias.to(weight.dtype), stride=weight.shape[2:])  # [B, D, t, h, w]
    x = gather_tokens(x.flatten(2).transpose(1, 2), keep)
    return x if position is None else x + position[keep]
