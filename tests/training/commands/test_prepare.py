"""``stmae data prepare``: the same frames at the same times, small; resumed, checked, and said where it cannot be."""

import json
import os

import av
import numpy as np
import pytest

from stmae.training import cli
from stmae.training.commands import data_prepare
from stmae.training.data import prepare
from stmae.training.data.prepare import prepared_size, target_names
from stmae.training.data.video import Video, VideoError
from stmae.training.data.video_list import Entry, find_labelled_videos, find_videos
from tests.support.synthetic_video import numbered_frame, read_number, rotate_mp4, write_audio, write_image, write_video
from tests.support.video_files import UNEVEN

SOURCES = {
    "plain.mp4": {"audio": True},
    "uneven.mkv": {"times": UNEVEN, "options": {"bf": "2"}},
    "counted.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "odd.mp4": {"size": (67, 101), "pix_fmt": "yuv444p"},
    "deep.mp4": {"pix_fmt": "yuv420p10le"},
}


def run(data, output, **settings):
    return data_prepare.run(data_prepare.Config(data=str(data), output=str(output), workers=0, **settings))


@pytest.mark.parametrize("name", SOURCES)
def test_the_result_has_the_same_frames_at_the_same_times(name, tmp_path):
    source, target = write_video(tmp_path / name, 60, **SOURCES[name]), str(tmp_path / "out" / "a.mp4")
    assert prepare.prepare_video(source, target, short_side=256, gop=12, crf=18) == 60
    with Video(source) as before, Video(target) as after:
        assert len(after) == len(before) == 60
        assert np.allclose(after.times - after.times[0], before.times - before.times[0], atol=1e-3)
        assert [read_number(frame) for frame in after.frames(range(60))] == list(range(60))
        difference = np.abs(after.frames([7, 33]).astype(int) - [numbered_frame(i, *after.size) for i in (7, 33)])
        assert difference.mean() < 6
    with av.open(target) as file:
        assert [stream.type for stream in file.streams] == ["video"]
        keys = [i for i, packet in enumerate(p for p in file.demux(video=0) if p.size) if packet.is_keyframe]
        assert keys[0] == 0 and max(np.diff([*keys, 60])) <= 12
    assert os.listdir(tmp_path / "out") == ["a.mp4"]


def test_sizes():
    assert prepared_size(1080, 1920, 256) == (256, 456) and prepared_size(1920, 1080, 256) == (456, 256)
    assert prepared_size(240, 320, 256) == (240, 320) and prepared_size(67, 101, 256) == (68, 100)


def test_a_turned_video_is_upright_and_smaller(tmp_path):
    source = rotate_mp4(write_video(tmp_path / "a.mp4", 20, size=(128, 192)), 90)
    prepare.prepare_video(source, str(tmp_path / "b.mp4"), short_side=96, gop=12, crf=18)
    with Video(source) as before, Video(tmp_path / "b.mp4") as after:
        assert after.size == (144, 96)
        shown, small = before.frames([5])[0], after.frames([5])[0]
        assert np.abs(shown[:192:4, ::4].mean((0, 1)) - small.mean((0, 1))).max() < 5
        assert shown.shape == (192, 128, 3) and small.shape == (144, 96, 3)


def folder_of(tmp_path):
    data = tmp_path / "data"
    for name in ("x", "y"):
        (data / name).mkdir(parents=True)
        write_video(data / name / "a.mp4", 20)
    write_video(data / "y" / "a.avi", 20, codec="mpeg4")
    write_image(data / "y" / "still.png", 3)
    write_audio(data / "x" / "sound.mp4")
    (data / "x" / "text.mp4").write_text("no video")
    return data


