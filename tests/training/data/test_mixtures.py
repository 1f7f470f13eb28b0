"""Several data sets by weight: which video comes when, and whole runs on them."""

import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from stmae.training.commands import pretrain
from stmae.training.config import PretrainConfig, parse
from stmae.training.config.sources import split_mixture
from stmae.training.data.batch_sampler import ResumableBatchSampler, VideoOrder, samples_an_epoch
from stmae.training.data.video_list import class_numbers, find_labelled_videos, find_mixture, find_videos
from stmae.training.engine.run_folder import RunFolderError
from tests.support.synthetic_video import write_video
from tests.training.commands.test_pretrain import TINY, assert_same, configure, weights
from tests.training.data.test_sources import pretrain_clips

LISTS = [(7, 0.5), (3, 0.3), (20, 0.2)]


# Text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.csv:0.7,b.csv:0.3", [("a.csv", 0.7), ("b.csv", 0.3)]),
        ("a,b.csv:1,c:d.csv:2.,e:.5", [("a,b.csv", 1), ("c:d.csv", 2), ("e", 0.5)]),
        (
            "https://host:8080/a.csv:3,x/*_test_split1.txt:train:1",
            [("https://host:8080/a.csv", 3), ("x/*_test_split1.txt:train", 1)],
        ),
        ("a.csv", None),
        ("a.csv:0.7", None),
        ("x/*_test_split1.txt:train", None),
        ("a, b.csv", None),
    ],
)
def test_sources_with_weights_are_told_from_one(text, expected):
    assert split_mixture(text) == expected


@pytest.mark.parametrize(
    "text", ["a.csv:0.7,b.csv", "a.csv:0.7,", "a.csv:0.7,b.csv:0.3,", "a.csv:0.7,b.csv:-1", "a.csv:0,b.csv:1"]
)
def test_a_mixture_that_is_not_understood_is_refused(text):
    with pytest.raises(ValueError, match=r"expected (SOURCE:WEIGHT|a weight above 0)"):
        split_mixture(text)


def test_a_name_that_exists_is_no_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv:0.7,b.csv:0.3").write_text("x.mp4\n")
    assert [entry.path for entry in find_videos("a.csv:0.7,b.csv:0.3")] == ["./x.mp4"]


# Order


def stream(count, seed=3, lists=LISTS):
    order = VideoOrder(lists, seed)
    return [order[position] for position in range(count)]


def list_of(number, lists=LISTS):
    return int(np.searchsorted(np.cumsum([videos for videos, _ in lists]), number, side="right"))


def test_every_epoch_has_each_list_by_its_weight():
    assert samples_an_epoch(LISTS) == [15, 9, 6]
    keys = stream(120)
    for epoch in range(4):
        assert Counter(list_of(number) for _, number in keys[30 * epoch : 30 * epoch + 30]) == {0: 15, 1: 9, 2: 6}


