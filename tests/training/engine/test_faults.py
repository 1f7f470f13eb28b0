"""What befalls long runs: kills at random and at every critical moment, broken videos, full disks, damaged checkpoints.

After each, the same command continues, and in the end the weights are, bit for bit, those of a run that nothing befell.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from stmae.training.data.loader import Batches, LoaderError
from stmae.training.data.video import Video
from stmae.training.engine.run_folder import RunFolder, RunFolderError
from tests.support.fork_server import TIMEOUT, ForkServer
from tests.support.synthetic_video import write_audio, write_image, write_video

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from Linux's /proc")
KILLS, TERMINATIONS = 20, 6
POSITIONS = 36  # more than a start and two checkpoints have
STEPS = 80
TINY = """
clips: {stride: 1, repeats: 1, short: skip}
model: {image_size: 16, num_frames: 2, patch_size: 8, mask_ratio: 0.5, width: 16, depth: 1, num_heads: 1, decoder_width: 16,
  decoder_depth: 1, decoder_num_heads: 1}
optimizer: {batch: 1, epochs: 8, warmup_epochs: 1, base_lr: 3.0e-3, base_batch: 1, clip_grad: 1.0}
run: {save_every: 2, log_every: 3, workers: 0, device: cpu, precision: float32, tensorboard: false}
"""  # 10 videos: 80 steps


@pytest.fixture(scope="module")
def server():
    with ForkServer() as server:
        yield server


PACKED = """
clips: {stride: 2, repeats: 2, size: native, side: [16, 32], frames: "2,4,8"}
model: {image_size: 16, num_frames: 4, patch_size: 8, mask_strategy: multi_block, mask_blocks: 2, width: 16, depth: 1,
  num_heads: 1, decoder_width: 16, decoder_depth: 1, decoder_num_heads: 1}
optimizer: {tokens: 600, accumulate: 2, epochs: 90, warmup_epochs: 1, base_lr: 3.0e-3, base_batch: 1, clip_grad: 1.0}
run: {save_every: 3, log_every: 1, workers: 0, device: cpu, precision: float32, tensorboard: false}
"""

BROKEN = {
    "cut.mp4": "cannot be opened",  # its index was at its end
    "short.mkv": "too short: 1 frame,",
    "empty.mp4": "the file is empty",
    "text.webm": "cannot be opened",
    "sound.mp4": "no video stream",
    "cut.jpg": "cannot be read as an image",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four usable files, of which one has noise in its middle and one is cut off in its middle, among six that are not."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("a.mp4", 12), ("damaged.mkv", 12), ("cut_off.mkv", 24), ("short.mkv", 1)):
        write_video(folder / name, frames, gop=4)
    data = bytearray((folder / "damaged.mkv").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 60] = random.Random(0).randbytes(60)
    (folder / "damaged.mkv").write_bytes(data)
    write_image(folder / "c.jpg", 3)

    complete = (folder / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(complete[: len(complete) // 2])
    data = (folder / "cut_off.mkv").read_bytes()
    (folder / "cut_off.mkv").write_bytes(data[: len(data) * 2 // 3])
    with Video(folder / "cut_off.mkv") as video:
        assert 2 < len(video) < 24
    (folder / "empty.mp4").touch()
    (folder / "text.webm").write_text("this is not a video")
    write_audio(folder / "sound.mp4")
    picture = (folder / "c.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(picture[: len(picture) // 2])
    return folder


@pytest.fixture(scope="module")
def command(videos, tmp_path_factory):
    """command(output, ...) -> the arguments of a run of 80 steps, the same every time."""
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(TINY)
    return lambda output, *more: ["pretrain", "--config", file, "--data", videos, "--output", output, *more]


@pytest.fixture(scope="module")
def finished(server, command, tmp_path_factory):
    """The folder of an uninterrupted run, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    status, printed = server.run(command(folder / "run"), folder / "printed")
    assert status == 0, printed
    return folder / "run", printed


