"""FSDP2 and sharded checkpoints: two processes compute what one does, and a run goes on at another number of processes."""

import json
import resource
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from stmae import checkpoint
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier, VideoClassifierConfig
from stmae.training.commands import finetune, pretrain
from stmae.training.config import FinetuneConfig, PretrainConfig, parse
from stmae.training.engine.distributed import SINGLE_PROCESS
from stmae.training.engine.run_folder import RunFolder, RunFolderError
from tests.support import two_processes
from tests.support.synthetic_video import write_video

TINY = """
clips: {stride: 2, repeats: 2}
optimizer: {batch: 4, accumulate: 2, epochs: 12, warmup_epochs: 2, base_lr: 3.0e-3, base_batch: 4, clip_grad: 0.5}
run: {save_every: 2, log_every: 1, workers: 0, device: cpu, precision: float32, tensorboard: false}
"""  # 4 videos: 6 steps
MODEL = {"image_size": 32, "num_frames": 4, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
PRETRAIN = (
    TINY
    + "model: "
    + json.dumps({**MODEL, "decoder_width": 32, "decoder_depth": 1, "decoder_num_heads": 1, "separable_position": False})
)
# What draws random numbers in the loop draws others in another process; the rest must be the same.
FINETUNE = TINY + "augmentation: {mixup: 0, cutmix: 0}\nmodel: {dropout: 0, drop_path: 0}\naverage_decay: 0.5\n"

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines if "loss" in line}


def others(folder, *names):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines if names[0] in line]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def drop_newest(folder):
    """Back to the state before the last."""
    states = RunFolder(folder, read_only=True)
    path = max(states.path.glob("state-*"), key=lambda path: int(path.stem.removeprefix("state-")))
    shutil.rmtree(path) if path.is_dir() else path.unlink()


