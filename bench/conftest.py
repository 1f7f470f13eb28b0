"""`pytest bench --benchmark-only`: ours beside the reference and tuned PyTorch. `--full` for every shape."""

import gc
import json
import os
import platform

import pytest
import torch

from bench.compare import alternate, duration, finished, quantiles, ratio, rounds_for


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every shape and dtype, and longer runs")
    parser.addoption("--results", metavar="FILE", help="JSON, rewritten after each bench: a killed run keeps its numbers")
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


@pytest.fixture(autouse=True)
def float32_is_float32():
    """cuDNN's convolutions round float32 to tf32 unless set otherwise; ours do not, so that nothing could be compared."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


@pytest.fixture(scope="session")
def results(request, device):
    """A list; a bench's name and `extra_info` are added as it ends, and the file that `--results` names is written anew."""
    path = request.config.getoption("--results")
    found = []

    def add(benchmark):
        found.append({"name": benchmark.name, "extra_info": dict(benchmark.extra_info)})
        if path:
            about = {
                "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
            }
            with open(f"{path}.tmp", "w") as file:
                json.dump({**about, "benchmarks": found}, file, indent=1)
            os.replace(f"{path}.tmp", path)

    return add


@pytest.fixture(autouse=True)
def _recorded(request):
    if "benchmark" not in request.fixturenames:
        yield
        return
    results, benchmark = request.getfixturevalue("results"), request.getfixturevalue("benchmark")
    yield
    if benchmark.extra_info:
        results(benchmark)


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
        info["target"] = target or {} if device == "cpu" else {}  # the targets are a CPU's
        median = info["seconds"]["ours"]["p50"]
        if flops:
            info["gflops"] = flops / median / 1e9
        if bytes:
            info["gbytes"] = bytes / median / 1e9
        shown = ", ".join(f"{value:.2f}x {name}" for name, value in info["ratio"].items())
        print(
            f"\n  {benchmark.name}: {duration(median)} = {shown}"
            + (f", {info['gflops']:.0f} GFLOP/s" if flops else "")
            + (f", {info['gbytes']:.1f} GB/s" if bytes else "")
        )
        benchmark.pedantic(finished(ours, device), rounds=3)

    return run