def assert_same_weights(a, b):
    a, b = load_file(RunFolder(a, read_only=True).model_path), load_file(RunFolder(b, read_only=True).model_path)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def newest_step(output):
    """Of the run's states, of which the newest must be complete; 0 where there is none yet. Not for a run that goes on saving."""
    states = RunFolder(output, read_only=True).states() if output.exists() else []
    if not states:
        return 0
    reports = []
    _, counters = RunFolder(output, read_only=True).load_state(reports.append)
    assert reports == [] and counters["step"] == states[0]
    return states[0]


def wait_for_step(output, step, process):
    """Until the run, which goes on, has saved a state of ``step`` or later, or has ended."""
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until and not has_ended(process):
        if output.exists() and max(RunFolder(output, read_only=True).states(), default=0) >= step:
            return
        time.sleep(0.01)


def status_of(process):
    """(state, parent) of a process that is there, though it may have ended and nobody waited for it yet."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1])


def has_ended(process):
    return status_of(process)[0] == "Z"


def children_of(process):
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if status_of(folder.name)[1] == process:
                children.append(int(folder.name))
    return children


def finish(server, command, output, finished):
    """To the end, in one go; then the weights and the log are those of the uninterrupted run."""
    status, printed = server.run(command(output), output.with_suffix(".log"))
    assert status == 0, printed
    assert_same_weights(output, finished[0])
    states = RunFolder(output, read_only=True).states()
    assert states[0] == STEPS and len(states) in (2, 3)  # 3: killed between the last one and the removal of the oldest
    assert not [name for name in os.listdir(output) if name.endswith(".tmp")]
    complete, pieces = (
        {line["step"]: line["loss"] for line in lines(folder / "log.jsonl") if "loss" in line} for folder in (finished[0], output)
    )
    logged = [line["step"] for line in lines(output / "log.jsonl") if "loss" in line]
    assert logged == sorted(pieces) and logged[-1] == STEPS
    starts = {line["step"] for line in lines(output / "run.jsonl")}
    for before, step in zip([0, *logged], logged):
        if not starts & {*range(before + 1, step)}:  # else it is the mean of fewer steps
            assert pieces[step] == complete[step]


def lines(path):
    """Those that no kill has cut short."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


# Kills


def test_killed_at_random_moments_again_and_again(server, command, tmp_path, finished):
    """From the start-up to the end, by SIGKILL and SIGTERM, with and without data workers."""
    output, printed = tmp_path / "run", tmp_path / "printed"
    started = time.monotonic()
    server.run(command(finished[0]), printed)  # complete already: all of a start but the first step
    start = time.monotonic() - started
    steps = sum(3 / line["clips_per_second"] for line in lines(finished[0] / "log.jsonl") if "loss" in line)

    draw = random.Random(1)
    left = [signal.SIGKILL] * KILLS + [signal.SIGTERM] * TERMINATIONS
    draw.shuffle(left)
    landed, saved, attempts = [], 0, 0
    while left and attempts < 200:
        attempts += 1
        before = newest_step(output)
        workers = ("--run.workers", "1") if attempts % 5 == 0 else ()
        process = server.start(command(output, *workers), printed)
        if attempts % 2:  # progress, however slow the machine has become
            wait_for_step(output, min(before + draw.randrange(1, 12), STEPS), process)
        time.sleep(draw.uniform(0, start + steps / 4))
        os.kill(process, left[-1])  # of a process that has ended, too: nobody else gets its number before it is waited for
        status = server.wait()
        after = newest_step(output)
        assert after >= before
        if after == STEPS:  # done, or all but: another run then
            finish(server, command, output, finished)
            shutil.rmtree(output)
        if status == 0 and "stopped after step" not in printed.read_text():
            continue  # it had ended when the signal came
        number = left.pop()
        if number == signal.SIGTERM and status == 0:
            assert after == int(re.search(rf"SIGTERM: stopped after step (\d+) of {STEPS} and saved", printed.read_text())[1])
        else:
            assert status == -number, printed.read_text()
        landed.append(after)
        saved += any(name.endswith(".tmp") for name in os.listdir(output)) if output.exists() else 0
    assert not left
    print(f"\n{start=:.2f} {steps=:.2f} {saved=} at steps {landed}")
    assert len(set(landed)) > 5
    finish(server, command, output, finished)


