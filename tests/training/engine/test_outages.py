"""Data that are away for a while or for good: the run waits and goes on as if nothing had been, or saves and says why."""

import errno
import functools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import av
import av.error
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from stmae.masking import make_mask
from stmae.training import cli
from stmae.training.commands import data_check, pretrain
from stmae.training.config import ClipConfig, PretrainConfig, parse
from stmae.training.data import dataset, loader, outage, video
from stmae.training.data.dataset import PretrainClips, ViewClips
from stmae.training.data.video import Video, VideoError
from stmae.training.data.video_list import find_videos
from stmae.training.engine.loop import TrainingError
from stmae.training.engine.run_folder import RunFolder
from tests.support import two_processes
from tests.support.fork_server import ForkServer
from tests.support.http_server import FileServer
from tests.support.synthetic_video import write_image, write_video

from .test_faults import TINY, wait_for_step

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
STEPS = 160
LONG = TINY.replace("epochs: 8", "epochs: 32")  # 5 videos: 160 steps


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STMAE_CACHE", str(tmp_path_factory.mktemp("cache") / "files"))
        with ForkServer() as server:
            yield server


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two class folders with videos, a frame folder's and an image's place among them."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("a/1.mp4", "a/2.mp4", "b/3.mp4", "b/4.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_video(folder / name, 8, gop=4)
    write_image(folder / "b" / "c.jpg", 3)
    return folder


@pytest.fixture
def videos(source, tmp_path):
    return shutil.copytree(source, tmp_path / "videos")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    file = tmp_path_factory.mktemp("settings") / "long.yaml"
    file.write_text(LONG)
    return file


def command(settings, videos, output, *more):
    return ["pretrain", "--config", settings, "--data", videos, "--output", output, *more]


@pytest.fixture(scope="module")
def weights(server, settings, source, tmp_path_factory):
    """Of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    status, said = server.run(command(settings, source, folder / "run"), folder / "said")
    assert status == 0, said
    return load_file(folder / "run" / "model.safetensors")


def assert_same(output, weights):
    found = load_file(output / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("workers, leave", [(0, "nothing"), (2, "an empty folder")])  # as where a disk was mounted
def test_a_folder_that_is_away_for_a_moment_changes_nothing(workers, leave, server, settings, videos, weights, tmp_path):
    output, said = tmp_path / "run", tmp_path / "said"
    process = server.start(command(settings, videos, output, "--run.workers", workers), said)
    wait_for_step(output, 4, process)
    os.rename(videos, tmp_path / "away")
    if leave == "an empty folder":
        videos.mkdir()
    time.sleep(1.5)
    if leave == "an empty folder":
        videos.rmdir()
    os.rename(tmp_path / "away", videos)
    status = server.wait()
    assert status == 0 and "skipped video" not in said.read_text(), said.read_text()
    assert_same(output, weights)


def test_killed_again_and_again_while_data_come_from_a_server(server, settings, source, weights, tmp_path):
    """At random moments, with and without data workers; requests fail, too."""
    kill_at_random(2, server, settings, source, tmp_path)
    assert_same(tmp_path / "run", weights)


def kill_at_random(kills, server, settings, source, folder, seed=1):
    """A run that is killed so many times, then comes to its end."""
    draw, done = random.Random(seed), 0
    with FileServer(source) as files:
        files.fault = lambda method, path: draw.choice(["drop", "cut", 503]) if draw.random() < 0.05 else None
        while True:
            before = max([0, *(int(path.name[6:14]) for path in folder.glob("run/state-*.safetensors"))])
            workers = ("--run.workers", draw.randrange(5) if kills > 10 else done)
            process = server.start(command(settings, f"{files.url}/", folder / "run", *workers), folder / "said")
            if done == kills:
                break
            wait_for_step(folder / "run", min(before + 1, STEPS - 10), process)
            time.sleep(draw.uniform(0, 0.2))
            os.kill(process, signal.SIGKILL)
            done += server.wait() == -signal.SIGKILL
        assert server.wait() == 0, (folder / "said").read_text()


def test_a_folder_that_does_not_come_back(server, settings, videos, weights, tmp_path):
    output, said = tmp_path / "run", tmp_path / "said"
    arguments = command(settings, videos, output, "--run.data_patience", 0.3, "--run.workers", 2)
    process = server.start([*arguments, "--run.save_every", 10], said)
    wait_for_step(output, 10, process)
    os.rename(videos, tmp_path / "away")
    status = server.wait()
    words = said.read_text()
    last = words.splitlines()[-1]
    step = RunFolder(output, read_only=True).states()[0]
    assert status == 75 and "Traceback" not in words and "skipped video" not in words, words
    assert re.search(rf"no more data: the folder {videos}/[ab] is away \(cannot be .*waited 0 s for it", last), last
    assert f"the checkpoint of step {step} is complete: the same command continues from it" in last
    os.rename(tmp_path / "away", videos)
    status, words = server.run(arguments, said)
    assert status == 0 and f"continuing from step {step}" in words, words
    assert_same(output, weights)


def test_several_processes_save_though_only_one_lacks_data(settings, videos, tmp_path):
    output = tmp_path / "run"
    options = [
        "--run.data_patience",
        0.3,
        "--run.parallel",
        "fsdp",
        "--optimizer.batch",
        2,
        "--model.separable_position",
        "false",
    ]
    arguments = command(settings, videos, output, *options)
    processes = two_processes.start(arguments)
    wait_for_step(output, 4, processes[0].pid)
    os.rename(videos / "b", tmp_path / "away")  # one of them comes to a video of it first
    said = two_processes.finish(processes, status=75)
    step = RunFolder(output, read_only=True).states()[0]
    assert "Traceback" not in said and said.count(f"the folder {videos}/b is away") == 2, said
    assert said.count(f"the checkpoint of step {step} is complete") == 2


# A sample


def clips(folder, patience=5.0):
    draw = functools.partial(make_mask, "random", 1, (1, 2, 2), 0.5)
    options = {"frames": 2, "size": (16, 16), "seed": 0, "sample_mask": draw, "patience": patience}
    return PretrainClips(find_videos(folder), ClipConfig(stride=1, repeats=1), **options)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that are made, in no time; ``pauses.then`` is called after each."""

    class Pauses(list):
        then = staticmethod(lambda: None)
        now = 0.0

        def sleep(self, seconds):
            self.append(seconds)
            self.now += seconds
            self.then()

    made = Pauses()
    monkeypatch.setattr(outage.time, "sleep", made.sleep)
    monkeypatch.setattr(outage.time, "monotonic", lambda: made.now)
    return made


