"""restore_tokens: the decoder's input and its gradients, forward + backward."""

import pytest
import torch

from bench.compare import compiled
from stmae import ops, reference

SHAPES = {"quick": [(4, 512)], "full": [(4, 512), (16, 512)]}  # B, D of the decoder
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "autocast": (torch.bfloat16, torch.float32),  # tokens, position
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}


def indexed(tokens, keep, mask_token, position):
    """Tuned PyTorch: mask token plus positions once for all, then the tokens by index."""
    B, K, D = tokens.shape
    out = (mask_token + position).expand(B, -1, -1).clone()
    rows = torch.arange(B, device=keep.device).unsqueeze(1)
    return out.index_put((rows, keep), tokens.to(out.dtype) + position[keep])


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES["full"], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def bench_restore_tokens(backward, shape, dtypes, compare, device, full):
    if shape not in SHAPES["full" if full else "quick"]:
        pytest.skip("--full")
    B, D, N, K = *shape, 1568, 156
    narrow, wide = DTYPES[dtypes]
    tokens, mask_token, position = (
        torch.randn(s, device=device).to(t).requires_grad_(backward)
        for s, t in (((B, K, D), narrow), ((D,), wide), ((N, D), wide))
    )
    keep = torch.rand(B, N, device=device).argsort(1)[:, :K].sort(1).values
    upstream = torch.randn(B, N, D, device=device).to(wide)

    def side(function):
        def run():
            out = function(tokens, keep, mask_token, position)
            return torch.autograd.grad(out, (tokens, mask_token, position), upstream) if backward else (out,)

        return run

    sides = dict(ours=side(ops.restore_tokens), reference=side(reference.restore_tokens), index_put=side(indexed))
    if device == "cuda" and full:
        sides["compiled"] = side(compiled(reference.restore_tokens))
    for x, y in zip(sides["ours"](), sides["reference"]()):
        torch.testing.assert_close(x, y, **(dict(rtol=2e-2, atol=1e-2) if wide == torch.bfloat16 else dict(rtol=1e-4, atol=1e-3)))
    # The forward reads tokens and positions and writes all; the backward reads all and writes their gradients.
    once = B * N * D * upstream.element_size() + N * D * position.element_size() + B * K * D * tokens.element_size()
    compare(**sides, bytes=once * (2 if backward else 1), target={"reference": 4} if backward else {})
