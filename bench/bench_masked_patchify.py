"""masked_patchify: forward and backward against normalise + Conv3d + gather + positions, and against gathering first."""

import pytest
import torch
import torch.nn.functional as F

from bench.compare import compiled
from stmae import ops, reference

WIDTH = {"base": 768, "large": 1024}
CASES = {
    "quick": [(4, "base", "planar"), (4, "base", "channels_last")],
    "full": [(4, "base", "planar"), (4, "base", "channels_last"), (4, "large", "channels_last"), (16, "base", "channels_last")],
}


def gathered_first(video, keep, weight, bias, position):
    """Tuned PyTorch: the visible patches by index, and only those normalised and multiplied."""
    (B, C, T, H, W), (u, p, q) = video.shape, weight.shape[2:]
    patches = video.view(B, C, T // u, u, H // p, p, W // q, q).permute(0, 2, 4, 6, 1, 3, 5, 7)
    iw, ih, it = keep % (W // q), keep // (W // q) % (H // p), keep // (W // q) // (H // p)
    x = patches[torch.arange(B, device=keep.device).unsqueeze(1), it, ih, iw].flatten(2)
    x = ((x.float() / 255 - 0.45) / 0.225).to(weight.dtype)
    return F.linear(x, weight.flatten(1), bias) + position[keep]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES["full"], ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_masked_patchify(direction, case, dtype, compare, device, full):
    if case not in CASES["full" if full else "quick"]:
        pytest.skip("--full")
    B, model, layout = case
    D, N, K = WIDTH[model], 1568, 156
    shape = (B, 3, 16, 224, 224) if layout == "planar" else (B, 16, 224, 224, 3)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    video = video if layout == "planar" else video.permute(0, 4, 1, 2, 3)
    keep = torch.rand(B, N, device=device).argsort(1)[:, :K].sort(1).values
    weight = (torch.randn(D, 3, 2, 16, 16, device=device) * 0.02).to(dtype).requires_grad_()
    bias = torch.randn(D, device=device).to(dtype).requires_grad_()
    position = torch.randn(N, D, device=device).requires_grad_()
    parameters = (weight, bias, position)
    upstream = torch.randn(B, K, D, device=device)

    def side(function):
        if direction == "forward":
            return lambda: function(video, keep, *parameters).detach()
        out = function(video, keep, *parameters)
        return lambda: torch.autograd.grad(out, parameters, upstream, retain_graph=True)[0]

    sides = dict(ours=side(ops.masked_patchify), reference=side(reference.masked_patchify), gathered_first=side(gathered_first))
    if device == "cuda" and full:
        sides["compiled"] = side(compiled(reference.masked_patchify))
    torch.testing.assert_close(sides["ours"](), sides["reference"](), rtol=0.05, atol=0.05 if direction == "forward" else 1.0)
    compare(**sides, flops=2 * B * K * D * 1536, target={"reference": 10})
