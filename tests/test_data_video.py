"""Reading videos: every frame asked for is the frame that comes, and what cannot be read says so."""

import os
import pickle
import random

import av
import numpy as np
import pytest
from stmae.training.video import Video, VideoError
from synthetic_video import numbered_frame, read_number, rotate_mp4, write_audio, write_video

FRAMES = 60
UNEVEN = [40 * i + i * i % 17 for i in range(FRAMES)]  # milliseconds

FILES = {
    "h264.mp4": {},
    "reordered.mp4": {"options": {"bf": "3", "x264-params": "open-gop=1"}},
    "one_key_frame.mp4": {"gop": 250},
    "odd_size.mp4": {"size": (67, 101), "pix_fmt": "yuv444p"},
    "hevc_10bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "variable_rate.mp4": {"times": UNEVEN},
    "variable_rate.mkv": {"times": UNEVEN},
    "with_sound.mov": {"audio": True},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "stream.ts": {},
    "program_stream.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "program_stream.vob": {"codec": "mpeg2video", "options": {"bf": "2"}, "container": "vob"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "reordered_mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "reordered_h264.avi": {"options": {"bf": "2"}},
    "grey.avi": {"codec": "ffv1", "pix_fmt": "gray"},
    "pictures.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "no_time_stamps.h264": {"container": "h264"},
}


def write(path, frames=FRAMES, **options):
    try:
        return write_video(path, frames, **options)
    except av.codec.codec.UnknownCodecError as error:
        pytest.skip(f"this FFmpeg has no encoder: {error}")


@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_the_one_asked_for(name, tmp_path):
    path = write(tmp_path / name, **FILES[name])
    draw = random.Random(0)
    with Video(path) as video:
        assert len(video) == FRAMES
        for index in draw.sample(range(FRAMES), 12):  # each a seek of its own
            assert read_number(video.frames([index])[0]) == index
        several = [draw.randrange(FRAMES) for _ in range(10)]  # unsorted, with repeats
        assert [read_number(frame) for frame in video.frames(several)] == several


def test_frames_equal_decoding_from_the_start(tmp_path):
    path = write(tmp_path / "a.mp4")
    with av.open(str(path)) as file:
        expected = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    with Video(path) as video:
        got = video.frames([50, 3, 27])
    assert np.array_equal(got, np.stack([expected[50], expected[3], expected[27]]))
    assert got.dtype == np.uint8


def test_times_and_rate_of_a_variable_rate_video(tmp_path):
    path = write(tmp_path / "a.mkv", times=UNEVEN)
    with Video(path) as video:
        assert np.allclose(video.times, np.array(UNEVEN) / 1000, atol=1e-3)
        assert video.rate == pytest.approx((FRAMES - 1) / (UNEVEN[-1] / 1000), rel=1e-3)
        assert video.size == (64, 96)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_display_matrix_turns_the_frame_clockwise(degrees, tmp_path):
    path = rotate_mp4(write(tmp_path / "a.mp4", 10), degrees)
    with Video(path) as video:
        frame = video.frames([5])[0]
    assert frame.shape == ((96, 64, 3) if degrees % 180 else (64, 96, 3))
    assert read_number(np.rot90(frame, degrees // 90)) == 5  # turned back, counter-clockwise


def test_grey_and_ten_bit_come_as_the_same_rgb(tmp_path):
    frame = numbered_frame(5, 64, 96)
    for name in ("grey.avi", "hevc_10bit.mp4"):
        with Video(write(tmp_path / name, 10, **FILES[name])) as video:
            got = video.frames([5])[0]
        assert np.abs(got[:32, :64].astype(int) - frame[:32, :64]).mean() < 8, name


def test_a_seek_that_lands_after_its_target_is_backed_off(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    with Video(path) as video:
        late, container = [], video._container

        class Late:
            def __getattr__(self, name):
                return getattr(container, name)

            def seek(self, target, **options):
                if not late:  # the first seek lands half a second too far
                    late.append(target)
                    target += int(0.5 / video._seconds)
                container.seek(target, **options)

        video._container = Late()
        assert read_number(video.frames([20])[0]) == 20
        assert late
        video._container = container


def test_a_truncated_video_has_the_frames_that_came(tmp_path):
    path = write(tmp_path / "whole.mkv", gop=10)
    data = path.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: len(data) // 2])
    with Video(cut) as video:
        assert 0 < len(video) < FRAMES
        last = len(video) - 2  # of the last packet only a part came
        assert read_number(video.frames([last])[0]) == last


def test_damage_in_the_middle_leaves_what_lies_behind_it(tmp_path):
    path = write(tmp_path / "whole.mp4", gop=10)
    data = bytearray(path.read_bytes())
    first, last = data.index(b"mdat") + 4, data.index(b"moov") - 4
    noise, start = random.Random(0), first + (last - first) // 2
    data[start : start + 300] = bytes(noise.randrange(256) for _ in range(300))
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    with Video(damaged) as video:
        assert len(video) == FRAMES
        assert read_number(video.frames([FRAMES - 1])[0]) == FRAMES - 1
        assert read_number(video.frames([3])[0]) == 3


def unusable(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 20)
    data = whole.read_bytes()
    files = {
        "empty.mp4": b"",
        "text.mp4": b"this is not a video\n" * 50,
        "no_index.mp4": data[: len(data) // 3],  # the index of an mp4 is at its end
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    write_audio(tmp_path / "sound.mp4")
    return {
        "empty.mp4": "empty",
        "text.mp4": "cannot be opened",
        "no_index.mp4": "cannot be opened",
        "sound.mp4": "no video stream",
        "absent.mp4": "No such file",
    }


@pytest.mark.parametrize("name", ["empty.mp4", "text.mp4", "no_index.mp4", "sound.mp4", "absent.mp4"])
def test_an_unusable_file_says_which_and_why(name, tmp_path):
    expected = unusable(tmp_path)[name]
    with pytest.raises(VideoError) as error:
        Video(tmp_path / name)
    assert name in str(error.value) and expected in error.value.reason
    assert "\n" not in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))  # it crosses from a data worker
    assert str(again) == str(error.value) and again.path == error.value.path


def test_frames_out_of_range_are_refused(tmp_path):
    with Video(write(tmp_path / "a.mp4", 10)) as video:
        with pytest.raises(IndexError, match=r"expected indices in \[0, 10\), got 3..10"):
            video.frames([3, 10])
        with pytest.raises(ValueError, match="at least one"):
            video.frames([])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="lists open files as Linux does")
def test_closing_frees_the_file(tmp_path):
    def held():
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.exists(link) and str(tmp_path) in os.readlink(link)]

    with Video(write(tmp_path / "a.mp4", 10)) as video:
        video.frames([3])
        assert held()
    with pytest.raises(VideoError):
        Video(write_audio(tmp_path / "sound.mp4"))
    assert held() == []
