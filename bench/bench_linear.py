"""The linear layers of ViT-B, ViT-L and the decoder, forward and backward apart, as they run under autocast: float32 weights.

Beside what torch does by itself: under bfloat16 it casts the weights, multiplies, and casts their gradient back. On a GPU both
are torch's, and there is nothing to compare.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from stmae import ops

SHAPES = {  # rows, K, N
    "base-qkv": (4 * 158, 768, 2304),
    "base-fc2": (4 * 158, 3072, 768),
    "decoder-qkv": (4 * 1569, 512, 1536),
    "decoder-fc1": (4 * 1569, 512, 2048),
    "large-fc1": (158, 1024, 4096),
}
QUICK = ("base-qkv", "decoder-fc1")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_linear(shape, dtype, direction, compare, full, device):
    if not full and shape not in QUICK:
        pytest.skip("only with --full")
    if device == "cuda":
        pytest.skip("torch's own on a GPU")
    rows, K, N = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(rows, K).to(dtype).requires_grad_()
    weight, bias = (torch.randn(N, K) / K**0.5).requires_grad_(), torch.randn(N).requires_grad_()
    grad_out = torch.randn(rows, N).to(dtype)

    def forward(linear):
        autocast = torch.autocast("cpu", dtype) if dtype is torch.bfloat16 else contextlib.nullcontext()
        with autocast:
            return linear(x, weight, bias)

    sides = {"ours": ops.linear, "torch": F.linear}
    outs = {name: forward(linear) for name, linear in sides.items()}

    def backward(name):
        return torch.autograd.grad(outs[name], (x, weight, bias), grad_out, retain_graph=True)

    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    for ours, theirs in zip((outs["ours"], *backward("ours")), (outs["torch"], *backward("torch"))):
        assert (ours - theirs).norm() < tolerance * theirs.norm()

    def run(name):
        if direction == "backward":
            return lambda: backward(name)
        return torch.no_grad()(lambda: forward(sides[name]))

    products = 1 if direction == "forward" else 2
    compare(**{name: run(name) for name in sides}, flops=2 * products * rows * K * N)
