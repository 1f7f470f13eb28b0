"""What a data set may be made of: lists of other code bases, Something-Something's json, images, folders of frames."""

import functools
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from stmae.masking import make_mask
from stmae.training import cli
from stmae.training.commands import data_check, pretrain
from stmae.training.config import AugmentationConfig, ClipConfig, PretrainConfig, parse
from stmae.training.data.dataset import LabelledClips, PretrainClips, ViewClips, require_readable
from stmae.training.data.decoders import open_entry
from stmae.training.data.images import Animation, FrameFolder, Still, open_image
from stmae.training.data.video import VideoError
from stmae.training.data.video_list import Entry, find_labelled_videos, find_videos
from tests.support.synthetic_video import numbered_frame, read_number, write_image, write_video
from tests.support.video_files import MEDIA


def pretrain_clips(entries, *, frames=4, size=(32, 32), seed=0, **clips):
    draw = functools.partial(make_mask, "random", 1, (2, 4, 4), 0.75)
    clips = ClipConfig(**{"stride": 4, "repeats": 2, **clips})
    return PretrainClips(entries, clips, frames=frames, size=size, sample_mask=draw, seed=seed)


FULL_FRAME = {"scale": (1, 1), "aspect": (1.5, 1.5), "flip": False}  # with size (64, 96): the frames as they are


# Lists


@pytest.mark.parametrize(
    "line, path, label, frames",
    [
        ("a.mp4\t3", "a.mp4", 3, 0),
        ("k400/abseiling/x y.mp4 0", "k400/abseiling/x y.mp4", 0, 0),  # mae_st, VideoMAE
        ("no extension 7", "no extension", 7, 0),
        ("jpegs/video_1 120 3", "jpegs/video_1", 3, 120),  # VideoMAE's rawframes
        ("jpegs/with a space 120 3", "jpegs/with a space", 3, 120),
        ("jpegs/video_1,120,3", "jpegs/video_1", 3, 120),
        ("jpegs/video_1 120 -1", "jpegs/video_1", -1, 120),
        ("take 2.mp4 3", "take 2.mp4", 3, 0),
        ("photo 1.JPG 3", "photo 1.JPG", 3, 0),
        ("photo.png", "photo.png", -1, 0),
    ],
)
def test_a_line_of_another_code_base(line, path, label, frames, tmp_path):
    (tmp_path / "train.csv").write_text(f"{line}\n")
    assert find_videos(tmp_path / "train.csv") == [Entry(str(tmp_path / path), label, frames)]


