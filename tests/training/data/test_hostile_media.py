"""Some 100 files of one clip, damaged, cut, mislabelled or hostile: each is read right or refused by name, within limits."""

import errno
import io
import os
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stmae.training.config import ClipConfig
from stmae.training.data.dataset import ViewClips
from stmae.training.data.decoders import open_entry
from stmae.training.data.video import VideoError
from stmae.training.data.video_list import Entry
from tests.support.synthetic_video import read_number, write_audio, write_video

FRAMES = 24
PROCESSOR_SECONDS = 5  # of one file; they take milliseconds
CONTAINERS = ("mp4", "mov", "mkv", "ts", "avi", "flv", "nut")


def flipped(data, seed, count, first=0.0, last=1.0):
    data, draw = bytearray(data), random.Random(seed)
    for _ in range(count):
        data[draw.randrange(int(first * len(data)), int(last * len(data)))] ^= 1 << draw.randrange(8)
    return bytes(data)


def replaced(data, begin, end, by):
    a, b = int(begin * len(data)), int(end * len(data))
    return data[:a] + by(b - a) + data[b:]


def noise(length):
    return random.Random(7).randbytes(length)


DAMAGE = {
    "tenth": lambda data: data[: len(data) // 10],
    "half": lambda data: data[: len(data) // 2],
    "all but the end": lambda data: data[: len(data) * 9 // 10],
    "without its start": lambda data: data[len(data) // 10 :],
    "zeros in the middle": lambda data: replaced(data, 0.4, 0.5, bytes),
    "zeros at the end": lambda data: replaced(data, 0.5, 1.0, bytes),
    "noise in the middle": lambda data: replaced(data, 0.4, 0.5, noise),
    "bits flipped in the header": lambda data: flipped(data, 1, 8, 0.0, 0.02),
    "bits flipped at the end": lambda data: flipped(data, 2, 8, 0.9, 1.0),
    "bits flipped anywhere": lambda data: flipped(data, 3, 40),
    "words swapped": lambda data: replaced(data, 0.1, 0.9, lambda n: data[len(data) // 10 :][:n][::-1]),
}
SOUND = {  # what leaves every frame as it was
    "whole": lambda data: data,
    "noise after it": lambda data: data + noise(1000),
}


def png(width, height):
    """A PNG that says it is of this size, and has no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def image(kind, **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def hostile(clip, folder):
    """{name: bytes, or a function that makes the path} of what is no video, and must be refused."""
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{clip}\n"
    files = {
        "empty.mp4": b"",
        "text.mp4": b"no video at all",
        "playlist.mp4": playlist.encode(),
        "live.m3u8.ts": playlist.replace("file://", "http://127.0.0.1:9/").encode(),
        "concat.mp4": f"ffconcat version 1.0\n{f'file {clip}' + chr(10)}".encode() * 1000,
        "subtitles.mkv": b"1\n00:00:00,000 --> 00:00:10,000\nhello\n",
        "session.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "page.mp4": b"<html><body>404</body></html>",
        "zip.mkv": b"PK\x03\x04" + noise(2000),
        "zeros.mp4": bytes(100_000),
        "noise.mp4": noise(100_000),
        "atoms.mp4": struct.pack(">I4s", 8, b"moov") * 20_000,
        "atom of no end.mp4": struct.pack(">I4sQ", 1, b"moov", 2**63) + noise(100),
        "deep atoms.mp4": b"".join(struct.pack(">I4s", 2**31 - 8 * i, b"moov") for i in range(1000)),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "pdf.jpg": b"%PDF-1.4\n",
        "huge.png": png(60_000, 60_000),
        "wide.png": png(2**31 - 1, 1),
        "no pixels.png": png(0, 0),
        "huge.gif": b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0),
        "huge.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        "half.jpg": image("JPEG")[:900],
        "half.png": image("PNG")[:3000],
        "half.webp": image("WEBP", lossless=True)[:3000],
        "half.tiff": image("TIFF")[:3000],
        "header.jpg": image("JPEG")[:30],
        "folder.mp4": lambda path: path.mkdir(),
        "pipe.mp4": os.mkfifo,
        "pipe.png": os.mkfifo,
        "loop.mp4": lambda path: path.symlink_to(path.name),
        "nowhere.mp4": lambda path: path.symlink_to("not there"),
        "device.mp4": lambda path: path.symlink_to("/dev/zero"),
        "sound.mp4": write_audio,
        "not there.mp4": lambda path: None,
        f"{'long' * 100}.mp4": lambda path: None,
        "sparse.mp4": lambda path: (path.touch(), os.truncate(path, 2**30)),
    }
    return {folder / name: content for name, content in files.items()}


def make(path, content):
    content(path) if callable(content) else path.write_bytes(content)


def clip_of(path):
    """uint8 [1, T, H, W, C] by the data path of an evaluation, or the VideoError."""
    views = ViewClips([Entry(str(path), -1)], ClipConfig(stride=5), frames=4, size=(64, 96), patience=0.0)
    started = time.thread_time()
    try:
        return views[0]["clips"]
    except VideoError as error:
        assert error.file == str(path) and 5 < len(error.reason) < 300 and "\n" not in str(error)
        return error
    finally:
        assert time.thread_time() - started < PROCESSOR_SECONDS


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """{container: bytes} of one clip of FRAMES numbered frames."""
    folder = tmp_path_factory.mktemp("clip")
    options = {"x264-params": "bframes=0"}
    return {name: write_video(folder / f"clip.{name}", FRAMES, gop=8, options=options).read_bytes() for name in CONTAINERS}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_sound_file_is_read_right_and_a_damaged_one_read_or_refused(container, clips, tmp_path):
    expected = clip_of(make_file(tmp_path / "first.mp4", clips["mp4"]))
    assert [read_number(frame.numpy()) for frame in expected[0]] == [4, 9, 14, 19]
    for name, change in SOUND.items():
        clip = clip_of(make_file(tmp_path / f"{name}.{container}", change(clips[container])))
        assert torch.equal(clip, expected), (container, name, clip)
    outcomes = {}
    for name, change in DAMAGE.items():
        path = make_file(tmp_path / f"{name}.{container}", change(clips[container]))
        first, again = clip_of(path), clip_of(path)
        if isinstance(first, VideoError):
            assert str(first) == str(again)
        else:
            assert torch.equal(first, again) and first.shape == (1, 4, 64, 96, 3) and first.dtype == torch.uint8
            with open_entry(Entry(str(path), -1)) as video:
                assert 0 < len(video) <= FRAMES + 1
        outcomes[name] = type(first).__name__
    assert len(outcomes) == len(DAMAGE)


def make_file(path, data):
    path.write_bytes(data)
    return path


def test_what_is_no_video_is_refused_by_its_name(clips, tmp_path):
    clip = make_file(tmp_path / "clip.mp4", clips["mp4"])
    files = hostile(clip, tmp_path)
    for path, content in files.items():
        make(path, content)
        assert isinstance(clip_of(path), VideoError), path.name
    assert len(files) + len(CONTAINERS) * (len(DAMAGE) + len(SOUND)) >= 100


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="names of files are bytes on Linux alone")
def test_odd_names_are_names(clips, tmp_path):
    expected = clip_of(make_file(tmp_path / "clip.mp4", clips["mp4"]))
    names = [
        "a\nb.mp4",
        "concat:x.mp4",
        "http:",
        "%03d.mp4",
        "-i.mp4",
        "pipe:0.mp4",
        "a|b.mp4",
        "\u202e4pm.mp4",
        " .mp4",
        "*?.mp4",
    ]
    for name in [*map(os.fsencode, names), b"\xff\xfe.mp4"]:
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        path.write_bytes(clips["mp4"])
        assert torch.equal(clip_of(path), expected), name
    link = tmp_path / "link.mp4"
    link.symlink_to("clip.mp4")
    assert torch.equal(clip_of(link), expected)


def test_a_file_that_grows_and_one_that_goes_while_it_is_open(clips, tmp_path):
    path = make_file(tmp_path / "clip.ts", clips["ts"])
    with open_entry(Entry(str(path), -1)) as video:
        before = video.frames(range(len(video)))
        with open(path, "ab") as file:
            file.write(clips["ts"])
        assert np.array_equal(video.frames(range(len(before))), before)
        os.truncate(path, 100)
        with pytest.raises(VideoError):
            video.frames([0, len(before) - 1])
    os.unlink(path)
    error = clip_of(path)
    assert error.errno == errno.ENOENT
