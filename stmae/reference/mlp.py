import torch
import torch.nn.functional as F

from .linear import linear


def mlp(
    x: torch.Tensor,  # [..., D]
    fc1_weight: torch.Tensor,  # [F, D]
    fc1_bias: torch.Tensor,  # [F]
    fc2_weight: torch.Tensor,  # [D, F]
    fc2_bias: torch.Tensor,  # [D]
) -> torch.Tensor:  # [..., D]
    return linear(F.gelu(linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