def test_a_root_is_where_relative_paths_start(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.csv").write_bytes("\ufeffa.mp4 1\r\n/absolute/b.mp4 2\r\n".encode())  # as some editors save
    entries = find_labelled_videos(tmp_path / "lists" / "train.csv", root=tmp_path)
    assert entries == [Entry(str(tmp_path / "a.mp4"), 1), Entry("/absolute/b.mp4", 2)]
    with pytest.raises(ValueError, match="data_root: there is no folder .*nowhere"):
        find_videos(tmp_path / "lists" / "train.csv", root=tmp_path / "nowhere")


@pytest.mark.parametrize("name, content", [("labels.json", '{"b": "0", "a": 7}'), ("labels.txt", "b\n\nc\na\n")])
def test_labels_number_class_folders(name, content, tmp_path):
    """Without them a set that lacks a class would number the others differently."""
    for path in ("set/a/1.mp4", "set/b/deep/2.jpg"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    (tmp_path / name).write_text(content)
    labels = [entry.label for entry in find_labelled_videos(tmp_path / "set", labels=tmp_path / name)]
    assert labels == ([7, 0] if name.endswith("json") else [2, 0])
    (tmp_path / name).write_text(content.replace("a", "z"))
    with pytest.raises(ValueError, match=r"labels\.\w+ numbers [23] classes, and .*set/a is none of them"):
        find_labelled_videos(tmp_path / "set", labels=tmp_path / name)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.json", None, "No such file"),
        ("list.json", "[1, 2]", "expected a json object {class: number}"),
        ("words.json", '{"a": "one"}', "expected a json object {class: number}"),
        ("below.json", '{"a": -1}', "expected classes with numbers of 0 or more"),
        ("empty.txt", "\n", "expected classes with numbers of 0 or more in .*, got none"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(name, content, message, tmp_path):
    write_video(tmp_path / "set.mp4", 2)
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "1.mp4").touch()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"data_labels: .*{message}"):
        find_labelled_videos(tmp_path / "set", labels=tmp_path / name)


# Something-Something


TEMPLATES = {"Holding something": "1", "Moving something away from something": "0"}
ITEMS = [
    {"id": "12", "label": "holding a pen", "template": "Holding [something]", "placeholders": ["a pen"]},
    {"id": "7", "template": "Moving [something] away from [something]", "placeholders": ["a", "b"]},
    {"id": 34, "template": "Holding [something]", "placeholders": ["a cup"]},
]


def something(folder, *, videos="20bn-something-something-v2", labels="labels.json", names=("7.mp4", "12.webm", "99.webm")):
    """As it is unpacked: labels/train.json, labels/labels.json, and the videos beside ``labels``. Video 34 is missing."""
    (folder / "labels").mkdir(parents=True)
    (folder / videos).mkdir(parents=True, exist_ok=True)
    for name in names:
        write_video(folder / videos / name, 20, codec="libvpx-vp9" if name.endswith("webm") else "libx264")
    if labels:
        (folder / labels).write_text(json.dumps(TEMPLATES))
    (folder / "labels" / "train.json").write_text(json.dumps(ITEMS))
    return folder / "labels" / "train.json"


@pytest.mark.parametrize("videos", ["20bn-something-something-v2", "labels/videos", "labels"])
@pytest.mark.parametrize("labels", ["labels/labels.json", "something-something-v2-labels.json"])
def test_something_something_is_found_beside_its_json(videos, labels, tmp_path):
    source = something(tmp_path, videos=videos, labels=labels)
    folder = tmp_path / videos
    expected = [Entry(str(folder / "12.webm"), 1), Entry(str(folder / "7.mp4"), 0), Entry(str(folder / "34.webm"), 1)]
    assert find_labelled_videos(source) == find_videos(source) == expected
    errors = require_readable(expected[2:] + expected, 4, ClipConfig(stride=4))
    assert [str(error) for error in errors] == [f"{folder / '34.webm'}: cannot be opened (No such file or directory)"]


def test_something_something_is_found_where_it_is_said_to_be(tmp_path):
    source = something(tmp_path / "lists", videos="../elsewhere", labels="../classes.json")
    with pytest.raises(ValueError, match=r"none of its videos \(12.webm, ...\) lies in .*: name their folder with --data_root"):
        find_videos(source)
    with pytest.raises(ValueError, match="there is no .*labels.json with the .*name the file with --data_labels"):
        find_labelled_videos(source, root=tmp_path / "elsewhere")
    assert [entry.label for entry in find_videos(source, tmp_path / "elsewhere")] == [-1, -1, -1]  # none needed to pre-train
    entries = find_labelled_videos(source, tmp_path / "elsewhere", tmp_path / "classes.json")
    assert [entry.label for entry in entries] == [1, 0, 1]
    with pytest.raises(ValueError, match=r"data_root: none of the videos of .*train.json \(12.webm, ...\) lies in .*lists"):
        find_videos(source, tmp_path / "lists")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "expected Something-Something's json"),
        ('{"id": 1}', "expected Something-Something's json"),
        ('[{"name": "a"}]', "expected Something-Something's json"),
        ("[]", "names no videos"),
        ('[{"id": "7", "template": "Eating [something]"}]', "has no number for 'Eating something', the template of video 7"),
        ('[{"id": "7"}]', "expected a label of 0 or more for .*7.mp4, got none"),  # the test set
    ],
)
def test_a_json_that_is_no_labelled_set_is_refused(content, message, tmp_path):
    source = something(tmp_path)
    (tmp_path / "labels" / "labels.json").write_text(json.dumps(TEMPLATES))
    source.write_text(content)
    with pytest.raises(ValueError, match=message):
        find_labelled_videos(source)