def sweep(server, command, output, kind, required):
    """[(what the run was about to do, exit status, its words, step of the state before and after)]: one run after the other,
    each with a fault at the next position, each continuing what the last one left; until everything ``required`` was met."""
    # Of a new run; one far into it, to have something to lose; all of a restart; and what was just missed, for what is logged
    # between two checkpoints, and so where they are, differs from run to run.
    draw = random.Random(0)
    positions = [*range(0, 36, 4), 80, *range(POSITIONS), *(draw.randrange(14, 32) for _ in range(80))]
    results = []
    for number, position in enumerate(positions):
        if number >= 10 + POSITIONS and required <= {what for what, *_ in results}:
            break
        before = newest_step(output)
        status, printed = server.run(command(output, "--run.save_every", 1), output.with_suffix(".log"), [kind, position])
        fault = re.findall(r"^FAULT (.*)$", printed, re.MULTILINE)
        assert fault, f"position {position}: the run came to its end with status {status}:\n{printed}"
        results.append((fault[0], status, re.sub(r"^FAULT .*\n", "", printed, flags=re.MULTILINE), before, newest_step(output)))
    return results


WRITES = {
    *("half of .state-", "half of .model.", "half a line of log.jsonl", "half a line of run.jsonl", "fsync"),
    *("open .config", "open .state-", "open .model.", "open .log.js", "replace .config", "replace .state-", "replace .model."),
}


def test_a_kill_in_the_last_save_does_not_leave_older_weights(server, command, tmp_path, finished):
    """The state is done, the weights beside it are not."""
    output = shutil.copytree(finished[0], tmp_path / "run")
    RunFolder(output, read_only=True).state_path(STEPS).unlink()
    RunFolder(output, read_only=True).model_path.write_bytes(b"of an older step")
    for position in range(18, 60):  # from the first step on
        status, printed = server.run(command(output), tmp_path / "printed", ["kill", position])
        if status == 0:
            break
        if RunFolder(output, read_only=True).states()[0] == STEPS:
            assert_same_weights(output, finished[0])
            RunFolder(output, read_only=True).state_path(STEPS).unlink()
            RunFolder(output, read_only=True).model_path.write_bytes(b"of an older step")
    assert status == 0 and position > 28
    assert_same_weights(output, finished[0])


def test_killed_at_every_position_of_writing(server, command, tmp_path, finished):
    required = {*WRITES, "unlink state-0"}
    results = sweep(server, command, tmp_path / "run", "kill", required)
    assert all(status == -signal.SIGKILL for _, status, *_ in results)
    assert all(after >= before for *_, before, after in results)
    assert {what for what, *_ in results} >= required
    assert all(after > 0 for *_, after in results[10:])
    finish(server, command, tmp_path / "run", finished)


