import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None = None,  # [N]
) -> torch.Tensor:  # [..., N]
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