def test_pre_training_takes_the_three_paths(tmp_path):
    source = something(tmp_path / "lists", videos="../elsewhere", labels="../classes.json", names=("7.mp4", "12.webm"))
    (tmp_path / "tiny.yaml").write_text(
        "data_root: elsewhere\nclips: {stride: 2, repeats: 1}\n"
        "model: {image_size: 32, num_frames: 4, patch_size: 8, width: 32, depth: 1, num_heads: 1, decoder_width: 32,"
        " decoder_depth: 1, decoder_num_heads: 1}\n"
        "optimizer: {batch: 2, epochs: 2, warmup_epochs: 0}\n"
        "run: {workers: 0, device: cpu, precision: float32, tensorboard: false, log_every: 1}\n"
    )  # a path in a file is relative to the file
    arguments = [f"--config={tmp_path / 'tiny.yaml'}", f"--data={source}", f"--output={tmp_path / 'run'}"]
    state = pretrain.run(parse(PretrainConfig, arguments, prog="stmae pretrain", description=""))
    assert state.done and state.videos == 3
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["path"] for line in log if "path" in line] == [str(tmp_path / "elsewhere" / "34.webm")]


# Images


def test_an_image_is_a_still_clip(tmp_path):
    write_image(tmp_path / "a.png", 5)
    (entry,) = find_videos(tmp_path)
    item = pretrain_clips([entry], frames=16, size=(64, 96), repeats=3, **FULL_FRAME)[(0, 0)]
    assert item["clips"].shape == (3, 16, 64, 96, 3) and item["clips"].dtype == torch.uint8 and item["skipped"] == []
    expected = torch.from_numpy(numbered_frame(5, 64, 96))
    assert all(torch.equal(frame, expected) for clip in item["clips"] for frame in clip)
    views = ViewClips([entry], ClipConfig(), frames=16, size=(64, 64), temporal=2, spatial=3)[0]["clips"]
    assert views.shape == (6, 16, 64, 64, 3)
    assert torch.equal(views[3], expected[:, :64].expand(16, -1, -1, -1))  # second clip, left


def test_crops_of_an_image_differ_between_clips_and_not_within_one(tmp_path):
    write_image(tmp_path / "a.jpg", 77)
    item = pretrain_clips(find_videos(tmp_path), frames=8, repeats=2)[(0, 0)]
    for clip in item["clips"]:
        assert all(torch.equal(frame, clip[0]) for frame in clip)
    assert not torch.equal(item["clips"][0], item["clips"][1])


def test_a_large_image_is_not_copied_for_every_frame(tmp_path):
    Image.new("RGB", (3000, 2000), (10, 20, 30)).save(tmp_path / "a.jpg")
    with Still(tmp_path / "a.jpg") as still:
        frames = still.frames(range(64))
        assert frames.shape == (64, 2000, 3000, 3) and frames.strides[0] == 0
    assert pretrain_clips(find_videos(tmp_path), frames=64)[(0, 0)]["clips"].shape == (2, 64, 32, 32, 3)


