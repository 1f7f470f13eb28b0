"""torchcodec beside PyAV: the same frames, bit for bit, whatever the file; and what happens where there is none.

The tests run against a stand-in with torchcodec's interface, and against torchcodec itself where it is installed.
"""

import dataclasses
import inspect
import sys
import types

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from stmae.training import cli
from stmae.training.config import ClipConfig
from stmae.training.data import decoders
from stmae.training.data.dataset import ViewClips, require_readable
from stmae.training.data.decoders import TorchcodecVideo, choose_decoder, open_entry
from stmae.training.data.video import Video, VideoError
from stmae.training.data.video_list import Entry, find_videos
from tests.support.synthetic_video import read_number, rotate_mp4, write_image, write_video
from tests.support.video_files import FILES, FRAMES, MEDIA, write


@dataclasses.dataclass
class FrameBatch:
    data: torch.Tensor
    pts_seconds: torch.Tensor
    duration_seconds: torch.Tensor


class FakeDecoder:
    """torchcodec.decoders.VideoDecoder, as far as it is used here."""

    def __init__(self, source, *, stream_index=None, dimension_order="NCHW", num_ffmpeg_threads=1, seek_mode="exact"):
        assert dimension_order == "NHWC" and seek_mode == "exact"
        self.source, self.stream_index = source, stream_index

    def get_frames_at(self, indices):
        with av.open(self.source) as file:
            stream = file.streams.best("video") if self.stream_index is None else file.streams[self.stream_index]
            frames = list(file.decode(stream))
        pixels = [np.rot90(frames[i].to_ndarray(format="rgb24"), round(frames[i].rotation / 90) % 4) for i in indices]
        times = torch.tensor([frames[i].time for i in indices], dtype=torch.float64)
        return FrameBatch(torch.from_numpy(np.stack(pixels)), times, torch.full_like(times, 0.04))


def use(monkeypatch, decoder):
    """Makes ``from torchcodec.decoders import VideoDecoder`` give ``decoder``; None: raise, as where it is not installed."""
    module = types.ModuleType("torchcodec.decoders")
    if decoder is not None:
        module.VideoDecoder = decoder
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    decoders._torchcodec.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    decoders._torchcodec.cache_clear()


INSTALLED, WHY_NOT = decoders._torchcodec()


@pytest.fixture(params=[FakeDecoder, INSTALLED] if INSTALLED else [FakeDecoder], ids=lambda decoder: decoder.__name__)
def decoder(request, monkeypatch):
    """The class; its calls are counted in ``decoder.asked``."""
    real = request.param

    class Counted(real):
        asked = []

        def get_frames_at(self, indices):
            batch = super().get_frames_at(indices)
            Counted.asked.append(list(indices))
            return batch

    use(monkeypatch, Counted)
    return Counted


def both(path, indices):
    with Video(path) as one, TorchcodecVideo(path) as other:
        assert len(one) == len(other) and np.array_equal(one.times, other.times) and one.size == other.size
        return one.frames(indices), other.frames(indices)


SUPPORTED_BY_BOTH = {  # of FILES: 8 bits deep, progressive, of even height, with reliable time stamps
    *("h264.mp4", "one_key_frame.mp4", "variable_rate.mp4", "variable_rate.mkv", "with_sound.mov", "vp9.webm", "mpeg4.avi"),
    *("grey.mp4", "grey.avi", "full_range.mp4", "odd_width.webm"),
}


@pytest.mark.parametrize("name", FILES)
def test_both_decoders_give_the_same_bytes(name, decoder, tmp_path):
    path = write(tmp_path / name, **FILES[name])
    indices = [50, 3, 27, 3, FRAMES - 1, 0]
    one, other = both(path, indices)
    assert np.array_equal(one, other) and [read_number(frame) for frame in other] == indices
    if name in SUPPORTED_BY_BOTH:  # the others may be read by either
        assert decoder.asked == [[0, 3, 27, 50, FRAMES - 1]]  # and it was torchcodec that gave them, each once


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_both_decoders_turn_alike(degrees, decoder, tmp_path):
    one, other = both(rotate_mp4(write_video(tmp_path / "a.mp4", 10), degrees), [5, 2])
    assert np.array_equal(one, other) and decoder.asked == [[2, 5]]


def test_both_decoders_mirror_alike(decoder):
    for name in ("mat_hflip.mp4", "mat_transpose.mp4"):
        one, other = both(MEDIA / name, [5, 2])
        assert np.array_equal(one, other) and decoder.asked == []  # torchcodec mirrors nothing


def test_both_decoders_take_the_same_of_two_streams(decoder):
    one, other = both(MEDIA / "two_streams.mp4", [5, 2])
    assert one.shape == (2, 64, 96, 3) and np.array_equal(one, other) and decoder.asked == [[2, 5]]


