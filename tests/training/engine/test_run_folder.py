"""A run's folder: one process at a time, nothing of anybody's overwritten, nothing run, and damage noticed."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from stmae import checkpoint
from stmae.training.config import ClipConfig
from stmae.training.engine import checksum, fsdp
from stmae.training.engine.distributed import SINGLE_PROCESS
from stmae.training.engine.run_folder import RunFolder, RunFolderError, clips_of, weights_file
from stmae.training.engine.train_state import TrainState, state_tensors, tensors_problem
from tests.support import small_models

HOLDER = """
import os, sys, time
from stmae.training.engine.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
child = os.fork()  # as a data worker
if not child:
    time.sleep(120)
    os._exit(0)
print(child, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """(process that holds the run folder, pid of its forked child)."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    os.kill(child, signal.SIGKILL)
    process.communicate()


def test_a_second_process_refuses_names_the_first_and_touches_nothing(tmp_path, holder):
    process, _ = holder
    stale = tmp_path / "run" / ".model.safetensors.0123abcd.tmp"
    stale.write_bytes(b"the first one is writing")
    with pytest.raises(RunFolderError, match=rf"another process trains in .*run: process {process.pid} on '.+'") as caught:
        RunFolder(tmp_path / "run")
    assert "\n" not in str(caught.value) and stale.exists()
    RunFolder(tmp_path / "run", read_only=True).states()


def test_a_kill_releases_the_lock_though_a_data_worker_lives_on(tmp_path, holder):
    process, _ = holder
    process.kill()
    process.wait()
    assert (tmp_path / "run" / ".lock").exists()
    RunFolder(tmp_path / "run").close()
    assert not list((tmp_path / "run").iterdir())


def test_the_lock_ends_with_the_run_and_one_process_holds_it_once(tmp_path):
    first = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        RunFolder(tmp_path)
    first.close()
    first.close()
    second = RunFolder(tmp_path)
    assert (tmp_path / ".lock").exists()
    second.close()


@pytest.mark.parametrize("name", [".lock", ".writable.tmp", "run.jsonl", "log.jsonl", "config.yaml", "model.safetensors"])
@pytest.mark.parametrize("kind", ["link", "broken link", "pipe"])
def test_what_lies_in_the_folder_leads_nowhere_else(tmp_path, name, kind):
    """A folder from somebody else: no file outside of it is written, made or emptied, and nothing waits for ever."""
    mine, folder = tmp_path / "mine", tmp_path / "run"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(mine)
    if kind == "link":
        mine.write_bytes(b"precious")
    try:
        run = RunFolder(folder)
        run.save_state(2, {"a": torch.ones(3)}, {"step": 2})
        run.write_config({"seed": 0}, {})
        run.record_start()
        run.log({"step": 1})
        run.rewind_log(1)
        run.close()
    except RunFolderError as error:
        assert "cannot" in str(error)
    assert (mine.read_bytes() == b"precious") if kind == "link" else not mine.exists()


@pytest.mark.parametrize("name", [".state-00000002.new.tmp", ".state-00000002.old.tmp", "state-00000002"])
def test_links_to_folders_are_not_followed_when_old_states_go(tmp_path, name):
    mine, folder = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    (mine / "thesis").write_text("precious")
    folder.mkdir()
    (folder / name).symlink_to(mine)
    run = RunFolder(folder)
    for step in (2, 4, 6, 8):
        run.save_state(step, {"a": torch.ones(3)}, {"step": step})
    run.save_shards(8, {"a": torch.ones(3)}, {"step": 8}, SINGLE_PROCESS)
    run.close()
    assert (mine / "thesis").read_text() == "precious" and run.states() == [8, 6]


# A hostile state


class Call:
    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("function", [os.mkdir, exec, getattr, torch.load, pickle.loads])
def test_a_hostile_index_runs_nothing_and_is_damaged(tmp_path, function):
    folder = RunFolder(tmp_path / "run")
    folder.save_state(2, {"a": torch.ones(3)}, {"step": 2})
    folder.save_shards(4, {"a": torch.ones(3)}, {"step": 4}, SINGLE_PROCESS)
    state = folder.state_path(4, shards=True)
    (state / "checksums").unlink()
    made = tmp_path / "made"
    arguments = {os.mkdir: (str(made),), exec: (f"import os; os.mkdir({str(made)!r})",)}.get(function, (str(made),))
    (state / ".metadata").write_bytes(pickle.dumps(Call(function, *arguments)))
    reports = []
    _, info = folder.load_state(reports.append)
    assert info["step"] == 2 and "which has no place in one: nothing of it was run" in reports[0]
    assert not made.exists()
    folder.close()


@pytest.mark.parametrize("change", ["size", "path", "bytes", "link"])
def test_an_index_of_too_much_or_of_files_elsewhere_is_damaged(tmp_path, change):
    folder = RunFolder(tmp_path / "run")
    folder.save_shards(4, {"a": torch.ones(3)}, {"step": 4}, SINGLE_PROCESS)
    state = folder.state_path(4, shards=True)
    (state / "checksums").unlink()
    index = pickle.loads((state / ".metadata").read_bytes())
    if change == "size":
        index.state_dict_metadata["a"].size = torch.Size([10**12])
    elif change == "path":
        for info in index.storage_data.values():
            info.relative_path = f"../state-00000004/{info.relative_path}"
    elif change == "bytes":
        index.state_dict_metadata["a"] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    else:
        (state / "__0_0.distcp").rename(tmp_path / "elsewhere")
        (state / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    (state / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(fsdp.ShardError, match="index|regular"):
        fsdp.read_shards(state, lambda name: None, SINGLE_PROCESS)
    folder.close()


# Flipped bits


def test_every_flipped_bit_of_a_state_is_noticed(tmp_path):
    folder = RunFolder(tmp_path)
    tensors = {"model.a": torch.arange(5.0), "optimizer.step.a": torch.tensor(3.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    folder.save_state(2, tensors, {"step": 2, "videos": 7})
    folder.save_state(4, tensors, {"step": 4, "videos": 7})
    complete = folder.state_path(4).read_bytes()
    loaded, info = folder.load_state()
    assert info == {"step": 4, "videos": 7} and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    changed_meaning = []
    for position in range(len(complete)):
        folder.state_path(4).write_bytes(complete[:position] + bytes([complete[position] ^ 4]) + complete[position + 1 :])
        loaded, info = folder.load_state(lambda message: None)
        same = info == {"step": 4, "videos": 7} and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
        if info["step"] != 2 and not same:
            changed_meaning.append(position)
    # Only in the checksum's own name can a bit go unnoticed: the file then looks like an older version's, else unchanged.
    assert not changed_meaning
    folder.close()


def test_a_flipped_bit_of_a_shard_is_noticed(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (2, 4):
        folder.save_shards(step, {"a": torch.arange(1000.0)}, {"step": step}, SINGLE_PROCESS)
    state = folder.state_path(4, shards=True)
    assert folder.load_state()[1]["step"] == 4
    data = bytearray((state / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (state / "__0_0.distcp").write_bytes(data)
    reports = []
    assert folder.load_state(reports.append)[1]["step"] == 2 and "checksum" in reports[0]
    folder.close()


def test_files_without_a_checksum_still_load(tmp_path):
    folder = RunFolder(tmp_path)
    save_file({"a": torch.ones(2)}, folder.state_path(2), {"stmae_state": json.dumps({"step": 2})})
    assert folder.load_state()[1] == {"step": 2}
    folder.save_shards(4, {"a": torch.ones(3)}, {"step": 4}, SINGLE_PROCESS)
    (folder.state_path(4, shards=True) / "checksums").unlink()
    assert folder.load_state()[1] == {"step": 4}
    folder.close()


def test_a_checksum_is_of_names_shapes_types_and_values():
    base = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    others = [
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)},
        {"a": torch.arange(6.0).view(torch.int32), "b": torch.tensor(1.0)},
        {"c": torch.arange(6.0), "b": torch.tensor(1.0)},
        {"a": torch.arange(6.0)},
        {"a": torch.arange(6.0), "b": torch.tensor(-1.0)},
    ]
    assert checksum.of_tensors(dict(reversed(base.items()))) == checksum.of_tensors(base)
    assert len({checksum.of_tensors(base), checksum.of_tensors(base, "x"), *map(checksum.of_tensors, others)}) == 7


# What a run continues from


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return state_tensors(model, optimizer, {})


def test_a_state_without_what_it_needs_is_damaged(model):
    tensors = trained(model)
    assert tensors_problem(tensors, model, {}, 1) is None
    weights = {name: value for name, value in tensors.items() if name.startswith("model.")}
    assert tensors_problem(weights, model, {}, 0) is None
    assert tensors_problem(weights, model, {}, 1) == "it lacks tensors of the optimizer"
    for name in tensors:
        assert "it lacks" in tensors_problem({key: value for key, value in tensors.items() if key != name}, model, {}, 1)
    assert "it lacks average.weight" in tensors_problem(tensors, model, {"weight": 0}, 1)
    assert "has the shape [1]" in tensors_problem({**tensors, "model.bias": torch.ones(1)}, model, {}, 1)
    assert "belongs to no parameter" in tensors_problem({**tensors, "optimizer.step.x": torch.ones(1)}, model, {}, 1)


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"step": 8, "steps": 8}, None),
        ({"step": 8}, None),  # an older version's
        ({"step": 9, "steps": 8}, "its step 9 is beyond the end, 8"),
        ({"step": -1, "steps": 8}, "beyond the end"),
        ({"step": True}, "its step is True"),
        ({"step": 1, "videos": "7"}, "its videos is '7'"),
        ({"step": 1, "before": [1]}, r"its before is [1]"),
    ],
)
def test_counters_that_no_run_has_are_damage(values, problem):
    found = TrainState().problem_of(values)
    assert found is None if problem is None else problem in found


def test_a_state_that_cannot_be_continued_is_passed_over(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (2, 4):
        folder.save_state(step, {"a": torch.ones(2)}, {"step": step})
    reports = []
    _, info = folder.load_state(reports.append, problem=lambda tensors, info: "it is odd" if info["step"] == 4 else None)
    assert info["step"] == 2 and "state-00000004.safetensors is damaged (it is odd)" in reports[0]
    folder.state_path(2).rename(folder.state_path(6))
    assert folder.load_state(reports.append)[1]["step"] == 4 and "it holds step 2" in reports[-1]
    folder.close()


def test_another_path_to_the_same_data_is_the_same_run(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "videos")
    folder = RunFolder(tmp_path / "run")
    folder.save_state(2, {"a": torch.ones(2)}, {"step": 2})
    folder.write_config({"data": str(tmp_path / "videos"), "seed": 0}, {})
    folder.write_config({"data": str(tmp_path / "link" / "."), "seed": 0}, {})
    with pytest.raises(RunFolderError, match="other settings"):
        folder.write_config({"data": str(tmp_path), "seed": 0}, {})
    with pytest.raises(RunFolderError, match="holds a pre-training run, and this is a fine-tuning run: choose another --output"):
        folder.write_config({"data": str(tmp_path / "videos"), "seed": 0, "checkpoint": "x"}, {})
    folder.close()


def test_weights_are_a_run_folder_a_file_or_a_folder_and_checked(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_config({"seed": 0, "clips": {"stride": 2}}, {})
    model = small_models.autoencoder()
    folder.save_model(model)
    folder.close()
    for path in (folder.path, folder.model_path):
        assert weights_file(path) == folder.model_path and clips_of(path).stride == 2
        assert checkpoint.load(weights_file(path)).config == model.config
    (tmp_path / "other").mkdir()
    assert weights_file(tmp_path / "other") == tmp_path / "other"
    data = bytearray(folder.model_path.read_bytes())
    data[-5] ^= 1
    folder.model_path.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="checksum"):
        weights_file(folder.path)
    assert "checksum" in folder.model_problem()


@pytest.mark.parametrize("recorded, kept", [({}, "swscale"), ({"pixels": "swscale"}, "swscale"), ({"pixels": "exact"}, "exact")])
def test_a_continued_run_keeps_its_pixels(recorded, kept, tmp_path):
    config = types.SimpleNamespace(clips=ClipConfig(pixels="exact"))
    folder = RunFolder(tmp_path / "run")
    (folder.path / "config.yaml").write_text(json.dumps({"clips": {"stride": 2, **recorded}}))
    folder.keep_pixels(config)
    assert config.clips.pixels in ("exact", "swscale")  # nothing was trained yet: what the installation has
    folder.save_state(1, {"a": torch.ones(2)}, {"step": 1})
    folder.keep_pixels(config)
    folder.close()
    assert config.clips.pixels == kept
    assert clips_of(folder.path).pixels == kept


def test_a_folder_that_vanishes_is_named(tmp_path):
    with contextlib.closing(RunFolder(tmp_path / "run")) as folder:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(RunFolderError, match=r"^cannot write state-00000001\.safetensors: "):
            folder.save_state(1, {"x": torch.zeros(2)}, {})
