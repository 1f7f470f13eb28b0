"""What a run reports while it runs: utilisation, memory, a probe, pictures and curves; none of it can end the run."""

import csv
import gc
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from stmae.checkpoint import files
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier, VideoClassifierConfig
from stmae.training.commands import pretrain
from stmae.training.config import EncodingConfig, PretrainConfig, parse
from stmae.training.data.video_list import find_labelled_videos
from stmae.training.engine import logger, plots
from stmae.training.engine.distributed import SINGLE_PROCESS
from stmae.training.engine.loop import TrainingError
from stmae.training.engine.run_folder import RunFolder
from stmae.training.evaluation.features import encode
from stmae.training.evaluation.pretraining import knn_accuracy
from stmae.training.evaluation.probes import knn
from stmae.training.planning import flops
from stmae.training.tasks import pretraining
from tests.support.synthetic_video import write_video

TINY = """
clips: {stride: 2, repeats: 2}
model: {image_size: 32, num_frames: 4, patch_size: 8, width: 32, depth: 2, num_heads: 2, decoder_width: 32, decoder_depth: 1,
  decoder_num_heads: 1}
optimizer: {batch: 2, epochs: 8, warmup_epochs: 2, base_lr: 3.0e-3, base_batch: 2, clip_grad: 1.0}
run: {save_every: 4, log_every: 2, workers: 0, device: cpu, precision: float32, evaluate_every: 4, reconstruct_every: 4}
probe: {data: list.txt, test_data: list.txt, every: 4, neighbours: 2}
"""  # 4 videos: 8 steps


# FLOPs


def counted(model, *inputs, **options):
    """(forward, forward and backward) FLOPs of the products that torch counts in the plain PyTorch definition of the model. It
    projects all patches before it drops the masked ones, so the projection is left out."""
    model.backend = "reference"
    with FlopCounterMode(display=False) as counter:
        out = model(*inputs, **options)
        forward = products(counter)
        (out.loss if hasattr(out, "loss") else out.sum()).backward()
    return forward, products(counter)


def products(counter):
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "conv" not in str(operation))


SHAPE = {"image_size": 32, "num_frames": 8, "patch_size": 8, "width": 48, "depth": 3, "num_heads": 2, "mlp_ratio": 3.0}


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"decoder_depth": 1, "mask_ratio": 0.5, "predicted_frames": 8}, id="other"),
        pytest.param({"decoder_mask_ratio": 0.5}, id="dual masking"),
        pytest.param({"target": "hog"}, id="hog"),
    ],
)
def test_the_formula_of_the_autoencoder_counts_what_torch_counts(class_token, more):
    config = MaskedAutoencoderConfig(
        **{**SHAPE, "decoder_width": 32, "decoder_depth": 2, "decoder_num_heads": 2, "class_token": class_token, **more}
    )
    video = torch.zeros(3, *config.video_shape)
    kept = MaskedAutoencoder(config).sample_mask(1)[0].shape[1]
    patches = 2 * kept * config.width * 3 * 2 * 8 * 8
    forward, both = flops.autoencoder_flops(config)
    assert counted(MaskedAutoencoder(config), video) == (3 * (forward - patches), 3 * (both - 2 * patches))


def test_the_formula_counts_what_torch_counts_of_a_packed_batch():
    config = MaskedAutoencoderConfig(**{**SHAPE, "decoder_width": 32, "decoder_depth": 2, "decoder_num_heads": 2})
    clips = [torch.zeros(3, 8, 32, 32), torch.zeros(3, 2, 40, 48), torch.zeros(3, 4, 24, 56)]
    model = MaskedAutoencoder(config)
    masks = model.sample_masks([(4, 4, 4), (1, 5, 6), (2, 3, 7)], mask_ratio=[0.9, 0.75, 0.5])
    each = [flops.autoencoder_flops(config, len(mask.keep), len(mask.masked)) for mask in masks]
    patches = sum(2 * len(mask.keep) * config.width * 3 * 2 * 8 * 8 for mask in masks)
    forward, both = (sum(values) for values in zip(*each))
    assert counted(model, clips, mask=masks) == (forward - patches, both - 2 * patches)


@pytest.mark.parametrize("kept", [None, 11])
def test_the_formula_of_the_classifier_counts_what_torch_counts(kept):
    config = VideoClassifierConfig(**SHAPE, num_classes=7)
    video = torch.zeros(3, *config.video_shape)
    keep = None if kept is None else torch.arange(kept).expand(3, -1)
    patches = 2 * (kept or config.num_tokens) * config.width * 3 * 2 * 8 * 8
    forward, both = flops.classifier_flops(config, kept)
    assert counted(VideoClassifier(config), video, keep=keep) == (3 * (forward - patches), 3 * (both - 2 * patches))


