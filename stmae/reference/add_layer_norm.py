import torch
import torch.nn.functional as F


def add_layer_norm(
    x: torch.Tensor,  # [..., D]
    branch: torch.Tensor | None,  # [..., D]
    weight: torch.Tensor,  # [D]
    bias: torch.Tensor,  # [D]
    *,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:  # x + branch and its norm, [..., D] each
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if branch is not None:
        x = x + branch.to(x.dtype)
    exact = torch.promote_types(x.dtype, torch.float32)  # the statistics' dtype: float64 for float64
    return x, F.layer_norm(x.to(exact), x.shape[-1:], weight.to(exact), bias.to(exact), eps).to(dtype)
