"""Clips of any shapes in batches: drawn before a file is opened, divided evenly, and the same whoever reads them."""

import functools
import itertools
import math
import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stmae.models import MaskedAutoencoderConfig
from stmae.training.config import ClipConfig
from stmae.training.data.batch_sampler import VideoOrder
from stmae.training.data.clip_shapes import SEARCHED, ClipShapes, fewest_tokens, is_picture, native_crop, native_grid
from stmae.training.data.loader import Batches, ClipLoader
from stmae.training.data.packed_batch_sampler import PackedBatchSampler, PackedOrder, divide
from stmae.training.data.packed_clips import NativeViews, PackedClips
from stmae.training.data.video_list import find_videos
from stmae.training.tasks.pretraining import clip_mask
from tests.support.fork_server import TIMEOUT
from tests.support.synthetic_video import read_number, write_video

MODEL = MaskedAutoencoderConfig(
    image_size=32, num_frames=4, patch_size=8, width=32, depth=1, num_heads=2, decoder_width=32, decoder_depth=1,
    decoder_num_heads=2, mask_ratio=0.6,
)  # fmt: skip
NATIVE = {"stride": 2, "repeats": 2, "size": "native", "side": (24, 48), "frames": "2,4,8"}
PICTURES = np.arange(40) % 5 == 0
ORDERS = {"tokens": {"tokens": 1700}, "batch": {"batch": 7}}


def shapes(model=MODEL, *, pictures=True, **changes):
    return ClipShapes(model, ClipConfig(**{**NATIVE, **changes}), pictures=pictures)


def order(size="tokens", seed=3, lists=((40, 1.0),), **changes):
    return PackedOrder(VideoOrder(lists, seed), shapes(**changes), PICTURES, seed=seed, **ORDERS[size])


# Shapes


def test_a_grid_fits_the_area_and_keeps_the_aspect_ratio():
    for area, aspect in itertools.product((1, 2, 3, 9, 30, 64, 196, 256), (0.01, 0.4, 9 / 16, 1, 4 / 3, 16 / 9, 2.4, 50)):
        h, w = native_grid(1000, round(1000 * aspect), area, (16, 16))
        assert area / 4 < h * w <= area
        if 1 / area**0.5 < aspect < area**0.5 and area >= 64:  # else a row of patches is all there is
            assert 0.85 < w / h / aspect < 1 / 0.85 and h * w > 0.7 * area
    for area in (4, 9, 36, 300):
        found = [math.prod(native_grid(h, w, area, (1, 1))) for h in range(1, 40) for w in range(1, 40)]
        assert min(found) >= fewest_tokens(area) and (area > SEARCHED or min(found) == fewest_tokens(area))
    assert native_grid(720, 720, 196, (16, 16)) == (14, 14)
    assert native_grid(360, 640, 196, (16, 16)) == native_grid(640, 360, 196, (16, 16))[::-1]
    assert native_grid(100, 200, 200, (16, 8)) == (7, 28)  # patches of 16 x 8: as wide as high is four to one


def test_a_native_crop_is_the_frame_but_for_less_than_a_patch():
    for height, width in ((64, 96), (96, 64), (180, 320), (333, 500)):
        crops = [native_crop(height, width, 196, (16, 16), position) for position in (0, 0.5, 1)]
        for crop in crops:
            top, left, h, w = crop.box
            assert top >= 0 and left >= 0 and top + h <= height and left + w <= width
            assert h == height or w == width
            assert abs(w / h / (crop.size[1] / crop.size[0]) - 1) < 1.5 / min(h, w)  # to the nearest pixel
            assert crop.size[0] % 16 == 0 and crop.size[1] % 16 == 0 and crop.size[0] * crop.size[1] <= 224**2
        assert crops[0].box[:2] == (0, 0) and len({crop.size for crop in crops}) == 1


