"""Frames that no clip holds and nothing refers to are not decoded: the bytes of the others stay the same."""

import contextlib
import random

import numpy as np
import pytest

from stmae.training.data.video import Video, VideoError, has_one_temporal_layer
from tests.support.synthetic_video import read_number
from tests.support.video_files import FRAMES, UNEVEN, write

X265 = "log-level=none:keyint=24:min-keyint=24"
SKIPPED = {
    "plain.mp4": {"options": {"bf": "2"}},
    "pyramid.mp4": {"gop": 60, "options": {"bf": "8", "x264-params": "b-pyramid=normal:b-adapt=0:ref=4:scenecut=0"}},
    "open.mkv": {"options": {"bf": "3", "x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:b-adapt=0"}},
    "uneven.mp4": {"times": UNEVEN, "options": {"bf": "3", "x264-params": "b-adapt=0"}},
    "broadcast.ts": {"options": {"bf": "3", "x264-params": "b-adapt=0"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": f"{X265}:bframes=4:b-pyramid=1:b-adapt=0"}},
    "hevc_open.mkv": {"codec": "libx265", "options": {"x265-params": f"{X265}:bframes=3:open-gop=1:b-adapt=0"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2", "b_strategy": "0"}},
    "mpeg4.mkv": {"codec": "mpeg4", "gop": 30, "options": {"bf": "3", "b_strategy": "0"}},
    "mpeg2.mkv": {"codec": "mpeg2video", "options": {"bf": "2", "b_strategy": "0"}},
}
NOT_SKIPPED = {
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2", "b_strategy": "0"}},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "interlaced.mp4": {"options": {"x264-params": "interlaced=1"}},
    "layers.mp4": {"codec": "libx265", "options": {"x265-params": f"{X265}:temporal-layers=3:b-pyramid=1:bframes=3:b-adapt=0"}},
}


def requests():
    draw = random.Random(0)
    for count in (1, 2, 4, 12):
        for _ in range(4):
            yield draw.sample(range(FRAMES), count)
    yield range(3, 60, 4)
    yield range(0, 60, 7)


def decoded(monkeypatch):
    """A list that every decoded frame's time stamp is appended to, and how often a request was begun."""
    frames, walks = [], []
    decode, walk = Video._decode, Video._walk
    monkeypatch.setattr(Video, "_decode", lambda self, needed=None: (frames.append(f.pts) or f for f in decode(self, needed)))
    monkeypatch.setattr(Video, "_walk", lambda self, *a, **k: (walks.append(k), walk(self, *a, **k))[1])
    return frames, walks


@pytest.mark.parametrize("name", SKIPPED)
def test_frames_are_the_same_as_with_every_frame_decoded(name, tmp_path, monkeypatch):
    path = write(tmp_path / name, **SKIPPED[name])
    with Video(path) as video:
        video._skips = False
        expected = video.frames(range(FRAMES))
    assert [read_number(frame) for frame in expected] == list(range(FRAMES))
    frames, walks = decoded(monkeypatch)
    counts = []
    for skips in (False, True):
        frames.clear()
        with Video(path) as video:
            assert video._skips
            video._skips = skips
            for indices in requests():
                assert np.array_equal(video.frames(indices), expected[list(indices)])
        counts.append(len(frames))
    assert counts[1] < counts[0]
    assert len(walks) == 2 * len(list(requests()))  # none was begun anew


@pytest.mark.parametrize("name", NOT_SKIPPED)
def test_files_whose_frames_cannot_be_told_are_decoded_whole(name, tmp_path):
    path = write(tmp_path / name, **NOT_SKIPPED[name])
    with Video(path) as video:
        assert not video._skips
        assert [read_number(frame) for frame in video.frames([50, 7, 33])] == [50, 7, 33]


def test_temporal_layers_are_read_from_the_parameter_sets():
    raw = b"\0\0\0\1\x40\x01\x0c\x01\xff\xff\x01\x60"  # a video parameter set whose max_sub_layers_minus1 is 0
    assert has_one_temporal_layer(raw) and not has_one_temporal_layer(raw[:7] + b"\x05" + raw[8:])
    record = bytearray(23)
    record[0], record[21] = 1, 1 << 3 | 4 | 3
    assert has_one_temporal_layer(record)
    record[21] = 3 << 3 | 4 | 3
    assert not has_one_temporal_layer(record) and not has_one_temporal_layer(b"") and not has_one_temporal_layer(None)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["open.mkv", "broadcast.ts", "hevc_open.mkv", "mpeg4.mkv", "mpeg2.mkv"])
def test_a_damaged_file_gives_the_same_with_and_without(name, seed, tmp_path):
    path = write(tmp_path / name, **SKIPPED[name])
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(5):
        place = draw.randrange(len(data) // 4, len(data) - 20)
        data[place : place + 20] = draw.randbytes(20)
    path.write_bytes(data)

    def read(indices, skips):
        with Video(path) as video, contextlib.suppress(VideoError):
            video._skips = video._skips and skips
            return video.frames([index for index in indices if index < len(video)] or [0])

    for indices in requests():
        with_all, without = read(indices, False), read(indices, True)
        assert (with_all is None) == (without is None)
        assert with_all is None or np.array_equal(with_all, without)