def test_images_and_videos_mix(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "v.mp4", 20)
        write_image(tmp_path / name / "i.webp", 9)
        (tmp_path / name / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    entries = find_labelled_videos(tmp_path)
    assert [entry.label for entry in entries] == [0, 0, 0, 1, 1, 1]
    data = LabelledClips(
        entries, ClipConfig(stride=4, repeats=2), frames=4, size=(32, 32), seed=0, augmentation=AugmentationConfig(erasing=1.0)
    )
    for number, entry in enumerate(entries):
        item = data[(0, number)]
        assert item["clips"].shape == (2, 4, 32, 32, 3)
        assert bool(item["skipped"]) == entry.path.endswith("broken.png")
        still = [all(torch.equal(frame, clip[0]) for frame in clip) for clip in item["clips"]]
        assert not any(still)  # erasing's noise differs from frame to frame, in stills too


SAVED = {  # mode -> the pixels that 8-bit RGB has
    "L": lambda x: x[..., :1].repeat(3, -1),
    "RGBA": lambda x: x,
    "P": lambda x: x,
    "I;16": lambda x: x[..., :1].repeat(3, -1),
    "1": lambda x: (x[..., :1] > 127).repeat(3, -1) * np.uint8(255),
    "CMYK": lambda x: x,
}


@pytest.mark.parametrize("mode", SAVED)
def test_modes_of_images_come_as_rgb(mode, tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (200, 3), dtype=np.uint8)  # few enough for a palette
    pixels = colours[rng.integers(0, 200, (37, 53))]
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
    elif mode in ("L", "1"):
        grey = Image.fromarray(pixels[..., 0])
        (grey.point(lambda v: 255 * (v > 127), "1") if mode == "1" else grey).save(path)
    elif mode == "P":
        Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE).save(path)
    else:
        Image.fromarray(pixels).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    with Still(path) as still:
        got = still.frames([0])
    assert got.shape == (1, 37, 53, 3) and got.dtype == np.uint8 and still.size == (37, 53)
    assert np.abs(got[0].astype(int) - SAVED[mode](pixels)).max() <= (1 if mode in ("CMYK", "P") else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(orientation, tmp_path):
    frame = numbered_frame(0b01101001, 64, 96)
    # What a camera held in each of the eight ways stores (EXIF 2.3, orientation): this is undone.
    stored = {
        1: frame,
        2: frame[:, ::-1],
        3: frame[::-1, ::-1],
        4: frame[::-1],
        5: frame.transpose(1, 0, 2),
        6: np.rot90(frame, 1),
        7: frame[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(frame, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    with Still(tmp_path / "a.jpg") as still:
        got = still.frames([0])[0]
    assert got.shape == frame.shape and still.size == (64, 96)
    assert np.abs(got.astype(int) - frame).mean() < 4


@pytest.mark.parametrize(
    "name, content",
    [("empty.jpg", b""), ("text.png", b"this is not an image"), ("cut.jpg", None), ("cut.png", None), ("absent.bmp", None)],
)
def test_a_broken_image_is_named_with_the_reason(name, content, tmp_path):
    if name.startswith("cut"):
        complete = write_image(tmp_path / f"complete{name[3:]}", 3).read_bytes()
        content = complete[: len(complete) // 2]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=f"{name}: cannot be read as an image \\(") as error:
        open_entry(Entry(str(tmp_path / name), -1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.apng", "a.avif"])
def test_an_animation_is_a_clip(name, tmp_path):
    frames = [Image.fromarray(numbered_frame(i, 64, 96)) for i in range(12)]
    options = {"lossless": True} if name == "a.webp" else {"format": "PNG"} if "png" in name else {"quality": 95}
    try:
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=40, **options)
    except (KeyError, ValueError, OSError) as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    (entry,) = find_videos(tmp_path)
    with open_entry(entry) as video:
        assert isinstance(video, Animation) and len(video) == 12 and video.size == (64, 96) and not video.still
        assert [read_number(frame) for frame in video.frames([7, 2, 11, 2, 0])] == [7, 2, 11, 2, 0]
    item = pretrain_clips([entry], size=(64, 96), stride=3, **FULL_FRAME)[(0, 0)]
    for clip in item["clips"]:
        numbers = [read_number(frame.numpy()) for frame in clip]
        assert [b - a for a, b in zip(numbers, numbers[1:])] == [3, 3, 3]


def test_an_animation_with_a_picture_beside_it_and_one_of_another_program(tmp_path):
    frames = [Image.fromarray(numbered_frame(i, 64, 96)) for i in range(5)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], default_image=True)
    with open_image(tmp_path / "a.png") as video:
        assert [read_number(frame) for frame in video.frames(range(len(video)))] == [1, 2, 3, 4]
    with open_image(MEDIA / "anim.webp") as video:
        assert len(video) == 10 and video.frames(range(10)).shape == (10, *video.size, 3)
        assert len({frame.tobytes() for frame in video.frames(range(10))}) == 10
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    with open_image(tmp_path / "pages.tif") as image:
        assert image.still and read_number(image.frames([0])[0]) == 0


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_white_are_refused_and_not_black(mode, tmp_path):
    pixels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(pixels if mode == "F" else (pixels * 2**30).astype(np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(VideoError, match="its pixels are (floats|32-bit integers)"):
        open_entry(Entry(str(tmp_path / "a.tif"), -1))


@pytest.mark.parametrize("kind", ["postscript", "windows metafile", "pipe", "device"])
def test_nothing_but_an_image_is_opened_as_one(kind, tmp_path):
    path = tmp_path / "a.png"
    if kind == "postscript":  # Pillow would hand it to Ghostscript, which runs it
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
        with Image.open(path) as image:
            assert image.format == "EPS"
    elif kind == "windows metafile":
        path.write_bytes(b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(40))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(VideoError, match="not a regular file" if kind in ("pipe", "device") else "cannot be read as an image"):
        open_entry(Entry(str(path), -1))


def png_of(path, width, height):
    """A PNG whose header says so, and which holds no pixels: to be refused before it is decoded."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_pixels_than_an_image_may_have_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    png_of(tmp_path / "bomb.png", 27000, 27000)
    with pytest.raises(VideoError, match="bomb.png: .*exceeds limit"):
        open_entry(Entry(str(tmp_path / "bomb.png"), -1))
    png_of(tmp_path / "large.png", 13000, 11000)
    with pytest.raises(VideoError, match="frames of 13000x11000 are over the limit of 134,217,728 pixels"):
        open_entry(Entry(str(tmp_path / "large.png"), -1))
    folder = tmp_path / "frames"
    folder.mkdir()
    write_image(folder / "1.png", 1)
    png_of(folder / "2.png", 8000, 8000)
    monkeypatch.setattr("stmae.training.data.images.MAX_CLIP_PIXELS", 30_000)  # of all that is held at once
    with FrameFolder(folder, 2) as video, pytest.raises(VideoError, match="2.png: the frames asked for together are over the"):
        video.frames([0, 1])
    monkeypatch.setattr("stmae.training.data.video.MAX_CLIP_PIXELS", 64 * 96 * 4)
    with FrameFolder(folder, 2) as video:
        assert len(video.frames([0] * 4)) == 4
        with pytest.raises(VideoError, match="5 frames of 96x64 at once: over the limit"):
            video.frames([0] * 5)


# Folders of frames


@pytest.fixture
def taken_apart(tmp_path):
    """A video of 30 frames as mmaction and VideoMAE keep it, numbered from 1, with optical flow beside it."""
    folder = tmp_path / "jpegs" / "some video"
    folder.mkdir(parents=True)
    for number in range(30):
        write_image(folder / f"img_{number + 1:05d}.jpg", number)
        write_image(folder / f"flow_x_{number + 1:05d}.jpg", 0)
    (folder / "notes.txt").touch()
    return folder


def test_a_folder_of_frames_is_a_video(taken_apart, tmp_path):
    (tmp_path / "list.txt").write_text("jpegs/some video 30 4\n")
    (entry,) = find_labelled_videos(tmp_path / "list.txt")
    assert entry == Entry(str(taken_apart), 4, 30)
    with open_entry(entry) as video:
        assert len(video) == 30 and video.size == (64, 96) and not video.still
        assert [read_number(frame) for frame in video.frames([17, 3, 29, 3, 0])] == [17, 3, 29, 3, 0]
    item = pretrain_clips([entry], size=(64, 96), stride=7, **FULL_FRAME)[(0, 0)]
    for clip in item["clips"]:
        numbers = [read_number(frame.numpy()) for frame in clip]
        assert [b - a for a, b in zip(numbers, numbers[1:])] == [7, 7, 7]


def test_frames_are_in_the_order_of_their_numbers_not_their_names(tmp_path):
    for number in range(12):
        write_image(tmp_path / f"{number}.png", number)  # 10.png comes before 2.png
    with FrameFolder(tmp_path, 11) as video:
        assert [read_number(frame) for frame in video.frames(range(11))] == list(range(11))


def test_a_folder_of_frames_that_does_not_hold_what_the_list_says(taken_apart, tmp_path):
    def reason(name, count):
        with pytest.raises(VideoError) as error:
            open_entry(Entry(str(tmp_path / "jpegs" / name), 0, count))
        return error.value.reason

    assert reason("some video", 31) == "the list says 31 frames, and the folder has 30 numbered images"
    assert reason("absent", 3) == "cannot be opened (No such file or directory)"
    write_image(taken_apart / "other_00001.jpg", 0)
    assert reason("some video", 30) == "several series of frames: img_*.jpg, other_*.jpg"
    (taken_apart / "other_00001.jpg").unlink()
    (taken_apart / "img_00004.jpg").write_bytes(b"")
    with FrameFolder(taken_apart, 30) as video:
        assert read_number(video.frames([4])[0]) == 4
        with pytest.raises(VideoError, match="img_00004.jpg: cannot be read as an image"):
            video.frames([3])


# The check


def test_data_check_counts_images_and_frames_and_names_the_decoder(taken_apart, tmp_path, capsys):
    write_video(tmp_path / "v.mp4", 30)
    write_image(tmp_path / "i.png", 2)
    write_image(tmp_path / "photo.jpg", 2, size=(48, 32))
    (tmp_path / "broken.jpg").touch()
    (tmp_path / "list.txt").write_text("v.mp4 0\ni.png 1\nphoto.jpg 1\nbroken.jpg 1\njpegs/some video 30 2\n")
    data_check.run(data_check.Config(data=str(tmp_path / "list.txt"), frames=4, workers=0, output=str(tmp_path / "good.txt")))
    printed = capsys.readouterr().out
    assert "5 videos: 4 can be used, 1 cannot (decoder: pyav)" in printed
    assert "images:  2, each a still clip" in printed and "frames:  30 to 30, median 30" in printed
    assert "rate:    25 to 25" in printed and "seconds: 1.2 to 1.2" in printed
    assert "96x64 (3), 32x48 (1)" in printed and "3 classes, 1 to 3" in printed
    complete = find_labelled_videos(tmp_path / "list.txt")
    assert find_labelled_videos(tmp_path / "good.txt") == [entry for entry in complete if "broken" not in entry.path]


def test_data_check_of_something_something(tmp_path, capsys):
    source = something(tmp_path)
    assert cli.main(["data", "check", str(source), "--frames", "4", "--workers", "0"]) == 0
    printed = capsys.readouterr()
    assert "3 videos: 2 can be used, 1 cannot" in printed.out and "2 classes, 1 to 2 videos each" in printed.out
    assert f"{tmp_path / '20bn-something-something-v2' / '34.webm'}: cannot be opened" in printed.out + printed.err
    assert cli.main(["data", "check", str(source), "--data_root", str(tmp_path / "labels")]) == 1
    assert os.linesep not in capsys.readouterr().err.strip()
