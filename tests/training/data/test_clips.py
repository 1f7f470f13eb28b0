"""From videos to batches: lists, clips, crops, order, and what is done about broken files."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from stmae.masking import make_mask
from stmae.training import cli
from stmae.training.config import ClipConfig
from stmae.training.data import clip_sampling, transforms
from stmae.training.data.batch_sampler import ResumableBatchSampler
from stmae.training.data.dataset import PretrainClips, ViewClips, as_video, require_readable
from stmae.training.data.free_memory import MEMORY_FILES, free_memory
from stmae.training.data.loader import Batches, ClipLoader, LoaderError
from stmae.training.data.shared_ring import SharedRing
from stmae.training.data.video import Video, VideoError
from stmae.training.data.video_list import Entry, find_labelled_videos, find_train_and_test, find_videos
from tests.support.fork_server import TIMEOUT
from tests.support.synthetic_video import read_number, write_audio, write_video

GRID = (2, 4, 4)


# Lists


def test_a_folder_is_searched_recursively_and_sorted(tmp_path):
    for name in ("b.mp4", "deep/er/a.MKV", "notes.txt", "deep/.hidden.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_videos(tmp_path) == [Entry(str(tmp_path / "b.mp4"), -1), Entry(str(tmp_path / "deep/er/a.MKV"), -1)]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_in(folder):
    return [os.path.relpath(entry.path, folder) for entry in find_videos(folder)]


def test_hidden_folders_and_the_output_of_runs_are_no_data(tmp_path):
    touch(tmp_path, "a/1.mp4", "a/.ipynb_checkpoints/1.mp4", ".trash/2.mp4", "b/2.mp4")
    touch(tmp_path, "runs/base/run.jsonl", "runs/base/config.yaml", "runs/base/plots.png", "runs/base/pictures/3.png")
    assert names_in(tmp_path) == ["a/1.mp4", "b/2.mp4"]
    assert [entry.label for entry in find_labelled_videos(tmp_path)] == [0, 1]
    touch(tmp_path, "run.jsonl", "config.yaml", "plots.png", "pictures/4.png")  # a run whose output is the data folder itself
    assert names_in(tmp_path) == ["a/1.mp4", "b/2.mp4"]
    touch(tmp_path, "c/config.yaml", "c/pictures/5.png")  # not a run's
    assert names_in(tmp_path) == ["a/1.mp4", "b/2.mp4", "c/pictures/5.png"]


def test_links_are_followed_once_and_end(tmp_path):
    data, store = tmp_path / "data", tmp_path / "store"
    touch(data, "z/1.mp4", "z/deep/2.mp4")
    touch(store, "3.mp4", "4.mp4")
    (data / "a").symlink_to(data / "z")  # comes before z, and is not z
    (data / "z" / "deep" / "up").symlink_to(data)
    (data / "z" / "self").symlink_to("self")
    (data / "store").symlink_to(store)
    (data / "again").symlink_to(store)
    (store / "back").symlink_to(data / "z")
    (data / "one.mp4").symlink_to(data / "z" / "1.mp4")
    (data / "five.mp4").symlink_to(tmp_path / "nowhere.mp4")  # listed, and named as broken
    for i in range(2):  # every folder a link to every other: no end, followed path by path
        for j in range(8):
            (data / f"mesh{i}").mkdir(exist_ok=True)
            (data / f"mesh{i}" / f"link{j}").symlink_to(data / f"mesh{1 - i}")
    assert names_in(data) == ["again/3.mp4", "again/4.mp4", "five.mp4", "z/1.mp4", "z/deep/2.mp4"]


def test_a_video_that_is_linked_into_two_classes_is_said(tmp_path, recwarn):
    touch(tmp_path, "a/1.mp4", "b/2.mp4")
    (tmp_path / "a" / "again.mp4").symlink_to("1.mp4")  # in its own class: nothing to say
    assert names_in(tmp_path) == ["a/1.mp4", "b/2.mp4"] and not recwarn
    (tmp_path / "b" / "1.mp4").symlink_to("../a/1.mp4")
    with pytest.warns(UserWarning, match="1 symbolic link to videos that are listed already, .*b/1.mp4 the one at .*a/1.mp4"):
        assert [entry.label for entry in find_labelled_videos(tmp_path)] == [0, 1]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.mp4", "locked/2.mp4")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # permissions do not hold for every user that runs the tests
    with pytest.raises(ValueError, match=r"cannot read the folder .*/locked \(Permission denied\)"):
        find_videos(tmp_path)


def test_a_comment_that_names_a_file_is_a_file(tmp_path):
    touch(tmp_path, "#1 cooking.mp4", "#2.mp4")
    (tmp_path / "list.txt").write_text("# old.mp4 3\n#1 cooking.mp4 4\n#2.mp4\n# made by hand\n#\n")
    assert find_videos(tmp_path / "list.txt") == [
        Entry(str(tmp_path / "#1 cooking.mp4"), 4),
        Entry(str(tmp_path / "#2.mp4"), -1),
    ]


@pytest.mark.parametrize("line", ["b.mp4 -1", "b.mp4", "b.mp4 1e9", "b.mp4 \u00b2", "b.mp4 --5", "b.mp4 -5", "b.mp4,1000000"])
def test_a_label_that_is_none_is_refused_with_its_line(line, tmp_path):
    (tmp_path / "list.txt").write_text(f"a.mp4 1\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.txt, line 3: expected an? (label|integer)"):
        find_labelled_videos(tmp_path / "list.txt")


@pytest.mark.parametrize(
    "line, expected, hint",
    [
        ("a/b.mp4 0 -1", ("a/b.mp4", -1, 0), "VideoMAE V2"),
        ("a/b 0 -1", ("a/b", -1, 0), "VideoMAE V2"),
        ("a b.mp4 90 3", ("a b.mp4", 3, 0), "'video label'"),
        ("a b.mp4,90,3", ("a b.mp4", 3, 0), "'video label'"),
        ("12:30 cam.mp4", ("12:30 cam.mp4", -1, 0), None),
        ("12:30 cam.mp4 5", ("12:30 cam.mp4", 5, 0), None),
    ],
)
def test_lines_that_are_easily_read_wrongly(line, expected, hint, tmp_path):
    (tmp_path / "list.txt").write_text(f"{line}\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (entry,) = find_videos(tmp_path / "list.txt")
    assert entry == Entry(str(tmp_path / expected[0]), *expected[1:])
    assert [hint in str(warning.message) and "line 1" in str(warning.message) for warning in caught] == [True] * bool(hint)


@pytest.mark.parametrize("header", ["path,label", "video label", '"Video_Path","Label"', "path\ttotal_frames\tlabel"])
def test_the_names_of_columns_are_no_video(header, tmp_path):
    (tmp_path / "list.csv").write_text(f"\ufeff{header}\na.mp4,3\n", encoding="utf-8")
    assert find_videos(tmp_path / "list.csv") == [Entry(str(tmp_path / "a.mp4"), 3)]
    (tmp_path / "list.csv").write_text(f"a.mp4,3\n{header}\n")
    with pytest.raises(ValueError, match="line 2: expected"):
        find_videos(tmp_path / "list.csv")


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names of files are bytes on Linux alone")
def test_names_that_are_no_utf8(tmp_path, capsys):
    complete = write_video(tmp_path / "complete.mp4", 30)
    data = tmp_path / "data"
    data.mkdir()
    for name in (b"caf\xe9.mp4", b"\xff broken.mp4"):
        with open(os.path.join(os.fsencode(data), name), "wb") as file:
            file.write(complete.read_bytes() if b"caf" in name else b"")
    os.replace(complete, os.path.join(os.fsencode(data), b"\xfe.mp4"))
    (tmp_path / "list.txt").write_bytes(b"data/caf\xe9.mp4 0\ndata/\xff broken.mp4 1\n")
    assert len(find_videos(data)) == 3 and [entry.label for entry in find_videos(tmp_path / "list.txt")] == [0, 1]
    for source in (data, tmp_path / "list.txt"):
        item = dataset(find_videos(source), stride=1)
        skipped = [pair for number in range(len(item)) for pair in item[(0, number)]["skipped"]]
        assert skipped and all("broken" in path for path, _ in skipped)
        json.dumps(skipped, ensure_ascii=False).encode()  # as a log writes it
        good = tmp_path / "good.txt"
        cli.main(["data", "check", str(source), "--frames", "4", "--stride", "1", "--workers", "0", "--output", str(good)])
        assert "1 cannot" in capsys.readouterr().out
        assert len(find_videos(good)) == len(find_videos(source)) - 1


@pytest.mark.parametrize(
    "line, name, label",
    [
        ("a.mp4 3", "a.mp4", 3),
        ("a.mp4,3", "a.mp4", 3),
        ("a.mp4, 3", "a.mp4", 3),
        ("with spaces in it.mp4 17", "with spaces in it.mp4", 17),
        ("with spaces, and commas.mp4,17", "with spaces, and commas.mp4", 17),
        ("with spaces, and commas.mp4 17", "with spaces, and commas.mp4", 17),
        ("take 2.mp4", "take 2.mp4", -1),
        ("a.mp4", "a.mp4", -1),
        ('"quoted name.mp4",4', "quoted name.mp4", 4),
        ("folder/a.mp4 -1", "folder/a.mp4", -1),
    ],
)
def test_a_line_of_a_list(line, name, label, tmp_path):
    (tmp_path / "list.csv").write_text(f"# a comment\n\n{line}\n")
    assert find_videos(tmp_path / "list.csv") == [Entry(str(tmp_path / name), label)]


def test_absolute_paths_stay_absolute(tmp_path):
    (tmp_path / "list.txt").write_text("/videos/a.mp4 1\n")
    assert find_videos(tmp_path / "list.txt")[0].path == "/videos/a.mp4"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such folder or list file"),
        ("", "names no videos"),
        ("fine.mp4 1\nnonsense here\n", "line 2: expected 'path label'"),
    ],
)
def test_a_bad_list_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_videos(tmp_path / "list.txt")


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no videos in folder"):
        find_videos(tmp_path)


def test_a_test_set_is_labelled_as_the_training_set(tmp_path):
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "train/c/3.mp4", "test/c/4.mp4", "other/c/5.mp4", "other/d/6.mp4")
    _, test = find_train_and_test(tmp_path / "train", tmp_path / "test")
    assert test == [Entry(str(tmp_path / "test/c/4.mp4"), 2)]  # on its own it would be class 0
    with pytest.raises(ValueError, match="the training set numbers 3 classes, and .*other/d is none of them"):
        find_train_and_test(tmp_path / "train", tmp_path / "other")
    (tmp_path / "train.txt").write_text("train/a/1.mp4 0\ntrain/c/3.mp4 2\n")
    (tmp_path / "test.txt").write_text("test/c/4.mp4 1\n")
    with pytest.raises(ValueError, match=r"test/c/4.mp4: its label is 1, and no video of .*train.txt has that label"):
        find_train_and_test(tmp_path / "train.txt", tmp_path / "test.txt")
    with pytest.raises(ValueError, match="cannot be numbered as .*train.txt is, .*name the numbers with --data_labels"):
        find_train_and_test(tmp_path / "train.txt", tmp_path / "test")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    _, test = find_train_and_test(tmp_path / "train.txt", tmp_path / "test", labels=tmp_path / "labels.txt")
    assert [entry.label for entry in test] == [2]


# Which frames


def test_stride_and_linspace_spacing():
    assert clip_sampling.clip_indices(5, 16, 4).tolist() == list(range(5, 66, 4))
    # The published code's 16 of 64 frames: linspace(0, 63, 16) rounded down.
    expected = [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    assert clip_sampling.clip_indices(0, 16, 4, "linspace").tolist() == expected


@pytest.mark.parametrize("spacing, span", [("stride", 61), ("linspace", 64)])
def test_random_clips_cover_every_start_and_nothing_else(spacing, span):
    rng = np.random.default_rng(0)
    starts = {int(clip_sampling.random_clip(rng, span + 3, 16, 4, spacing)[0]) for _ in range(200)}
    assert starts == {0, 1, 2, 3}
    assert clip_sampling.random_clip(rng, span - 1, 16, 4, spacing) is None


def test_spaced_clips_reach_from_the_first_to_the_last_frame():
    clips = clip_sampling.spaced_clips(3, 100, 16, 4)
    assert [int(clip[0]) for clip in clips] == [0, 19, 39] and clips[-1][-1] == 99
    assert int(clip_sampling.spaced_clips(1, 101, 16, 4)[0][0]) == 20
    assert clip_sampling.spaced_clips(2, 60, 16, 4) is None


# Crops


def test_random_crops_keep_to_their_area_and_aspect():
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left, h, w = transforms.random_crop_box(rng, 180, 320, (0.5, 1.0), (0.75, 1.3333))
        assert 0 <= top <= 180 - h and 0 <= left <= 320 - w
        assert 0.49 < h * w / (180 * 320) < 1 or (h, w) == (180, 240)  # the last: nothing fitted in ten draws
        assert 0.74 < w / h < 1.35


@pytest.mark.parametrize("position, left", [(0.0, 0), (0.5, 70), (1.0, 140)])
def test_view_boxes_slide_along_the_longer_side(position, left):
    assert transforms.view_box(180, 320, (224, 224), position) == (0, left, 180, 180)


@pytest.mark.parametrize("position, left", [(0.0, 0), (0.5, 110), (1.0, 220)])
def test_smaller_view_boxes_are_in_the_middle_of_the_shorter_side(position, left):
    assert transforms.view_box(480, 640, (224, 224), position, 0.875) == (30, left, 420, 420)
    assert transforms.view_box(640, 480, (224, 224), position, 0.875) == (left, 30, 420, 420)


def test_a_crop_of_seven_eighths_is_a_resize_to_256_and_a_crop_of_224():
    frames = torch.randint(0, 256, (1, 512, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resized = transforms.resized_crop(frames, (0, 0, 512, 640), (256, 320))
    expected = resized[:, 16:240, 48:272]
    box = transforms.view_box(512, 640, (224, 224), 0.5, 0.875)
    clip = transforms.resized_crop(frames, box, (224, 224))
    # At the edges the one sees pixels beyond the crop, and the other does not.
    torch.testing.assert_close(clip[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], rtol=0, atol=0)


def test_resized_crop_is_uint8_and_close_to_float_resizing():
    frames = torch.randint(0, 256, (4, 90, 120, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = transforms.resized_crop(frames.numpy(), (10, 20, 60, 80), (32, 48))
    assert out.dtype == torch.uint8 and out.shape == (4, 32, 48, 3) and out.is_contiguous()
    cut = frames[:, 10:70, 20:100].permute(0, 3, 1, 2).float()
    exact = torch.nn.functional.interpolate(cut, size=(32, 48), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    assert (out.float() - exact).abs().max() <= 2  # uint8 filter weights


# ResumableBatchSampler


def keys(**options):
    return list(ResumableBatchSampler(5, 4, seed=3, num_steps=7, **options))


def test_every_video_comes_once_an_epoch_though_batches_cross_epochs():
    flat = [key for batch in keys() for key in batch]
    assert len(flat) == 28
    for epoch in range(5):
        assert sorted(video for e, video in flat if e == epoch) == list(range(5))
    assert [v for e, v in flat if e == 0] != [v for e, v in flat if e == 1]


def test_order_continues_anywhere():
    assert keys(first_step=3) == keys()[3:]
    assert keys() == keys()
    assert keys() != list(ResumableBatchSampler(5, 4, seed=4, num_steps=7))


def test_ranks_and_accumulated_parts_divide_the_same_batches():
    complete = keys()
    ranks = [keys(rank=rank, world_size=2) for rank in range(2)]
    assert [sum(parts, []) for parts in zip(*ranks)] == complete
    parts = keys(accumulate=2)
    assert [parts[2 * i] + parts[2 * i + 1] for i in range(7)] == complete
    with pytest.raises(ValueError, match="a batch of 4 videos does not divide into 3"):
        ResumableBatchSampler(5, 4, seed=0, num_steps=1, accumulate=3)


# Clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name in "abcd":
        write_video(folder / f"{name}.mp4", 60, size=(64, 96))
    return folder


def dataset(entries, *, seed=0, strategy="random", **clips):
    clips = ClipConfig(**{"stride": 4, "repeats": 2, **clips})
    draw = functools.partial(make_mask, strategy, 1, GRID, 0.75)
    return PretrainClips(entries, clips, frames=4, size=(32, 32), sample_mask=draw, seed=seed)


def test_a_sample_is_a_function_of_seed_epoch_and_video(folder):
    entries = find_videos(folder)
    first = dataset(entries)[(2, 1)]
    assert first["clips"].shape == (2, 4, 32, 32, 3) and first["clips"].dtype == torch.uint8
    assert first["keep"].shape == (2, 8) and first["skipped"] == []
    torch.manual_seed(99)
    np.random.seed(99)
    again = dataset(entries)
    again[(0, 3)]  # what was asked before does not matter
    again = again[(2, 1)]
    assert torch.equal(first["clips"], again["clips"]) and torch.equal(first["keep"], again["keep"])
    for other in (dataset(entries)[(3, 1)], dataset(entries, seed=1)[(2, 1)]):
        assert not torch.equal(first["clips"], other["clips"]) and not torch.equal(first["keep"], other["keep"])


def test_repeats_are_different_clips_of_one_video(folder):
    item = dataset(find_videos(folder), repeats=4)[(0, 0)]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(item["clips"][i], item["clips"][j]) and not torch.equal(item["keep"][i], item["keep"][j])


def test_clips_hold_the_frames_they_should(folder):
    # The full frame, not flipped, at its own size: the numbers can be read.
    clips = ClipConfig(stride=7, repeats=3, scale=(1, 1), aspect=(1.5, 1.5), flip=False)
    draw = functools.partial(make_mask, "random", 1, GRID, 0.75)
    item = PretrainClips(find_videos(folder), clips, frames=4, size=(64, 96), sample_mask=draw, seed=0)[(0, 2)]
    for clip in item["clips"]:
        numbers = [read_number(frame.numpy()) for frame in clip]
        assert [b - a for a, b in zip(numbers, numbers[1:])] == [7, 7, 7]


def test_the_batch_reaches_the_model_as_a_view(folder):
    data = dataset(find_videos(folder))
    (batch,) = ClipLoader(data, ResumableBatchSampler(4, 2, seed=0, num_steps=1), 0)
    video = as_video(batch["clips"])
    assert video.shape == (4, 3, 4, 32, 32) and batch["masked"].shape == (4, 24)
    assert video.data_ptr() == batch["clips"].data_ptr() and video.stride(1) == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(folder, workers):
    entries = find_videos(folder)
    order = ResumableBatchSampler(len(entries), 3, seed=0, num_steps=4)
    alone = list(ClipLoader(dataset(entries), order, 0))
    spread = list(ClipLoader(dataset(entries), order, workers))
    assert len(alone) == 4
    for a, b in zip(alone, spread):
        assert torch.equal(a["clips"], b["clips"]) and torch.equal(a["keep"], b["keep"])


def test_a_loader_continues_in_mid_epoch(folder):
    entries = find_videos(folder)
    complete = list(ClipLoader(dataset(entries), ResumableBatchSampler(4, 3, seed=0, num_steps=5), 0))
    order = ResumableBatchSampler(4, 3, seed=0, num_steps=5, first_step=2)
    rest = list(ClipLoader(dataset(entries), order, 1))
    for a, b in zip(complete[2:], rest):
        assert torch.equal(a["clips"], b["clips"]) and torch.equal(a["keep"], b["keep"])


def write_seven(ring):
    for value in ring[1].values():
        value.fill_(7)


def order(videos, batch, steps=1, **options):
    return ResumableBatchSampler(videos, batch, seed=0, num_steps=steps, **options)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_lies_where_its_workers_wrote_it_until_it_is_overwritten(workers, folder):
    entries = find_videos(folder)
    kept = list(ClipLoader(dataset(entries), order(4, 2, 12, accumulate=2), workers))
    loader = ClipLoader(dataset(entries), order(4, 2, 12, accumulate=2), workers, held=4)
    addresses, recent = set(), []
    with Batches(loader) as batches:
        for expected in kept:
            recent = [*recent[-3:], (expected, next(batches))]
            addresses.add(recent[-1][1]["clips"].data_ptr())
            for before, batch in recent:  # four at a time are what they were
                assert all(torch.equal(before[name], batch[name]) for name in ("clips", "keep", "masked"))
    assert len(kept) == 24
    if workers:
        assert len(addresses) <= loader.slots < 24
        size = loader.sampler.videos * 2 * (4 * 32 * 32 * 3 + 8 * 32)
        assert size * loader.slots <= loader.shared_bytes <= (size + 3 * 64) * loader.slots


def test_shared_memory_that_there_is_not_is_an_error(folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stmae.training.data.shared_ring.os.posix_fallocate", full)
    with pytest.raises(
        LoaderError, match=r"need \d+ MiB of shared memory, 3 batches \(No space left on device\): try fewer videos"
    ):
        list(ClipLoader(dataset(find_videos(folder)), order(4, 2), 1))


def test_a_loader_without_a_loop_around_it_waits_for_slow_videos(folder, monkeypatch):
    entries = find_videos(folder)
    expected = list(ClipLoader(dataset(entries), order(4, 2, 2), 0))
    data = dataset(entries)
    fill = data.fill
    monkeypatch.setattr("stmae.training.data.loader.POLL", 0.01)
    monkeypatch.setattr(data, "fill", lambda *arguments: time.sleep(0.05) or fill(*arguments))
    for batch, copy in zip(ClipLoader(data, order(4, 2, 2), 1), expected, strict=True):
        assert torch.equal(batch["clips"], copy["clips"]) and torch.equal(batch["keep"], copy["keep"])


LEFT = """
import sys
from stmae.training.data.loader import ClipLoader
from stmae.training.data.video_list import find_videos
from tests.training.data.test_clips import dataset, order

