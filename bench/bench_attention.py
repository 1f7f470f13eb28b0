"""Attention, forward and backward apart, at the shapes of ViT-B, ViT-L and ViT-H clips of 16 x 224 x 224, 90 % masked.

Beside scaled_dot_product_attention, as tuned PyTorch calls it, and (where its matrices fit) the reference; on a GPU also
beside flash-attn and xformers where they are installed, and with `--full` the reference under torch.compile.
"""

import pytest
import torch

from bench.compare import compiled
from stmae import ops, reference
from stmae.kernels import attention_backends

SHAPES = {  # B, N, H, D
    "decoder": (4, 1569, 16, 32),
    "base-encoder": (4, 158, 12, 64),
    "large-encoder": (4, 158, 16, 64),
    "huge-encoder": (4, 393, 16, 80),
    "base-dense": (1, 1569, 12, 64),
}
QUICK = ("decoder", "base-encoder")


CLIPS = {"cpu": 1, "cuda": 8}  # times B: a few clips do not fill a GPU
LARGEST_MATRICES = {"cpu": 2**26, "cuda": 2**32}  # bytes of the reference's scores


def implementations(B, H, N, dtype, device, full):
    """Ours, and all that can serve here, by name; with ``full`` on a GPU also the compiled reference."""
    sides = {"ours": ops.attention}
    for name, adapter in attention_backends.ADAPTERS.items():
        if attention_backends.unusable(name, device_type=device, dtype=dtype) is None:
            sides[name] = lambda q, k, v, adapter=adapter: adapter(q, k, v, q.shape[3] ** -0.5)
    scores = 4 * B * H * N * N
    if scores <= LARGEST_MATRICES[device]:
        sides["reference"] = reference.attention
        if device == "cuda" and full:  # on a CPU compiling takes longer than all benches together
            sides["compiled"] = compiled(reference.attention)
    return sides


def target(direction, dtype, shape):
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
    B *= CLIPS[device]
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(B, N, 3, H, D).to(device, dtype).unbind(2))  # views of a projection
    grad_out = torch.randn(B, N, H, D).to(device, dtype)

    sides = implementations(B, H, N, dtype, device, full)
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
    compare(**timed, flops=2 * products * B * H * N * N * D, target={"sdpa": target(direction, dtype, shape)})
