"""From decoded frames to clips: the exact path against float64, and both paths against whole frames cropped afterwards."""

import functools
import gc
import os

import av
import numpy as np
import pytest
import torch

from stmae.masking import make_mask
from stmae.training.config import AugmentationConfig, ClipConfig
from stmae.training.data import clip_sampling, pixels
from stmae.training.data.dataset import LabelledClips, PretrainClips, ViewClips
from stmae.training.data.decoders import open_entry
from stmae.training.data.pixels import EXACT_FORMATS, LUMA_WEIGHTS, FrameConverter
from stmae.training.data.randaugment import rand_augment
from stmae.training.data.transforms import Crop, random_crop_box, random_erasing, resized_crop, view_box
from stmae.training.data.video import Video
from stmae.training.data.video_list import Entry
from tests.conftest import OFFERED
from tests.support.synthetic_video import rotate_mp4, set_display_matrix, write_image, write_video

_video, WHY_NOT = pixels.video_module()
exact = pytest.mark.skipif(_video is None, reason=f"stmae._video: {WHY_NOT}")


@pytest.fixture(params=OFFERED)
def capability(request):
    before = _video.cpu_capability()
    _video.set_cpu_capability(request.param)
    yield request.param
    _video.set_cpu_capability(before)


# The definition, in float64


def resize_matrix(start, length, count, total):
    """[count, total]: antialiased bilinear interpolation of [start, start + length), as torch has it."""
    scale = length / count
    reach = max(scale, 1.0)
    matrix = np.zeros((count, total))
    for i in range(count):
        centre = scale * (i + 0.5)
        low, high = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), length)
        weights = np.maximum(0, 1 - np.abs(np.arange(low, high) + 0.5 - centre) / reach)
        matrix[i, start + low : start + high] = weights / weights.sum()
    return matrix


def chroma_matrix(length, place):
    """[length, samples]: linear interpolation between samples at place, place + 2, ..."""
    samples = (length + 1) // 2
    matrix = np.zeros((length, samples))
    for x in range(length):
        below, part = divmod((x - place) / 2, 1)
        for k, weight in ((below, 1 - part), (below + 1, part)):
            matrix[x, int(min(max(k, 0), samples - 1))] += weight
    return matrix


def to_rgb(planes, depth, weights, full, half_rows, half_columns, place_x=0.0):
    """float64 [H, W, 3], in levels of 0 to 255, not clipped."""
    step, largest = 2.0 ** (depth - 8), 2.0**depth - 1
    y, *chroma = (plane.astype(np.float64) for plane in planes)
    y = y * 255 / largest if full else (y - 16 * step) * 255 / (219 * step)
    if not chroma:
        return np.repeat(y[..., None], 3, axis=2)
    u, v = ((c - 128 * step) * (255 / largest if full else 255 / (224 * step)) for c in chroma)
    if half_rows:
        u, v = (chroma_matrix(len(y), 0.5) @ c for c in (u, v))
    if half_columns:
        u, v = (c @ chroma_matrix(y.shape[1], place_x).T for c in (u, v))
    kr, kb = weights
    red, blue = 2 * (1 - kr) * v, 2 * (1 - kb) * u
    return np.stack([y + red, y - (kr * red + kb * blue) / (1 - kr - kb), y + blue], axis=-1)


def resized(rgb, box, size):
    top, left, h, w = box
    rows, columns = resize_matrix(top, h, size[0], rgb.shape[0]), resize_matrix(left, w, size[1], rgb.shape[1])
    return np.einsum("ih,hwc,jw->ijc", rows, rgb, columns, optimize=True).clip(0, 255)


def random_planes(rng, height, width, depth, half_rows, half_columns, grey):
    sizes = [(height, width)]
    if not grey:
        sizes += 2 * [((height + half_rows) >> half_rows, (width + half_columns) >> half_columns)]
    return [rng.integers(0, 2**depth, size).astype(np.uint8 if depth == 8 else np.uint16) for size in sizes]


def random_box(rng, height, width):
    h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w