def test_a_packed_run_that_is_killed_again_and_again_ends_with_the_same_bits(server, tmp_path):
    """Clips of unequal sizes, lengths and masks, videos, pictures and a broken video, filled into a budget. SIGKILL comes in a
    save and in a line of the log, and each start has another number of data workers."""
    (tmp_path / "packed.yaml").write_text(PACKED)
    for name, size in (("videos/wide.mp4", (64, 96)), ("videos/high.mp4", (96, 64)), ("stills/a.png", (40, 70))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (write_video(tmp_path / name, 12, size=size) if "mp4" in name else write_image(tmp_path / name, 1, size=size))
    (tmp_path / "videos" / "broken.mp4").write_text("this is not a video")
    data, printed = f"{tmp_path / 'videos'}:0.7,{tmp_path / 'stills'}:0.3", tmp_path / "printed"

    def run(output, workers, fault=None):
        files = "--config", tmp_path / "packed.yaml", "--data", data, "--output", tmp_path / output
        return server.run(["pretrain", *files, "--run.workers", workers], printed, fault)

    status, words = run("complete", 0)
    assert status == 0 and "skipped: 1 video" in words, words
    steps, reached = newest_step(tmp_path / "complete"), []
    for workers, position in ((0, 45), (2, 51)):  # positions: see Faults
        status, words = run("killed", workers, ["kill", position])
        assert status == -signal.SIGKILL, words
        reached.append(newest_step(tmp_path / "killed"))
    assert 0 < reached[0] < reached[1] < steps
    status, words = run("killed", 1)
    assert status == 0 and f"continuing from step {reached[-1]}" in words, words
    assert_same_weights(tmp_path / "killed", tmp_path / "complete")
    logs = [
        {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines(tmp_path / output / "log.jsonl") if "loss" in line}
        for output in ("complete", "killed")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == steps


def test_killed_data_workers_leave_the_checkpoint(server, command, tmp_path, finished):
    """As the kernel does when memory runs out; torch reports it wherever the process is, in a step as in a save."""
    output, printed = tmp_path / "run", tmp_path / "printed"
    draw = random.Random(2)
    kills = 0
    for _ in range(60):
        before = newest_step(output)
        process = server.start(command(output, "--run.workers", 2), printed)
        wait_for_step(output, min(before + 4, STEPS), process)
        time.sleep(draw.uniform(0, 0.1))
        with suppress(ValueError, ProcessLookupError):  # it ended meanwhile
            os.kill(min(children_of(process)), signal.SIGKILL)
        status = server.wait()
        after = newest_step(output)
        assert after >= before
        if status == 0:  # the run had ended, or had all its batches already
            assert after == STEPS, printed.read_text()
            shutil.rmtree(output)
            continue
        assert status == 1, printed.read_text()
        last = printed.read_text().splitlines()[-1]
        assert last.startswith("stmae pretrain: no more data: ") and "run.workers" in last, printed.read_text()
        assert f"the checkpoint of step {after} is complete" in last
        kills += 1
        if kills == 5:
            break
    assert kills == 5
    finish(server, command, output, finished)


def test_a_killed_worker_is_reported_where_a_batch_is_requested(tmp_path):
    for workers, killed in ((1, 0), (2, 1)):
        with Batches(DataLoader(range(100), num_workers=workers)) as batches:
            assert next(batches) == 0
            pid = batches.iterator._workers[killed].pid
            os.kill(pid, signal.SIGKILL)
            while not has_ended(pid):
                time.sleep(0.01)
            for _ in range(1000):  # torch's report would come in one of these lines
                time.sleep(0.0001)
            with pytest.raises(LoaderError, match=f"no more data: DataLoader worker .pid {pid}. is killed by signal: Killed"):
                next(batches)


def test_batches_without_a_handler_of_children(tmp_path):
    """torch installs its handler once in a process; another part of the program may have taken it away since."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for _ in range(2):
            with Batches(DataLoader(range(3), num_workers=1)) as batches:
                signal.signal(signal.SIGCHLD, batches._child_ended)
                batches.child_ended = signal.SIG_DFL
                assert [int(next(batches)) for _ in range(3)] == [0, 1, 2]
            assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


# Broken videos


def test_broken_videos_are_named_once_and_the_others_used(finished):
    folder, printed = finished
    events = [line for line in lines(folder / "log.jsonl") if "path" in line]
    assert sorted(event["path"].rpartition("/")[2] for event in events) == sorted(BROKEN)
    for event in events:
        assert BROKEN[event["path"].rpartition("/")[2]] in event["reason"]
        assert printed.count(f"skipped video {event['path']}: {event['reason']}") == 1
    assert "skipped: 6 videos that could not be used, 0 steps without a finite gradient" in printed


# Full disks


def test_a_disk_that_fills_at_every_position_of_writing(server, command, tmp_path, finished):
    output = tmp_path / "run"
    results = sweep(server, command, output, "full", WRITES)
    assert {what for what, *_ in results} >= WRITES
    for what, status, printed, before, after in results:
        assert status == 1 and "Traceback" not in printed, (what, printed)
        last = printed.splitlines()[-1]
        assert re.search(r"^stmae pretrain: .*cannot write .*No space left on device", last), (what, last)
        assert after >= before
        if after:  # what there is to continue from
            assert f"(the checkpoint of step {after} is complete: the same command continues from it)" in last, (what, last)
        assert not [name for name in os.listdir(output) if name.endswith(".tmp")], what
    finish(server, command, output, finished)


def test_a_small_disk_that_fills(server, command, tmp_path, finished):
    """A real one, with space for two states and a half; then it is made larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    first = RunFolder(finished[0], read_only=True)
    state, model = (file.stat().st_size for file in (first.state_path(STEPS), first.model_path))

    def mount(size, *options):
        options = ",".join([f"size={size}", "mode=700", *options])
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, text=True)

    others = sum(file.stat().st_size + 4096 for file in finished[0].rglob("*") if file.suffix not in (".safetensors", ".tmp"))
    others -= (finished[0] / "plots.png").stat().st_size  # drawn at the end
    mounted = mount(int(2.5 * state) + model + others)
    if mounted.returncode:
        pytest.skip(f"only where file systems may be mounted: {mounted.stderr.strip()}")
    try:
        status, printed = server.run(command(disk / "run"), tmp_path / "printed")
        assert status == 1 and "Traceback" not in printed, printed
        step = newest_step(disk / "run")
        assert 0 < step < STEPS
        last = printed.splitlines()[-1]
        assert "No space left on device" in last and f"the checkpoint of step {step} is complete" in last
        assert mount(64 << 20, "remount").returncode == 0
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", disk], check=True)
    finish(server, command, tmp_path / "run", finished)


# Damaged checkpoints


def lengths(size, header):
    """Where to cut a safetensors file: inside its 8 bytes of length, its header, and its tensors."""
    return sorted({0, 1, 7, 8, 9, header // 2, 8 + header - 1, 8 + header, 8 + header + 1, size // 2, size - 1})


def test_a_checkpoint_cut_short_at_any_length_is_passed_over_and_kept(finished, tmp_path):
    folder = RunFolder(shutil.copytree(finished[0], tmp_path / "run"))
    newest, older = folder.states()
    file = folder.state_path(newest)
    data = file.read_bytes()
    expected = load_file(folder.state_path(older))
    for length in lengths(len(data), int.from_bytes(data[:8], "little")):
        file.write_bytes(data[:length])
        reports = []
        tensors, counters = folder.load_state(reports.append)
        assert counters["step"] == older and len(reports) == 1 and f"{file.name} is damaged" in reports[0], length
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)
        assert file.stat().st_size == length  # whatever is in it may be worth something to somebody
    folder.state_path(older).write_bytes(b"")
    with pytest.raises(RunFolderError, match="every checkpoint in .* is damaged; move them away to start over"):
        folder.load_state(lambda report: None)


def test_a_run_goes_on_from_the_state_before_the_damaged_one(server, command, tmp_path, finished):
    output = tmp_path / "run"
    process = server.start(command(output), tmp_path / "printed")
    wait_for_step(output, 10, process)
    os.kill(process, signal.SIGKILL)
    server.wait()
    file = RunFolder(output, read_only=True).state_path(RunFolder(output, read_only=True).states()[0])
    file.write_bytes(file.read_bytes()[:-1])
    finish(server, command, output, finished)
    assert f"checkpoint {file.name} is damaged" in output.with_suffix(".log").read_text()


def test_no_new_state_is_removed_for_the_sake_of_damaged_ones(tmp_path):
    """Two damaged states of later steps, as when a disk went bad: what is written now is the only complete state there is."""
    folder = RunFolder(tmp_path / "run")
    for step in (8, 10):
        folder.state_path(step).write_bytes(b"damaged")
    for step in (4, 6):
        folder.save_state(step, {"a": torch.full((3,), float(step))}, {"step": step})
        tensors, info = folder.load_state(lambda report: None)
        assert info == {"step": step} and tensors["a"][0] == step
    assert folder.states()[-2:] == [6, 4]
