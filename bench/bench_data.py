"""From files to the model: how fast clips are decoded, and how long a training step waits for them.

The videos are H.264 at 340x256 and ten seconds long, as Kinetics is usually stored; they are made from the demonstration clips.
"""

import functools
import time
from pathlib import Path

import av
import pytest
import torch

import stmae.training
from bench.steps import Step
from stmae.masking import sample_noise
from stmae.training.config import ClipConfig
from stmae.training.data.batch_sampler import ResumableBatchSampler
from stmae.training.data.dataset import PretrainClips, as_video
from stmae.training.data.decoders import choose_decoder
from stmae.training.data.loader import ClipLoader
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


def dataset(videos, decoder="pyav", repeats=REPEATS):
    noise = functools.partial(sample_noise, "random", 1, (8, 14, 14), 0.9)
    clips = ClipConfig(repeats=repeats, decoder=decoder)
    return PretrainClips(find_videos(videos), clips, frames=FRAMES, size=SIZE, sample_noise=noise, seed=0)


def loader(data, *, videos_a_step, steps):
    order = ResumableBatchSampler(len(data), videos_a_step, seed=0, num_steps=steps)
    return ClipLoader(data, order, WORKERS, held=2)


def bench_decoding(videos, compare, benchmark, full):
    """Four clips of one video, cropped and resized, in one process: from one opening, from four, and by torchcodec."""
    together, separately = dataset(videos), dataset(videos, repeats=1)
    sides = {
        "ours": lambda: [together[(0, number)] for number in range(len(together))],
        "separately": lambda: [separately[(r, number)] for number in range(len(together)) for r in range(REPEATS)],
    }
    if choose_decoder("auto") == "torchcodec":
        other = dataset(videos, "torchcodec")
        for number in range(len(together)):
            assert torch.equal(other[(0, number)]["clips"], together[(0, number)]["clips"])
        sides["torchcodec"] = lambda: [other[(0, number)] for number in range(len(together))]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a data worker
    try:
        compare(**sides, seconds=20 if full else 4)
    finally:
        torch.set_num_threads(before)
    rates = {name: len(together) * REPEATS / seconds["p50"] for name, seconds in benchmark.extra_info["seconds"].items()}
    benchmark.extra_info["clips_per_second"] = rates
    print("  clips/s on one thread: " + ", ".join(f"{rate:.0f} {name}" for name, rate in rates.items()))


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
        step.video, step.noise = as_video(batch["clips"].to(device)), batch["noise"].to(device)
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
