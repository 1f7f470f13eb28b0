"""``stmae data check``: which videos are slow by a rule that their files decide, and what preparing them would gain."""

import re

import pytest

from stmae.training import cli
from stmae.training.commands import data_check
from stmae.training.data.decode_cost import decoded_pixels
from stmae.training.data.video import Video
from stmae.training.data.video_list import find_videos
from tests.support.synthetic_video import write_image, write_video


@pytest.mark.parametrize(
    "length, gop, span, frames",
    [
        (300, 250, 61, 124.5 + 61),  # from the key frame before, on average half a group
        (300, 12, 61, 5.5 + 61),
        (300, 1, 61, 61),  # key frames alone
        (300, None, 61, (300 - 61) / 2 + 61),  # counted: from the start
        (20, 250, 61, 20),  # shorter than a clip
    ],
)
def test_what_a_clip_decodes(length, gop, span, frames):
    assert decoded_pixels(length, (256, 340), gop, span) == frames * 256 * 340


@pytest.fixture
def folder(tmp_path):
    """One large video with a single key frame, one small one with many, one whose frames are counted, and an image."""
    (tmp_path / "set").mkdir()
    write_video(tmp_path / "set" / "large.mp4", 60, size=(480, 640), gop=60, options={"sc_threshold": "0"})
    write_video(tmp_path / "set" / "small.mp4", 60, gop=4)
    write_video(tmp_path / "set" / "counted.avi", 60, codec="mpeg4", gop=4, options={"bf": "2"})
    write_image(tmp_path / "set" / "image.png", 3)
    return tmp_path


def check(folder, *options):
    argv = ["data", "check", str(folder / "set"), "--workers", "0", "--frames", "4", "--stride", "2", *options]
    return cli.main(argv)


def test_slow_videos_are_named_and_what_preparing_gains(folder, capsys):
    assert check(folder, "--slow", str(folder / "slow.txt")) == 0
    said = capsys.readouterr().out
    with Video(folder / "set" / "large.mp4") as video:
        assert video.gop == 60 and video.codec == "h264"
    ratio = (29.5 + 7) * 640 * 480 / ((5.5 + 7) * 342 * 256)
    assert re.search(rf"large.mp4: h264 640x480, a key frame every 60: {ratio:.0f}x the pixels, \d+ ms a clip", said)
    counted = ((60 - 7) / 2 + 7) / (5.5 + 7)  # it keeps its size; 2.7: below the limit
    assert counted < 3 and "slow:    1, which" in said and "counted.avi" not in said
    assert re.search(r"cost: +[\d.]+ to [\d.]+, median [\d.]+ ms of a processor", said)
    assert re.search(r"prepare: 1 of them tried: \d+ -> [\d.]+ ms a clip, [\d.]+ -> [\d.]+ MB", said)
    assert re.search(r"all 1 take \S+ hours of a processor, \S+ -> \S+ GB", said)
    assert [entry.path for entry in find_videos(folder / "slow.txt")] == [str(folder / "set" / "large.mp4")]


def test_a_file_that_is_decoded_from_its_start_is_slow_where_it_is_long(folder, capsys):
    write_video(folder / "set" / "counted.avi", 90, codec="mpeg4", gop=4, options={"bf": "2"})
    assert check(folder, "--tried", "0") == 0
    said = capsys.readouterr().out
    assert re.search(r"counted.avi: mpeg4 96x64, from its start every time: 4x the pixels", said)
    assert "slow:    2, which" in said and "prepare:" not in said


def test_nothing_is_said_where_nothing_is_slow(folder, capsys):
    (folder / "set" / "large.mp4").unlink()
    assert check(folder) == 0
    assert "slow:" not in capsys.readouterr().out


def test_a_video_too_long_to_try_is_not_prepared(folder, capsys, monkeypatch):
    monkeypatch.setattr(data_check, "TRIED_PIXELS", 1000)
    assert check(folder) == 0
    assert "prepare:" not in (said := capsys.readouterr().out) and "slow:    1" in said
