import torch


def restore_tokens(tokens, keep, mask_token, position):  # tokens [B, K, D], position [N, D] -> [B, N, D]
    dtype = torch.promote_types(torch.promote_types(tokens.dtype, mask_token.dtype), position.dtype)
    x = mask_token.to(dtype).expand(tokens.shape[0], position.shape[0], -1)
    x = x.scatter(1, keep.unsqueeze(-1).expand_as(tokens), tokens.to(dtype))
    return x + position