loaders = [iter(ClipLoader(dataset(find_videos(sys.argv[1])), order(4, 2, 9), 1, held=1)) for _ in range(2)]
next(loaders[0])
print(sum(1 for _ in loaders[1]), flush=True)
"""


def test_a_program_ends_that_leaves_its_loaders_to_python(folder):
    """One of them has a worker that waits, one has given all its batches."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", LEFT, folder], cwd=root, capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    assert done.stdout == "9\n", done.stderr


KILLED = """
import multiprocessing, os, signal, sys
from stmae.training.data.loader import ClipLoader
from stmae.training.data.video_list import find_videos
from tests.training.data.test_clips import dataset, order

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    batches = iter(ClipLoader(dataset(find_videos(sys.argv[1])), order(4, 2, 90), 2, held=1))
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_process_that_is_killed(folder, method, tmp_path):
    """However they are started; two of them, which wait for a place in the memory."""
    (tmp_path / "killed.py").write_text(KILLED)
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, tmp_path / "killed.py", folder, method]
    killed = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT)
    workers = [int(word) for word in killed.stdout.split()]
    assert killed.returncode == -signal.SIGKILL and len(workers) == 2
    end = time.monotonic() + TIMEOUT
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(is_running, workers))


def is_running(process):
    """Of a process that is no child of this one."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_memory_that_is_not_free_is_not_taken(folder, monkeypatch):
    monkeypatch.setattr("stmae.training.data.shared_ring.free_memory", lambda: 2**20 // 2)
    with pytest.raises(LoaderError, match=r"need \d+ MiB of shared memory, 3 batches \(0 MiB are free\): try fewer videos or"):
        list(ClipLoader(dataset(find_videos(folder)), order(4, 200), 1))


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_that_of_the_machine_and_of_every_control_group(version, tmp_path):
    groups, limit, used = MEMORY_FILES[version]
    for name, text in {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\nHugePages_Total: 0\n",
        "proc/self/cgroup": {1: "4:cpu:/a/b\n3:memory:/a/b\n", 2: "0::/a/b\n"}[version],
        f"{groups}/a/b/{limit}": {1: str(2**63 - 4096), 2: "max"}[version],
        f"{groups}/a/b/{used}": "1000",
        f"{groups}/a/{limit}": "4000000",
        f"{groups}/a/{used}": "3000000",
        f"{groups}/a/memory.stat": f"anon 2000000\n{'total_' * (version == 1)}inactive_file 500000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == 4_000_000 - 3_000_000 + 500_000
    (tmp_path / groups / "a" / limit).write_text("90000000")
    assert free_memory(tmp_path) == 5000 * 1024
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/\xff\n")  # names may have any bytes
    assert free_memory(tmp_path) == 5000 * 1024
    assert free_memory(tmp_path / "nothing") is None and (free_memory() or 2**30) > 2**20


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_ring_reaches_processes_however_they_are_started(method):
    ring = SharedRing(2, {"a": ((2, 3), torch.uint8), "b": ((5,), torch.float32)})
    process = multiprocessing.get_context(method).Process(target=write_seven, args=(ring,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (ring[1]["a"] == 7).all() and (ring[3]["b"] == 7).all() and (ring[0]["a"] == 0).all()
    for value in ring[1].values():
        assert value.data_ptr() % 64 == 0


# Short videos

SHORT = {"loop": [0, 2, 4, 1], "pad": [0, 2, 4, 4]}


@pytest.mark.parametrize("short", SHORT)
def test_a_short_video_begins_again_or_repeats_its_last_frame(short, tmp_path):
    path = write_video(tmp_path / "short.mp4", 5)
    clips = ClipConfig(stride=2, repeats=2, scale=(1, 1), aspect=(1.5, 1.5), flip=False, short=short)
    draw = functools.partial(make_mask, "random", 1, GRID, 0.75)
    options = {"frames": 4, "size": (64, 96)}
    item = PretrainClips(find_videos(tmp_path), clips, sample_mask=draw, seed=0, **options)[(0, 0)]
    view = ViewClips(find_videos(tmp_path), clips, temporal=2, **options)[0]
    for clip in (*item["clips"], *view["clips"]):
        assert [read_number(frame.numpy()) for frame in clip] == SHORT[short]
    done = {"loop": "it begins again", "pad": "its last frame is repeated"}[short]
    assert item["skipped"] == [] and item["short"] == [(str(path), f"5 frames, and a clip needs 7: {done}")]
    (batch,) = ClipLoader(PretrainClips(2 * find_videos(tmp_path), clips, sample_mask=draw, seed=0, **options), order(2, 2), 0)
    assert batch["short"] == 2 * item["short"]


@pytest.mark.parametrize("spacing", ["stride", "linspace", "segments"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_spacing_takes_short_videos(length, spacing, tmp_path):
    write_video(tmp_path / "short.mp4", length)
    for short in SHORT:
        item = dataset(find_videos(tmp_path), stride=3, spacing=spacing, short=short)[(0, 0)]
        assert item["clips"].shape == (2, 4, 32, 32, 3) and len(item["short"]) == 1
    with pytest.raises(RuntimeError, match="201 videos in a row could not be read, the last: .*too short"):
        dataset(find_videos(tmp_path), stride=3, spacing=spacing, short="skip")[(0, 0)]


# Broken files


@pytest.fixture
def mixed(tmp_path):
    """One good video among six that are not."""
    good = write_video(tmp_path / "good.mp4", 60)
    data = good.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    write_audio(tmp_path / "sound.mp4")
    write_video(tmp_path / "short.mp4", 5)
    entries = find_videos(tmp_path)
    return [*entries, Entry(str(tmp_path / "absent.mp4"), -1)]


REASONS = {
    "cut.mp4": "cannot be opened",
    "empty.mp4": "empty",
    "text.mp4": "cannot be opened",
    "sound.mp4": "no video stream",
    "short.mp4": "too short: 5 frames, a clip of 4 at stride 4 needs 13",
    "absent.mp4": "cannot be opened",
}


def test_broken_videos_are_replaced_and_named(mixed):
    data = dataset(mixed, short="skip")
    seen = {}
    for number in range(len(mixed)):
        item = data[(0, number)]
        assert item["clips"].shape == (2, 4, 32, 32, 3)  # always something: only the good one is left
        for path, reason in item["skipped"]:
            seen[path.rpartition("/")[2]] = reason
    assert seen.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert reason in seen[name]


def test_the_substitute_does_not_depend_on_what_a_worker_has_seen(mixed):
    used = dataset(mixed)
    for number in range(len(mixed)):
        used[(0, number)]
    for number in range(len(mixed)):
        a, b = dataset(mixed)[(1, number)], used[(1, number)]
        assert torch.equal(a["clips"], b["clips"]) and a["skipped"] == b["skipped"]


@pytest.fixture
def half_damaged(tmp_path):
    """Two videos of which only the first half can be read, one that is intact, one that is empty."""
    for name in "abc":
        path = write_video(tmp_path / f"{name}.mkv", 60, gop=10)
        if name != "c":  # as a disk that was full, or a download that was given up, leaves it: the right length, zeros at the end
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    (tmp_path / "d.mkv").write_bytes(b"")
    return find_videos(tmp_path)


class PartlyUnreadable(PretrainClips):
    """Fails for some clips of a video and not for others, as damage in a part of it does."""

    def _read(self, epoch, number, out):
        if number == 0 and np.random.default_rng([epoch, number]).random() < 0.5:
            raise VideoError(self.entries[number].path, "frame 50 of 60 cannot be decoded")
        return super()._read(epoch, number, out)


def damaged_clips(entries):
    draw = functools.partial(make_mask, "random", 1, GRID, 0.75)
    return PartlyUnreadable(entries, ClipConfig(stride=4, repeats=2), frames=4, size=(32, 32), sample_mask=draw, seed=0)


def damaged_batches(entries, workers, first_step=0):
    order = ResumableBatchSampler(len(entries), 3, seed=0, num_steps=12, first_step=first_step)
    return list(ClipLoader(damaged_clips(entries), order, workers))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_half_damaged_videos_give_the_same_whatever_the_workers_and_resumes(half_damaged):
    complete = damaged_batches(half_damaged, 0)
    others = [(0, damaged_batches(half_damaged, workers)) for workers in (1, 2)]
    others += [(first, damaged_batches(half_damaged, workers, first)) for first, workers in ((1, 0), (5, 2), (8, 1))]
    for first, batches in others:
        assert len(batches) == 12 - first
        for a, b in zip(complete[first:], batches):
            assert torch.equal(a["clips"], b["clips"]) and torch.equal(a["keep"], b["keep"]) and a["skipped"] == b["skipped"]
    names = {path.rpartition("/")[2] for batch in complete for path, _ in batch["skipped"]}
    assert names >= {"a.mkv", "d.mkv"}


def test_a_sample_depends_on_the_file_alone_and_not_on_what_was_read_before(half_damaged):
    keys = [(epoch, number) for epoch in range(6) for number in range(len(half_damaged))]
    used = damaged_clips(half_damaged)
    forward = {key: used[key] for key in keys}
    outcomes = set()
    for key in reversed(keys):
        a, b = forward[key], damaged_clips(half_damaged)[key]
        assert torch.equal(a["clips"], b["clips"]) and a["skipped"] == b["skipped"]
        if key[1] == 0:
            outcomes.add(bool(a["skipped"]))
    assert outcomes == {True, False}  # the first video is given up for some clips, and read for others


def test_a_video_that_was_away_once_is_back(tmp_path):
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", 60)
    entries = find_videos(tmp_path)
    data, fresh = dataset(entries), dataset(entries)[(0, 0)]
    (tmp_path / "a.mp4").rename(tmp_path / "away")
    assert data[(0, 0)]["skipped"]
    (tmp_path / "away").rename(tmp_path / "a.mp4")
    again = data[(0, 0)]
    assert again["skipped"] == [] and torch.equal(again["clips"], fresh["clips"])


def test_no_usable_video_is_an_error_before_training(mixed):
    broken = [entry for entry in mixed if not entry.path.endswith("good.mp4")]
    with pytest.raises(ValueError) as error:
        require_readable(broken, 4, ClipConfig(stride=4, short="skip"))
    assert "none of the videos can be used, 6 in all" in str(error.value)
    for name, reason in REASONS.items():
        assert any(name in line and reason in line for line in str(error.value).splitlines())
    require_readable(mixed, 4, ClipConfig(stride=4))


def test_an_epidemic_of_broken_videos_ends(mixed, monkeypatch):
    monkeypatch.setattr("stmae.training.data.dataset.SUBSTITUTES", 5)
    broken = [entry for entry in mixed if not entry.path.endswith("good.mp4")]
    with pytest.raises(RuntimeError, match="6 videos in a row could not be read"):
        dataset(broken, short="skip")[(0, 0)]


def test_evaluation_never_substitutes(mixed):
    views = ViewClips(mixed, ClipConfig(stride=4, short="skip"), frames=4, size=(32, 32))
    for number, entry in enumerate(mixed):
        if entry.path.endswith("good.mp4"):
            assert views[number]["clips"].shape == (1, 4, 32, 32, 3)
        else:
            with pytest.raises(VideoError):
                views[number]


def test_views_are_deterministic_temporal_times_spatial(folder):
    entries = [entry._replace(label=7) for entry in find_videos(folder)]
    clips = ClipConfig(stride=4, pixels="swscale")
    views = ViewClips(entries, clips, frames=4, size=(64, 64), temporal=2, spatial=3)
    item = views[1]
    assert item["clips"].shape == (6, 4, 64, 64, 3) and item["label"] == 7
    assert torch.equal(item["clips"], views[1]["clips"])
    with Video(entries[1].path) as video:
        frames = video.frames(clip_sampling.spaced_clips(2, 60, 4, 4)[1])
    assert np.array_equal(item["clips"][3].numpy(), frames[:, :, :64])  # second clip, left
    assert np.array_equal(item["clips"][5].numpy(), frames[:, :, 32:])  # second clip, right
