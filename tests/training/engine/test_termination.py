"""Every way out of a run of two processes ends both, with their data workers, and with the exit status that says why.

None ends by a signal: a thread of gloo or of a writer that outlives its interpreter would abort the process.
"""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from stmae.training.engine.run_folder import RunFolder
from tests.support.fork_server import TIMEOUT, ForkServer
from tests.support.synthetic_video import write_video

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]
ENDLESS = """
clips: {stride: 1, repeats: 1}
model: {image_size: 16, num_frames: 2, patch_size: 8, mask_ratio: 0.5, width: 64, depth: 1, num_heads: 2, decoder_width: 16,
  decoder_depth: 1, decoder_num_heads: 1}
optimizer: {batch: 2, epochs: 100000, warmup_epochs: 1, clip_grad: 1.0}
run: {save_every: 2, log_every: 1, workers: 0, device: cpu, precision: float32, tensorboard: false, parallel: fsdp}
"""


class Runs:
    """Runs of two processes in copies of a folder, which holds what it takes to continue from the step it was stopped at."""

    def __init__(self, server, folder):
        self.server, self.folder, self.number = server, folder, 0
        (folder / "videos").mkdir()
        for name in "ab":
            write_video(folder / "videos" / f"{name}.mp4", 8)
        (folder / "endless.yaml").write_text(ENDLESS)
        self.begun = folder / "begun"

    def start(self, output, *more, data=None, **options):
        self.said = [Path(f"{output}.said-{rank}") for rank in range(2)]
        command = ["pretrain", "--config", self.folder / "endless.yaml", "--data", data or self.folder / "videos"]
        return self.server.start_two([*command, "--output", output, *more], f"{output}.said", **options)

    def copy(self):
        self.number += 1
        return Path(shutil.copytree(self.begun, self.folder / f"run-{self.number}"))

    def wait_for_step(self, output, step):
        """Until the run has saved a state of ``step`` or later."""
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until and max(steps_of(output), default=0) < step:
            assert not any(map(has_ended, self.server.running)), self.words()
            time.sleep(0.01)

    def ended(self, *processes):
        """The exit statuses."""
        return [self.server.wait(process) for process in processes]

    def words(self):
        return [file.read_text() for file in self.said]


def has_ended(process):
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def children_of(process):
    children = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        children += map(int, file.read_text().split())
    return children


def steps_of(output):
    return RunFolder(output, read_only=True).states() if output.exists() else []


def assert_complete(output):
    """The newest state is, and no temporary file is left."""
    reports = []
    assert RunFolder(output, read_only=True).load_state(reports.append) is not None and not reports
    assert not list(output.glob(".*"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with ForkServer() as server:
        runs = Runs(server, tmp_path_factory.mktemp("termination"))
        processes = runs.start(runs.begun)
        runs.wait_for_step(runs.begun, 2)
        os.kill(processes[1], signal.SIGTERM)  # of one process: the other hears of it
        runs.first = runs.ended(*processes), runs.words()
        yield runs


def test_a_signal_to_one_process_stops_both_after_the_same_step(runs):
    statuses, words = runs.first
    assert statuses == [0, 0], words
    (step,) = steps_of(runs.begun)[:1]
    assert f"a signal to another process: stopped after step {step} of" in words[0] and "saved" in words[0]
    assert_complete(runs.begun)


def test_an_interrupt_of_both_saves_and_a_second_one_ends_them_at_once(runs):
    output = runs.copy()
    (before,) = steps_of(output)[:1]
    processes = runs.start(output, "--run.workers", 1)
    runs.wait_for_step(output, before + 1)
    workers = [worker for process in processes for worker in children_of(process)]
    assert len(workers) == 2
    for _ in range(2):
        for process in processes:
            os.kill(process, signal.SIGINT)
    statuses, words = runs.ended(*processes), runs.words()
    # 130: the second one came before the step's end. Then the other process may hear of it by the connection alone.
    assert set(statuses) <= {0, 1, 130}, words
    assert all("Traceback" not in said for said in words), words
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert steps_of(output)[0] > before


def test_a_process_that_cannot_write_its_shard_ends_all_with_a_complete_checkpoint(runs):
    output = runs.copy()
    before = steps_of(output)
    statuses, words = runs.ended(*runs.start(output, file_size=40_000)), runs.words()
    assert statuses == [1, 1], words
    for said in words:
        assert f"cannot write state-{before[0] + 2 - before[0] % 2:08d}: " in said and "Traceback" not in said
        assert f"the checkpoint of step {before[0]} is complete: the same command continues from it" in said
    assert steps_of(output) == before
    assert_complete(output)


@pytest.mark.parametrize("refused", ["other settings", "damaged", "locked"])
def test_what_is_refused_ends_all_with_the_same_words(runs, refused):
    output, more = runs.copy(), ()
    if refused == "other settings":
        more, expected = ("--seed", 3), "holds a run with other settings (seed 0 -> 3)"
    elif refused == "damaged":
        expected = "is damaged; move them away to start over"
        for file in output.glob("state-*/*"):
            file.write_bytes(b"damaged")
    else:
        expected = "another process trains in"
    holder = RunFolder(output) if refused == "locked" else None
    statuses, words = runs.ended(*runs.start(output, *more)), runs.words()
    assert statuses == [1, 1], words
    assert all(expected in said and "Traceback" not in said for said in words), words
    if holder is not None:
        holder.close()


@pytest.mark.parametrize("killed, parallel", [(0, "fsdp"), (1, "fsdp"), (1, "ddp")])
def test_the_death_of_one_process_ends_the_other(runs, killed, parallel):
    output = runs.copy()
    (before,) = steps_of(output)[:1]
    processes = runs.start(output, "--run.parallel", parallel)
    runs.wait_for_step(output, before + 1)
    os.kill(processes[killed], signal.SIGKILL)
    statuses, words = runs.ended(*processes), runs.words()
    expected = [1, 1]
    expected[killed] = -signal.SIGKILL
    assert statuses == expected, words
    survivor = words[1 - killed]
    assert "Traceback" not in survivor
    # In a save, it is the write that fails.
    assert "stmae pretrain: lost another process of this run: " in survivor or "stmae pretrain: cannot write " in survivor
    assert "is complete: the same command continues from it" in survivor


def test_the_loss_of_the_data_ends_all(runs):
    output = runs.copy()
    (before,) = steps_of(output)[:1]
    data = Path(shutil.copytree(runs.folder / "videos", f"{output}.videos"))
    # Where the videos are is a setting of the run: as they were when it began, under another name in this copy.
    config = output / "config.yaml"
    config.write_text(config.read_text().replace(str(runs.folder / "videos"), str(data)))
    processes = runs.start(output, "--run.data_patience", 0.1, data=data)
    runs.wait_for_step(output, before + 1)
    shutil.rmtree(data)
    statuses, words = runs.ended(*processes), runs.words()
    assert statuses == [75, 75], words
    assert all("Traceback" not in said and "the same command continues from it" in said for said in words), words


def test_the_death_of_a_data_worker_ends_all(runs):
    output = runs.copy()
    (before,) = steps_of(output)[:1]
    processes = runs.start(output, "--run.workers", 1)
    runs.wait_for_step(output, before + 1)
    os.kill(children_of(processes[1])[0], signal.SIGKILL)
    statuses, words = runs.ended(*processes), runs.words()
    assert statuses == [1, 1], words
    assert all("stmae pretrain: no more data: " in said and "Traceback" not in said for said in words), words
