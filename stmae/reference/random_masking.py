import torch


def random_masking(
    noise: torch.Tensor,  # [B, N]
    num_keep: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # keep [B, K], masked [B, M]
    order = torch.argsort(noise, dim=1, stable=True)
    return order[:, :num_keep].sort(dim=1).values, order[:, num_keep:].sort(dim=1).values
