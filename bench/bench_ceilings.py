"""What this machine can do: the products and the copy that the other results are shares of."""

import pytest
import torch
from compare import alternate, finished, quantiles

from stmae.ops.linear import product

SIZE = {"cpu": 1536, "cuda": 8192}


def record(benchmark, work, unit, device, rounds=15):
    median = quantiles(alternate({"work": work}, rounds=rounds, device=device)["work"])["p50"]
    benchmark.extra_info["ceiling"] = unit / median / 1e9
    benchmark.pedantic(finished(work, device), rounds=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_product(dtype, benchmark, device):
    n = SIZE[device]
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    record(benchmark, lambda: product(a, b), 2 * n**3, device)
    print(f"\n  {benchmark.extra_info['ceiling']:.0f} GFLOP/s")


def bench_copy(benchmark, device):
    source = torch.randn(64 * 2**20 if device == "cpu" else 2**30, device=device)
    target = torch.empty_like(source)
    record(benchmark, lambda: target.copy_(source), 2 * source.numel() * 4, device)
    print(f"\n  {benchmark.extra_info['ceiling']:.1f} GB/s, read and written")
