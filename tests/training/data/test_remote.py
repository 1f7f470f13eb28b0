"""Data that lie elsewhere, or in shards: the bytes of local files, whatever happens on the way and to the cache."""

import errno
import functools
import io
import multiprocessing
import os
import random
import shutil
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stmae.training import cli
from stmae.training.commands import pretrain
from stmae.training.config import PretrainConfig, parse
from stmae.training.config.sources import absolute, is_url, joined, map_sources, suffix_of
from stmae.training.data import file_cache, local_copy, outage, remote, shards
from stmae.training.data.dataset import require_readable
from stmae.training.data.decoders import open_entry
from stmae.training.data.file_cache import FileCache
from stmae.training.data.outage import DataAwayError
from stmae.training.data.video import VideoError
from stmae.training.data.video_list import Entry, find_labelled_videos, find_mixture, find_videos
from tests.support.http_server import FileServer
from tests.support.synthetic_video import write_image, write_video
from tests.training.data.test_sources import pretrain_clips
from tests.training.engine.test_faults import TINY, assert_same_weights

NAMES = ("a/0.mp4", "a/1.mp4", "b/2.avi", "b/3.png")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two class folders, a list, and a shard of the same files; nobody changes them."""
    folder = tmp_path_factory.mktemp("source")
    for name in NAMES:
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write = (
            write_image
            if name.endswith("png")
            else functools.partial(write_video, codec="mpeg4" if name.endswith("avi") else "libx264")
        )
        write(folder / "set" / name, 24, **({"ground": 60} if name == "a/1.mp4" else {}))
    (folder / "list.csv").write_text("".join(f"set/{name} {number}\n" for number, name in enumerate(NAMES)))
    with tarfile.open(folder / "shard-0.tar", "w") as archive:
        for number, name in enumerate(NAMES):
            archive.add(folder / "set" / name, name)
            add(archive, os.path.splitext(name)[0] + ".cls", str(number))
    return folder


def add(archive, name, text):
    info = tarfile.TarInfo(name)
    info.size = len(text)
    archive.addfile(info, io.BytesIO(text.encode()))


@pytest.fixture
def server(source, tmp_path):
    """Of a copy of ``source``."""
    with FileServer(shutil.copytree(source, tmp_path / "served")) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the cache; what a process remembers of URLs is of one test."""
    monkeypatch.setenv("STMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(local_copy, "_versions", {})
    monkeypatch.setattr(outage, "_answered", {})
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    file_cache._cache.cache_clear()
    return tmp_path / "cache"


def kept(cache):
    return sorted(path for path in cache.glob("??/*") if not path.name.endswith(".tmp"))


def new_process(monkeypatch):
    """As at a new start: nothing is remembered of what was read."""
    monkeypatch.setattr(local_copy, "_versions", {})
    file_cache._cache.cache_clear()


def frames(entry):
    with open_entry(entry) as video:
        return np.array(video.frames([0, len(video) // 2]))


def on_server(source, server, path="set/a/0.mp4"):
    return Entry(f"{server.url}/{path}", -1)


# Text


def test_urls_are_told_from_paths():
    assert is_url("s3://bucket/a.mp4") and is_url("https://h/x") and not is_url("/a/b://c.mp4") and not is_url("a:b.mp4")
    assert suffix_of("https://h/a.MP4?token=x.png#y") == ".mp4" and suffix_of("s3://b/a?b.webm") == ".webm"
    assert joined("https://h/lists", "x/a.mp4") == "https://h/lists/x/a.mp4"
    assert joined("https://h/lists", "/a.mp4") == "https://h/a.mp4" and joined("/x", "s3://b/a.mp4") == "s3://b/a.mp4"
    assert absolute("s3://b/a.mp4") == "s3://b/a.mp4" and absolute("a.mp4") == os.path.abspath("a.mp4")
    assert map_sources("s3://b/a.csv:1,b.csv:2", lambda path: f"/x/{path}") == "s3://b/a.csv:1,/x/b.csv:2"


def test_urls_in_a_settings_file_stay(tmp_path):
    (tmp_path / "run.yaml").write_text("data: https://h/list.csv\ndata_root: s3://bucket/videos\noutput: out\n")
    made = parse(PretrainConfig, [f"--config={tmp_path}/run.yaml"], prog="stmae pretrain", description="")
    assert (made.data, made.data_root) == ("https://h/list.csv", "s3://bucket/videos")


# Listing


def test_a_list_a_folder_and_a_shard_elsewhere_are_those_of_here(source, server):
    url = server.url
    expected = [(name, number) for number, name in enumerate(NAMES)]
    listed = find_labelled_videos(f"{url}/list.csv")
    assert [(entry.path, entry.label) for entry in listed] == [(f"{url}/set/{name}", label) for name, label in expected]
    in_folder = find_labelled_videos(f"{url}/set/")
    assert [(entry.path, entry.label) for entry in in_folder] == [(f"{url}/set/{name}", name[0] == "b") for name in NAMES]
    sharded = find_labelled_videos(f"{url}/shard-{{0..0}}.tar")
    assert [(entry.path, entry.label) for entry in sharded] == [(f"{url}/shard-0.tar/{name}", label) for name, label in expected]
    for entries in (listed, in_folder, sharded, find_videos(source / "shard-0.tar")):
        for entry, name in zip(entries, NAMES):
            assert np.array_equal(frames(entry), frames(Entry(str(source / "set" / name), -1)))
    mixture = find_mixture(f"{url}/list.csv:0.5,{source}/set:0.5")
    assert mixture.weights == [(4, 0.5), (4, 0.5)]


def test_a_local_list_may_name_urls_and_shards(source, server, tmp_path):
    (tmp_path / "list.csv").write_text(
        f"{server.url}/set/a/0.mp4 5\n{source}/set/a/1.mp4 6\n{source}/shard-{{0..0}}.tar 7\n{source}/shard-0.tar/b/2.avi 8\n"
        f"{source}/shard-0.tar/a/1.mp4\n"
    )
    entries = find_labelled_videos(tmp_path / "list.csv")
    assert [entry.label for entry in entries] == [5, 6, 7, 7, 7, 7, 8, 1]
    assert np.array_equal(frames(entries[6]), frames(Entry(str(source / "set/b/2.avi"), -1)))
    (tmp_path / "list.csv").write_text(f"{source}/shard-0.tar/no.mp4 8\n")
    with pytest.raises(ValueError, match=r"shard-0.tar: this shard has no video no.mp4"):
        find_videos(tmp_path / "list.csv")


@pytest.mark.parametrize(
    "name, message",
    [
        ("no.csv", "no.csv: there is no such file"),
        ("no.tar", "no.tar: the server answers 404"),
        ("trainlist01.txt", "are read from this machine alone"),
        ("train.json", "are read from this machine alone"),
        ("empty/", "no videos in folder"),
    ],
)
def test_what_is_not_there_is_said(name, message, server, capsys):
    os.mkdir(os.path.join(server.folder, "empty"))
    assert cli.main(["data", "check", f"{server.url}/{name}", "--workers", "0"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("url, words", [("gs://bucket/list.csv", "gcsfs"), ("nothing://x/list.csv", "nothing")])
def test_a_missing_package_is_named(url, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert cli.main(["data", "check", url]) == 1
    assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(remote.RemoteError, match=r"needs the package fsspec: pip install 'stmae\[remote\]'"):
        find_videos(url)


def test_any_protocol_of_fsspec_serves(source, monkeypatch):
    import fsspec

    system = fsspec.filesystem("memory")
    system.put(f"{source}/set", "/kept/set", recursive=True)
    try:
        entries = find_labelled_videos("memory://kept/set/")
        assert [(entry.path, entry.label) for entry in entries] == [
            (f"memory://kept/set/{name}", name[0] == "b") for name in NAMES
        ]
        for entry, name in zip(entries, NAMES):
            assert np.array_equal(frames(entry), frames(Entry(str(source / "set" / name), -1)))
    finally:
        system.rm("/kept", recursive=True)

    def forbidden(*words):
        raise PermissionError("Access Denied") from RuntimeError("as a package explains it")

    monkeypatch.setattr(type(system), "info", forbidden)
    with pytest.raises(VideoError, match="it may not be read .*Access Denied") as caught:
        frames(Entry("memory://kept/a.mp4", -1))
    assert caught.value.errno == errno.EACCES


# Shards


def write_shard(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            add(archive, name, data)
    return path


def test_samples_of_a_shard_as_webdataset_has_them(tmp_path):
    files = {"x/1.cls": "4", "x/1.mp4": "v", "x/1.thumb.jpg": "i", "2.json": '{"label": 9}', "2.png": "i", "3.mp4": "v"}
    files |= {"3.txt": "words", "4.cls": "cat", "4.mp4": "v", "__note__.txt": "", "d/.hidden.mp4": "v", "n" * 150 + ".webm": "v"}
    path = write_shard(tmp_path / "s.tar", files)
    found = {entry.path.removeprefix(f"{path}/"): entry.label for entry in find_videos(path)}
    assert found == {"x/1.mp4": 4, "2.png": 9, "3.mp4": -1, "4.mp4": -1, "n" * 150 + ".webm": -1}
    with pytest.raises(ValueError, match="3.mp4: expected a label of 0 or more, as NAME.cls in the shard"):
        find_labelled_videos(path)
    assert shards.expanded("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert len(shards.expanded("{0..1}/s-{000..122}.tar")) == 246
    with pytest.raises(ValueError, match="FIRST <= LAST"):
        find_videos("s-{3..1}.tar")


def test_an_archive_is_scanned_once_until_it_changes(tmp_path, monkeypatch, server):
    monkeypatch.setenv("STMAE_INDEX", str(tmp_path / "index"))
    local, url = os.path.join(server.folder, "shard-0.tar"), f"{server.url}/shard-0.tar"
    first = find_videos(url), find_videos(local)
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda *_: pytest.fail("scanned again"))
    assert (find_videos(url), find_videos(local)) == first
    monkeypatch.setattr(shards, "_scan", scan)
    write_shard(local, {"new.mp4": "v"})
    assert [entry.path for entry in find_videos(url)] == [f"{url}/new.mp4"]


@pytest.mark.parametrize("damage", ["cut in a file", "cut in a header", "zeroed", "compressed", "empty"])
def test_a_damaged_archive_is_refused(damage, source, tmp_path):
    data = bytearray((source / "shard-0.tar").read_bytes())
    second = find_videos(source / "shard-0.tar")[1].member.offset
    if damage == "zeroed":
        data[second - 512 : second - 412] = bytes([1] * 100)
    cut = {"cut in a file": second + 100, "cut in a header": second - 300, "empty": 0}
    with (tarfile.open if damage == "compressed" else open)(
        tmp_path / "s.tar", "w:gz" if damage == "compressed" else "wb"
    ) as file:
        if damage != "compressed":
            file.write(data[: cut.get(damage)])
    with pytest.raises(
        ValueError, match=r"s.tar: (expected an uncompressed tar archive that is whole|damaged at byte|no videos)"
    ):
        find_videos(tmp_path / "s.tar")


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_shard_that_changed_is_never_mixed(where, server, monkeypatch):
    local = os.path.join(server.folder, "shard-0.tar")
    entries = find_videos(local if where == "here" else f"{server.url}/shard-0.tar")
    frames(entries[0])
    data = bytearray(Path(local).read_bytes())
    data[entries[1].member.offset - 512 + 136] ^= 1  # a file's time in its header
    before = os.stat(local)
    with open(local, "wb") as file:
        file.write(data)
    os.utime(local, ns=(before.st_atime_ns, before.st_mtime_ns))  # so that the version is the same to all appearances
    with pytest.raises(VideoError, match="a/1.mp4: the archive changed since it was listed"):
        frames(entries[1])
    os.utime(local)
    new_process(monkeypatch)
    with pytest.raises(VideoError, match="a/0.mp4: the archive changed since it was listed"):
        frames(entries[0])


# Fetching


def test_a_file_is_fetched_once(server, source, cache, monkeypatch):
    entry = on_server(source, server)
    expected = frames(Entry(str(source / "set/a/0.mp4"), -1))
    for _ in range(3):
        assert np.array_equal(frames(entry), expected)
    assert server.count("GET") == 1 and len(kept(cache)) == 1
    new_process(monkeypatch)
    asked = server.count("HEAD")
    assert np.array_equal(frames(entry), expected)
    assert server.count("GET") == 1 and server.count("HEAD") == asked + 1  # whether it is the same still


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: b""])
def test_a_damaged_copy_is_fetched_anew(damage, server, source, cache, monkeypatch):
    expected = frames(on_server(source, server))
    (file,) = kept(cache)
    file.write_bytes(damage(file.read_bytes()))
    new_process(monkeypatch)
    assert np.array_equal(frames(on_server(source, server)), expected)
    assert server.count("GET") == 2 and [path.name for path in kept(cache)] == [file.name]


def test_a_file_that_changed_is_fetched_anew(server, source, cache, monkeypatch):
    entry, file = on_server(source, server), os.path.join(server.folder, "set/a/0.mp4")
    old = frames(entry)
    shutil.copy(source / "set/b/2.avi", file)
    assert np.array_equal(frames(entry), old)  # this process has read it
    new_process(monkeypatch)
    assert np.array_equal(frames(entry), frames(Entry(str(source / "set/b/2.avi"), -1)))


def test_a_file_that_changes_while_it_is_read_is_read_again(server, source, cache):
    """The answer that tells its version is of the old one, the bytes are of the new one."""
    file = os.path.join(server.folder, "set/a/0.mp4")

    def change():
        shutil.copy(source / "set/a/1.mp4", file)
        server.fault = lambda method, path: None

    server.fault = lambda method, path: change if method == "GET" else None
    data = pretrain_clips([on_server(source, server)])
    expected = pretrain_clips([Entry(str(source / "set/a/1.mp4"), -1)])[(0, 0)]
    assert torch.equal(data[(0, 0)]["clips"], expected["clips"])
    assert server.count("GET") >= 2 and len(kept(cache)) == 1, server.requests


def failing(times, fault, method="GET"):
    """A fault of the first ``times`` requests of that method."""
    left = [times]

    def fail(asked, path):
        if asked != method or not left[0]:
            return None
        left[0] -= 1
        return fault

    return fail


@pytest.mark.parametrize("fault", ["drop", "cut", 503, 429])
@pytest.mark.parametrize("path", ["set/a/0.mp4", "shard-0.tar"])
def test_a_failing_request_is_repeated(fault, path, server, source):
    (entry, *_) = find_videos(f"{server.url}/{path}")
    server.fault = failing(2, fault)
    assert np.array_equal(frames(entry), frames(Entry(str(source / "set/a/0.mp4"), -1)))


def test_a_vanished_file_is_counted_and_named(server, source):
    entries = [on_server(source, server), on_server(source, server, "set/a/gone.mp4")]
    data, expected = pretrain_clips(entries), pretrain_clips([Entry(str(source / "set/a/0.mp4"), -1)] * 2)
    item = next(item for epoch in range(20) if not (item := data[(epoch, 1)])["skipped"][1:])
    assert item["skipped"] == [(entries[1].path, "cannot be fetched (the server answers 404)")]
    assert torch.equal(data[(3, 0)]["clips"], expected[(3, 0)]["clips"])
    server.fault = lambda method, path: 403
    with pytest.raises(ValueError, match=r"none of the videos can be used, 1 in all:\n.*\(the server answers 403\)"):
        require_readable([on_server(source, server, "set/a/1.mp4")], 4, data.clips)


def test_a_server_that_is_away_is_waited_for(server, source, monkeypatch):
    """Longer than a request is repeated; then the sample is the one that it would have been."""
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.02)
    entries = [on_server(source, server, f"set/a/{name}.mp4") for name in range(2)]
    data, local = pretrain_clips(entries), pretrain_clips([Entry(str(source / f"set/a/{name}.mp4"), -1) for name in range(2)])
    data[(0, 0)]
    server.fault = lambda method, path: "drop" if len(server.requests) < 60 else None
    item = data[(0, 1)]
    assert len(server.requests) >= 60 and not item["skipped"] and torch.equal(item["clips"], local[(0, 1)]["clips"])


def test_a_server_that_stays_away_ends_the_data(server, source, monkeypatch):
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.02)
    data = pretrain_clips([on_server(source, server)])
    data.patient.patience = 0.1
    server.fault = lambda method, path: 500
    with pytest.raises(DataAwayError, match=f"the server {server.url} is away .*the server answers 500"):
        data[(0, 0)]
    with pytest.raises(DataAwayError, match="the server answers 500"):
        require_readable(data.entries, 4, data.clips)


def test_a_file_that_fails_alone_is_passed_over(server, source, monkeypatch):
    monkeypatch.setattr(outage, "FILE_PATIENCE", 0.05)
    data = pretrain_clips([on_server(source, server), on_server(source, server, "set/a/1.mp4")])
    data[(0, 0)]
    server.fault = lambda method, path: 500 if path.endswith("1.mp4") else None
    assert {path for path, _ in data[(0, 1)]["skipped"]} == {data.entries[1].path}


# Cache


def write_bytes(data):
    def write(path):
        with open(path, "wb") as file:
            file.write(data)

    return write


def test_the_least_recently_used_go_first(tmp_path):
    kept_files = FileCache(tmp_path / "cache", 1000)
    for number in range(4):
        with kept_files.file(str(number), 240, write_bytes(b"%d" % number * 240)):
            pass
        time.sleep(0.01)
    with (
        kept_files.file("0", 240, lambda path: pytest.fail("it is there")),
        kept_files.file("4", 240, write_bytes(b"4" * 240)) as path,
    ):
        assert Path(path).read_bytes() == b"4" * 240
    left = {path.read_bytes()[:1] for path in kept(tmp_path / "cache")}
    assert left == {b"0", b"3", b"4"}  # 0 was used, 1 and 2 make room down to nine tenths


def test_a_file_in_use_is_not_removed(tmp_path):
    kept_files = FileCache(tmp_path / "cache", 1000)
    with kept_files.file("0", 600, write_bytes(b"0" * 600)) as path:
        other = FileCache(tmp_path / "cache", 1000).file("1", 600, write_bytes(b"1" * 600))
        with pytest.raises(file_cache.CacheError, match="in use and 600 bytes more are over the limit of 1,000"), other:
            pass
        assert Path(path).read_bytes() == b"0" * 600
    with kept_files.file("1", 600, write_bytes(b"1" * 600)):
        assert len(kept(tmp_path / "cache")) == 1


def test_what_a_killed_process_left_is_removed(tmp_path):
    kept_files = FileCache(tmp_path / "cache", 1000)
    with kept_files.file("0", 100, write_bytes(b"0" * 100)):
        stale = kept(tmp_path / "cache")[0].with_name(".abc.tmp")
        stale.write_bytes(b"x" * 900)
    (tmp_path / "cache" / ".bytes").write_text("damaged")
    with kept_files.file("1", 100, write_bytes(b"1" * 100)):
        pass
    assert not stale.exists() and len(kept(tmp_path / "cache")) == 2
    assert (tmp_path / "cache" / ".bytes").read_text() == "200"


def use_cache(folder, seed):
    draw = random.Random(seed)
    kept_files = FileCache(folder, 5000)
    for _ in range(150):
        number = draw.randrange(20)
        try:
            with kept_files.file(str(number), 400, write_bytes(b"%02d" % number * 200)) as path:
                assert Path(path).read_bytes() == b"%02d" % number * 200
        except file_cache.CacheError:
            pass  # all of the others' files are in use
        if draw.random() < 0.03 and os.path.exists("/proc/self/fd"):  # somebody removes a file, in use or not
            for file in kept(folder)[:1]:
                file.unlink(missing_ok=True)


def test_many_processes_share_a_cache(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(target=use_cache, args=(tmp_path / "cache", seed)) for seed in range(4)
    ]
    for process in processes:
        process.start()
    time.sleep(0.1)
    processes[0].kill()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes[1:]] == [0, 0, 0]
    assert sum(path.stat().st_size for path in kept(tmp_path / "cache")) <= 5000


@pytest.mark.parametrize("trouble", ["full", "not a folder", "too small", "no memory files"])
def test_without_a_cache_nothing_is_lost(trouble, server, source, tmp_path, monkeypatch):
    if trouble == "not a folder":
        (tmp_path / "cache").write_text("a file")
    if trouble == "too small":
        monkeypatch.setenv("STMAE_CACHE_GB", "1e-6")
    if trouble in ("full", "no memory files"):
        get_file = remote.fetch

        def full(url, target, expected):
            if str(tmp_path / "cache") in os.path.realpath(target):
                write_bytes(b"half")(target)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            get_file(url, target, expected)

        monkeypatch.setattr(remote, "fetch", full)
    if trouble == "no memory files":
        monkeypatch.setattr(file_cache, "IN_MEMORY", -1)
    data = pretrain_clips([on_server(source, server), on_server(source, server, "set/b/2.avi")])
    with pytest.warns(UserWarning, match=r"not kept in the cache .*cache \(.*\): such files are read without it") as warned:
        got = [data[(0, 0)], data[(0, 1)], data[(1, 0)]]
    assert len(warned) == 1
    local = pretrain_clips([Entry(str(source / "set/a/0.mp4"), -1), Entry(str(source / "set/b/2.avi"), -1)])
    for item, key in zip(got, [(0, 0), (0, 1), (1, 0)]):
        assert torch.equal(item["clips"], local[key]["clips"]) and not item["skipped"]
    assert not kept(tmp_path / "cache") and not list(tmp_path.glob("cache/??/.*.tmp"))


def test_a_limit_that_is_not_understood_is_said(server, source, monkeypatch):
    monkeypatch.setenv("STMAE_CACHE_GB", "many")
    with pytest.raises(ValueError, match="STMAE_CACHE_GB: expected a number above 0, got 'many'"):
        frames(on_server(source, server))


# Runs


def run(data, output, workers):
    (output.parent / "tiny.yaml").write_text(TINY)
    argv = ["--config", output.parent / "tiny.yaml", "--data", data, "--output", output, "--run.workers", workers]
    pretrain.run(parse(PretrainConfig, [*map(str, argv), "--optimizer.epochs=4"], prog="stmae pretrain", description=""))


@pytest.fixture(scope="module")
def local_run(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("local") / "run"
    run(source / "list.csv", output, 0)
    return output


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("data, workers", [("list.csv", 0), ("shard-0.tar", 1), ("list.csv", 2)])
def test_a_run_from_elsewhere_has_the_bits_of_one_from_here(data, workers, local_run, server, tmp_path):
    run(f"{server.url}/{data}", tmp_path / "run", workers)
    assert_same_weights(tmp_path / "run", local_run)


def test_what_lies_elsewhere_is_prepared_and_checked(server, tmp_path, capsys):
    assert cli.main(["data", "prepare", f"{server.url}/shard-0.tar", "--output", str(tmp_path / "small"), "--workers", "0"]) == 0
    lines = (tmp_path / "small" / "shard-0.txt").read_text().splitlines()
    assert lines == ["a/0.mp4 0", "a/1.mp4 1", "b/2.mp4 2", "b/3.png 3"]
    assert len(find_labelled_videos(tmp_path / "small" / "shard-0.txt")) == 4
    asked = server.count("GET")
    assert cli.main(["data", "prepare", f"{server.url}/shard-0.tar", "--output", str(tmp_path / "small"), "--workers", "0"]) == 0
    assert server.count("GET") == asked + 1  # for what the shard holds
    assert cli.main(["data", "prepare", f"{server.url}/set/", "--output", str(tmp_path / "set"), "--workers", "0"]) == 0
    assert len(find_videos(tmp_path / "set")) == 4
    capsys.readouterr()
    assert cli.main(["data", "check", f"{server.url}/set/", "--output", str(tmp_path / "usable.txt"), "--workers", "0"]) == 0
    assert find_videos(tmp_path / "usable.txt") == find_videos(f"{server.url}/set/")