def test_the_papers_figure_comes_out():
    """81.0 GFLOPs for ViT-L and its decoder at 90 %: a multiply-add counts one, and every patch is projected before masking."""
    config = MaskedAutoencoderConfig(width=1024, depth=24, num_heads=16)
    dropped = 1568 - 156
    assert flops.autoencoder_flops(config)[0] / 2 + dropped * 1024 * 2 * 16 * 16 * 3 == pytest.approx(81.0e9, rel=0.01)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_the_ceiling_is_a_speed(dtype):
    assert 1e8 < flops.measured_peak_flops(torch.device("cpu"), dtype) < 1e14


def test_memory_is_the_most_there_was():
    code = """
import torch
from stmae.training.engine.meters import peak_memory
cpu = torch.device("cpu")
print(peak_memory(cpu))
block = torch.ones(100 * 2**20)
print(peak_memory(cpu))
del block
print(peak_memory(cpu))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    before, grown, after = map(int, run.stdout.split())
    assert before > 2**20 and grown > 0.99 * (400 * 2**20) and grown >= before
    assert after > 0.99 * grown  # Linux counts in coarse steps


# A run


class Run:
    def __init__(self, folder):
        self.folder = folder
        for number, name in enumerate("abcd"):
            write_video(folder / f"{name}.mp4", 30, ground=60 + 30 * number)
        (folder / "list.txt").write_text("".join(f"{name}.mp4 {number // 2}\n" for number, name in enumerate("abcd")))
        (folder / "tiny.yaml").write_text(TINY)

    def __call__(self, output, *more):
        arguments = ["--config", self.folder / "tiny.yaml", "--data", self.folder / "list.txt", "--output", self.folder / output]
        config = parse(PretrainConfig, [str(word) for word in (*arguments, *more)], prog="p", description="")
        pretrain.run(config)
        return self.folder / output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("monitoring"))


@pytest.fixture(scope="module")
def finished(run):
    return run("finished", "--held_out", str(run.folder / "list.txt"))


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's malloc")
def test_freed_memory_stays_with_the_process():
    """Pages touched for the first time when large tensors of several sizes are made again: all of them, or few."""
    code = """
import ctypes, resource, sys, torch
from stmae.training.engine.device import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is touched once, however many pages it has
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20 * size) for size in range(9, 17)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    def page_faults(how, **more):
        arguments = {"capture_output": True, "text": True, "check": True, "env": environment | more}
        return int(subprocess.run([sys.executable, "-c", code, how], **arguments).stdout)

    accepts = "import ctypes; raise SystemExit(not ctypes.CDLL(None).mallopt(-3, 2**31 - 1))"
    if subprocess.run([sys.executable, "-c", accepts]).returncode:
        pytest.skip("this version of glibc keeps blocks up to 32 MB only")
    pages = sum(range(9, 17)) * 2**22 // os.sysconf("SC_PAGE_SIZE")
    if page_faults("freed") < 0.9 * pages:
        pytest.skip("this system does not count the pages that are touched for the first time")
    assert page_faults("kept") < 0.5 * pages
    assert page_faults("kept", MALLOC_MMAP_THRESHOLD_="1000000") > 0.9 * pages  # what the user set stays


def test_the_log_has_utilisation_and_memory(finished):
    numbers = [line for line in lines(finished) if "mfu" in line]
    assert [line["step"] for line in numbers] == [2, 4, 6, 8]
    (start,) = (json.loads(line) for line in (finished / "run.jsonl").read_text().splitlines())
    config = MaskedAutoencoderConfig(
        image_size=32, num_frames=4, patch_size=8, width=32, depth=2, num_heads=2, decoder_width=32, decoder_depth=1,
        decoder_num_heads=1,
    )  # fmt: skip
    per_clip = flops.autoencoder_flops(config)[1]
    for line in numbers:
        expected = line["clips_per_second"] * per_clip / (start["ceiling_tflops"] * 1e12)
        assert line["mfu"] == pytest.approx(expected, rel=0.05) and 0.05 < line["memory_gb"] < 64


