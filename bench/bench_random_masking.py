"""random_masking: selection against two sorts and two argsorts' gathers."""

import pytest
import torch

from stmae import ops, reference

SHAPES = {"quick": [(4, 1568)], "full": [(4, 1568), (64, 1568), (4, 3920)]}  # B, N; ViT-B and L, and 16 frames of H


def official(noise, num_keep):
    """As MAE-ST writes it: two argsorts, then gathers; the mask instead of the masked ids."""
    B, N = noise.shape
    shuffle = torch.argsort(noise, dim=1)
    restore = torch.argsort(shuffle, dim=1)
    mask = torch.ones(B, N, device=noise.device)
    mask[:, :num_keep] = 0
    return shuffle[:, :num_keep], torch.gather(mask, 1, restore)


@pytest.mark.parametrize("shape", SHAPES["full"], ids=lambda s: "x".join(map(str, s)))
def bench_random_masking(shape, compare, device, full):
    if shape not in SHAPES["full" if full else "quick"]:
        pytest.skip("--full")
    noise = torch.rand(shape, device=device)
    K = shape[1] // 10
    for x, y in zip(ops.random_masking(noise, K), reference.random_masking(noise, K)):
        assert torch.equal(x, y)
    compare(
        ours=lambda: ops.random_masking(noise, K),
        reference=lambda: reference.random_masking(noise, K),
        official=lambda: official(noise, K),
        target={"reference": 5},
    )