def test_pauses_grow_to_the_end_of_the_patience(videos, pauses):
    data = clips(videos, patience=5.0)
    data[(0, 0)]
    shutil.rmtree(videos)
    with pytest.raises(outage.DataAwayError, match=r"the folder .* is away \(cannot be .*\); waited 5 s for it"):
        data[(0, 0)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 1.9])


def test_a_file_that_is_not_there_is_passed_over_at_once(videos, pauses):
    data = clips(videos)
    for number in range(len(data)):
        data[(0, number)]
    shutil.copytree(videos / "b", videos.parent / "b")
    os.unlink(videos / "a" / "1.mp4")
    os.symlink("nowhere.mp4", videos / "a" / "1.mp4")
    assert "cannot be opened" in data[(0, 0)]["skipped"][0][1] and pauses == []
    shutil.rmtree(videos / "b")  # known to have been there: waited for
    pauses.then = lambda: shutil.copytree(videos.parent / "b", videos / "b")
    data[(0, 3)]
    assert pauses == [0.1]


def test_a_folder_that_never_was_is_passed_over_at_once(videos, pauses, tmp_path):
    (tmp_path / "list.txt").write_text("videos/never/1.mp4\nvideos/a/1.mp4\n")
    data = clips(tmp_path / "list.txt")
    assert "never/1.mp4" in data[(0, 0)]["skipped"][0][0] and pauses == []


def test_nothing_at_all_that_can_be_read_is_waited_for(videos, pauses, tmp_path):
    """Of a run that starts in an outage, and has read nothing yet."""
    data = clips(videos)
    os.rename(videos, tmp_path / "away")
    pauses.then = lambda: len(pauses) == 3 and os.rename(tmp_path / "away", videos)
    assert data[(0, 2)]["skipped"] == [] and len(pauses) == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_stutters_is_waited_for_and_one_bad_sector_only_once(number, videos, pauses, monkeypatch):
    data, whole = clips(videos), clips(videos)[(0, 1)]
    bad = data.entries[1].path
    file_size = video.file_size

    def failing(path):
        if path == bad:
            raise OSError(number, os.strerror(number), path)
        return file_size(path)

    monkeypatch.setattr(video, "file_size", failing)
    pauses.then = lambda: monkeypatch.setattr(video, "file_size", file_size)
    assert torch.equal(data[(0, 1)]["clips"], whole["clips"]) and len(pauses) == 1

    pauses.clear()
    pauses.then = lambda: None
    monkeypatch.setattr(video, "file_size", failing)
    assert os.strerror(number) in data[(0, 1)]["skipped"][0][1] and sum(pauses) == pytest.approx(outage.FILE_PATIENCE)
    pauses.clear()
    assert data[(0, 1)]["skipped"] and pauses == []


def test_a_disk_that_fails_while_it_is_read_is_no_damaged_tail(videos, monkeypatch):
    """The bytes that the disk did not give are not the end of the file."""
    path = str(videos / "a" / "1.mp4")

    class Failing:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, stream):
            for number, packet in enumerate(self.container.demux(stream)):
                if number == 3:
                    raise av.error.OSError(errno.EIO, os.strerror(errno.EIO))
                yield packet

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *arguments, **options: Failing(opened(*arguments, **options)))
    with Video(path) as cut:  # all its bytes can be read: what FFmpeg calls an error of input is damage
        assert len(cut) == 3
    monkeypatch.setattr(video, "open", lambda *arguments, **options: (_ for _ in ()).throw(OSError(errno.EIO, "")), raising=False)
    with pytest.raises(VideoError, match="cannot be read .Input/output error") as caught:
        Video(path)
    assert caught.value.errno == errno.EIO