def test_the_probe_while_training_is_the_one_of_the_frozen_features(finished, run):
    found = {line["step"]: line["knn_accuracy"] for line in lines(finished) if "knn_accuracy" in line}
    assert list(found) == [0, 4, 8]
    entries = find_labelled_videos(run.folder / "list.txt")
    x, y, _, _ = encode(finished, entries, EncodingConfig(device="cpu", precision="float32", workers=0))
    assert found[8] == knn(x, y, x, y, 2, 2)


def test_watching_changes_nothing_that_is_computed(finished, run):
    bare = run("bare", "--probe.every", "0", "--run.reconstruct_every", "0", "--run.evaluate_every", "0")
    losses = [[line["loss"] for line in lines(folder) if "loss" in line] for folder in (finished, bare)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_a_run_may_go_on_with_another_probe(finished, run, capsys):
    run("finished", "--held_out", str(run.folder / "list.txt"), "--probe.every", "2")
    assert "complete, 8 of 8 steps" in capsys.readouterr().out


def test_nothing_of_a_run_outlives_it(run, monkeypatch):
    """Workers ignore the signal that Python ends them with; and a gloo thread that meets a live model at exit aborts."""
    built = []

    class Recording(MaskedAutoencoder):
        def __init__(self, config):
            super().__init__(config)
            built.append(weakref.ref(self))

    monkeypatch.setattr(pretraining, "MaskedAutoencoder", Recording)
    monkeypatch.setattr(files, "_KINDS", {**files._KINDS, "Recording": files._KINDS["MaskedAutoencoder"]})
    gc.disable()
    try:
        run("workers", "--run.workers", "1", "--run.tensorboard", "false")
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()
    gc.collect()
    assert len(built) == 1 and built[0]() is None


def test_pictures_are_in_the_folder_and_in_tensorboard(finished):
    names = sorted(path.name for path in (finished / "pictures").iterdir())
    assert names == [f"{n}-{stem}-step-{step:08d}.png" for n, stem in enumerate("abc") for step in (0, 4, 8)]
    first, last = (np.asarray(Image.open(finished / "pictures" / f"0-a-step-{step:08d}.png")) for step in (0, 8))
    assert first.shape == last.shape and first.shape[2] == 3
    rows = first.shape[0] // 3
    assert (first[20:rows] == last[20:rows]).all() and (first[20 + 2 * rows :] != last[20 + 2 * rows :]).any()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("0-a")] == [0, 4, 8]
    assert {"mfu", "memory_gb", "knn_accuracy", "held_out_loss", "loss"} <= set(events.Tags()["scalars"])


def test_the_curves_are_drawn(finished, tmp_path):
    assert Image.open(finished / "plots.png").size[0] > 1000
    drawn = plots.draw(finished / "log.jsonl", tmp_path / "again.png")
    assert {"loss", "held_out_loss", "lr", "gradient_norm", "knn_accuracy", "clips_per_second", "data_wait", "mfu"} == set(drawn)
    curves = plots.read(finished / "log.jsonl")
    assert [step for step, _ in curves["loss"]] == [2, 4, 6, 8]


def test_a_log_cut_short_or_without_numbers_is_drawn_too(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 0, "loss": NaN}\n{"step": 1, "loss": 2.0, "gradient_norm": 0.0}\n{"step": 2, "lo'
    )
    assert plots.draw(tmp_path / "log.jsonl", tmp_path / "plots.png") == ["loss", "gradient_norm"]
    (tmp_path / "log.jsonl").write_text("")
    assert plots.draw(tmp_path / "log.jsonl", tmp_path / "plots.png") == []
    assert Image.open(tmp_path / "plots.png").size[0] > 100


def test_pictures_that_cannot_be_written_are_reported_and_the_run_goes_on(run, capsys):
    output = run.folder / "unwritable"
    (output / "plots.png").mkdir(parents=True)
    (output / "pictures").write_text("a file where the folder should be")
    run("unwritable")
    printed = capsys.readouterr().out
    assert "could not write the picture of 0-a, training goes on" in printed
    assert "could not write log.csv and plots.png, training goes on" in printed
    events = [line["event"] for line in lines(output) if "event" in line]
    assert sum("training goes on" in event for event in events) == 10  # three pictures three times, the curves once
    assert RunFolder(output, read_only=True).states() == [8, 4] and lines(output)[-1]["step"] == 8
    assert not [path.name for path in output.glob(".*")]


