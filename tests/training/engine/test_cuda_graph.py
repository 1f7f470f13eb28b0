"""What of a captured training step needs no GPU: its arithmetic, its inputs, the loop around it, and when it is refused."""

import copy
import json
import re
import types

import pytest
import torch
from safetensors.torch import load_file

from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig
from stmae.training.config import ClipConfig, FinetuneConfig, OptimizerConfig, PretrainConfig, PretrainRunConfig, RunConfig
from stmae.training.engine import cuda_graph, loop
from stmae.training.engine.distributed import Processes
from stmae.training.engine.loop import Task, Training, TrainingError
from stmae.training.engine.optimizer import adamw, weight_decay_groups
from stmae.training.tasks import pretraining
from tests.support.synthetic_video import write_video

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS = types.SimpleNamespace(betas=(0.9, 0.95))


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoder = dict(image_size=32, num_frames=2, width=32, depth=2, num_heads=2)
    return MaskedAutoencoder(
        MaskedAutoencoderConfig(**encoder, decoder_width=16, decoder_depth=1, decoder_num_heads=2, mask_ratio=0.5)
    )


def batches(model, count, *, clips=2, steps=5):
    generator = torch.Generator().manual_seed(1)
    c = model.config
    return [
        [
            {
                "clips": torch.randint(
                    0, 256, (clips, c.in_channels, *c.video_shape[1:]), dtype=torch.uint8, generator=generator
                ),
                "noise": torch.rand(clips, c.num_tokens, generator=generator),
            }
            for _ in range(count)
        ]
        for _ in range(steps)
    ]


def loss_of(model):
    return lambda batch: model(batch["clips"], noise=batch["noise"]).loss


class Recorded(cuda_graph.GraphedStep):
    """On a CPU: a "graph" that runs the captured function again, on the captured tensors, and writes to the captured results."""

    def _capture(self, step):
        result = torch.full((), torch.nan), torch.full((), torch.nan)

        def replay():
            for kept, new in zip(result, step(), strict=True):
                kept.copy_(new)

        return replay, result


def graphed(model, kind=Recorded, clip_grad=0.0):
    optimizer = adamw(weight_decay_groups(model, 0.05), SETTINGS)
    cuda_graph.make_capturable(optimizer, CPU)
    return kind(loss_of(model), list(model.parameters()), optimizer, clip_grad=clip_grad, device=CPU), optimizer


def eager(model, steps, rates, clip_grad):
    """What the loop does without a graph, decisions on the host."""
    optimizer = adamw(weight_decay_groups(model, 0.05), SETTINGS)
    results = []
    for micro_batches, lr in zip(steps, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = 0.0
        for batch in micro_batches:
            part = loss_of(model)(batch) / len(micro_batches)
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or torch.inf)
        if loss.isfinite() and norm.isfinite():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        results.append((loss.item(), norm.item()))
    return results


@pytest.mark.parametrize("accumulate, clip_grad", [(1, 0.0), (3, 0.02)])
def test_same_weights_as_without_a_graph(model, accumulate, clip_grad):
    other, steps = copy.deepcopy(model), batches(model, accumulate)
    rates = [0.0, 2**-10, 2**-9, 2**-10, 2**-11]  # exact in float32, as which the graph keeps them
    expected = eager(other, steps, rates, clip_grad)
    step, optimizer = graphed(model, clip_grad=clip_grad)
    results = []
    for micro_batches, lr in zip(steps, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"].fill_(lr)
        results.append(tuple(x.item() for x in step(micro_batches)))
    assert step.replay is not None and step.calls == 5
    assert results == expected
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_without_a_finite_gradient_changes_nothing(model):
    step, optimizer = graphed(model)
    for group in optimizer.param_groups:
        group["lr"].fill_(0.01)
    steps = batches(model, 1, steps=7)
    for position, micro_batches in enumerate(steps):
        broken = position in (1, 5)  # before the capture and after it
        before = [p.detach().clone() for p in model.parameters()]
        state = copy.deepcopy([optimizer.state[p] for p in model.parameters()])
        if broken:
            with torch.no_grad():
                model.decoder.mask_token.fill_(torch.nan)  # a graph reads the weights where they are
            before = [p.detach().clone() for p in model.parameters()]
        loss, norm = step(micro_batches)
        assert bool(loss.isfinite() and norm.isfinite()) != broken
        if broken:
            for old, p in zip(before, model.parameters(), strict=True):
                assert torch.equal(old.nan_to_num(7.0), p.detach().nan_to_num(7.0))
            for old, p in zip(state, model.parameters(), strict=True):
                assert all(torch.equal(value, optimizer.state[p][name]) for name, value in old.items())
            with torch.no_grad():
                model.decoder.mask_token.fill_(0.5)
        else:
            assert not all(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))