def test_an_evaluation_waits_too(videos, pauses, tmp_path):
    views = ViewClips(find_videos(videos), ClipConfig(stride=1), frames=2, size=(16, 16), patience=5.0)
    whole = views[0]
    os.rename(videos, tmp_path / "away")
    pauses.then = lambda: len(pauses) == 2 and os.rename(tmp_path / "away", videos)
    assert torch.equal(views[0]["clips"], whole["clips"]) and len(pauses) == 2
    shutil.rmtree(videos)
    with pytest.raises(outage.DataAwayError, match="is away"):
        views[0]


def test_an_outage_during_an_evaluation_saves_too(server, settings, videos, weights, tmp_path):
    output, said = tmp_path / "run", tmp_path / "said"
    held_out = shutil.copytree(videos / "a", tmp_path / "held_out")
    arguments = command(settings, videos, output, "--held_out", held_out)
    process = server.start([*arguments, "--run.evaluate_every", 20, "--run.data_patience", 0.3], said)
    wait_for_step(output, 4, process)
    os.rename(held_out, tmp_path / "away")
    status, words = server.wait(), said.read_text()
    step = RunFolder(output, read_only=True).states()[0]
    assert status == 75 and "left out" not in words and f"the folder {held_out} is away" in words.splitlines()[-1], words
    os.rename(tmp_path / "away", held_out)
    status, words = server.run(arguments, said)
    assert status == 0 and f"continuing from step {step}" in words
    assert_same(output, weights)


# Videos that end a data worker, or hold it


BLAMED = {
    "crash": (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"DataLoader worker .* It was reading {path}"),
    "hang": (functools.partial(time.sleep, 60), r"data worker \d \(process \d+\) has been reading {path} for \d+ s"),
}


def reading_badly(monkeypatch, name, do):
    """Whoever reads the video ``name`` does ``do`` first."""
    opened = dataset.open_entry

    def open_entry(entry, *options):
        if entry.path.endswith(name) and get_worker_info() is not None:
            do()
        return opened(entry, *options)

    monkeypatch.setattr(dataset, "open_entry", open_entry)
    monkeypatch.setattr(data_check, "open_entry", open_entry)
    monkeypatch.setattr(loader, "POLL", 0.1)


def configuration(settings, videos, output, *more):
    arguments = [*command(settings, videos, output)[1:], "--optimizer.epochs", 4, "--run.workers", 2, *more]
    return parse(PretrainConfig, list(map(str, arguments)), prog="p", description="")


@pytest.mark.parametrize("how", BLAMED)
def test_a_video_that_takes_a_worker_down_is_named_and_does_not_do_it_twice(how, settings, videos, tmp_path, monkeypatch, capsys):
    do, words = BLAMED[how]
    path, output = videos / "b" / "3.mp4", tmp_path / "run"
    reading_badly(monkeypatch, "3.mp4", do)
    config = configuration(settings, videos, output, "--run.data_timeout", 0.5)
    with pytest.raises(TrainingError, match=words.format(path=path)) as caught:
        pretrain.run(config)
    assert f"it is left out from now on: {output / 'left_out.txt'} names it" in str(caught.value)
    capsys.readouterr()
    assert pretrain.run(config).done
    printed = capsys.readouterr().out
    assert f"note: not used: 1 video that {output / 'left_out.txt'} names" in printed
    assert f"skipped video {path}: left out, as left_out.txt in the run's folder says" in printed


def test_a_killed_worker_is_not_blamed_on_its_video(settings, videos, tmp_path, monkeypatch):
    """As where memory runs out: which video it read may be chance."""
    path, output = videos / "b" / "3.mp4", tmp_path / "run"
    reading_badly(monkeypatch, "3.mp4", lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        TrainingError, match=f"(Killed|unexpectedly). It was reading {path}.*too little memory: try fewer run.workers"
    ) as caught:
        pretrain.run(configuration(settings, videos, output))
    assert f"if it is this video each time, add its path to {output / 'left_out.txt'}" in str(caught.value)
    (output / "left_out.txt").write_text(f"# by hand\n\n{path}\n")
    assert RunFolder(output, read_only=True).left_out() == {str(path)}


def test_data_check_goes_on_after_a_video_that_takes_a_worker_down(videos, monkeypatch, capsys):
    reading_badly(monkeypatch, "3.mp4", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    assert cli.main(["data", "check", str(videos), "--frames", "2", "--stride", "1"]) == 0
    printed = capsys.readouterr().out
    assert "5 videos: 4 can be used, 1 cannot" in printed and "3.mp4: DataLoader worker" in printed


def test_a_video_that_takes_too_much_of_a_processor_is_named(videos, monkeypatch):
    monkeypatch.setattr(video, "MAX_SECONDS", -1.0)
    skipped = dict(clips(videos)[(0, 0)]["skipped"])
    assert skipped[str(videos / "a" / "1.mp4")] == "takes more than -1 s of a processor to read"
