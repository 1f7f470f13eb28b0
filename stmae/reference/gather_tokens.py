import torch


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # x [B, N, D], ids [B, M] -> [B, M, D]
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[2]))
