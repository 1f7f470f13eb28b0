"""Counts what a training step launches on a GPU and what it moves through memory, on tensors that hold nothing.

Nothing is computed: every tensor lives on the meta device. An op of this package is entered where a CUDA tensor would enter it,
so that its launcher's Python runs, and with it the torch ops inside; a Triton kernel is counted in place of its launch.

    python tests/kernels/step_traffic.py [--batch 32]     the launches of ViT-L's step, most bytes first
"""

import argparse
import collections
import contextlib
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from stmae import models
from stmae.ops import checks


class Kernel(NamedTuple):
    """A launch, and the bytes of its arguments and results: each read or written once."""

    name: str
    nbytes: int


# Ops that launch nothing, beside views. (What a GPU copies into a new tensor is an op of its own.)
NO_LAUNCH = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "promote_types"}
# Kernels that multiply, bound by more than memory, and those that read the video. The rest moves elements.
COMPUTE = {"mm", "addmm", "_attention", "_grad_q", "_grad_kv"}
COMPUTE |= {"_masked_patchify", "_grad_weight", "_grad_position", "_patch_loss", "_patch_loss_backward"}


def nbytes(values):
    """Of the tensors among ``values``; an expanded one lies in memory once."""
    total = 0
    for x in tree_leaves(values):
        if isinstance(x, torch.Tensor):
            elements = [size for size, stride in zip(x.shape, x.stride()) if stride or not size]
            total += torch.Size(elements).numel() * x.element_size()
    return total


class Launches(TorchDispatchMode):
    """Within, collects the ``kernels`` that a GPU would run, in their order."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "stmae":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        result = func(*args, **kwargs)
        if not func.is_view and name not in NO_LAUNCH:
            new = None if func._schema.is_mutable else result  # what is written in place is among the arguments
            self.kernels.append(Kernel(name, nbytes([args, kwargs, new])))
        return result

    def elementwise(self):
        """Bytes moved by all kernels but the products, attention and those that read the video."""
        return sum(kernel.nbytes for kernel in self.kernels if kernel.name not in COMPUTE)


@contextlib.contextmanager
def counting(dtype=torch.bfloat16):
    """Within, ops on meta tensors run as on a GPU under autocast to ``dtype``; yields the Launches."""
    run, autocast_dtype = JITFunction.run, checks.autocast_dtype
    launches = Launches()

    def record(kernel, *args, grid, warmup, **constants):
        launches.kernels.append(Kernel(kernel.fn.__name__, nbytes([args, constants])))

    JITFunction.run = record
    checks.autocast_dtype = lambda op, x: dtype
    try:
        with launches:
            yield launches
    finally:
        JITFunction.run, checks.autocast_dtype = run, autocast_dtype


def step(build=models.mae_vit_large_patch16, batch=32):
    """The Launches of a pre-training step, forward and backward, of 16x224x224 clips, channels last, under bfloat16 autocast."""
    with torch.device("meta"):
        model = build()
        video = torch.empty(batch, 16, 224, 224, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
        noise = torch.empty(batch, model.config.num_tokens)
    with counting() as launches:
        model(video, noise=noise).loss.backward()
    if any(parameter.grad is None or parameter.grad.dtype != torch.float32 for parameter in model.parameters()):
        raise AssertionError("the step left a parameter without a float32 gradient")
    return launches


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    launches = step(batch=parser.parse_args().batch)
    table = collections.defaultdict(list)
    for kernel in launches.kernels:
        table[kernel.name].append(kernel.nbytes)
    print("| kernel | launches | GB |\n|---|---|---|")
    for name, sizes in sorted(table.items(), key=lambda item: -sum(item[1])):
        print(f"| `{name}` | {len(sizes)} | {sum(sizes) / 1e9:.3f} |")
    print(f"| all | {len(launches.kernels)} | {launches.elementwise() / 1e9:.1f} elementwise |")
