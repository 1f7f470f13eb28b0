"""The index of long and counted files: the same frames with it and without, and nothing lost where it is damaged or full."""

import multiprocessing
import os

import av
import numpy as np
import pytest

from stmae.training.data import frame_index, video
from stmae.training.data.video import Video
from tests.support.synthetic_video import read_number, write_video

FILES = {
    "stamped.mp4": {"options": {"bf": "2"}},
    "counted.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "counted.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder; short files are kept too."""
    monkeypatch.setenv("STMAE_INDEX", str(tmp_path / "cache"))
    monkeypatch.setattr(video, "LONG", 10)
    return tmp_path / "cache"


@pytest.fixture
def scans(monkeypatch):
    """What was scanned or counted, in order."""
    done = []
    for name in ("_scan", "_count"):
        method = getattr(Video, name)
        monkeypatch.setattr(Video, name, lambda self, name=name, method=method: (done.append(name), method(self))[1])
    return done


def entries(cache):
    return [path for path in cache.rglob("*") if path.is_file()]


def read(path):
    with Video(path) as opened:
        facts = len(opened), opened.times.tolist(), opened.rate, opened.size, opened._skips
        return facts, opened.frames([50, 3, 27, 59])


@pytest.mark.parametrize("name", FILES)
def test_the_second_time_nothing_is_scanned_and_the_frames_are_the_same(name, cache, scans, tmp_path):
    path = write_video(tmp_path / name, **FILES[name])
    facts, frames = read(path)
    assert scans == (["_scan"] if name == "stamped.mp4" else ["_scan", "_count"]) and len(entries(cache)) == 1
    again, frames_again = read(path)
    assert len(scans) == (1 if name == "stamped.mp4" else 2)
    assert facts == again and np.array_equal(frames, frames_again)
    assert [read_number(frame) for frame in frames_again] == [50, 3, 27, 59]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another version", "a folder"])
def test_a_damaged_entry_is_rebuilt(damage, cache, scans, tmp_path):
    path = write_video(tmp_path / "a.mp4")
    expected = read(path)
    (entry,) = entries(cache)
    data = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        entry.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "another version":
        entry.write_bytes(data.replace(b"index 1", b"index 0"))
    else:
        entry.unlink()
        entry.mkdir()
    got = read(path)
    assert scans == ["_scan", "_scan"] and got[0] == expected[0] and np.array_equal(got[1], expected[1])
    if damage != "a folder":
        assert entry.read_bytes() == data


def test_a_file_that_was_written_anew_is_scanned_anew(cache, scans, tmp_path):
    path = write_video(tmp_path / "a.mp4")
    read(path)
    status = os.stat(path)
    write_video(path, 40)
    with Video(path) as opened:
        assert len(opened) == 40
    # The same size, the same time, other bytes: a copy that keeps times, over a file that happens to be as long.
    data = bytearray(path.read_bytes())
    path.write_bytes(data)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    read_before = len(scans)
    with Video(path) as opened:
        assert len(opened) == 40
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    with Video(path) as opened:
        assert len(opened) == 40
    assert len(scans) == read_before + 2


def test_where_nothing_can_be_written_files_are_scanned(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "LONG", 10)
    path = write_video(tmp_path / "a.mp4")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "below", "/proc/nowhere"):
        monkeypatch.setenv("STMAE_INDEX", str(folder))
        assert read(path)[0][0] == 60
    monkeypatch.setenv("STMAE_INDEX", str(tmp_path / "full"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frame_index.os, "replace", full)
    assert read(path)[0][0] == 60 and entries(tmp_path / "full") == []
    assert scans == ["_scan"] * 3


def test_short_files_and_those_that_a_scan_changes_are_not_kept(tmp_path, monkeypatch, scans):
    monkeypatch.setenv("STMAE_INDEX", str(tmp_path / "cache"))
    read(write_video(tmp_path / "a.mp4"))
    monkeypatch.setattr(video, "LONG", 10)
    read(write_video(tmp_path / "a.mkv"))
    assert entries(tmp_path / "cache") == []
    monkeypatch.setenv("STMAE_INDEX", "off")
    read(tmp_path / "a.mp4")
    assert entries(tmp_path / "cache") == []


def _read_in_process(path, results):
    with Video(path) as opened:
        results.put((len(opened), read_number(opened.frames([33])[0])))


def test_many_processes_may_write_the_same_entry(cache, tmp_path):
    path = write_video(tmp_path / "a.mpg", codec="mpeg2video", options={"bf": "2"})
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read_in_process, args=(path, results)) for _ in range(6)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [(60, 33)] * 6
    for process in processes:
        process.join()
    assert len(entries(cache)) == 1


def test_the_folder(monkeypatch):
    monkeypatch.delenv("STMAE_INDEX")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(frame_index.folder()) == "/somewhere/stmae/index"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert str(frame_index.folder()).endswith("/.cache/stmae/index")
    assert av.library_versions["libavformat"]  # named in every entry
