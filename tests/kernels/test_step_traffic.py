"""How much a pre-training step moves through memory outside its products, and in how many launches: see step_traffic.py."""

import os
import subprocess
import sys

import pytest
import torch

from stmae import models
from tests.kernels import lower_bounds, step_traffic

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="interpreted kernels are not launched")


@pytest.fixture(scope="module")
def large():
    """ViT-L, 32 clips, bfloat16 autocast, forward and backward."""
    return step_traffic.step()


def test_bytes_and_launches(large):
    """Adds and norms 13.5 GB, GELU 9, bias sums 2.5, casts of weights 2: their gradients come out of the products as float32."""
    assert large.elementwise() <= 28e9
    assert len(large.kernels) <= 1000


def test_each_weight_is_cast_once(large):
    """And nothing else is: what torch casts are class tokens, positions and their gradients."""
    weights = 4 * 28 + 2  # of a block: qkv, projection and two of the MLP; and those in and out of the decoder
    assert sum(kernel.name == "_cast" for kernel in large.kernels) == weights
    assert sum(kernel.nbytes for kernel in large.kernels if kernel.name == "_to_copy") < 50e6


def test_what_torch_launches_is_little(large):
    """A layer norm, GELU or residual sum by torch would show here."""
    ours = ("_", *step_traffic.COMPUTE)
    by_torch = [kernel for kernel in large.kernels if not kernel.name.startswith(ours)]
    assert not {kernel.name for kernel in by_torch} & {"native_layer_norm", "gelu", "gelu_backward", "native_layer_norm_backward"}
    assert sum(kernel.nbytes for kernel in by_torch if kernel.name != "sum") < 0.6e9


def test_lower_bounds_have_what_the_layers_move(large):
    """Within 5 %: partial sums, statistics and parameters are not in the bounds."""
    with torch.device("meta"):
        work = lower_bounds.step_work(models.mae_vit_large_patch16(), 32)
    names = {
        "_add_layer_norm": "add_layer_norm`",
        "_add_layer_norm_backward": "add_layer_norm`, backward",
        "_gelu": "mlp`",
        "_gelu_backward": "mlp`, backward",
        "_cast": "to bfloat16",
    }
    for kernel, end in names.items():
        rows = [(calls, calls * moved) for op, (calls, moved, *_) in work.items() if op.endswith(end)]
        counted = [launch.nbytes for launch in large.kernels if launch.name == kernel]
        calls, moved = map(sum, zip(*rows))
        assert len(counted) == calls, kernel
        assert moved <= sum(counted) <= 1.05 * moved, kernel
    (sums,) = (moved for op, (_, moved, *_) in work.items() if op.startswith("bias gradients"))
    assert sums <= sum(launch.nbytes for launch in large.kernels if launch.name == "sum") <= 1.05 * sums


def test_launches_are_counted():
    x = torch.empty(10, 4, device="meta", requires_grad=True)
    with step_traffic.counting() as launches:
        y = x.t()[1:] + 1
        (y @ x).sum().backward()
    sizes = {name: [kernel.nbytes for kernel in launches.kernels if kernel.name == name] for name in ("add", "sum", "mm")}
    # Forward [3, 10] + 1, then x's two gradients added up; what sum's backward expands is one number.
    assert sizes == {"add": [4 * 60, 4 * 120], "sum": [4 * 13], "mm": [4 * (30 + 40 + 12), *sizes["mm"][1:]]}
    assert len(sizes["mm"]) == 3
    assert launches.elementwise() == sum(kernel.nbytes for kernel in launches.kernels if kernel.name != "mm")


def test_command_prints_the_table():
    run = subprocess.run(
        [sys.executable, step_traffic.__file__, "--batch", "2"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert lines[0] == "| kernel | launches | GB |" and any(line.startswith("| `_add_layer_norm` | 58 |") for line in lines)
