"""From files to the model: how fast clips are decoded, and how long a training step waits for them.

The videos are H.264 at 340x256 and ten seconds long, as Kinetics is usually stored; they are made from the demonstration clips.
"""

import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import stmae.training
from bench.data_side import SIDES, sample
from bench.steps import Step
from stmae.masking import make_mask
from stmae.training.config import ClipConfig
from stmae.training.data.batch_sampler import ResumableBatchSampler
from stmae.training.data.dataset import PretrainClips, as_video
from stmae.training.data.loader import ClipLoader
from stmae.training.data.prepare import prepare_video
from stmae.training.data.video_list import find_videos

REPEATS, WORKERS = 4, 2
FRAMES, SIZE, LENGTH = 16, (224, 224), 300
TARGETS = {"data wait": 0.05}


@pytest.fixture(scope="session")
def videos(tmp_path_factory, full):
    """A folder of videos; a key frame every 250 frames, as libx264 has it when nobody asks."""
    folder = tmp_path_factory.mktemp("videos")
    clips = sorted(path for path in (Path(stmae.training.__file__).parent / "assets").glob("*.mp4"))
    for source in clips if full else clips[::2]:
        with av.open(str(source)) as file:
            frames = [frame.reformat(340, 256, "rgb24").to_ndarray() for frame in file.decode(video=0)]
        there_and_back = frames + frames[-2:0:-1]
        with av.open(str(folder / source.name), "w") as file:
            stream = file.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "23"})
            stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
            stream.codec_context.gop_size = 250
            for number in range(LENGTH):
                frame = av.VideoFrame.from_ndarray(there_and_back[number % len(there_and_back)], format="rgb24")
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    return folder


def dataset(videos, repeats=REPEATS):
    mask = functools.partial(make_mask, "random", 1, (8, 14, 14), 0.9)
    clips = ClipConfig(repeats=repeats)
    return PretrainClips(find_videos(videos), clips, frames=FRAMES, size=SIZE, sample_mask=mask, seed=0)


def loader(data, *, videos_a_step, steps):
    order = ResumableBatchSampler(len(data), videos_a_step, seed=0, num_steps=steps)
    return ClipLoader(data, order, WORKERS, held=2)


SIZES = {"340x256": (340, 256), "640x480": (640, 480), "1920x1080": (1920, 1080)}
WANTED = (700, 2000)  # clips a second: what an H100 takes of ViT-L and of ViT-B, by the paper's figures


@pytest.fixture(scope="session")
def files(tmp_path_factory, videos):
    """{name: path} of one video in several sizes, and as ``stmae data prepare`` leaves it."""
    folder = tmp_path_factory.mktemp("files")
    source = sorted(videos.iterdir())[-1]
    found = {}
    for name, (width, height) in SIZES.items():
        found[name] = folder / f"{name}.mp4"
        encode(source, found[name], width, height)
    found["prepared"] = folder / "prepared.mp4"
    prepare_video(str(found["1920x1080"]), str(found["prepared"]), short_side=256, gop=12, crf=20.0)
    return found


def encode(source, path, width, height):
    with av.open(str(source)) as old, av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 250, 1
        for frame in old.decode(video=0):
            pixels = frame.reformat(width, height, "rgb24").to_ndarray()
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))


def sides_here(path):
    """Names of the sides that work here, each checked: the pictures are ours but for rounding."""
    found, ours = {}, None
    for name, side in SIDES.items():
        try:
            got = sample(side(path), LENGTH, 1, 1)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"\n  {name}: cannot be used here ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
            continue
        ours = got if ours is None else ours
        found[name] = float(np.abs(got.astype(int) - ours).mean())
        assert found[name] < 6, f"{name} gives other frames"
    return list(found)


@pytest.mark.parametrize("repeats", [1, REPEATS])
@pytest.mark.parametrize("name", [*SIZES, "prepared"])
def bench_clip_cost(name, repeats, files, benchmark, full):
    """Processor time and memory of a clip from each decoder, through the same crop and resize; one thread, alternating."""
    processes = {}
    for side in sides_here(str(files[name])):
        command = [sys.executable, "-m", "bench.data_side", side, str(files[name]), str(repeats)]
        processes[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    times, memory = {side: [] for side in processes}, {}
    for _ in range(15 if full else 5):
        for side, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            milliseconds, memory[side] = json.loads(process.stdout.readline())
            times[side].append(milliseconds)
    for process in processes.values():
        process.communicate()
    median = {side: statistics.median(values) for side, values in times.items()}
    ratio = {side: statistics.median(a / b for a, b in zip(times["exact"], values)) for side, values in times.items()}
    cores = {str(rate): median["exact"] * rate / 1e3 for rate in WANTED}
    benchmark.extra_info.update(milliseconds=median, ours_over=ratio, mebibytes=memory, cores=cores)
    benchmark.pedantic(lambda: None)
    print(f"\n  {name}, {repeats} clips from one opening: CPU ms a clip (ours over it), peak MiB")
    for side in processes:
        print(f"    {side:<24} {median[side]:7.1f}  ({ratio[side]:.2f})  {memory[side]:6.0f}")
    print("    by arithmetic: " + ", ".join(f"{count:.0f} such cores for {rate} clips/s" for rate, count in cores.items()))


def bench_loader(videos, benchmark, full):
    """Clips a second from two workers with no model beside them: what a GPU's step could be fed with."""
    steps = 60 if full else 20
    batches = iter(loader(dataset(videos), videos_a_step=2, steps=steps))
    next(batches)  # the workers have started
    started, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch["clips"])
    rate = count / (time.perf_counter() - started)
    benchmark.extra_info.update(clips_per_second=rate, workers=WORKERS)
    benchmark.pedantic(lambda: None)
    print(f"\n  {benchmark.name}: {rate:.1f} clips/s of {FRAMES} frames from {WORKERS} workers")


def bench_data_wait(videos, benchmark, device, full):
    """The fraction of a ViT-B step (224, one video x 4 clips) spent waiting for the loader, as the training loop counts it."""
    steps = 40 if full else 4
    step = Step("base", "ops", "bfloat16", device, REPEATS)
    batches = iter(loader(dataset(videos), videos_a_step=1, steps=steps + 2))
    waits, seconds = [], []
    for number in range(steps + 2):
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        step.video = as_video(batch["clips"].to(device))  # under the same masks every time
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:  # the first wait for the workers to start
            waits.append(waited)
            seconds.append(time.perf_counter() - started)
    fraction = sum(waits) / sum(seconds)
    benchmark.extra_info.update(
        data_wait=fraction, step_seconds=sorted(seconds)[len(seconds) // 2], workers=WORKERS, target=TARGETS
    )
    benchmark.pedantic(lambda: None)
    print(
        f"\n  {benchmark.name}: {fraction:.2%} of a step of {sorted(seconds)[len(seconds) // 2]:.2f} s is data wait "
        f"(target {TARGETS['data wait']:.0%}), {WORKERS} workers, {REPEATS} clips from each video"
    )