def test_a_tensorboard_that_fails_is_reported_once(run, capsys, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    run("full", "--probe.data", "null", "--probe.test_data", "null")
    assert capsys.readouterr().out.count("TensorBoard stops here, training goes on") == 1
    assert RunFolder(run.folder / "full", read_only=True).states() == [8, 4]


def test_the_log_as_a_table(finished):
    with open(finished / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    logged = {}
    for line in lines(finished):
        logged.setdefault(line["step"], {}).update((n, v) for n, v in line.items() if n != "step" and isinstance(v, float | int))
    assert [int(row["step"]) for row in rows] == sorted(logged)
    for row in rows:
        assert {n: float(v) for n, v in row.items() if n != "step" and v} == pytest.approx(logged[int(row["step"])], rel=0)


def remote_tracker(monkeypatch, package, **functions):
    """A module of that name in the place of the real one; returns the calls that it gets."""
    calls = []
    module = types.ModuleType(package)
    for name in ("init", "log", "finish", "Image"):
        given = functions.get(name)

        def function(*arguments, _name=name, _given=given, **named):
            calls.append((_name, arguments, named))
            return _given(*arguments, **named) if _given else (_name, *arguments)

        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, package, module)
    return calls


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_remote_tracker_gets_numbers_and_pictures(run, package, monkeypatch):
    calls = remote_tracker(monkeypatch, package)
    run(package, "--run.tracker", package, "--run.project", "clips")
    name, _, started = calls[0]
    assert name == "init" and started["project"] == "clips" and started["name"] == package and started["resume"] == "allow"
    assert started["config"]["optimizer"]["batch"] and calls[-1][0] == "finish"
    scalars, pictures = {}, {}
    for name, arguments, named in calls:
        if name == "log":
            for key, value in arguments[0].items():
                (scalars if isinstance(value, float | int) else pictures).setdefault(key, []).append(named["step"])
    assert scalars["loss"] == [2, 4, 6, 8] and scalars["knn_accuracy"][0] == 0 and pictures["0-a"] == [0, 4, 8]


def test_a_tracker_that_cannot_start_is_refused_before_a_step(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainingError, match="run.tracker wandb: .*pip install wandb"):
        run("missing", "--run.tracker", "wandb")

    def no_key(**options):
        raise ValueError("No API key configured.\nUse `wandb login`")

    remote_tracker(monkeypatch, "wandb", init=no_key)
    with pytest.raises(TrainingError, match="run.tracker wandb: No API key configured. Use .*; WANDB_MODE=offline"):
        run("missing", "--run.tracker", "wandb")
    assert RunFolder(run.folder / "missing", read_only=True).states() == []


def test_a_log_that_cannot_be_written_does_not_hide_what_went_wrong(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    shown = logger.Logger(folder, step=0, steps=1)
    (tmp_path / "log.jsonl").unlink(missing_ok=True)
    (tmp_path / "log.jsonl").mkdir()
    shown.plot(1, last=True)
    shown.close()
    assert "could not write log.csv and plots.png, training goes on" in capsys.readouterr().out


def test_curves_are_not_drawn_at_every_checkpoint_of_a_fast_run(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "draw", lambda source, picture: drawn.append(picture))
    shown = logger.Logger(RunFolder(tmp_path), step=0, steps=1)
    (tmp_path / "log.jsonl").touch()
    shown.plot(1)
    shown.plot(2, last=True)
    assert len(drawn) == 1
    shown.last_plot -= logger.PLOT_EVERY
    shown.plot(3)
    shown.close()
    assert drawn == [Path(tmp_path) / "plots.png"] * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--probe.test_data", "null"], "expected both of probe.data and probe.test_data"),
        (["--probe.every", "-1"], "probe.every: expected 0 or more, got -1"),
        (["--run.reconstruct_every", "-1"], "run.reconstruct_every: expected 0 or more, got -1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, run, capsys):
    with pytest.raises(SystemExit):
        run("refused", *arguments)
    assert message in capsys.readouterr().err


def test_a_probe_with_nothing_readable_is_nan(run, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_text("not a video")
    (tmp_path / "list.txt").write_text("broken.mp4 0\n")
    entries = find_labelled_videos(tmp_path / "list.txt")
    arguments = ["--config", str(run.folder / "tiny.yaml"), "--data", "x", "--output", str(tmp_path)]
    config = parse(PretrainConfig, arguments, prog="p", description="")
    model = MaskedAutoencoder(config.model)
    shown = logger.Logger(RunFolder(tmp_path), step=0, steps=1)
    numbers = knn_accuracy(entries, entries, config, SINGLE_PROCESS, torch.device("cpu"), model, None, shown, 0)
    shown.close()
    assert np.isnan(numbers["knn_accuracy"]) and "left out of the probe" in capsys.readouterr().out
