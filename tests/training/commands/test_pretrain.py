"""``stmae pretrain`` from end to end: it learns, continues exactly, and survives what befalls long runs."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stmae import checkpoint
from stmae.training import cli
from stmae.training.commands import pretrain
from stmae.training.config import PretrainConfig, parse
from stmae.training.engine import loop
from stmae.training.engine.run_folder import RunFolder, RunFolderError
from stmae.training.tasks import pretraining
from tests.support.synthetic_video import write_video

ROOT = Path(__file__).parents[3]
TINY = """
clips: {stride: 2, repeats: 2}
model: {image_size: 32, num_frames: 4, patch_size: 8, width: 32, depth: 2, num_heads: 2, decoder_width: 32, decoder_depth: 1,
  decoder_num_heads: 1}
optimizer: {batch: 2, epochs: 40, warmup_epochs: 8, base_lr: 3.0e-3, base_batch: 2, clip_grad: 1.0}
run: {save_every: 4, log_every: 5, workers: 0, device: cpu, precision: float32, tensorboard: false}
"""  # 3 videos: 30 steps


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name in "abc":
        write_video(folder / f"{name}.mp4", 30)
    return folder


@pytest.fixture
def tiny(tmp_path, videos):
    """Command-line arguments of a run of 30 steps that takes a second."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    return ["--config", str(tmp_path / "tiny.yaml"), "--data", str(videos)]


def configure(arguments, output, *more):
    return parse(PretrainConfig, [*arguments, "--output", str(output), *more], prog="stmae pretrain", description="")


