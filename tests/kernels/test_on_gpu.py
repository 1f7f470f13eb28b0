"""The suite on real hardware, through the dispatcher and the compiled kernels: `pytest -m gpu`. Skipped, loudly, without."""

import contextlib

import pytest
import torch

from tests.kernels.suite import *  # noqa: F403
from tests.kernels.suite import _seeded, each_dtype, launch, masks, name_of, random, video_of  # noqa: F401

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(gpu):
    return gpu


@pytest.fixture
def guarded():
    return contextlib.nullcontext


def test_tuned_configurations_give_the_same(device):
    """Outside deterministic mode the launcher times its configurations: whichever wins has to be right."""
    torch.use_deterministic_algorithms(False)
    qkv = random(2, 1568, 3, 8, 64, dtype=torch.bfloat16, device=device)
    out, _ = launch("packed_attention", qkv, 0.125)
    torch.use_deterministic_algorithms(True)
    plain, _ = launch("packed_attention", qkv, 0.125)
    torch.testing.assert_close(out, plain, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("op", ["random_masking", "masked_patchify", "restore_tokens", "attention", "patch_loss", "mlp"])
def test_captured_in_a_cuda_graph(device, op):
    """No op waits for the device or allocates by data, forward or backward."""
    from stmae import ops

    video = video_of("channels-last", torch.uint8, (2, 3, 4, 32, 32), device)
    keep, masked = masks(2, 8, 3, device)
    weight, tokens = random(32, 3, 2, 16, 16, device=device), random(2, 3, 32, device=device)
    position, qkv, pred = random(8, 32, device=device), random(2, 40, 3, 2, 32, device=device), random(2, 5, 1536, device=device)
    noise = torch.rand(2, 8, device=device)
    norm, square = random(32, device=device), random(32, 32, device=device)
    for x in (weight, tokens, position, qkv, pred):
        x.requires_grad_()

    def mlp():
        x, normal = ops.add_layer_norm(tokens, None, norm, norm)
        with torch.autocast("cuda", torch.bfloat16):
            normal = ops.mlp(ops.linear(normal, square, norm), square, norm, square, norm)
            return ops.add_layer_norm(x, normal, norm, norm)[1]

    calls = {
        "random_masking": lambda: ops.random_masking(noise, 3),
        "masked_patchify": lambda: ops.masked_patchify(video, keep, weight, None, position),
        "restore_tokens": lambda: ops.restore_tokens(tokens, keep, position[0], position),
        "attention": lambda: ops.packed_attention(qkv),
        "patch_loss": lambda: ops.patch_loss(pred, video, masked, patch_size=(2, 16, 16)),
        "mlp": mlp,
    }
    leaves = [x for x in (weight, tokens, position, qkv, pred)]

    def step():
        out = calls[op]()
        if op == "random_masking":
            return list(out)
        return [out, *(g for g in torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True) if g is not None)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(stream):  # compile and tune before the capture
        eager = [x.clone() for x in step()]
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(eager, captured):
        assert torch.equal(a, b)


def test_debugging_checks_ids(device, monkeypatch):
    from stmae import ops

    x, ids = random(2, 5, 16, device=device), torch.tensor([[0, 4], [1, 5]], device=device)
    monkeypatch.setattr(ops.checks, "DEBUG", True)
    with pytest.raises(ValueError, match=r"gather_tokens: expected ids in \[0, 5\)"):
        ops.gather_tokens(x, ids)
    assert ops.gather_tokens(x, ids.clamp(max=4)).shape == (2, 2, 16)


@pytest.mark.parametrize("op", ["masked_patchify", "attention"])
def test_opcheck(device, op):
    if op == "attention":
        arguments = (random(1, 40, 3, 2, 32, device=device), 0.2)
        torch.library.opcheck(torch.ops.stmae.packed_attention.default, arguments)
    else:
        video = video_of("planar", torch.uint8, (2, 1, 2, 16, 16), device)
        keep, _ = masks(2, 8, 3, device)
        parameters = (random(*shape, device=device) for shape in ((8, 1, 1, 8, 8), (8,), (8, 8)))
        arguments = (video, keep, *parameters, [0.5], [0.2])
        torch.library.opcheck(torch.ops.stmae.masked_patchify.default, arguments)