class Runs:
    """Commands of the same small runs, into different folders."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "videos").mkdir()
        for number, name in enumerate("abcd"):
            write_video(folder / "videos" / f"{name}.mp4", 30, ground=60 + 30 * number)
        (folder / "list.txt").write_text("".join(f"videos/{name}.mp4 {number % 3}\n" for number, name in enumerate("abcd")))
        (folder / "pretrain.yaml").write_text(PRETRAIN)
        (folder / "finetune.yaml").write_text(FINETUNE)
        torch.manual_seed(0)
        checkpoint.save(
            MaskedAutoencoder(MaskedAutoencoderConfig(**MODEL, decoder_width=32, decoder_depth=1, decoder_num_heads=1)),
            folder / "start.safetensors",
        )

    def pretrain(self, output, *more):
        data = self.folder / "videos"
        return ["pretrain", "--config", self.folder / "pretrain.yaml", "--data", data, "--held_out", data,
                "--output", self.folder / output, *more]  # fmt: skip

    def finetune(self, output, *more):
        data = self.folder / "list.txt"
        return ["finetune", "--config", self.folder / "finetune.yaml", "--data", data, "--test_data", data,
                "--checkpoint", self.folder / "start.safetensors", "--output", self.folder / output, *more]  # fmt: skip

    def here(self, command):
        """Run it in this process."""
        kind = {"pretrain": (pretrain, PretrainConfig), "finetune": (finetune, FinetuneConfig)}[command[0]]
        return kind[0].run(parse(kind[1], [str(word) for word in command[1:]], prog="p", description=""))


FSDP = ("--run.parallel", "fsdp")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """In runs.folder: of one process ``one``, ``one-shards`` and ``classifier``; of two ``two``, ``two-from-file``,
    ``two-from-shards`` and ``two-classifier``."""
    runs = Runs(tmp_path_factory.mktemp("sharding"))
    runs.here(runs.pretrain("one"))
    runs.here(runs.pretrain("one-shards", *FSDP))
    runs.here(runs.finetune("classifier"))
    for begun, output in (("one", "two-from-file"), ("one-shards", "two-from-shards")):
        shutil.copytree(runs.folder / begun, runs.folder / output)
        drop_newest(runs.folder / output)
    runs.printed = two_processes.finish(
        two_processes.start(
            runs.pretrain("two", *FSDP, "--run.checkpoint_activations", "true"),
            runs.pretrain("two-from-file", *FSDP),
            runs.pretrain("two-from-shards", *FSDP),
            runs.finetune("two-classifier", *FSDP),
        )
    )
    return runs


def test_two_processes_with_shards_give_the_losses_of_one(runs):
    one, two = losses(runs.folder / "one"), losses(runs.folder / "two")
    assert len(one) == 6 and one.keys() == two.keys()
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4), step
    assert max(norm for _, norm in one.values()) > 0.5  # it was clipped
    held_out = others(runs.folder / "one", "held_out_loss")
    assert others(runs.folder / "two", "held_out_loss") == [pytest.approx(pair, rel=1e-4) for pair in held_out]
    assert len(list((runs.folder / "two" / "state-00000006").glob("*.distcp"))) == 2
    assert (
        checkpoint.load(runs.folder / "two" / "model.safetensors").config
        == checkpoint.load(runs.folder / "one" / "model.safetensors").config
    )
    # AdamW divides by the root of tiny squares in the first steps, where rounding shows.
    assert_close(weights(runs.folder / "two"), weights(runs.folder / "one"), 2e-3)


def test_a_classifier_and_its_averaged_weights_too(runs):
    one, two = losses(runs.folder / "classifier"), losses(runs.folder / "two-classifier")
    assert len(one) == 6
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-3), step
    assert others(runs.folder / "two-classifier", "top1", "top5") == others(runs.folder / "classifier", "top1", "top5")
    assert_close(weights(runs.folder / "two-classifier"), weights(runs.folder / "classifier"), 2e-3)


@pytest.mark.parametrize("begun", ["file", "shards"])
def test_two_processes_continue_what_one_began(begun, runs):
    assert runs.printed.count("continuing from step 4") == 2
    continued = losses(runs.folder / f"two-from-{begun}")
    assert continued == {step: pytest.approx(pair, rel=1e-4) for step, pair in losses(runs.folder / "one").items()}
    assert RunFolder(runs.folder / f"two-from-{begun}").states() == [6, 4]
    assert_close(weights(runs.folder / f"two-from-{begun}"), weights(runs.folder / "one"), 1e-3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_continues_what_two_began(parallel, runs, capsys):
    output = runs.folder / f"one-from-two-{parallel}"
    shutil.copytree(runs.folder / "two", output)
    drop_newest(output)
    runs.here(runs.pretrain(output.name, "--run.parallel", parallel))
    assert "continuing from step 4" in capsys.readouterr().out
    assert losses(output) == {step: pytest.approx(pair, rel=1e-4) for step, pair in losses(runs.folder / "two").items()}
    assert_close(weights(output), weights(runs.folder / "two"), 1e-3)
    assert (output / "state-00000006").is_dir() == (parallel == "fsdp")


def test_one_process_with_either_kind_of_checkpoint_gets_the_same_weights(runs):
    a, b = weights(runs.folder / "one"), weights(runs.folder / "one-shards")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(path.is_dir() for path in (runs.folder / "one-shards").glob("state-*"))


def test_two_killed_processes_continue_bit_for_bit(runs):
    command = runs.pretrain("killed", *FSDP, "--run.checkpoint_activations", "true", "--run.save_every", "1")
    output = runs.folder / "killed"
    for _ in range(10):
        processes = two_processes.start(command)
        until = time.monotonic() + 100
        while time.monotonic() < until and not list(output.glob("state-*")):
            time.sleep(0.005)
        for process in processes:
            process.kill()
        printed = [process.communicate()[0] for process in processes]
        states = RunFolder(output, read_only=True).states()
        assert states, "".join(printed)
        if states[0] < 6:
            break
        shutil.rmtree(output)  # the kill came late, as it may on a busy machine
    printed = two_processes.finish(two_processes.start(command))
    assert "continuing from step" in printed
    a, b = weights(output), weights(runs.folder / "two")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(output.glob(".*"))


def test_computing_activations_again_changes_no_bit_of_a_run(runs):
    runs.here(runs.pretrain("again", "--run.checkpoint_activations", "true"))
    a, b = weights(runs.folder / "again"), weights(runs.folder / "one")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("backend", ["ops", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
def test_computing_activations_again_saves_memory_and_changes_no_gradient(kind, dtype, backend):
    if kind == "autoencoder":
        model = MaskedAutoencoder(MaskedAutoencoderConfig(**MODEL, decoder_width=32, decoder_depth=2, decoder_num_heads=1))
    else:
        model = VideoClassifier(VideoClassifierConfig(**MODEL, num_classes=4, dropout=0.3, drop_path=0.5))
    model.backend = backend
    video = torch.randint(0, 256, (3, *model.config.video_shape), dtype=torch.uint8)
    results = []
    for again in (False, True):
        model.checkpoint_activations = again
        assert model.checkpoint_activations is again
        model.zero_grad()
        torch.manual_seed(1)  # drop path, dropout, mask
        kept = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            out = model(video)
        loss = out.loss if kind == "autoencoder" else out.float().square().mean()
        loss.backward()
        results.append((sum(kept), loss, [parameter.grad for parameter in model.parameters()]))
    (kept, loss, grads), (kept_again, loss_again, grads_again) = results
    assert kept_again < 0.5 * kept
    assert torch.equal(loss, loss_again) and all(map(torch.equal, grads, grads_again))


# What befalls checkpoints, in one process.


@pytest.fixture
def copy(runs, tmp_path):
    """The finished run of one process with shards, of states 6 and 4."""
    shutil.copytree(runs.folder / "one-shards", tmp_path / "run")
    return RunFolder(tmp_path / "run", read_only=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda state: cut(next(state.glob("*.distcp"))), id="a shard cut short"),
        pytest.param(lambda state: next(state.glob("*.distcp")).unlink(), id="a shard missing"),
        pytest.param(lambda state: cut(state / ".metadata"), id="the index cut short"),
        pytest.param(lambda state: (state / ".metadata").unlink(), id="no index"),
    ],
)
def test_a_damaged_state_is_passed_over_kept_and_then_replaced(damage, copy, runs):
    damage(copy.state_path(6, shards=True))
    reports = []
    tensors, counters = copy.load_state(reports.append)
    assert counters["step"] == 4 and "checkpoint state-00000006 is damaged" in reports[0]
    assert copy.states() == [6, 4]
    copy.save_shards(6, tensors, {**counters, "step": 6}, SINGLE_PROCESS)
    assert copy.load_state(reports.append)[1]["step"] == 6 and len(reports) == 1
    assert copy.states() == [6, 4] and not list(copy.path.glob(".*"))


def test_all_states_damaged_is_an_error(copy):
    for step in copy.states():
        cut(next(copy.state_path(step, shards=True).glob("*.distcp")))
    with pytest.raises(RunFolderError, match="every checkpoint in .* is damaged"):
        copy.load_state(lambda message: None)
    assert copy.states() == [6, 4]


def test_a_full_disk_leaves_the_states_before_whole(copy):
    tensors, counters = copy.load_state()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # stands for the disk: writing stops in the middle
    try:
        with pytest.raises(RunFolderError, match=r"cannot write state-00000008: .*the checkpoint of step 6 is complete"):
            copy.save_shards(8, tensors, counters, SINGLE_PROCESS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert copy.states() == [6, 4] and not list(copy.path.glob(".*"))
    assert copy.load_state()[1] == counters


def test_what_a_kill_left_behind_is_no_state_and_is_cleared_away(copy):
    for kind in ("new", "old"):
        shutil.copytree(copy.state_path(6, shards=True), copy.path / f".state-00000008.{kind}.tmp")
    assert copy.states() == [6, 4]
    RunFolder(copy.path).close()
    assert not list(copy.path.glob(".*")) and copy.states() == [6, 4]


def test_of_two_kinds_of_one_step_the_newer_replaces_the_older(copy):
    tensors, counters = copy.load_state()
    copy.save_state(6, tensors, counters)
    assert sorted(path.name for path in copy.path.glob("state-*")) == ["state-00000004", "state-00000006.safetensors"]
    copy.save_shards(6, tensors, counters, SINGLE_PROCESS)
    assert sorted(path.name for path in copy.path.glob("state-*")) == ["state-00000004", "state-00000006"]
    assert copy.load_state()[1] == counters
