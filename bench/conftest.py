"""`pytest bench --benchmark-only`: ours beside the reference and what a strong user would run. `--full` for every shape."""

import gc

import pytest
import torch
from compare import alternate, finished, quantiles, ratio, rounds_for


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every shape and dtype, and longer runs")
    parser.addoption("--device", default=None, help="cpu or cuda; cuda when there is one")


@pytest.fixture(scope="session")
def full(request):
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def device(request):
    device = request.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device: expected cpu or cuda, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda: torch {torch.__version__} finds no GPU")
    return device


@pytest.fixture
def compare(benchmark, device, full):
    """compare(ours=f, reference=g, ..., flops=, bytes=, target={"reference": 3.5}): alternating rounds of all sides.

    On a GPU these are times of the device. pytest-benchmark's own columns are those of `ours`, on the host's clock;
    `extra_info` carries the others, the ratios, and the achieved rates.
    """

    def run(*, ours, flops=None, bytes=None, target=None, seconds=None, **others):
        sides = {"ours": ours, **others}
        rounds = rounds_for(sides, seconds=seconds or (6.0 if full else 1.0), device=device)
        gc.collect()
        measured = alternate(sides, rounds=rounds, device=device)
        info = benchmark.extra_info
        info["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        info["threads"] = torch.get_num_threads()
        info["rounds"] = rounds
        info["seconds"] = {name: quantiles(times) for name, times in measured.items()}
        info["ratio"] = {name: ratio(measured[name], measured["ours"]) for name in others}
        info["target"] = target or {} if device == "cpu" else {}  # the goals are a CPU's
        median = info["seconds"]["ours"]["p50"]
        if flops:
            info["gflops"] = flops / median / 1e9
        if bytes:
            info["gbytes"] = bytes / median / 1e9
        shown = ", ".join(f"{value:.2f}x {name}" for name, value in info["ratio"].items())
        print(
            f"\n  {benchmark.name}: {median * 1e3:.2f} ms = {shown}"
            + (f", {info['gflops']:.0f} GFLOP/s" if flops else "")
            + (f", {info['gbytes']:.1f} GB/s" if bytes else "")
        )
        benchmark.pedantic(finished(ours, device), rounds=3)

    return run