def test_a_list_comes_whole_before_any_of_its_videos_comes_again():
    keys = stream(300)
    assert len(set(keys)) == 300  # never twice the same clips
    start = 0
    for index, (videos, _) in enumerate(LISTS):
        own = [key for key in keys if list_of(key[1]) == index]
        for number in range(len(own) // videos):
            part = own[number * videos : (number + 1) * videos]
            assert sorted(part) == [(number, start + video) for video in range(videos)]
        start += videos
    first, second = ([n for e, n in keys if list_of(n) == 2 and e == epoch] for epoch in (0, 1))
    assert first != second


def test_the_order_is_a_function_of_the_seed_and_the_position():
    whole = stream(200)
    order = VideoOrder(LISTS, 3)
    for position in (199, 0, 31, 30, 120):  # anywhere, in any order
        assert order[position] == whole[position]
    assert stream(200, seed=4) != whole
    assert stream(200, lists=[(7, 5), (3, 3), (20, 2)]) == whole  # weights need not add up to 1


def test_one_list_has_the_order_that_it_had():
    """The bytes of every run before there were mixtures: permutation(seed, epoch)."""
    expected = [(e, int(n)) for e in range(3) for n in np.random.default_rng([2**40, e]).permutation(11)]
    assert stream(33, seed=2**40, lists=[(11, 0.25)]) == expected


def test_ranks_and_starts_divide_a_mixture_alike():
    def batches(**options):
        return list(ResumableBatchSampler(30, 8, seed=1, num_steps=12, lists=LISTS, **options))

    complete = batches()
    assert batches(first_step=5) == complete[5:]
    assert [sum(parts, []) for parts in zip(*(batches(rank=rank, world_size=2) for rank in range(2)))] == complete
    with pytest.raises(ValueError, match="expected lists of 29 videos together"):
        ResumableBatchSampler(29, 8, seed=1, num_steps=12, lists=LISTS)


def test_too_small_a_weight_is_refused():
    with pytest.raises(ValueError, match=r"list 2 of 2 gives no sample in an epoch of 12, with 0.001 of the weight"):
        samples_an_epoch([(10, 0.999), (2, 0.001)])


# Data


@pytest.fixture
def lists(tmp_path):
    """a.csv: three videos, b.csv: two stills, both labelled."""
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", 24)
        if i < 2:
            Image.fromarray(np.full((64, 96, 3), 100 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "a.csv").write_text("0.mp4 0\n1.mp4 1\n2.mp4 2\n")
    (tmp_path / "b.csv").write_text("0.png 1\n1.png 3\n")
    return tmp_path


def test_a_broken_video_is_replaced_by_one_of_its_own_list(lists):
    mixture = find_mixture(f"{lists}/a.csv:0.5,{lists}/b.csv:0.5")
    (lists / "0.png").write_bytes(b"broken")
    data = pretrain_clips(mixture.entries)
    data.lists = mixture.weights
    for epoch in range(10):
        item = data[(epoch, 3)]
        assert item["skipped"] and (item["clips"] == 100).all()  # 1.png, and never a video


def test_class_folders_of_a_mixture_are_numbered_together(tmp_path):
    for path in ("one/b/1.mp4", "one/c/2.mp4", "two/a/3.mp4", "two/c/4.mp4"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    source = f"{tmp_path}/one:3,{tmp_path}/two:1"
    assert class_numbers(source) == {"a": 0, "b": 1, "c": 2}
    mixture = find_mixture(source, labelled=True)
    assert [entry.label for entry in mixture.entries] == [1, 2, 0, 2] and mixture.weights == [(2, 3), (2, 1)]
    assert mixture.describe()[0].endswith("one: 2 videos, 75.0% of the samples, 1.5 passes an epoch")
    (tmp_path / "list.csv").write_text("x.mp4 7\n")
    with pytest.raises(ValueError, match="one: its class folders cannot be numbered as the lists it is mixed with"):
        find_mixture(f"{tmp_path}/one:3,{tmp_path}/list.csv:1", labelled=True)
    with pytest.raises(ValueError, match="expected one data set, got several with weights, which training alone takes"):
        find_labelled_videos(source)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_on_a_mixture_continues_bit_for_bit(lists, capfd):
    """Videos and stills; from a checkpoint in the middle, with another number of workers."""
    (lists / "tiny.yaml").write_text(TINY)
    arguments = ["--config", str(lists / "tiny.yaml"), "--optimizer.epochs", "8", "--optimizer.warmup_epochs", "0"]
    mixture = ["--data", f"{lists}/a.csv:0.7,{lists}/b.csv:0.3"]
    pretrain.run(configure([*arguments, *mixture], lists / "whole"))
    assert "a.csv: 3 videos, 80.0% of the samples, 1.33 passes an epoch" in capfd.readouterr().out
    shutil.copytree(lists / "whole", lists / "again")
    for name in ("state-00000010.safetensors", "model.safetensors"):
        (lists / "again" / name).unlink()
    pretrain.run(configure([*arguments, *mixture, "--run.workers", "1"], lists / "again"))
    assert "continuing from step 8" in capfd.readouterr().out
    assert_same(weights(lists / "whole"), weights(lists / "again"))
    with pytest.raises(RunFolderError, match="other settings .*a.csv:0.7,"):
        pretrain.run(configure([*arguments, "--data", f"{lists}/a.csv:0.6,{lists}/b.csv:0.4"], lists / "whole"))


def test_paths_of_a_mixture_in_a_file_are_relative_to_it(tmp_path):
    (tmp_path / "run.yaml").write_text("data: a.csv:0.7,../b.csv:0.3\noutput: out\n")
    made = parse(PretrainConfig, [f"--config={tmp_path}/run.yaml"], prog="stmae pretrain", description="")
    assert made.data == f"{tmp_path}/a.csv:0.7,{tmp_path.parent}/b.csv:0.3"