def test_a_folder_of_classes_stays_one_and_what_is_left_out_is_named(tmp_path, capsys):
    data, output = folder_of(tmp_path), tmp_path / "out"
    done, errors = run(data, output)
    assert len(done) == 4 and len(errors) == 2
    found = find_labelled_videos(output)
    names = {(os.path.relpath(entry.path, output), entry.label) for entry in found}
    assert names == {("x/a.mp4", 0), ("y/a.avi.mp4", 1), ("y/a.mp4.mp4", 1), ("y/still.png", 1)}
    left_out = (output / "left_out.txt").read_text()
    assert "sound.mp4" in left_out and "no video stream" in left_out and "text.mp4" in left_out
    assert "6 videos: 4 in" in capsys.readouterr().out
    with Video(output / "x" / "a.mp4") as video:
        assert read_number(video.frames([13])[0]) == 13


def test_it_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    data, output = folder_of(tmp_path), tmp_path / "out"
    run(data, output)
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.mp4")}
    (output / "x" / "a.mp4").unlink()
    encoded, original = [], data_prepare.prepare_video
    monkeypatch.setattr(
        data_prepare, "prepare_video", lambda source, *a, **k: (encoded.append(source), original(source, *a, **k))
    )
    done, _ = run(data, output)
    assert len(done) == 4
    assert [os.path.basename(path) for path in encoded if not path.endswith(("sound.mp4", "text.mp4"))] == ["a.mp4"]
    for path, changed in kept.items():
        assert path.exists() and (path.parts[-2:] == ("x", "a.mp4") or path.stat().st_mtime_ns == changed)
    with pytest.raises(ValueError, match="was prepared with .*'gop': 12.*, not .*'gop': 6"):
        run(data, output, gop=6)
    assert json.loads((output / "prepare.json").read_text())["short_side"] == 256


def test_a_list_gives_a_list(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a b", "c"):
        write_video(tmp_path / "videos" / f"{name}.mkv", 20)
    (tmp_path / "train.txt").write_text("videos/a b.mkv 3\nvideos/c.mkv 5\nvideos/none.mkv 1\n")
    done, errors = run(tmp_path / "train.txt", tmp_path / "out")
    assert len(done) == 2 and len(errors) == 1
    assert [(os.path.basename(e.path), e.label) for e in find_videos(tmp_path / "out" / "train.txt")] == [
        ("a b.mp4", 3),
        ("c.mp4", 5),
    ]
    with Video(find_videos(tmp_path / "out" / "train.txt")[0].path) as video:
        assert len(video) == 20


@pytest.mark.parametrize("wrong", ["frames", "times", "looks"])
def test_a_result_that_is_not_as_its_source_takes_no_name(wrong, tmp_path, monkeypatch):
    source, target = write_video(tmp_path / "a.mp4", 30), tmp_path / "out" / "a.mp4"
    write = prepare._Encoder.write

    def wrong_write(self, index, frame):
        if wrong == "frames" and index == 29:
            return
        if wrong == "times" and index == 20:
            self.last += 9000
        write(self, index, frame)
        if wrong == "looks" and index in self.kept:
            self.kept[index] = 255 - self.kept[index]

    monkeypatch.setattr(prepare._Encoder, "write", wrong_write)
    with pytest.raises(VideoError, match="encoded anew"):
        prepare.prepare_video(source, str(target), short_side=256, gop=12, crf=20)
    assert os.listdir(tmp_path / "out") == []


def test_several_processes_and_the_command_line(tmp_path, capsys):
    data = folder_of(tmp_path)
    assert cli.main(["data", "prepare", str(data), "--output", str(tmp_path / "out"), "--workers", "2", "--gop", "6"]) == 0
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 3
    assert cli.main(["data", "prepare", str(data), "--output", str(data / "inside")]) == 1
    assert "expected a folder outside of" in capsys.readouterr().err


def test_names():
    entries = [Entry(f"/d/{name}", -1) for name in ("x/a.mp4", "x/b.avi", "b/c.webm", "b/c.mp4", "p.png")]
    assert target_names(entries, "/d") == ["x/a.mp4", "x/b.mp4", "b/c.webm.mp4", "b/c.mp4.mp4", "p.png"]
