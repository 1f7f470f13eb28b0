"""Pre-training on packed batches: the same run with any number of workers, processes and parts, continued anywhere."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from stmae import checkpoint
from stmae.training.commands import pretrain
from stmae.training.config import (
    ClipConfig,
    EncodingConfig,
    FinetuneClipConfig,
    OnlineProbeConfig,
    PretrainConfig,
    PretrainRunConfig,
    from_preset,
    parse,
)
from stmae.training.data.dataset import as_video
from stmae.training.data.loader import LoaderError
from stmae.training.data.packed_clips import NativeViews
from stmae.training.data.video_list import find_mixture
from stmae.training.engine.run_folder import RunFolder, clips_of
from stmae.training.evaluation.features import encode, encode_tokens
from stmae.training.evaluation.pictures import write_reconstructions
from stmae.training.planning.flops import autoencoder_flops
from stmae.training.tasks import pretraining
from tests.support import two_processes
from tests.support.synthetic_video import write_video

NATIVE = """
clips: {stride: 2, repeats: 2, size: native, side: [24, 40], frames: "4,8"}
model: {image_size: 32, num_frames: 4, patch_size: 8, width: 32, depth: 2, num_heads: 2, decoder_width: 32, decoder_depth: 1,
  decoder_num_heads: 1, mask_ratio: 0.6}
