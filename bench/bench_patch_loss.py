"""patch_loss: forward and forward + backward, for a planar video and for a decoder's channels-last frames."""

import pytest
import torch

from bench.compare import compiled
from stmae import ops, reference

CASES = {"quick": [(4, "planar"), (4, "channels_last")], "full": [(4, "planar"), (4, "channels_last"), (16, "channels_last")]}
FRAMES = torch.linspace(0, 15, 8).long().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES["full"], ids=lambda c: f"{c[0]}-{c[1]}")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def bench_patch_loss(backward, case, dtype, compare, device, full):
    if case not in CASES["full" if full else "quick"]:
        pytest.skip("--full")
    B, layout = case
    shape = (B, 3, 16, 224, 224) if layout == "planar" else (B, 16, 224, 224, 3)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    video = video if layout == "planar" else video.permute(0, 4, 1, 2, 3)
    M, P = 1412, 768
    pred = torch.randn(B, M, P, device=device).to(dtype).requires_grad_(backward)
    masked = torch.rand(B, 1568, device=device).argsort(1)[:, :M].sort(1).values

    def side(function):
        def run():
            loss = function(pred, video, masked, patch_size=(1, 16, 16), frames=FRAMES)
            return torch.autograd.grad(loss, pred)[0] if backward else loss

        return run

    ours, plain = side(ops.patch_loss), side(reference.patch_loss)
    torch.testing.assert_close(ours(), plain(), rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    # Predictions and their pixels, read in each direction; the gradient, written.
    once = B * M * P * (pred.element_size() + 1)
    moved = once if not backward else 2 * once + B * M * P * pred.element_size()
    others = {"compiled": side(compiled(reference.patch_loss))} if device == "cuda" and full else {}
    compare(ours=ours, reference=plain, **others, bytes=moved, target={"reference": 10} if backward else {})
