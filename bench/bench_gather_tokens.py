"""gather_tokens: the masked tokens in front of the prediction, forward and forward + backward."""

import pytest
import torch

from bench.compare import compiled
from stmae import ops, reference

SHAPES = {"quick": [(4, 512)], "full": [(4, 512), (16, 512)]}  # B, D of the decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES["full"], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def bench_gather_tokens(backward, shape, dtype, compare, device, full):
    if shape not in SHAPES["full" if full else "quick"]:
        pytest.skip("--full")
    B, D, N, M = *shape, 1568, 1412
    x = torch.randn(B, N, D, device=device).to(dtype).requires_grad_(backward)
    ids = torch.rand(B, N, device=device).argsort(1)[:, :M].sort(1).values
    index = ids.unsqueeze(-1).expand(-1, -1, D)
    upstream = torch.randn(B, M, D, device=device).to(dtype)

    def side(function):
        def run():
            out = function(x, ids)
            return torch.autograd.grad(out, x, upstream)[0] if backward else out

        return run

    ours, plain = side(ops.gather_tokens), side(reference.gather_tokens)
    assert torch.equal(ours(), plain())
    moved = B * D * x.element_size() * (2 * M + (M + N if backward else 0))
    others = {"compiled": side(compiled(reference.gather_tokens))} if device == "cuda" and full else {}
    take = side(lambda x, _: torch.take_along_dim(x, index, 1))
    compare(ours=ours, reference=plain, take_along_dim=take, **others, bytes=moved)
