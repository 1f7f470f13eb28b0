"""The pre-training step: forward, backward, gradient clipping, AdamW. Ours, the reference and a strong user's version.

All run the same weights on the same clip and mask; the loss and a gradient are compared before anything is timed.
"""

import contextlib
import subprocess
import sys

import pytest
import strong
import torch

import stmae
from stmae.models import encoder as model_encoder

model_encoder._BACKENDS["strong"] = strong

FACTORIES = {
    "small": stmae.models.mae_vit_small_patch16,
    "base": stmae.models.mae_vit_base_patch16,
    "large": stmae.models.mae_vit_large_patch16,
}


def precision(dtype, device):
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


class Step:
    """One model and its optimizer on one back end; a call is one training step."""

    def __init__(self, size, backend, dtype, device, batch, *, dense=False):
        torch.manual_seed(0)
        self.model = FACTORIES[size]().to(device)
        self.model.backend = backend
        self.dtype, self.device, self.dense = dtype, device, dense
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        config = self.model.config
        generator = torch.Generator().manual_seed(1)
        video = torch.randint(0, 256, (batch, config.num_frames, *config.image_size, 3), dtype=torch.uint8, generator=generator)
        self.video = video.to(device).permute(0, 4, 1, 2, 3)  # a decoder's frames, [B, C, T, H, W] as a view
        self.noise = torch.rand(batch, config.num_tokens, generator=generator).to(device)

    def loss(self):
        with precision(self.dtype, self.device):
            if not self.dense:
                return self.model(self.video, noise=self.noise).loss
            # The dense encoder sees every token; the decoder gets the visible ones, so that all else is the same work.
            model, ops = self.model, self.model._ops
            keep, masked = model.sample_mask(len(self.video), noise=self.noise)
            tokens = torch.cat([keep.new_zeros(len(keep), 1), keep + 1], dim=1)
            pred = model.decode(ops.gather_tokens(model.encode(self.video), tokens), keep, masked)
            config = model.config
            return ops.patch_loss(pred, self.video, masked, patch_size=config.target_patch_size, frames=config.frames)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.02)
        self.optimizer.step()


def check(steps, dtype):
    """All sides must compute the same thing before a ratio means anything."""
    results = {}
    for name, step in steps.items():
        loss = step.loss()
        loss.backward()
        results[name] = loss.item(), step.model.encoder.blocks[0].qkv.weight.grad.clone()
        step.optimizer.zero_grad(set_to_none=True)
    loss, grad = results["ours"]
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-4
    for name, (other_loss, other_grad) in results.items():
        assert abs(loss - other_loss) < tolerance * abs(loss), f"{name}: loss {other_loss}, ours {loss}"
        assert (grad - other_grad).norm() < 3 * tolerance * grad.norm(), f"{name}: gradients differ"


CLIPS = {"cpu": 1, "cuda": 8}  # times the batch: a few clips do not fill a GPU
TARGETS = {"float32": {"reference": 5.0, "strong": 2.3}, "bfloat16": {"reference": 4.5, "strong": 1.9}}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", ["small", "base", "large"])
def bench_step(size, dtype, compare, device, full):
    if not full and size != "small":
        pytest.skip("--full runs the larger models")
    batch = {"small": 1, "base": 4, "large": 2}[size] * CLIPS[device]
    sides = {"ours": "ops", "reference": "reference", "strong": "strong"}
    steps = {name: Step(size, backend, dtype, device, batch) for name, backend in sides.items()}
    check(steps, dtype)
    compare(**steps, target=TARGETS[dtype] if size == "base" else None, seconds=60 if full else 6)


def bench_compiled_step(compare, device, full):
    """The strong version under torch.compile, where it helps at all."""
    if not full and device == "cpu":
        pytest.skip("--full runs torch.compile, which takes minutes on a CPU")
    batch = 4 * CLIPS[device]
    sides = {"ours": "ops", "compiled": "strong"}
    steps = {name: Step("base", backend, "bfloat16", device, batch) for name, backend in sides.items()}
    check(steps, "bfloat16")
    steps["compiled"].model.compile()
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
from bench_step import Step, torch
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
    code = MEASURE.format(path=sys.path, size=size, backend=backend, dtype=dtype, batch=batch, device=device)
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def bench_step_memory(dtype, benchmark, device, full):
    if device == "cpu" and not sys.platform.startswith("linux"):
        pytest.skip("peak resident memory is read from /proc")
    if not full and dtype == "float32":
        pytest.skip("--full measures float32, too")
    size = "base" if full else "small"
    peaks = {name: peak_gib(size, name, dtype, 4 * CLIPS[device], device) for name in ("ops", "reference", "strong")}
    benchmark.extra_info.update(peak_gib=peaks, size=size)
    benchmark.pedantic(lambda: None)
    print(
        f"\n  peak GiB, {size} {dtype}: ours {peaks['ops']:.2f}, {peaks['ops'] / peaks['reference']:.2f} of the reference, "
        f"{peaks['ops'] / peaks['strong']:.2f} of the strong version"
    )
