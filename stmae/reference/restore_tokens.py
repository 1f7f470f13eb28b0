import torch


def restore_tokens(
    tokens: torch.Tensor,  # [B, K, D]
    keep: torch.Tensor,  # [B, K]
    mask_token: torch.Tensor,  # [D]
    position: torch.Tensor,  # [N, D]
) -> torch.Tensor:  # [B, N, D]
    dtype = torch.promote_types(torch.promote_types(tokens.dtype, mask_token.dtype), position.dtype)
    x = mask_token.to(dtype).expand(tokens.shape[0], position.shape[0], -1)
    x = x.scatter(1, keep.unsqueeze(-1).expand_as(tokens), tokens.to(dtype))
    return x + position
