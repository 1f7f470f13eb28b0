from collections.abc import Sequence

import torch

from .random_masking import random_masking


def random_masking_varlen(
    noise: torch.Tensor,  # [sum N]
    cu_seqlens: torch.Tensor,  # [S + 1]
    num_keep: Sequence[int],  # [S]
) -> tuple[torch.Tensor, torch.Tensor]:  # keep [sum K], masked [sum M]
    offsets = cu_seqlens.tolist()
    keep, masked = [cu_seqlens.new_empty(0, dtype=torch.int64)], [cu_seqlens.new_empty(0, dtype=torch.int64)]
    for first, last, count in zip(offsets, offsets[1:], num_keep):
        kept, rest = random_masking(noise[None, first:last], count)
        keep.append(first + kept[0])
        masked.append(first + rest[0])
    return torch.cat(keep), torch.cat(masked)