def test_both_decoders_count_from_the_first_frame_that_can_be_decoded(decoder):
    for name in ("h264_mid.ts", "mpeg2_cut.ts"):
        one, other = both(MEDIA / name, [40, 0, 7])
        assert np.array_equal(one, other)


def test_a_damaged_video_gives_the_same_frames(decoder, tmp_path):
    path = write_video(tmp_path / "complete.mkv", FRAMES, gop=10)
    data = path.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: len(data) // 2])
    with Video(cut) as video:
        last = len(video) - 2
    one, other = both(cut, [last, 0])
    assert np.array_equal(one, other) and read_number(other[0]) == last
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="cannot be opened"):
        TorchcodecVideo(tmp_path / "text.mp4")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_decoder_changes_no_clip(decoder, tmp_path):
    for name in "abc":
        write_video(tmp_path / f"{name}.mp4", 30)
    write_image(tmp_path / "d.png", 7)
    batches = []
    for choice in ("pyav", "torchcodec", "auto"):
        views = ViewClips(
            find_videos(tmp_path), ClipConfig(decoder=choice, pixels="swscale"), frames=4, size=(32, 32), temporal=2
        )
        for workers in (0, 2):
            batches.append([item["clips"] for item in DataLoader(views, batch_size=None, num_workers=workers)])
    assert len(batches[0]) == 4
    assert all(torch.equal(a, b) for batch in batches for a, b in zip(batch, batches[0]))
    assert len(decoder.asked) == 2 * 3  # this process's; once for the two clips of a video


@pytest.mark.parametrize("fault", ["other frames", "an exception", "cannot open"])
def test_what_torchcodec_gets_wrong_pyav_gets_right(fault, monkeypatch, tmp_path):
    class Faulty(FakeDecoder):
        def __init__(self, source, **options):
            super().__init__(source, **options)
            if fault == "cannot open":
                raise ValueError("no such thing")

        def get_frames_at(self, indices):
            if fault == "an exception":
                raise RuntimeError("Requested next frame while there are no more frames left to decode.")
            return super().get_frames_at([i + 1 for i in indices])

    use(monkeypatch, Faulty)
    with open_entry(Entry(str(write_video(tmp_path / "a.mp4", 30)), -1), "torchcodec") as video:
        assert isinstance(video, TorchcodecVideo)
        assert [read_number(frame) for frame in video.frames([20, 4])] == [20, 4]


@pytest.mark.skipif(INSTALLED is None, reason=f"torchcodec cannot be used: {WHY_NOT}")
def test_the_stand_in_has_the_interface_of_the_installed_one(tmp_path):
    names = inspect.signature(INSTALLED.__init__).parameters
    assert {"source", "stream_index", "dimension_order", "num_ffmpeg_threads", "seek_mode"} <= names.keys()
    path = str(write_video(tmp_path / "a.mp4", 30))
    options = {"dimension_order": "NHWC", "num_ffmpeg_threads": 1, "seek_mode": "exact"}
    one, other = (make(path, **options).get_frames_at(indices=[3, 9]) for make in (INSTALLED, FakeDecoder))
    assert torch.equal(one.data, other.data) and one.data.dtype == torch.uint8
    torch.testing.assert_close(one.pts_seconds, other.pts_seconds)


def test_a_decoder_that_is_not_there(monkeypatch, tmp_path, capsys):
    use(monkeypatch, None)
    path = write_video(tmp_path / "a.mp4", 30)
    assert choose_decoder("auto") == choose_decoder("pyav") == "pyav"
    with pytest.raises(ValueError, match="decoder: torchcodec was requested and cannot be used: cannot import name") as error:
        require_readable(find_videos(path), 4, ClipConfig(decoder="torchcodec"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="decoder: expected one of pyav, torchcodec, auto, got 'decord'"):
        open_entry(Entry(str(path), -1), "decord")
    assert cli.main(["data", "check", str(tmp_path), "--frames", "4", "--workers", "0", "--decoder", "torchcodec"]) == 1
    assert "torchcodec was requested and cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("choice, used", [("pyav", "pyav"), ("auto", "torchcodec"), ("torchcodec", "torchcodec")])
def test_data_check_names_the_decoder_it_used(choice, used, decoder, tmp_path, capsys):
    write_video(tmp_path / "a.mp4", 30)
    assert cli.main(["data", "check", str(tmp_path), "--frames", "4", "--workers", "0", "--decoder", choice]) == 0
    assert f"1 can be used, 0 cannot (decoder: {used})" in capsys.readouterr().out
    assert bool(decoder.asked) == (used == "torchcodec")
