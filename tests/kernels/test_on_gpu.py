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
    out, _ = launch("attention_qkvpacked", qkv, 0.125)
    torch.use_deterministic_algorithms(True)
    plain, _ = launch("attention_qkvpacked", qkv, 0.125)
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
        "attention": lambda: ops.attention_qkvpacked(qkv),
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
        torch.library.opcheck(torch.ops.stmae.attention_qkvpacked.default, arguments)
    else:
        video = video_of("planar", torch.uint8, (2, 1, 2, 16, 16), device)
        keep, _ = masks(2, 8, 3, device)
        parameters = (random(*shape, device=device) for shape in ((8, 1, 1, 8, 8), (8,), (8, 8)))
        arguments = (video, keep, *parameters, [0.5], [0.2])
        torch.library.opcheck(torch.ops.stmae.masked_patchify.default, arguments)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_training_step_captured_in_a_cuda_graph(device, accumulate):
    """Replays give what the same steps give without a graph; one without a finite gradient changes nothing."""
    import types

    from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig
    from stmae.training.engine.cuda_graph import GraphedStep, make_capturable
    from stmae.training.engine.optimizer import adamw, weight_decay_groups

    class Eager(GraphedStep):
        def __call__(self, micro_batches):
            return self._on_side_stream(self._moved(micro_batches))

    encoder = dict(image_size=64, num_frames=4, width=64, depth=2, num_heads=2)
    config = MaskedAutoencoderConfig(**encoder, decoder_width=32, decoder_depth=2, decoder_num_heads=2, mask_ratio=0.75)
    clips = torch.randint(0, 256, (8 * accumulate, 2, 4, 64, 64, 3), dtype=torch.uint8).permute(0, 1, 5, 2, 3, 4)
    noise = torch.rand(8 * accumulate, 2, config.num_tokens)
    results = []
    for kind in (Eager, GraphedStep):
        torch.manual_seed(0)
        model = MaskedAutoencoder(config).to(device)
        optimizer = adamw(weight_decay_groups(model, 0.05), types.SimpleNamespace(betas=(0.9, 0.95)))
        make_capturable(optimizer, torch.device(device))

        def loss(batch, model=model):
            with torch.autocast("cuda", torch.bfloat16):
                return model(batch["clips"], noise=batch["noise"]).loss

        step = kind(loss, list(model.parameters()), optimizer, clip_grad=0.1, device=torch.device(device))
        losses = []
        for number in range(8):
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-3 / (1 + number))
            parts = range(number * accumulate, (number + 1) * accumulate)
            micro_batches = [{"clips": clips[i].pin_memory(), "noise": noise[i].pin_memory()} for i in parts]
            if number != 6:
                losses.append(tuple(x.item() for x in step(micro_batches)))
                continue
            kept = model.decoder.mask_token.detach().clone()
            model.decoder.mask_token.data.fill_(torch.nan)
            before = [p.detach().clone() for p in model.parameters()]
            assert not step(micro_batches)[0].isfinite()
            for a, b in zip(before, model.parameters(), strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.detach().nan_to_num(7.0))
            model.decoder.mask_token.data.copy_(kept)
        results.append((losses, list(model.parameters())))
    (first, weights), (second, others) = results
    assert first == second and all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