def test_draws_are_of_the_ranges_and_pictures_are_one_tubelet():
    made = shapes()
    frames, areas, costs = made.draw(1, 2, np.arange(4000) % 2 == 0)
    assert set(frames[::2].ravel()) == {2} and set(frames[1::2].ravel()) == {2, 4, 8}
    assert areas.min() == 9 and areas.max() == 35  # 24^2 / 8^2, and what is below 48^2 / 8^2
    again, *_ = shapes().draw(1, 2, np.arange(4000) % 2 == 0)
    assert np.array_equal(frames, again) and not np.array_equal(frames, made.draw(1, 3, np.arange(4000) % 2 == 0)[0])
    for t, area, cost in list(zip(frames.ravel() // 2, areas.ravel(), costs.ravel()))[:50]:
        visible = int(t * area * 0.4)
        assert cost == visible + t * area  # K + (K + M), with K + M = N
    expected = made.draw(5, 0, np.zeros(40_000, bool))[2].sum(axis=1)
    assert made.mean_cost == pytest.approx(expected.mean(), rel=0.01) and made.most_cost >= expected.max()


def test_what_the_masks_of_other_strategies_cost():
    dual = shapes(MODEL.replace(decoder_mask_ratio=0.5))
    counts = dual.counts(4, 16)
    assert dual.cost(4, 16) == 2 * counts.visible + counts.reconstructed == 2 * 25 + 20 and dual.tokens_per_cost > 0.9
    blocks = shapes(MODEL.replace(mask_strategy="multi_block"))
    frames, areas, costs = blocks.draw(5, 0, np.zeros(4000, bool))
    assert np.array_equal(frames, shapes().draw(5, 0, np.zeros(4000, bool))[0])  # nothing else is drawn otherwise
    tokens = blocks.tokens(frames, areas)
    assert (costs > tokens).all() and (costs < 2 * tokens).all()  # one visible at least, and one masked
    assert blocks.mean_cost == pytest.approx(costs.sum(axis=1).mean(), rel=0.02)
    assert costs.sum(axis=1).max() <= blocks.most_cost and (tokens / costs).max() <= blocks.tokens_per_cost
    fixed = shapes(size="fixed", side=None, frames=None, pictures=False)
    assert fixed.cost(2, 16) == fixed.standard_cost / 2 == 12 + 32 and fixed.mean_cost == fixed.most_cost


@pytest.mark.parametrize(
    "model, changes, message",
    [
        ({"mask_ratio": 0.9}, {}, r"of the smallest clip that may be drawn: .* of grid 1x1x4, 4 in all, .* keeps nothing"),
        ({"mask_strategy": "frame"}, {}, "keeps everything"),  # of a picture's single slice
        ({"mask_strategy": "multi_block"}, {"side": (8, 8)}, "expected clips of two tokens or more"),
    ],
)
def test_shapes_without_a_mask_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        shapes(MODEL.replace(**model), **changes)


# Batches


@pytest.mark.parametrize("size", ORDERS)
def test_steps_take_the_samples_in_order_and_as_many_as_fit(size):
    made = order(size)
    plain, position = VideoOrder([(40, 1.0)], 3), 0
    for step in range(30):
        keys, costs = made[step]
        assert [key[:2] for key in keys] == [plain[position + i] for i in range(len(keys))]
        assert costs == [sum(cost for _, _, cost in drawn) for _, _, drawn in keys]
        following = made[step + 1][1][0]
        if size == "tokens":
            assert sum(costs) <= 1700 < sum(costs) + following
        else:
            assert len(keys) == 7
        for _, number, drawn in keys:
            assert not PICTURES[number] or {frames for frames, _, _ in drawn} == {2}
        position += len(keys)
        assert made.start(step + 1) == position
    assert order(size)[25] == made[25]  # from anywhere
    for samples in (1, position // 2, position):
        steps = order(size).steps(samples)
        assert made.start(steps) >= samples > made.start(steps - 1) and made.steps(samples) == steps


@pytest.mark.parametrize("size", ORDERS)
def test_ranks_and_micro_batches_divide_a_step_evenly(size):
    made = order(size)
    for accumulate, world_size in ((1, 1), (1, 2), (3, 1), (2, 2)):
        split = {"accumulate": accumulate, "world_size": world_size, "num_steps": 12, "first_step": 2}
        samplers = [PackedBatchSampler(made, rank=rank, **split) for rank in range(world_size)]
        batches = [list(sampler) for sampler in samplers]
        assert [len(own) for own in batches] == [len(samplers[0])] * world_size
        for step in range(2, 12):
            keys, costs = made[step]
            parts = [own[(step - 2) * accumulate + part] for own in batches for part in range(accumulate)]
            assert sorted(sum(parts, [])) == sorted(keys)
            cost_of = dict(zip(keys, costs))
            loads = [sum(cost_of[key] for key in part) for part in parts]
            assert max(loads) - min(loads) <= max(costs)
            for part in parts:
                assert sum(frames // 2 * area for _, _, drawn in part for frames, area, _ in drawn) <= samplers[0].capacity


@pytest.mark.parametrize("size", ORDERS)
def test_a_micro_batchs_memory_is_what_the_largest_step_costs(size):
    made = order(size)
    costs = [sum(made[step][1]) for step in range(30)]  # over several epochs
    assert made.most_cost(30) == (1700 if size == "tokens" else max(costs))
    assert made.most_cost(1) == (1700 if size == "tokens" else costs[0])
    assert PackedBatchSampler(made, num_steps=30).capacity == math.ceil(made.most_cost(30) * made.shapes.tokens_per_cost)
    assert made.mean_cost == pytest.approx(np.mean([cost for step in range(30) for cost in made[step][1]]), rel=0.1)


def test_a_divided_list_is_all_of_it():
    assert divide([5, 1, 7, 7, 2, 3], 3) == [[2, 4], [1, 3], [0, 5]]
    assert divide([1, 1, 1], 3) == [[0], [1], [2]]


def test_budgets_that_are_too_small_are_refused():
    most = shapes().most_cost
    with pytest.raises(ValueError, match=rf"optimizer.tokens: expected {most} or more, .* 2 clips cost at most, got {most - 1}"):
        PackedOrder(VideoOrder([(40, 1.0)], 0), shapes(), PICTURES, seed=0, tokens=most - 1)
    small = PackedOrder(VideoOrder([(40, 1.0)], 0), shapes(), PICTURES, seed=0, tokens=3 * most)
    PackedBatchSampler(small, num_steps=1, accumulate=3)
    with pytest.raises(ValueError, match=rf"a budget of {3 * most} tokens does not divide into 2 .* on 2 process.*{4 * most}"):
        PackedBatchSampler(small, num_steps=1, accumulate=2, world_size=2)
    with pytest.raises(ValueError, match=r"a batch of 7 videos does not divide into 8 micro-batch"):
        PackedBatchSampler(order("batch"), num_steps=1, accumulate=8)


def test_a_mixture_by_weight_fills_budgets_too():
    made = order(lists=[(8, 1.0), (32, 1.0)])
    keys = [key for step in range(made.steps(400)) for key in made[step][0]][:400]
    assert sum(number < 8 for _, number, _ in keys) == 200
    assert len({key[:2] for key in keys}) == 400


# Clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, size in (("a", (64, 96)), ("b", (96, 64)), ("c", (80, 80))):
        write_video(folder / f"{name}.mp4", 40, size=size)
    Image.fromarray(np.full((60, 120, 3), 77, np.uint8)).save(folder / "d.png")
    (folder / "e.mp4").write_text("not a video")
    return folder


def dataset(folder, model=MODEL, **changes):
    entries, clips = find_videos(folder), ClipConfig(**{**NATIVE, **changes})
    made = ClipShapes(model, clips, pictures=True)
    return PackedClips(entries, clips, shapes=made, seed=0, sample_mask=functools.partial(clip_mask, model))


def sampler(data, *, tokens=1500, **options):
    made = PackedOrder(
        VideoOrder(data.lists, 0), data.shapes, [is_picture(entry) for entry in data.entries], seed=0, tokens=tokens
    )
    return PackedBatchSampler(made, **{"num_steps": 6, **options})


def assert_same(a, b):
    assert len(a) == len(b)
    for own, other in zip(a, b):
        assert own.keys() == other.keys()
        for name in ("clips", "keep", "masked"):
            assert len(own[name]) == len(other[name]) and all(map(torch.equal, own[name], other[name])), name
        assert own["skipped"] == other["skipped"] and own["short"] == other["short"]


def test_a_clip_has_its_shape_and_a_mask_of_its_own(folder):
    data = dataset(folder)
    for number, aspect in enumerate((1.5, 2 / 3, 1.0, 2.0)):
        item = data[(0, number, ((4, 20, 0), (8, 33, 0)))]  # costs: of use to masks of unequal numbers alone
        for clip, keep, masked, (frames, area) in zip(item["clips"], item["keep"], item["masked"], ((4, 20), (8, 33))):
            T, H, W, C = clip.shape
            assert (2 if number == 3 else frames, 3) == (T, C)
            assert H % 8 == W % 8 == 0 and area * 64 >= H * W and 0.75 < W / H / aspect < 1.35
            tokens = T // 2 * (H // 8) * (W // 8)
            assert torch.equal(torch.cat([keep, masked]).sort().values, torch.arange(tokens)) and len(keep) == int(tokens * 0.4)
    assert (item["clips"][0] == 77).all()  # the picture


def test_native_clips_hold_the_frames_they_should(folder):
    data = dataset(folder, flip=False, side=(256, 256), stride=3)
    item = data[(0, 0, ((4, 1024, 0), (8, 1024, 0)))]
    for clip, frames in zip(item["clips"], (4, 8)):
        assert clip.shape[1] * clip.shape[2] > 0.9 * 256**2
        small = torch.nn.functional.interpolate(clip.permute(0, 3, 1, 2).float(), size=(64, 96), mode="area")
        numbers = [read_number(frame.permute(1, 2, 0).numpy()) for frame in small]
        assert np.diff(numbers).tolist() == [3] * (frames - 1)


def test_a_batch_is_the_items_one_after_another(folder):
    data = dataset(folder)
    order = sampler(data)
    for keys, batch in zip(order, ClipLoader(data, order, 0)):
        alone = [data[key] for key in keys]
        for name in ("clips", "keep", "masked", "skipped"):
            joined = [value for item in alone for value in item[name]]
            assert len(joined) == len(batch[name])
            assert all(torch.equal(a, b) if name != "skipped" else a == b for a, b in zip(joined, batch[name]))


def test_the_number_of_workers_changes_nothing_and_a_loader_continues_anywhere(folder):
    alone = list(ClipLoader(dataset(folder), sampler(dataset(folder)), 0))
    assert any(batch["skipped"] for batch in alone)
    assert_same(list(ClipLoader(dataset(folder), sampler(dataset(folder)), 2)), alone)
    assert_same(list(ClipLoader(dataset(folder), sampler(dataset(folder), first_step=3), 1)), alone[3:])


def test_the_ring_holds_what_is_in_use(folder):
    data = dataset(folder)
    copies = list(ClipLoader(data, sampler(data, num_steps=12, accumulate=2), 2))
    loader = ClipLoader(data, sampler(data, num_steps=12, accumulate=2), 2, held=4)
    held = []
    for number, batch in enumerate(loader):
        held.append(batch)
        assert_same(held[-4:], copies[max(0, number - 3) : number + 1])
    assert len(held) == 24 and loader.slots < 24


def test_a_worker_waits_until_its_place_is_free_and_ends_with_the_loop(folder):
    """Here they read eight videos ahead, and there is memory for one batch more than those in use."""
    data = dataset(folder)
    copies = list(ClipLoader(data, sampler(data, num_steps=12), 2))
    for taken in (12, 3):
        loader = ClipLoader(data, sampler(data, num_steps=12), 2, held=2)
        loader.slots = 3
        latest = []
        with Batches(loader) as batches:
            for number in range(taken):
                latest = [*latest[-1:], next(batches)]
                assert_same(latest, copies[max(0, number - 1) : number + 1])
            workers = batches.iterator._workers
            assert all(worker.is_alive() for worker in workers) or taken == 12
        assert not any(worker.is_alive() for worker in workers)
        assert_same(latest, copies[taken - 2 : taken])  # what waited was not written


def start_and_wait(folder, pipe):
    """In a process of its own: says which workers it has, two that wait for a place, and is then killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data = dataset(folder)
    loader = ClipLoader(data, sampler(data, num_steps=12), 2, held=2)
    loader.slots = 2
    batches = iter(loader)
    next(batches)
    pipe.send([worker.pid for worker in batches._workers])
    time.sleep(1000)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from Linux's /proc")
def test_a_worker_that_waits_ends_with_its_process(folder):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=start_and_wait, args=(folder, there))
    process.start()
    there.close()  # or this would wait for ever where the process fails
    workers = here.recv()
    process.kill()
    process.join()
    until = time.monotonic() + TIMEOUT
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(is_running, workers))


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("size", ["native", "fixed"])
def test_masks_of_unequal_numbers_fill_the_budget_and_no_more(size, folder):
    """What is counted is what there is, but that grids of few patches do not quite fill their areas."""
    model = MODEL.replace(mask_strategy="multi_block", mask_blocks=2, mask_block_scale=(0.2, 0.4))
    data = dataset(folder, model, **({} if size == "native" else {"size": "fixed", "side": None}))
    full = []
    for keys, batch in zip(sampler(data, tokens=4000, num_steps=3), ClipLoader(data, sampler(data, tokens=4000, num_steps=3), 0)):
        counts = [2 * len(keep) + len(masked) for keep, masked in zip(batch["keep"], batch["masked"])]
        drawn = [own for key in keys for own in key[2]]
        used = [math.prod(clip.shape[:3]) / (frames * area * 64) for clip, (frames, area, _) in zip(batch["clips"], drawn)]
        assert all(count <= cost * part for count, (_, _, cost), part in zip(counts, drawn, used))
        full.append(sum(counts) / sum(cost * part for (_, _, cost), part in zip(drawn, used)))
        assert 4000 - data.shapes.most_cost < sum(cost for _, _, cost in drawn) <= 4000
    assert np.mean(full) > 0.95


def test_a_clip_that_no_mask_is_small_enough_for_is_made_smaller(tmp_path):
    """A strip, into which the blocks do not fit that hide two thirds of a square."""
    Image.fromarray(np.full((8, 512, 3), 77, np.uint8)).save(tmp_path / "strip.png")
    model = MODEL.replace(mask_strategy="multi_block", mask_blocks=1, mask_block_scale=(0.7, 0.7), mask_block_aspect=(1.0, 1.0))
    data = dataset(tmp_path, model, side=(64, 64), repeats=1)
    _, area, cost = (int(values[0, 0]) for values in data.shapes.draw(0, 0, np.ones(1, bool)))
    item = data[(0, 0, ((2, area, cost),))]
    T, H, W, _ = item["clips"][0].shape
    assert area == 64 and (T, H) == (2, 8) and cost / 4 < W // 8 <= cost // 2
    assert 2 * len(item["keep"][0]) + len(item["masked"][0]) <= cost


def test_clips_of_one_size_and_of_several_lengths(folder):
    data = dataset(folder, size="fixed", side=None, scale=(0.3, 0.9))
    batch = next(iter(ClipLoader(data, sampler(data), 0)))
    assert {tuple(clip.shape[1:3]) for clip in batch["clips"]} == {(32, 32)}
    assert {len(clip) for clip in batch["clips"]} <= {2, 4, 8} and len({len(clip) for clip in batch["clips"]}) > 1


def test_native_views(folder):
    views = NativeViews(find_videos(folder), ClipConfig(stride=2), MODEL, temporal=3)
    shapes = [tuple(views[number]["clips"].shape) for number in range(4)]
    assert shapes == [(3, 4, 24, 40, 3), (3, 4, 40, 24, 3), (3, 4, 32, 32, 3), (3, 2, 24, 40, 3)]
    assert math.prod(shapes[0][2:4]) <= 32 * 32 and torch.equal(views[0]["clips"], views[0]["clips"])
    with pytest.raises(ValueError, match="expected one spatial view and crop_pct 1 of frames of native size, got 3 and 1"):
        NativeViews(find_videos(folder), ClipConfig(), MODEL, spatial=3)
