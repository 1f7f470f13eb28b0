import itertools
from collections.abc import Sequence

import torch

from . import checks, library


def random_masking_varlen(
    noise: torch.Tensor, cu_seqlens: torch.Tensor, num_keep: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`random_masking` of sequences of any lengths that lie one after another, each with its own number of kept tokens.

    Ids are numbered through all sequences, so that `gather_tokens` and `restore_tokens` take them with a batch of 1: token i of
    sequence s is cu_seqlens[s] + i. But for that, the ids are those of each sequence by itself.

    Args:
        noise: [sum N] float32, no NaN (an error on CPUs; counts as the largest on GPUs).
        cu_seqlens: [S + 1] int32 or int64 on the noise's device: from 0, ascending, up to sum N.
        num_keep: S ints, how many tokens of each sequence to keep: 1 to N - 1, of an empty sequence 0.

    Returns:
        keep [sum K] and masked [sum N - sum K], int64, ascending: in both the ids of the first sequence, then the second's, ...

    Raises:
        ValueError: wrong shape, dtype or device.
        RuntimeError: offsets that do not start at 0, ascend and end at the total, a num_keep that keeps nothing or everything,
            NaN in the noise (on CPUs; see STMAE_DEBUG for GPUs).
    """
    op = "random_masking_varlen"
    checks.tensor(op, "noise", noise, "[sum N]", (None,), (torch.float32,))
    checks.offsets(op, "cu_seqlens", cu_seqlens, noise.shape[0], "noise")
    checks.same_device(op, noise=noise, cu_seqlens=cu_seqlens)
    counts = checks.integers(op, "num_keep", num_keep, cu_seqlens.shape[0] - 1)
    if any(count < 0 for count in counts) or sum(counts) > noise.shape[0]:
        raise ValueError(f"{op}: expected num_keep of at most the {noise.shape[0]} tokens, none below 0, got {counts}")
    if checks.DEBUG and noise.device.type != "cpu" and not torch.compiler.is_compiling() and noise.isnan().any():
        raise ValueError(f"{op}: expected noise without NaN, got NaN")
    cu_keep = torch.tensor(list(itertools.accumulate(counts, initial=0)), dtype=torch.int64).to(noise.device, non_blocking=True)
    return _op(noise.detach(), cu_seqlens, cu_keep, sum(counts))


def _fake(noise, cu_seqlens, cu_keep, total_keep):
    ids = noise.new_empty(total_keep, dtype=torch.int64)
    return ids, noise.new_empty(noise.shape[0] - total_keep, dtype=torch.int64)


_op = library.define(
    "random_masking_varlen",
    "(Tensor noise, Tensor cu_seqlens, Tensor cu_keep, SymInt total_keep) -> (Tensor, Tensor)",
    fake=_fake,
    kernels="random_masking",
)
