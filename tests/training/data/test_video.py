"""Reading videos: every frame asked for is the frame that comes, and what cannot be read is an error."""

import contextlib
import os
import pickle
import random

import av
import numpy as np
import pytest

from stmae.training.data.video import Video, VideoError
from tests.support.synthetic_video import (
    numbered_frame,
    read_number,
    rotate_mp4,
    set_display_matrix,
    write_audio,
    write_image,
    write_video,
)
from tests.support.video_files import FILES, FRAMES, MEDIA, UNEVEN, write


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


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("x, y", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_all_eight_orientations(turned, x, y, tmp_path):
    """A front camera's picture is mirrored, and may be turned besides: every stored pixel lies where the matrix puts it."""
    path = write(tmp_path / "a.mp4", 10)
    with Video(path) as video:
        stored = video.frames([5])[0]
    rows, columns = np.indices(stored.shape[:2])
    a, b, c, d = (0, y, x, 0) if turned else (x, 0, 0, y)
    shown_x, shown_y = a * columns + c * rows, b * columns + d * rows
    expected = np.zeros((np.ptp(shown_y) + 1, np.ptp(shown_x) + 1, 3), np.uint8)
    expected[shown_y - shown_y.min(), shown_x - shown_x.min()] = stored
    with Video(set_display_matrix(path, a, b, c, d)) as video:
        assert np.array_equal(video.frames([5])[0], expected)


@pytest.mark.parametrize(
    "name, count",
    [
        ("mat_hflip.mp4", 90),
        ("mat_transpose.mp4", 90),
        ("h264_mid.ts", 54),
        ("mpeg2_cut.ts", 66),
        ("xvid_packed.avi", 43),  # as UCF101 has them: XviD, each B-frame packed with the frame after it
    ],
)
def test_frames_are_those_that_ffmpeg_shows(name, count):
    with np.load(MEDIA / f"{name}.expected.npz") as expected, Video(MEDIA / name) as video:
        assert len(video) == count
        for place, index in (("first", 0), ("middle", count // 2), ("last", count - 1)):
            assert np.array_equal(video.frames([index])[0], expected[place])  # each a seek of its own
        together = video.frames(range(count))
        assert all(np.array_equal(video.frames([i])[0], together[i]) for i in range(count))


def cut(source, path, drop, container=None):
    """Copies the packets of ``source``, none of them decoded, but for those whose numbers ``drop`` accepts."""
    with av.open(str(source)) as old, av.open(str(path), "w", format=container) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
            if not drop(number):
                packet.stream = stream
                new.mux(packet)
    return path


@pytest.mark.parametrize(
    "name, begin, options",
    [
        ("a.mkv", 7, {}),
        ("a.ts", 7, {}),
        ("a.mkv", 12, {"options": {"bf": "3", "x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0"}}),
        ("a.ts", 5, {"codec": "mpeg2video", "options": {"bf": "2"}}),
        ("a.webm", 5, {"codec": "libvpx-vp9"}),
        ("a.mkv", 12, {"codec": "libx265", "options": {"bf": "3", "x265-params": "log-level=none:open-gop=1:keyint=12"}}),
    ],
)
def test_a_recording_that_begins_anywhere_has_the_frames_that_can_be_decoded(name, begin, options, tmp_path):
    path = cut(write(tmp_path / f"whole_{name}", **options), tmp_path / name, lambda number: number < begin)
    with av.open(str(path)) as file:  # from the start, packet by packet
        shown = []
        for packet in file.demux(video=0):
            with contextlib.suppress(av.error.FFmpegError):
                shown += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    with Video(path) as video:
        assert len(video) == len(shown) and 0 < len(shown) <= FRAMES - begin
        numbers = [read_number(frame) for frame in video.frames(range(len(video)))]
        assert numbers == [read_number(frame) for frame in shown] == list(range(FRAMES - len(shown), FRAMES))
        for index in (0, len(shown) - 1, len(shown) // 2, 1):
            assert read_number(video.frames([index])[0]) == numbers[index]


def test_only_a_file_that_begins_in_the_middle_is_decoded_to_be_counted(tmp_path, monkeypatch):
    complete = write(tmp_path / "complete.mkv", gop=12)
    middle = cut(complete, tmp_path / "middle.mkv", lambda number: number < 7)
    decoded, decode = [], Video._decode
    monkeypatch.setattr(Video, "_decode", lambda self: (decoded.append(frame.pts) or frame for frame in decode(self)))
    with Video(complete):
        assert decoded == []
    with Video(middle) as video:
        assert 0 < len(video) <= FRAMES - 7 and len(decoded) == 1


def test_a_hole_shows_the_last_frame_before_it(tmp_path):
    """Packets that hold nothing to decode, as after a loss: a complete group of pictures of them."""
    complete = write(tmp_path / "complete.mkv", codec="libvpx-vp9", gop=10)
    path = tmp_path / "hole.mkv"
    with av.open(str(complete)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
            if 20 <= number < 30:
                broken = av.Packet(b"\xff" * packet.size)
                broken.pts, broken.dts, broken.time_base = packet.pts, packet.dts, packet.time_base
                broken.is_keyframe, packet = packet.is_keyframe, broken
            packet.stream = stream
            new.mux(packet)
    with Video(path) as video:
        assert len(video) == FRAMES
        expected = [19 if 20 <= i < 30 else i for i in range(FRAMES)]
        assert [read_number(frame) for frame in video.frames(range(FRAMES))] == expected
        assert [read_number(video.frames([i])[0]) for i in (25, 30, 20, 29, 19)] == [19, 30, 19, 19, 19]


@pytest.mark.parametrize("damage", ["lost", "zeros", "begins late"])
@pytest.mark.parametrize(
    "options",
    [{}, {"options": {"bf": "3"}}, {"codec": "mpeg2video", "options": {"bf": "2"}}],
    ids=["h264", "h264 with B", "mpeg2"],
)
def test_a_damaged_broadcast_is_usable_from_end_to_end(options, damage, tmp_path):
    """One packet in 20 lost, an eighth of the file overwritten, or its first fifth missing: every frame counted can be shown."""
    path = write(tmp_path / "a.ts", **options)
    data, noise = path.read_bytes(), random.Random(1)
    packets = [data[i : i + 188] for i in range(0, len(data), 188)]
    if damage == "lost":
        data = b"".join(packet for number, packet in enumerate(packets) if number < 8 or noise.random() > 0.05)
    elif damage == "zeros":
        data = data[: len(data) // 2] + bytes(len(data) // 8) + data[len(data) // 2 + len(data) // 8 :]
    else:
        data = b"".join(packets[len(packets) // 5 :])
    path.write_bytes(data)
    with Video(path) as video:
        assert FRAMES // 2 < len(video) < FRAMES
        together = video.frames(range(len(video)))
        assert all(np.array_equal(video.frames([index])[0], together[index]) for index in range(len(video)))
    for index in range(0, len(together), 7):
        with Video(path) as video:
            assert len(video) == len(together) and video.frames([index]).shape == (1, 64, 96, 3)


def test_ffmpegs_best_stream_is_read(tmp_path):
    with Video(MEDIA / "two_streams.mp4") as video:
        assert video.size == (64, 96) and video.frames([0]).shape == (1, 64, 96, 3)


LUMA = np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize(
    "name",
    [
        *("h264.mp4", "odd_size.mp4", "odd_size.webm", "odd_width.webm", "h264_10bit.mp4", "hevc_10bit.mp4", "12bit.mkv"),
        *("full_range.mp4", "interlaced.mp4", "nv12.mkv"),
    ],
)
def test_colours_of_every_depth_range_and_size_come_as_the_same_rgb(name, tmp_path):
    path = write(tmp_path / name, 10, **FILES[name])
    with Video(path) as video:
        got, size = video.frames([5])[0], video.size
    expected = numbered_frame(5, *size)
    assert got.shape == expected.shape and size == FILES[name].get("size", (64, 96))
    # Away from the blocks' edges, where chroma is subsampled, to the last row and column.
    difference = np.abs(got.astype(int) - expected)
    assert difference.mean() < 6 and difference[-1].mean() < 10 and difference[:, -1].mean() < 10


@pytest.mark.parametrize("name", ["grey.mp4", "grey.avi", "grey_16bit.mkv"])
def test_grey_comes_as_rgb_of_equal_channels(name, tmp_path):
    with Video(write(tmp_path / name, 10, **FILES[name])) as video:
        got = video.frames([5])[0]
    assert got.shape == (64, 96, 3) and np.ptp(got, axis=2).max() <= 1
    expected = numbered_frame(5, 64, 96) @ LUMA
    if name == "grey.mp4":  # H.264's luma is 16 to 235 unless it says otherwise; what was written here is not
        expected = ((expected - 16) * 255 / 219).clip(0, 255)
    assert np.abs(got[..., 0] - expected).mean() < 3


def test_an_odd_size_turned_is_whole(tmp_path):
    """Telephones write these: 67 x 101 with a display matrix."""
    path = rotate_mp4(write(tmp_path / "a.mp4", 10, **FILES["odd_size.mp4"]), 90)
    with Video(path) as video:
        frames = video.frames([5, 6])
    assert frames.shape == (2, 101, 67, 3)
    assert np.abs(np.rot90(frames[1], 1).astype(int) - numbered_frame(6, 67, 101)).mean() < 6


def test_a_variable_rate_is_sampled_by_frames_in_one_pass_or_many(tmp_path):
    """A pause of four seconds in the middle, and bursts: frame i stays frame i."""
    times, now = [], 0
    for number in range(FRAMES):
        now += 4000 if number == 30 else 10 + 90 * (number % 7 == 0)
        times.append(now)
    with Video(write(tmp_path / "a.mp4", times=times)) as video:
        assert len(video) == FRAMES
        together = video.frames(range(FRAMES))
        assert [read_number(frame) for frame in together] == list(range(FRAMES))
        assert all(np.array_equal(video.frames([i])[0], together[i]) for i in (59, 29, 30, 31, 0))
        assert np.allclose(np.diff(video.times), np.diff(times) / 1000, atol=2e-3)


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
    path = write(tmp_path / "complete.mkv", gop=10)
    data = path.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: len(data) // 2])
    with Video(cut) as video:
        assert 0 < len(video) < FRAMES
        last = len(video) - 2  # of the last packet only a part came
        assert read_number(video.frames([last])[0]) == last


def test_damage_in_the_middle_leaves_what_lies_behind_it(tmp_path):
    path = write(tmp_path / "complete.mp4", gop=10)
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
    complete = write_video(tmp_path / "complete.mp4", 20)
    data = complete.read_bytes()
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
def test_an_unusable_file_is_named_with_the_reason(name, tmp_path):
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


@pytest.mark.parametrize("kind", ["playlist", "ffconcat", "pattern", "protocol", "pipe", "folder"])
def test_nothing_but_a_regular_video_file_is_opened(kind, tmp_path):
    """Neither what a file names nor what never ends."""
    write_video(tmp_path / "real.mp4", 10)
    path = tmp_path / f"{kind}.mp4"
    if kind == "playlist":
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nreal.mp4\n#EXT-X-ENDLIST\n")
    elif kind == "ffconcat":
        path.write_text("ffconcat version 1.0\nfile real.mp4\n")
    elif kind == "pattern":
        path = tmp_path / "image%02d.png"
        for number in range(3):
            write_image(tmp_path / f"image{number:02d}.png", number)
    elif kind == "protocol":
        path = f"concat:{tmp_path / 'real.mp4'}"
    elif kind == "pipe":
        os.mkfifo(path)  # opening one waits for a writer
    else:
        path.mkdir()
    with pytest.raises(VideoError, match="not a regular file" if kind in ("pipe", "folder") else "cannot be opened"):
        Video(path)


def test_a_name_with_a_colon_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", 10).rename("concat:a.mp4")
    with Video("concat:a.mp4") as video:
        assert read_number(video.frames([3])[0]) == 3


def test_more_pixels_than_a_clip_may_have_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", 10)
    monkeypatch.setattr("stmae.training.data.video.MAX_CLIP_PIXELS", 64 * 96 * 4)
    with Video(path) as video:
        assert len(video.frames([0, 1, 2, 3])) == 4
        monkeypatch.setattr(video, "_by_stamp", None)  # not called
        with pytest.raises(VideoError, match=r"5 frames of 96x64 at once: over the limit of 24,576 pixels \(4 frames\)"):
            video.frames(range(5))
    monkeypatch.setattr("stmae.training.data.video.MAX_FRAME_PIXELS", 64 * 96 - 1)
    with pytest.raises(VideoError):
        Video(path)