@exact
@pytest.mark.parametrize("layout", sorted(set(EXACT_FORMATS.values())), ids=str)
def test_every_pixel_is_the_nearest_to_the_float64_conversion(layout, capability):
    depth, half_rows, half_columns, grey = layout
    rng = np.random.default_rng(depth + half_rows)
    for number, (height, width) in enumerate([(1, 1), (2, 3), (33, 47), (40, 64), (67, 101)]):
        box, size = random_box(rng, height, width), (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
        weights, full, mirror = list(LUMA_WEIGHTS.values())[number], bool(number % 2), (number % 3 == 0, number % 2 == 0)
        planes = random_planes(rng, height, width, depth, half_rows, half_columns, grey)
        place = 0.5 * (number % 2)
        plan = _video.CropResize(
            size=(height, width), box=box, out_size=size, mirror=mirror, chroma_shift=(half_rows, half_columns),
            chroma_place=(0.5, place), luma_weights=weights, full_range=full, depth=depth, grey=grey,
        )  # fmt: skip
        padded = [np.pad(plane, ((0, 0), (0, 5))) for plane in planes]
        out = np.full((size[0] + 2, size[1] + 2, 3), 77, np.uint8)
        plan([plane.tobytes() for plane in padded], [plane.strides[0] for plane in padded], out[1:-1, 1:-1])
        expected = resized(to_rgb(planes, depth, weights, full, half_rows, half_columns, place), box, size)
        expected = expected[:: -1 if mirror[0] else 1, :: -1 if mirror[1] else 1]
        # Half a level is the rounding; float32 sums of values below 1,100, weights below 1, err by less than 1e-3.
        assert np.abs(out[1:-1, 1:-1] - expected).max() <= 0.5 + 1e-3
        border = np.concatenate([out[0].ravel(), out[-1].ravel(), out[:, 0].ravel(), out[:, -1].ravel()])
        assert (border == 77).all()


@exact
@pytest.mark.parametrize("colorspace", [1, 2, 5, 9])
@pytest.mark.parametrize("name", ["yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuv420p10le", "gray"])
def test_the_exact_path_is_nearer_to_float64_than_swscale(name, colorspace):
    """Smooth pictures, as cameras give them, in the formats that both read."""
    depth, half_rows, half_columns, grey = EXACT_FORMATS[name]
    height, width = 96, 128
    rng = np.random.default_rng(1)
    frame = av.VideoFrame(width, height, name)
    frame.colorspace, frame.color_range = colorspace, 2 if "j" in name or grey else 1
    planes = []
    for plane, noise in zip(frame.planes, random_planes(rng, height, width, depth, half_rows, half_columns, grey)):
        rows, columns = np.indices(noise.shape)
        waves = np.sin(rows / 9 + len(planes)) + np.cos(columns / 7)
        values = (2 ** (depth - 1) + 2.0 ** (depth - 8) * (25 * waves + noise / 2.0 ** (depth - 3))).astype(noise.dtype)
        padded = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
        padded[:, : values.shape[1]] = values
        plane.update(padded.tobytes())
        planes.append(values)
    crop = Crop((7, 11, 80, 90), (56, 56))
    full = "j" in name or grey
    expected = resized(to_rgb(planes, depth, LUMA_WEIGHTS[colorspace], full, half_rows, half_columns), crop.box, crop.size)
    ours, theirs = np.empty((56, 56, 3), np.uint8), np.empty((56, 56, 3), np.uint8)
    converter = FrameConverter("h264", exact=True)
    assert converter.crop(frame, crop, ours)
    pixels.crop_rgb(converter.rgb(frame), crop, theirs)
    errors = [np.abs(out - expected) for out in (ours, theirs)]
    assert errors[0].max() <= 0.501 and errors[0].max() <= errors[1].max() and errors[0].mean() <= errors[1].mean()


# Hostile arguments

GOOD = {
    "size": (8, 8), "box": (0, 0, 8, 8), "out_size": (4, 4), "mirror": (False, False), "chroma_shift": (1, 1),
    "chroma_place": (0.5, 0.0), "luma_weights": (0.299, 0.114), "full_range": False, "depth": 8, "grey": False,
}  # fmt: skip


@exact
@pytest.mark.parametrize(
    "change, words",
    [
        ({"size": (0, 8)}, "height"),
        ({"size": (8, 2**31 - 1)}, "width"),
        ({"box": (0, 0, 9, 8)}, "box's height"),
        ({"box": (-1, 0, 8, 8)}, "box's top"),
        ({"box": (0, 2**31 - 1, 8, 8)}, "box's left"),
        ({"box": (0, 1, 8, 2**31 - 1)}, "box's width"),
        ({"out_size": (0, 4)}, "clip's height"),
        ({"out_size": (4, 2**30)}, "clip's width"),
        ({"chroma_shift": (2, 1)}, "chroma_shift_y"),
        ({"chroma_place": (float("nan"), 0.0)}, "place of the first chroma sample"),
        ({"luma_weights": (0.6, 0.5)}, "luma's weights"),
        ({"depth": 40}, "depth"),
    ],
)
def test_geometry_that_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        _video.CropResize(**{**GOOD, **change})


@exact
def test_planes_that_do_not_fit_are_refused():
    plan, out = _video.CropResize(**GOOD), np.zeros((4, 4, 3), np.uint8)
    y, c = bytes(64), bytes(16)
    plan([y, c, c], [8, 4, 4], out)
    plan([bytes(8 * 7 + 8), c, c], [8, 4, 4], out)
    for planes, strides in (
        ([y[:-1], c, c], [8, 4, 4]),
        ([y, c[:-1], c], [8, 4, 4]),
        ([y, c, c], [9, 4, 4]),
        ([y, c, c], [7, 4, 4]),
        ([y, c, c], [-8, 4, 4]),
        ([y, c, c], [8, 2**62, 4]),
        ([y, c], [8, 4]),
        ([y, c, c], [8, 4]),
    ):
        with pytest.raises(ValueError, match="plane"):
            plan(planes, strides, out)
    for wrong in (out[:, :3], out[:, :, ::-1], out[::-1], np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="expected out"):
            plan([y, c, c], [8, 4, 4], wrong)
    frozen = out.copy()
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        plan([y, c, c], [8, 4, 4], frozen)
    with pytest.raises(TypeError):
        plan([y, None, c], [8, 4, 4], out)
    wide = _video.CropResize(**{**GOOD, "depth": 10})
    with pytest.raises(ValueError, match="at least 16 bytes"):
        wide([y * 2, c * 2, c * 2], [8, 8, 8], out)


# Clips beside whole frames that are cropped afterwards, as they were made before


def clips_of_whole_frames(video, indices, rngs, settings, size):
    frames = video.frames(np.concatenate(indices))
    for rng, part in zip(rngs, np.split(frames, len(rngs))):
        box = random_crop_box(rng, part.shape[1], part.shape[2], settings.scale, settings.aspect)
        clip = resized_crop(np.ascontiguousarray(part), box, size)
        yield clip.flip(2) if settings.flip and rng.random() < 0.5 else clip


SOURCES = {
    "a.mp4": lambda path: write_video(path, 40, options={"bf": "3"}),
    "turned.mp4": lambda path: rotate_mp4(write_video(path, 40, size=(67, 101), pix_fmt="yuv444p"), 90),
    "deep.mkv": lambda path: write_video(path, 40, codec="ffv1", pix_fmt="yuv444p12le"),
    "counted.mpg": lambda path: write_video(path, 40, codec="mpeg2video", options={"bf": "2"}),
    "still.png": lambda path: write_image(path, 7),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("labelled", [False, True])
def test_swscale_clips_keep_their_bytes(name, labelled, tmp_path):
    entry = Entry(str(SOURCES[name](tmp_path / name)), 3)
    settings, size, frames = ClipConfig(stride=3, repeats=3, pixels="swscale"), (32, 40), 4
    augmentation = AugmentationConfig(erasing=1.0)
    common = {"frames": frames, "size": size, "seed": 5}
    draw = functools.partial(make_mask, "random", 1, (2, 2, 2), 0.75)
    if labelled:
        data = LabelledClips([entry], settings, augmentation=augmentation, **common)
    else:
        data = PretrainClips([entry], settings, sample_mask=draw, **common)
    for epoch in range(3):
        item = data[(epoch, 0)]
        rngs = [np.random.default_rng([5, epoch, 0, r, 0]) for r in range(3)]
        with open_entry(entry) as video:
            length = 10 if video.still else len(video)
            indices = [clip_sampling.random_clip(rng, length, frames, 3) for rng in rngs]
            expected = list(clips_of_whole_frames(video, indices, rngs, settings, size))
        for r, (rng, clip) in enumerate(zip(rngs, expected)):
            if labelled:
                clip = rand_augment(rng, clip, augmentation.operations, augmentation.magnitude, augmentation.magnitude_std)
                clip = random_erasing(rng, clip.contiguous(), augmentation.erasing)
            else:
                generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
                assert torch.equal(item["keep"][r], draw(generator=generator).keep[0])
            assert torch.equal(item["clips"][r], clip)


@exact
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("x, y", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_exact_clips_are_turned_as_the_frames_are(turned, x, y, tmp_path):
    path = write_video(tmp_path / "a.mp4", 4, pix_fmt="yuv444p")
    set_display_matrix(path, *((0, y, x, 0) if turned else (x, 0, 0, y)))
    for flip in (False, True):
        clips = []
        for is_exact in (False, True):
            with Video(path, exact=is_exact) as video:
                out = np.zeros((1, 2, 24, 36, 3), np.uint8)
                video.clips([[1, 3]], lambda height, width, flip=flip: [Crop((3, 5, 50, 44), (24, 36), flip)], out)
            clips.append(out.astype(int))
        assert np.abs(clips[0] - clips[1]).max() <= 4 and clips[1].std() > 20  # two roundings and swscale's own


@exact
def test_other_formats_take_swscale(tmp_path):
    path = write_video(tmp_path / "a.mkv", 4, codec="ffv1", pix_fmt="yuv444p12le")
    outs = [np.zeros((1, 2, 24, 36, 3), np.uint8) for _ in range(2)]
    for is_exact, out in zip((False, True), outs):
        with Video(path, exact=is_exact) as video:
            video.clips([[1, 3]], lambda height, width: [Crop((3, 5, 50, 44), (24, 36))], out)
    assert np.array_equal(*outs) and outs[0].any()


@exact
def test_all_views_share_one_decode_and_hold_no_whole_clip(tmp_path, monkeypatch):
    entry = Entry(str(write_video(tmp_path / "a.mp4", 40)), 1)
    views = ViewClips([entry], ClipConfig(stride=2), frames=8, size=(32, 32), temporal=2, spatial=3)
    taken, alive, walk = [], [], Video._walk

    def counted(self, wanted, take, skip):
        def counted_take(index, frame):
            take(index, frame)
            taken.append(index)
            if index == wanted[-1]:
                alive.append(sum(type(o) is av.VideoFrame for o in gc.get_objects()))

        return walk(self, wanted, counted_take, skip)

    monkeypatch.setattr(Video, "_walk", counted)
    gc.collect()
    before = sum(type(o) is av.VideoFrame for o in gc.get_objects())
    item = views[0]
    assert len(taken) == len(set(taken)) == 16  # each frame once for all six clips
    assert alive[0] - before <= 8  # this one, the one before, and, at the file's end, all that the decoder still had
    with Video(entry.path, exact=True) as video:
        for place, position in enumerate((0, 0.5, 1)):
            out = np.zeros((1, 8, 32, 32, 3), np.uint8)
            video.clips([range(0, 16, 2)], lambda h, w, p=position: [Crop(view_box(h, w, (32, 32), p), (32, 32))], out)
            assert np.array_equal(item["clips"][place].numpy(), out[0])


def test_without_the_module_swscale_serves_with_a_warning(tmp_path, monkeypatch):
    entry = Entry(str(write_video(tmp_path / "a.mp4", 20)), 1)
    clips = [ClipConfig(stride=2, pixels=name) for name in ("exact", "swscale")]
    monkeypatch.setattr(pixels, "video_module", lambda: (None, "No module named 'stmae._video'"))
    with pytest.warns(UserWarning, match="swscale in the place of exact.*No module named"):
        assert pixels.choose_pixels("exact") == "swscale"
    with pytest.warns(UserWarning, match="swscale"):
        got = ViewClips([entry], clips[0], frames=4, size=(32, 32))[0]
    assert torch.equal(got["clips"], ViewClips([entry], clips[1], frames=4, size=(32, 32))[0]["clips"])
    with pytest.raises(ValueError, match="expected 'exact' or 'swscale', got 'rgb'"):
        pixels.choose_pixels("rgb")


@exact
def test_the_module_needs_no_torch():
    assert os.path.basename(_video.__file__).startswith("_video.cpython")  # built for this Python
    with open(_video.__file__, "rb") as file:
        binary = file.read()
    assert b"libtorch" not in binary and b"libc10" not in binary
