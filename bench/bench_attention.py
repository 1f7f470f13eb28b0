"""Attention, forward and backward apart, at the shapes of ViT-B, ViT-L and ViT-H clips of 16 x 224 x 224, 90 % masked.

Beside scaled_dot_product_attention, what a strong user would call, and (where its matrices fit) the reference.
"""

import pytest
import torch

from stmae import ops, reference

SHAPES = {  # B, N, H, D
    "decoder": (4, 1569, 16, 32),
    "base-encoder": (4, 158, 12, 64),
    "large-encoder": (4, 158, 16, 64),
    "huge-encoder": (4, 393, 16, 80),
    "base-dense": (1, 1569, 12, 64),
}
QUICK = ("decoder", "base-encoder")


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def goal(direction, dtype, shape):
    if dtype is torch.float32:
        return 2.2
    if direction == "forward":
        return 3.5
    return 2.0 if shape == "base-dense" else 3.0  # SDPA's own backward is best there


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_attention(shape, dtype, direction, compare, full, device):
    if not full and shape not in QUICK:
        pytest.skip("only with --full")
    B, N, H, D = SHAPES[shape]
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(B, N, 3, H, D).to(device, dtype).unbind(2))  # views of a projection
    grad_out = torch.randn(B, N, H, D).to(device, dtype)

    sides = {"ours": ops.attention, "sdpa": sdpa}
    if 4 * B * H * N * N <= 2**26:
        sides["reference"] = reference.attention
    outs = {name: attend(q, k, v) for name, attend in sides.items()}
    grads = {name: torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True) for name, out in outs.items()}
    tolerance = 3e-2 if dtype is torch.bfloat16 else 3e-5
    for name in sides:
        torch.testing.assert_close(outs[name], outs["ours"], rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(grads["ours"], grads[name]):
            torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance * ours.abs().max().item())

    def forward(attend):
        def run():
            with torch.no_grad():
                attend(q, k, v)

        return run

    def backward(out):
        return lambda: torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True)

    timed = {name: forward(sides[name]) if direction == "forward" else backward(outs[name]) for name in sides}
    products = 2 if direction == "forward" else 5
    compare(**timed, flops=2 * products * B * H * N * N * D, target={"sdpa": goal(direction, dtype, shape)})