optimizer: {tokens: 1200, epochs: 16, warmup_epochs: 2, base_lr: 1.0e-3, base_batch: 4, clip_grad: 1.0}
run: {save_every: 2, log_every: 1, workers: 0, device: cpu, precision: float32, tensorboard: false}
"""


class Runs:
    def __init__(self, folder):
        self.folder, self.videos, stills = folder, folder / "videos", folder / "stills"
        self.videos.mkdir()
        stills.mkdir()
        for name, size in (("a", (64, 96)), ("b", (96, 64)), ("c", (64, 64)), ("d", (64, 120))):
            write_video(self.videos / f"{name}.mp4", 30, size=size)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (60 + 20 * number, 80, 3), np.uint8)
            Image.fromarray(pixels).save(stills / f"{number}.png")
        self.data = f"{self.videos}:0.6,{stills}:0.4"
        (folder / "native.yaml").write_text(NATIVE)

    def command(self, output, *more):
        files = "--config", self.folder / "native.yaml", "--data", self.data, "--output", self.folder / output
        return [str(word) for word in ("pretrain", *files, *more)]

    def run(self, output, *more):
        return pretrain.run(parse(PretrainConfig, self.command(output, *more)[1:], prog="p", description=""))

    def lines(self, output):
        lines = map(json.loads, (self.folder / output / "log.jsonl").read_text().splitlines())
        return {line["step"]: line for line in lines if "loss" in line}

    def losses(self, output):
        return {step: (line["loss"], line["gradient_norm"]) for step, line in self.lines(output).items()}

    def weights(self, output):
        return load_file(self.folder / output / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """In it ``one``, an uninterrupted run on one process with no workers."""
    runs = Runs(tmp_path_factory.mktemp("packed"))
    runs.state = runs.run("one", "--held_out", str(runs.videos))
    return runs


def assert_bits(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_on_clips_of_unequal_shapes(runs):
    losses = [loss for loss, _ in runs.losses("one").values()]
    assert len(losses) == runs.state.step >= 5 and losses[-1] < losses[0]
    assert runs.state.after["held_out_loss"] < runs.state.before["held_out_loss"]
    assert len(list((runs.folder / "one" / "pictures").glob("*.png"))) == 6
    assert runs.lines("one")[runs.state.step]["epoch"] >= 16


def test_a_run_that_is_continued_has_the_bits_of_one_without_a_break(runs):
    """From each of the states that it leaves, and with data workers."""
    arguments = ("continued", "--held_out", str(runs.videos), "--run.workers", "2")
    runs.run(*arguments)
    assert_bits(runs.weights("continued"), runs.weights("one"))
    folder = RunFolder(runs.folder / "continued")
    newest = folder.states()[0]
    folder.state_path(newest).unlink()  # as after a kill
    folder.close()
    (runs.folder / "continued" / "model.safetensors").unlink()
    state = runs.run(*arguments)
    assert state.done and state.step == newest
    assert_bits(runs.weights("continued"), runs.weights("one"))
    assert runs.losses("continued") == runs.losses("one")


def test_a_compiled_run_computes_the_same_and_compiles_each_block_once(runs, monkeypatch):
    """A graph of each block with gradients, and for the pictures one without; none for the shapes of a batch, or of masks."""
    # Without Inductor, which would run a C++ compiler for seconds: the graphs are the same.
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    settings = "--model.depth", "1", "--optimizer.epochs", "24", "--model.mask_strategy", "multi_block"
    state = runs.run("plain", *settings)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    runs.run("compiled", *settings, "--run.compile", "true")
    assert (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())) == (before[0] + 4, before[1])
    torch._dynamo.reset()
    plain, compiled = runs.losses("plain"), runs.losses("compiled")
    assert len(plain) == state.step >= 6
    # Sums are rounded as in the uncompiled blocks, or once less where two steps become one; updates add it up.
    assert compiled[1] == pytest.approx(plain[1], rel=16 * torch.finfo(torch.float32).eps)
    assert compiled == {step: pytest.approx(pair, rel=1e-4) for step, pair in plain.items()}


def test_micro_batches_add_up_to_the_batch(runs):
    runs.run("parts", "--optimizer.accumulate", "3")
    assert runs.losses("parts") == {step: pytest.approx(pair, rel=1e-4) for step, pair in runs.losses("one").items()}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_compute_what_one_does(runs):
    """With DDP, with FSDP2, and in micro-batches. Sums of float32 are added in another order."""
    fsdp = (
        "--run.parallel",
        "fsdp",
        "--model.loss_reduction",
        "clip",
        "--optimizer.tokens",
        "2400",
        "--optimizer.accumulate",
        "2",
    )
    runs.run("one-clip", *fsdp)
    printed = two_processes.finish(two_processes.start(runs.command("ddp"), runs.command("fsdp", *fsdp)))
    assert "at most 1,200 tokens" in printed
    for two, one in (("ddp", "one"), ("fsdp", "one-clip")):
        expected = runs.losses(one)
        assert runs.losses(two) == {step: pytest.approx(pair, rel=1e-4) for step, pair in expected.items()}
        tokens = [[line["tokens_per_second"] / line["clips_per_second"] for line in runs.lines(x).values()] for x in (two, one)]
        assert tokens[0] == pytest.approx(tokens[1], rel=1e-6)  # tokens of a clip: each step has the same clips


def test_features_and_probes_of_native_size(runs):
    """Of a run on native sizes by default; each video's features are those of its clips by themselves."""
    settings = {"workers": 0, "precision": "float32"}
    entries = [entry._replace(label=number % 2) for number, entry in enumerate(find_mixture(runs.data).entries)]
    config = EncodingConfig(**settings)
    features, _, paths, _ = encode(runs.folder / "one", entries, config)
    model = checkpoint.load_classifier(runs.folder / "one" / "model.safetensors").eval()
    views = NativeViews(entries, clips_of(runs.folder / "one"), model.config)
    sizes = {views[number]["clips"].shape for number in range(len(entries))}
    assert len(sizes) >= 4 and len(paths) == len(entries)
    for number, own in enumerate(features):
        (clip,) = as_video(views[number]["clips"])
        assert torch.equal(own, model.features([clip])[0])
    fixed, *_ = encode(runs.folder / "one", entries, EncodingConfig(**settings, size="fixed"))
    assert not torch.equal(fixed, features)
    with pytest.raises(ValueError, match="size: expected 'fixed' or tokens 'mean': of native size every video has its own"):
        encode(runs.folder / "one", entries, EncodingConfig(**settings, tokens="all"))
    with pytest.raises(ValueError, match="size: expected 'fixed' or no probe of all tokens"):
        encode_tokens(runs.folder / "one", entries, config)


def test_pictures_of_native_size(runs, tmp_path):
    written = write_reconstructions(runs.folder / "one", runs.videos, tmp_path)
    assert len(written) == 8
    heights = {Image.open(path).height for path in written if path.suffix == ".png"}
    assert len(heights) >= 2  # those of upright frames are others