def weights(folder):
    return load_file(RunFolder(folder, read_only=True).model_path)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def lines(folder, name="log.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def command(arguments, output, **options):
    argv = [sys.executable, "-m", "stmae.training", "pretrain", *arguments, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, videos):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    arguments = ["--config", str(folder / "tiny.yaml"), "--data", str(videos), "--held_out", str(videos)]
    pretrain.run(configure(arguments, folder / "run"))
    return folder / "run"


def test_it_learns(finished):
    held_out = [line["held_out_loss"] for line in lines(finished) if "held_out_loss" in line]
    assert len(held_out) == 2 and held_out[1] < 0.9 * held_out[0]


def test_the_run_folder_says_everything(finished):
    (start,) = lines(finished, "run.jsonl")
    assert start["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"command", "time", "device", "precision", "threads", "host"} <= start.keys()
    numbers = [line for line in lines(finished) if "loss" in line]
    assert [line["step"] for line in numbers] == [5, 10, 15, 20, 25, 30]
    expected = {"loss", "lr", "gradient_norm", "clips_per_second", "tokens_per_second", "data_wait", "epoch", "skipped_steps"}
    assert expected <= numbers[0].keys() and numbers[-1]["epoch"] == 40
    assert "base_lr: 0.003" in (finished / "config.yaml").read_text()
    assert checkpoint.load(finished / "model.safetensors").config.width == 32
    assert not [name for name in os.listdir(finished) if name.startswith(".")]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tiny, tmp_path, finished):
    pretrain.run(configure(tiny, tmp_path / "again"))
    assert_same(weights(tmp_path / "again"), weights(finished))
    pretrain.run(configure(tiny, tmp_path / "other", "--seed", "1"))
    name = "encoder.patch_embed.weight"
    assert not torch.equal(weights(tmp_path / "other")[name], weights(finished)[name])


def test_a_finished_run_is_left_alone(finished, videos, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir() if path.suffix == ".safetensors"}
    pretrain.run(configure(["--config", str(finished / "config.yaml")], finished))
    assert "complete, 30 of 30 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_starts_from_other_weights_with_a_schedule_of_its_own(finished, tiny, tmp_path, capsys):
    source = shutil.copytree(finished, tmp_path / "source")
    arguments = [*tiny, "--init", str(source), "--optimizer.epochs", "4", "--optimizer.warmup_epochs", "0"]
    still = ["--optimizer.base_lr", "1e-12"]  # so that what it started from can be seen at its end
    pretrain.run(configure(arguments, tmp_path / "run", *still))
    said = capsys.readouterr().out
    assert "recognised as stmae" in said and "  new " not in said
    assert lines(tmp_path / "run")[-1]["step"] == 3
    for name, value in weights(finished).items():
        assert torch.allclose(weights(tmp_path / "run")[name], value, atol=1e-6), name
    shutil.rmtree(source)  # a run that goes on has its own weights
    pretrain.run(configure(arguments, tmp_path / "run", *still, "--run.extend_epochs", "2"))
    assert "recognised" not in capsys.readouterr().out

    with pytest.raises(checkpoint.CheckpointError, match="no such file"):
        pretrain.run(configure(arguments, tmp_path / "other"))
    argv = ["pretrain", *tiny, "--init", str(finished), "--output", str(tmp_path / "other"), "--model.num_heads", "4"]
    assert cli.main(argv) == 1
    said = capsys.readouterr().err
    assert "its weights are of a model with num_heads 2, not 4" in said and said.count("\n") == 1
    pretrain.run(configure([*tiny, "--init", str(finished), "--init_decoder", "false"], tmp_path / "new", *still))
    name = "decoder.head.weight"
    assert "new decoder.mask_token: the decoder is not taken" in capsys.readouterr().out
    assert not torch.allclose(weights(tmp_path / "new")[name], weights(finished)[name], atol=1e-3)


def test_a_finished_run_is_continued_for_more_epochs(finished, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "run")
    arguments = ["--config", str(output / "config.yaml"), "--run.extend_epochs", "4"]
    pretrain.run(configure(arguments, output))
    printed = capsys.readouterr().out
    assert "continuing from step 30" in printed and lines(output)[-1]["step"] == 33
    state = RunFolder(output, read_only=True).load_state()[1]
    assert (state["step"], state["steps"], state["done"]) == (33, 33, True)
    pretrain.run(configure(arguments, output))
    assert "complete, 33 of 33 steps" in capsys.readouterr().out
    with pytest.raises(loop.TrainingError, match="holds a run at step 33, .* ends at step 30: repeat run.extend_epochs"):
        pretrain.run(configure(["--config", str(finished / "config.yaml")], output))


def test_a_run_of_an_older_version_continues(finished, tmp_path, capsys):
    """Its config.yaml lacks what it had no name for: that is the default, and nothing else."""
    output, arguments = shutil.copytree(finished, tmp_path / "run"), ["--config", str(finished / "config.yaml")]
    settings = yaml.safe_load((output / "config.yaml").read_text())
    del settings["model"]["decoder_mask_ratio"], settings["data_labels"], settings["probe"]
    (output / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(RunFolderError, match=r"other settings \(model.decoder_mask_ratio 0.0 -> 0.5\)"):
        pretrain.run(configure(arguments, output, "--model.decoder_mask_ratio", "0.5"))
    pretrain.run(configure(arguments, output))
    assert "complete, 30 of 30 steps" in capsys.readouterr().out
    assert "decoder_mask_ratio" in (output / "config.yaml").read_text()


def test_accumulated_parts_add_up_to_the_whole_batch(tiny, tmp_path):
    arguments = [*tiny, "--run.log_every", "1", "--optimizer.epochs", "6", "--optimizer.warmup_epochs", "1"]
    pretrain.run(configure(arguments, tmp_path / "complete"))
    pretrain.run(configure(arguments, tmp_path / "parts", "--optimizer.accumulate", "2"))
    complete, parts = lines(tmp_path / "complete"), lines(tmp_path / "parts")
    assert len(complete) == 5
    for a, b in zip(complete, parts):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)


def test_a_batch_that_does_not_divide_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="a batch of 2 videos does not divide into 3"):
        pretrain.run(configure(tiny, tmp_path / "run", "--optimizer.accumulate", "3"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_and_continued_is_bit_for_bit_the_uninterrupted_run(workers, tiny, tmp_path, finished):
    """kill -9 three times, at moments that differ, then to the end."""
    output = tmp_path / "run"
    arguments = [*tiny, "--run.workers", workers, "--run.save_every", "3"]
    for step in (1, 8, 17):
        assert interrupt(arguments, output, step, signal.SIGKILL)[0] == -signal.SIGKILL
    process = command(arguments, output)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "continuing from step" in printed
    assert_same(weights(output), weights(finished))
    assert RunFolder(output, read_only=True).states() == [30, 27]
    steps = [line["step"] for line in lines(output) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 30


def interrupt(arguments, output, step, number):
    """(exit status, what it printed) of a run that got the signal once it had saved a state of ``step`` or later."""
    for _ in range(10):
        process = command(arguments, output, start_new_session=True)
        until = time.monotonic() + 100
        while time.monotonic() < until and process.poll() is None:
            if output.exists() and max(RunFolder(output, read_only=True).states(), default=0) >= step:
                break
            time.sleep(0.01)
        if number == signal.SIGKILL:
            process.kill()
            process.wait()
            printed = ""  # data workers, which live a little longer, could still print something
        else:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # as a terminal and a scheduler do: to the workers too
            printed, _ = process.communicate(timeout=120)
        states = RunFolder(output, read_only=True).states()
        assert states, f"nothing was saved, exit status {process.returncode}: {printed}"
        if states[0] < 30:
            return process.returncode, printed
        shutil.rmtree(output)  # the signal came late, as it may on a busy machine
    raise AssertionError(f"no run was caught before its end:\n{printed}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_leaves_cleanly(number, tiny, tmp_path, finished):
    output = tmp_path / "run"
    arguments = [*tiny, "--run.workers", "2", "--run.save_every", "3"]
    status, printed = interrupt(arguments, output, 3, number)
    assert status == 0 and "Traceback" not in printed
    stopped = int(re.search(r"stopped after step (\d+) of 30", printed)[1])
    assert RunFolder(output, read_only=True).states()[0] == stopped
    pretrain.run(configure(arguments, output))
    assert_same(weights(output), weights(finished))


def test_a_folder_holds_one_run(finished, videos):
    with pytest.raises(RunFolderError, match=r"optimizer.base_lr 0.003 -> 0.004"):
        pretrain.run(configure(["--config", str(finished / "config.yaml")], finished, "--optimizer.base_lr", "4e-3"))


def test_a_damaged_checkpoint_is_passed_over_and_kept(tiny, tmp_path, finished, capsys):
    output = tmp_path / "run"
    pretrain.run(configure(tiny, output))
    newest, older = RunFolder(output, read_only=True).states()
    file = RunFolder(output, read_only=True).state_path(newest)
    file.write_bytes(file.read_bytes()[:-1000])
    (output / "model.safetensors").unlink()
    capsys.readouterr()
    pretrain.run(configure(tiny, output))
    printed = capsys.readouterr().out
    assert "is damaged" in printed and f"continuing from step {older}" in printed
    assert_same(weights(output), weights(finished))


def test_all_checkpoints_damaged_is_an_error_and_none_is_touched(tiny, tmp_path):
    output = tmp_path / "run"
    pretrain.run(configure(tiny, output))
    for step in RunFolder(output, read_only=True).states():
        RunFolder(output, read_only=True).state_path(step).write_bytes(b"not a checkpoint")
    with pytest.raises(RunFolderError, match="every checkpoint in .* is damaged"):
        pretrain.run(configure(tiny, output))
    assert all(
        RunFolder(output, read_only=True).state_path(step).read_bytes() == b"not a checkpoint"
        for step in RunFolder(output, read_only=True).states()
    )


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tiny, tmp_path, finished):
    """A limit on the size of files stands for the disk: writing stops in the middle of a state."""
    output = tmp_path / "run"
    interrupt([*tiny, "--run.save_every", "5"], output, 5, signal.SIGTERM)
    step = RunFolder(output, read_only=True).states()[0]
    size = RunFolder(output, read_only=True).state_path(step).stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    process = command([*tiny, "--run.save_every", "5"], output, preexec_fn=limit)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in printed
    assert re.search(rf"cannot write state-\d+.safetensors: .*the checkpoint of step {step} is complete", printed), printed
    assert RunFolder(output, read_only=True).states()[0] == step
    assert not [name for name in os.listdir(output) if name.endswith(".tmp")]
    pretrain.run(configure(tiny, output))
    assert_same(weights(output), weights(finished))


def test_an_output_that_cannot_be_a_folder_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["pretrain", *tiny, "--output", str(tmp_path / "file" / "run")]) == 1
    error = capsys.readouterr().err
    assert "cannot write to the output folder" in error and error.count("\n") == 1


def nan_at(steps, monkeypatch):
    """Poisons the loss at the calls in training numbered ``steps``."""
    forward, calls = pretraining.MaskedAutoencoder.forward, []

    def poisoned(self, video, **options):
        out = forward(self, video, **options)
        if not self.training:  # pictures
            return out
        calls.append(None)
        return out._replace(loss=out.loss * float("nan")) if len(calls) in steps else out

    monkeypatch.setattr(pretraining.MaskedAutoencoder, "forward", poisoned)


def test_a_step_without_finite_loss_is_skipped_and_counted(tiny, tmp_path, monkeypatch, capsys):
    nan_at({3, 4}, monkeypatch)
    state = pretrain.run(configure(tiny, tmp_path / "run"))
    assert state.skipped_steps == 2 and state.step == 30
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())
    events = [line for line in lines(tmp_path / "run") if "event" in line]
    assert [event["step"] for event in events] == [3, 4]
    assert "2 steps without a finite gradient" in capsys.readouterr().out


def test_many_in_a_row_stop_the_run_and_keep_the_checkpoint(tiny, tmp_path, monkeypatch):
    nan_at(range(7, 1000), monkeypatch)
    with pytest.raises(loop.TrainingError, match="20 steps in a row had no finite loss .*the checkpoint of step 24 is complete"):
        pretrain.run(configure(tiny, tmp_path / "run"))
    counters = RunFolder(tmp_path / "run").load_state()[1]
    assert counters["skips_in_a_row"] == 18


def test_broken_videos_are_named_once_and_counted(tiny, tmp_path, videos, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "broken.mp4").write_text("not a video")
    for path in videos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    pretrain.run(configure(tiny, tmp_path / "run", "--data", str(folder)))
    printed = capsys.readouterr().out
    assert len(re.findall(r"skipped video .*broken.mp4: cannot be opened", printed)) == 1
    assert "1 video that could not be used" in printed
    assert [line["skipped_videos"] for line in lines(tmp_path / "run") if "loss" in line][-1] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "/nowhere"], "no such folder or list file: /nowhere"),
        (["--model.num_frames", "40", "--clips.short", "skip"], "none of the videos can be used, 3 in all"),
        (["--run.device", "cuda:77"], "cuda:77"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_starts(arguments, message, tiny, tmp_path, capsys):
    assert cli.main(["pretrain", *tiny, "--output", str(tmp_path / "run"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizer.warmup_epochs", "40"], "optimizer.warmup_epochs: expected 0 or more, and less than epochs (40), got 40"),
        (["--optimizer.batch", "0"], "optimizer.batch: expected more than 0, got 0"),
        (["--model.in_channels", "1"], "model.in_channels: expected 3 for decoded video, got 1"),
        (["--seed", "-1"], "seed: expected 0 or more"),
    ],
)
def test_a_value_that_no_setting_takes_is_refused_by_the_parser(arguments, message, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["pretrain", *tiny, "--output", str(tmp_path / "run"), *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
