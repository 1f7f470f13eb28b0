import torch.nn.functional as F

from .linear import linear


def mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):  # [..., D] -> [..., D]
    return linear(F.gelu(linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