def test_other_shapes_are_computed_without_the_graph(model):
    step, _ = graphed(model)
    for micro_batches in batches(model, 2):
        step(micro_batches)
    (large,) = batches(model, 2, clips=3, steps=1)
    expected = sum(loss_of(model)(batch).item() for batch in large) / 2
    inputs = copy.deepcopy(step.inputs)
    loss, _ = step(large)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for a, b in zip(inputs, step.inputs, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_cannot_be_captured_is_said(model):
    class Waiting(cuda_graph.GraphedStep):
        def _capture(self, step):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    step, _ = graphed(model, Waiting)
    steps = batches(model, 1)
    for micro_batches in steps[: cuda_graph.WARM_UP]:
        step(micro_batches)
    with pytest.raises(
        cuda_graph.CaptureError, match="cannot be captured: CUDA error: operation not permitted when stream is cap"
    ):
        step(steps[-1])


def test_an_optimizer_that_decides_on_the_host_is_refused(model):
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW(model.parameters(), fused=False)):
        with pytest.raises(cuda_graph.CaptureError, match="cannot skip an update on the device; expected torch's AdamW"):
            cuda_graph.make_capturable(optimizer, CPU)


@pytest.mark.parametrize(
    "device, world_size, debug, reason",
    [
        (CUDA, 1, "", None),
        (CUDA, 1, "0", None),
        (CPU, 1, "", "needs a CUDA device, and this run is on cpu"),
        (CUDA, 2, "", r"exchanged between processes \(fsdp, 2 of them\)"),
        (CUDA, 1, "1", "STMAE_DEBUG has the host check token ids"),
    ],
    ids=str,
)
def test_runs_that_are_refused(device, world_size, debug, reason, monkeypatch):
    monkeypatch.setenv("STMAE_DEBUG", debug)
    problem = cuda_graph.capture_problem(PretrainRunConfig(cuda_graph=True, parallel="fsdp"), device, world_size)
    assert problem is None if reason is None else re.search(reason, problem)


def test_configurations_that_are_refused():
    with pytest.raises(ValueError, match="run.cuda_graph: expected false with run.checkpoint_activations"):
        PretrainRunConfig(cuda_graph=True, checkpoint_activations=True)
    with pytest.raises(ValueError, match="run.cuda_graph: expected false for fine-tuning: only a pre-training step has the same"):
        FinetuneConfig(data="data", output="run", checkpoint="model.safetensors", run=RunConfig(cuda_graph=True))


def test_a_run_on_a_cpu_is_refused(tmp_path):
    config = PretrainConfig(data="data", output=str(tmp_path), run=PretrainRunConfig(cuda_graph=True, device="cpu"))
    task = Task(model=None, dataset=[0], loss=None, parameter_groups=None, peak_lr=0.1, repeats=1, tokens=1, flops=None)
    with pytest.raises(TrainingError, match="run.cuda_graph: a CUDA graph needs a CUDA device, and this run is on cpu"):
        Training(task, config, Processes({}), CPU)


@pytest.fixture
def pretrain(tmp_path):
    """A function that pre-trains for six steps on two videos: (weights, lines of the log that have a loss)."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in "ab":
        write_video(videos / f"{name}.mp4", 12)
    encoder = dict(image_size=(32, 32), num_frames=4, patch_size=(8, 8), width=32, depth=1, num_heads=2)
    decoder = dict(decoder_width=32, decoder_depth=1, decoder_num_heads=1)

    def train(name, **run):
        config = PretrainConfig(
            data=str(videos),
            output=str(tmp_path / name),
            model=MaskedAutoencoderConfig(**encoder, **decoder),
            clips=ClipConfig(stride=2, repeats=2),
            optimizer=OptimizerConfig(batch=2, accumulate=2, epochs=12, warmup_epochs=4, clip_grad=1.0),
            run=PretrainRunConfig(workers=0, log_every=1, device="cpu", precision="float32", tensorboard=False, **run),
        )
        state = pretraining.pretrain(config)
        assert state.done and state.step == 6
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return load_file(tmp_path / name / "model.safetensors"), [line for line in lines if "loss" in line], state

    return train


def test_the_loop_with_a_graphed_step(pretrain, monkeypatch):
    plain, plain_lines, _ = pretrain("plain")
    monkeypatch.setattr(loop, "capture_problem", lambda *arguments: None)
    monkeypatch.setattr(loop, "GraphedStep", Recorded)
    graphed, lines, state = pretrain("graphed", cuda_graph=True)
    assert state.skipped_steps == 0 and len(lines) == len(plain_lines) == 6
    for a, b in zip(plain_lines, lines, strict=True):
        # The learning rate is kept in float32, which is all the difference.
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
    for name, weight in plain.items():
        torch.testing.assert_close(graphed[name], weight, rtol=1e-5, atol=1e-6)


def test_the_loop_counts_the_steps_that_a_graph_skips(pretrain, monkeypatch):
    class Broken(Recorded):
        def __call__(self, micro_batches):
            loss, norm = super().__call__(micro_batches)
            return (loss * torch.nan if self.calls in (2, 5) else loss), norm

    monkeypatch.setattr(loop, "capture_problem", lambda *arguments: None)
    monkeypatch.setattr(loop, "GraphedStep", Broken)
    _, _, state = pretrain("broken", cuda_graph=True)
    assert state.skipped_steps == 2


def test_the_loop_says_what_cannot_be_captured(pretrain, monkeypatch):
    class Waiting(cuda_graph.GraphedStep):
        def _capture(self, step):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(loop, "capture_problem", lambda *arguments: None)
    monkeypatch.setattr(loop, "GraphedStep", Waiting)
    with pytest.raises(TrainingError, match="run.cuda_graph: the step cannot be captured: operation not permitted"):
        pretrain("waiting", cuda_graph=True)
