"""What this machine can do: the products and the copy that the other results are fractions of."""

import pytest
import torch

from bench.compare import alternate, finished, quantiles
from stmae.ops.linear import product

SIZE = {"cpu": 2048, "cuda": 8192}


def record(benchmark, unit, device, rounds=15, **work):
    """The rate of the best of several ways."""
    seconds = alternate(work, rounds=rounds, device=device)
    median, best = min((quantiles(times)["p50"], name) for name, times in seconds.items())
    benchmark.extra_info["ceiling"] = unit / median / 1e9
    benchmark.pedantic(finished(work[best], device), rounds=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_product(dtype, benchmark, device):
    n = SIZE[device]
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    ways = {"torch": lambda: a @ b}
    if device == "cpu":  # on a GPU the products are torch's
        ways["ours"] = lambda: product(a, b)
    record(benchmark, 2 * n**3, device, **ways)
    print(f"\n  {benchmark.extra_info['ceiling']:.0f} GFLOP/s")


def bench_copy(benchmark, device):
    source = torch.randn(64 * 2**20 if device == "cpu" else 2**30, device=device)
    target = torch.empty_like(source)
    record(benchmark, 2 * source.numel() * 4, device, copy=lambda: target.copy_(source))
    print(f"\n  {benchmark.extra_info['ceiling']:.1f} GB/s, read and written")
