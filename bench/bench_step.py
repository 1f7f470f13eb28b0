"""The pre-training step: ours, the reference, tuned PyTorch and, where transformers is installed, Hugging Face's VideoMAE.

All but the last run the same weights on the same clip and mask; the loss and a gradient are compared before anything is timed.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from bench.steps import Step, check, make

SIDES = ["ours", "reference", "tuned"]
CLIPS = {"cpu": 1, "cuda": 8}  # times the batch: a few clips do not fill a GPU
TARGETS = {"float32": {"reference": 5.0, "tuned": 2.3}, "bfloat16": {"reference": 4.5, "tuned": 1.9}}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", ["small", "base", "large"])
def bench_step(size, dtype, compare, device, full):
    if not full and size != "small":
        pytest.skip("--full runs the larger models")
    batch = {"small": 1, "base": 4, "large": 2}[size] * CLIPS[device]
    steps = {side: make(side, size, dtype, device, batch) for side in SIDES}
    check(steps, dtype)
    if importlib.util.find_spec("transformers"):
        steps["huggingface"] = make("huggingface", size, dtype, device, batch)
    compare(**steps, target=TARGETS[dtype] if size == "base" else None, seconds=60 if full else 6)


def bench_compiled_step(compare, device, full):
    """Ours and tuned PyTorch under torch.compile, beside ours without."""
    if not full:
        pytest.skip("--full runs torch.compile, which takes minutes")
    sides = ["ours", "ours-compiled", "tuned-compiled"]
    steps = {side: make(side, "base", "bfloat16", device, 4 * CLIPS[device]) for side in sides}
    check(steps, "bfloat16")
    compare(**steps, seconds=60)


@pytest.mark.parametrize("size", ["base", "large"])
def bench_sparse_against_dense(size, compare, device, full):
    """90 % masked against encoding every token: the saving that the method is about."""
    if not full:
        pytest.skip("--full runs the larger models")
    sides = {"ours": False, "dense": True}
    batch = 4 * CLIPS[device]
    steps = {name: Step(size, "ops", "bfloat16", device, batch, dense=dense) for name, dense in sides.items()}
    compare(**steps, target={"dense": 6.5} if size == "large" else None, seconds=60)


MEASURE = """
import sys
sys.path[:0] = {path!r}
from bench.steps import Step, torch
step = Step({size!r}, {backend!r}, {dtype!r}, {device!r}, {batch})
step(); step()
if {device!r} == "cuda":
    print(torch.cuda.max_memory_allocated() / 2**30)
else:
    with open("/proc/self/status") as status:  # getrusage would count what the parent held before this program started
        print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20)
"""


def peak_gib(size, backend, dtype, batch, device):
    """Peak memory of a process that runs two steps, in GiB: resident on a CPU, of tensors on a GPU."""
    path = [str(Path(__file__).parents[1]), *sys.path]
    code = MEASURE.format(path=path, size=size, backend=backend, dtype=dtype, batch=batch, device=device)
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def bench_step_memory(dtype, benchmark, device, full):
    if device == "cpu" and not sys.platform.startswith("linux"):
        pytest.skip("peak resident memory is read from /proc")
    if not full and dtype == "float32":
        pytest.skip("--full measures float32, too")
    size = "base" if full else "small"
    peaks = {name: peak_gib(size, name, dtype, 4 * CLIPS[device], device) for name in ("ops", "reference", "tuned")}
    benchmark.extra_info.update(peak_gib=peaks, size=size)
    benchmark.pedantic(lambda: None)
    print(
        f"\n  peak GiB, {size} {dtype}: ours {peaks['ops']:.2f}, {peaks['ops'] / peaks['reference']:.2f} of the reference, "
        f"{peaks['ops'] / peaks['tuned']:.2f} of the tuned"
    )
