import operator

import torch

from . import checks, library


def random_masking(noise: torch.Tensor, num_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split tokens into kept and masked: in each row, the `num_keep` tokens of the smallest noise are kept.

    Ties go to the lower index. Kept tokens are the same as those of the official `argsort` (MAE-ST, section 3.1), in
    ascending order rather than in the order of the noise: the model does not depend on it, memory access does.

    Args:
        noise: [B, N] float32, no NaN (an error on CPUs; counts as the largest on GPUs). See `stmae.masking.sample_noise`.
        num_keep: K, how many tokens of each row to keep, in [1, N - 1].

    Returns:
        keep [B, K] and masked [B, N - K], int64, ascending in each row.

    Raises:
        ValueError: wrong shape or dtype, or a num_keep that keeps nothing or everything.
        RuntimeError: NaN in noise.
    """
    checks.tensor("random_masking", "noise", noise, "[B, N]", (None, None), (torch.float32,))
    if isinstance(num_keep, bool) or not (hasattr(num_keep, "__index__") or isinstance(num_keep, torch.SymInt)):
        raise ValueError(f"random_masking: expected num_keep an int, got {checks.describe(num_keep)}")
    if not isinstance(num_keep, torch.SymInt):
        num_keep = operator.index(num_keep)  # NumPy's integers, too
    if noise.shape[1] < 2:
        raise ValueError(f"random_masking: expected noise of at least 2 tokens a row, got {checks.describe(noise)}")
    if not 0 < num_keep < noise.shape[1]:
        raise ValueError(
            f"random_masking: expected num_keep in [1, {noise.shape[1] - 1}] for {noise.shape[1]} tokens, got {num_keep} "
            f"(which keeps {'nothing' if num_keep <= 0 else 'everything'})"
        )
    if checks.DEBUG and noise.device.type != "cpu" and not torch.compiler.is_compiling() and noise.isnan().any():
        raise ValueError("random_masking: expected noise without NaN, got NaN")
    return _op(noise.detach(), num_keep)


def _fake(noise, num_keep):
    B, N = noise.shape
    return noise.new_empty(B, num_keep, dtype=torch.int64), noise.new_empty(B, N - num_keep, dtype=torch.int64)


_op = library.define(
    "random_masking", "(Tensor noise, SymInt num_keep) -> (Tensor, Tensor)", fake=_fake, kernels="random_masking"
)