def test_what_is_counted_of_a_batch(runs):
    config = parse(PretrainConfig, runs.command("none")[1:], prog="p", description="")
    clips = [torch.zeros(4, 24, 32, 3), torch.zeros(2, 32, 40, 3)]
    keep, masked = [torch.arange(9), torch.arange(8)], [torch.arange(15), torch.arange(12)]
    batch = {"clips": clips, "keep": keep, "masked": masked}
    flops = sum(autoencoder_flops(config.model, len(k), len(m))[1] for k, m in zip(keep, masked))
    assert pretraining.measure(config.model, batch) == (27, 24 + 20, flops)
    assert pretraining.measure(config.model.replace(loss_reduction="clip"), batch)[0] == 2


def test_clips_of_one_size_under_masks_of_unequal_size(runs):
    size = ("--clips.size", "fixed", "--clips.side", "null", "--optimizer.tokens", "null", "--optimizer.batch", "4")
    more = ("--model.mask_strategy", "multi_block", "--model.mask_blocks", "2", "--held_out", str(runs.videos))
    state = runs.run("blocks", *size, *more)
    assert state.done and np.isfinite(state.after["held_out_loss"]) and state.step == 12  # 8 passes of 6 samples


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizer.tokens", "100"], r"optimizer.tokens: expected \d+ or more, what a video's 2 clips cost at most, got 100"),
        (["--model.mask_ratio", "0.95"], "of the smallest clip that may be drawn: masking: expected a ratio that keeps some"),
        (["--clips.frames", "8,32", "--clips.short", "skip"], r"can be used, 4 in all:\n.*too short: 30 frames, a clip of 32"),
        (["--optimizer.accumulate", "9"], r"a budget of 1200 tokens does not divide into 9 micro-batches on 1 process: expected"),
    ],
)
def test_what_cannot_be_is_refused_before_a_step(arguments, message, runs, tmp_path):
    with pytest.raises(ValueError, match=message):
        runs.run(tmp_path / "run", *arguments)


@pytest.mark.parametrize("size", [("--optimizer.tokens", 10**12), ("--optimizer.tokens", "null", "--optimizer.batch", 10**10)])
def test_steps_that_memory_does_not_hold_are_refused_before_they_are_drawn(size, runs, tmp_path):
    for workers in "01":
        with pytest.raises(LoaderError, match=r"need [\d,]+ MiB of memory \([\d,]+ MiB are free\): try fewer videos or tokens"):
            runs.run(tmp_path / "run", *size, "--run.workers", workers)


@pytest.mark.parametrize(
    "clips, more, message",
    [
        ({"side": (4, 40)}, {}, "clips.side: expected at least the side of a square as large as a patch of 16x16, 16, got 4"),
        ({"side": (40, 24)}, {}, "side: expected two numbers above 0"),
        ({"frames": "4,7"}, {}, "clips.frames: expected multiples of model.tubelet_size 2, got 7"),
        ({"frames": (0,)}, {}, "frames: expected a number above 0"),
        ({"scale": (0.3, 1.0)}, {}, "scale: expected its default with size 'native', which takes frames as they are"),
        ({"size": "fixed", "side": (24, 40)}, {}, r"side: expected null unless size is 'native', got \[24.0, 40.0\]"),
        ({}, {"run": PretrainRunConfig(cuda_graph=True)}, "run.cuda_graph: expected false with packed batches"),
        (
            {},
            {"probe": OnlineProbeConfig(data="a", test_data="a", tokens="all")},
            "probe.tokens: expected 'mean' with clips.size 'native'",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(clips, more, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PretrainConfig(data="d", output="o", clips=ClipConfig(**{"size": "native", **clips}), **more)


def test_the_command_line_refuses_them_in_the_same_words(runs, capsys):
    with pytest.raises(SystemExit):
        parse(PretrainConfig, [*runs.command("none")[1:], "--clips.frames", "4;8"], prog="p", description="")
    words = "clips.frames: expected a number above 0, or several with commas between them, got '4;8'"
    assert words in " ".join(capsys.readouterr().err.split())


def test_native_is_not_of_fine_tuning():
    with pytest.raises(TypeError, match="size"):
        FinetuneClipConfig(size="native")
    assert not from_preset(PretrainConfig, "paper-base", data="d", output="o").packed
