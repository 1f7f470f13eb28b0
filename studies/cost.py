"""What a clip costs: FLOPs of dense and sparse encoders beside the paper's, and how processor time grows.

    python -m studies.cost      # from the repository's root; writes docs/cost.png and docs/cost.json; minutes on one core

*Dense* is an encoder that sees every token, *sparse* one that sees the visible tokens alone. FLOPs are counted by torch's
FlopCounterMode, without computing anything, and halved: as in the paper, a multiplication with its addition is one. Times are
processor times of training steps (forward, backward, AdamW), in bf16 where the processor has it, medians of alternating rounds.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import stmae
from stmae.masking import Mask
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig
from stmae.training.engine.device import choose_precision, keep_freed_memory

from .processor import processor

PAPER = {"dense": 627.5, "sparse": 81.0}  # GFLOPs of ViT-L, a clip of 16x224x224, 90 % masked
PAPER_SPEED = 5.8  # times, of ViT-L's training on GPUs: compute alone

# Of the growth: a ViT-S of fewer blocks, so that all of it takes minutes.
SMALL = MaskedAutoencoderConfig(
    width=384, depth=4, num_heads=6, decoder_width=192, decoder_depth=2, decoder_num_heads=6, mask_ratio=0.9
)
FRAMES = (2, 4, 8, 16, 32, 64, 128)  # of a clip of 224x224: 196 to 12,544 tokens
CLIPS = (1, 2, 4, 8, 16)
RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)  # 0: the dense encoder


def large():
    """ViT-L of the paper, without memory."""
    with torch.device("meta"):
        return stmae.models.mae_vit_large_patch16()


def gflops(function):
    """Thousands of millions of multiplications with their additions, of matrix products, that a call of ``function`` makes."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2e9


def count_large():
    """GFLOPs of ViT-L's forward on one clip: {"dense", "sparse"} as the paper's model computes it, {"ops"} as the kernels do."""
    model = large()
    video = torch.empty(1, *model.config.video_shape, dtype=torch.uint8, device="meta")
    mask = Mask(*(ids.to("meta") for ids in model.sample_mask(1, device="cpu")))
    model.backend = "reference"  # embeds every patch, then takes the visible ones
    counted = {name: gflops(functools.partial(forward, model, video, mask, name)) for name in PAPER}
    model.backend = "ops"  # embeds the visible patches alone; the last block of the decoder goes on with the masked ones
    return {**counted, "ops": gflops(lambda: forward(model, video, mask, "sparse"))}


def forward(model, video, mask, encoder):
    """The loss. ``dense``: the encoder sees every token, and the decoder then gets the visible ones: all else is the same."""
    if encoder == "sparse":
        return model(video, mask=mask).loss
    config, ops = model.config, model._ops
    tokens = torch.cat([mask.keep.new_zeros(len(video), 1), mask.keep + 1], dim=1)  # the class token's id is 0
    pred = model.decode(ops.gather_tokens(model.encode(video), tokens), *mask)
    return ops.patch_loss(pred, video, mask.masked, patch_size=config.target_patch_size, frames=config.frames)


class Step:
    """One training step a call, of a model that is given or made."""

    def __init__(self, config, clips, *, encoder="sparse", model=None):
        torch.manual_seed(0)
        self.model, self.encoder = model or MaskedAutoencoder(config), encoder
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        generator = torch.Generator().manual_seed(1)
        self.video = torch.randint(0, 256, (clips, *config.video_shape), dtype=torch.uint8, generator=generator)
        self.mask = self.model.sample_mask(clips, mask_ratio=config.mask_ratio, generator=generator)

    def __call__(self):
        dtype, _ = choose_precision("auto", torch.device("cpu"))
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            loss = forward(self.model, self.video, self.mask, self.encoder)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def alternate(sides, rounds, clock=time.process_time):
    """Seconds of ``clock`` of a call of each of ``sides`` {name: function}: {name: [seconds, ...]}, the sides by turns."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start = clock()
            side()
            if number:  # the first one packs weights and allocates
                seconds[name].append(clock() - start)
    return seconds


def exponent(xs, ys):
    """The slope of the straight line through (log x, log y), least squares: y grows as x to this power."""
    logs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean = [sum(values) / len(values) for values in logs]
    return sum((x - mean[0]) * (y - mean[1]) for x, y in zip(*logs)) / sum((x - mean[0]) ** 2 for x in logs[0])


def measure_large(rounds, clips=2):
    """ViT-L's training step: processor seconds of {"dense", "sparse"}, medians of ``rounds``.

    With fewer clips AdamW's pass over the weights, the same for both, would be a large part of it.
    """
    config = large().config
    sparse = Step(config, clips)
    sides = {"dense": Step(config, clips, encoder="dense", model=sparse.model), "sparse": sparse}
    seconds = alternate(sides, rounds)
    return {"clips": clips, "rounds": rounds, **{name: statistics.median(values) for name, values in seconds.items()}}


def measure_tokens(rounds, frames=FRAMES):
    """Seconds of a step on one clip for each number of tokens, sparse and dense, with the FLOPs of the same."""
    rows = []
    for length in frames:
        config = SMALL.replace(num_frames=length)
        sparse = Step(config, 1)
        sides = {"sparse": sparse, "dense": Step(config, 1, encoder="dense", model=sparse.model)}
        seconds = alternate(sides, rounds if config.num_tokens < 5000 else 1)
        row = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append({"tokens": config.num_tokens, **row, "gflops": {name: small_gflops(config, name) for name in row}})
        print(rows[-1], flush=True)
    return rows


def small_gflops(config, encoder):
    """Of the forward pass on one clip."""
    with torch.device("meta"):
        model = MaskedAutoencoder(config)
    video = torch.empty(1, *config.video_shape, dtype=torch.uint8, device="meta")
    mask = Mask(*(ids.to("meta") for ids in model.sample_mask(1, device="cpu")))
    return gflops(lambda: forward(model, video, mask, encoder))


def measure_clips(rounds, counts=CLIPS):
    """Seconds of a step for each number of clips, 1568 tokens each."""
    seconds = alternate({count: Step(SMALL, count) for count in counts}, rounds)
    return [{"clips": count, "sparse": statistics.median(values)} for count, values in seconds.items()]


def measure_ratios(rounds, ratios=RATIOS):
    """Seconds of a step on two clips for each mask ratio; at 0 the dense encoder, and the decoder as at 0.9."""
    sides = {ratio: Step(SMALL.replace(mask_ratio=ratio), 2) if ratio else Step(SMALL, 2, encoder="dense") for ratio in ratios}
    seconds = alternate(sides, rounds)
    return [{"ratio": ratio, "seconds": statistics.median(values)} for ratio, values in seconds.items()]


def measure_threads(rounds, clips=2):
    """A step with one thread and with two, alternating: processor time (medians), and time by the clock (the least of all rounds,
    since other work on the machine only adds to it)."""
    before, found = torch.get_num_threads(), []
    step = Step(SMALL, clips)
    try:
        processor_times, clock_times = {1: [], 2: []}, {1: [], 2: []}
        for number in range(rounds + 1):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                start = time.process_time(), time.perf_counter()
                step()
                if number:
                    processor_times[threads].append(time.process_time() - start[0])
                    clock_times[threads].append(time.perf_counter() - start[1])
        for threads in (1, 2):
            found.append(
                {"threads": threads, "processor": statistics.median(processor_times[threads]), "clock": min(clock_times[threads])}
            )
    finally:
        torch.set_num_threads(before)
    return found


def summary(found):
    """The numbers that the page states, from those that were measured."""
    flops, steps, tokens = found["large"]["gflops"], found["large"]["step"], found["tokens"]
    counts = [row["tokens"] for row in tokens]
    clips = found["clips"]
    threads = {row["threads"]: row for row in found["threads"]}
    return {
        "flops_ratio": flops["dense"] / flops["sparse"],
        "time_ratio": steps["dense"] / steps["sparse"],
        **{f"tokens_{name}": exponent(counts, [row[name] for row in tokens]) for name in PAPER},
        **{f"tokens_{name}_last": exponent(counts[-3:], [row[name] for row in tokens[-3:]]) for name in PAPER},
        **{f"tokens_{name}_gflops": exponent(counts, [row["gflops"][name] for row in tokens]) for name in PAPER},
        **{f"tokens_{name}_gflops_last": exponent(counts[-3:], [row["gflops"][name] for row in tokens[-3:]]) for name in PAPER},
        "visible": exponent([1 - row["ratio"] for row in found["ratios"]], [row["seconds"] for row in found["ratios"]]),
        "clips": exponent([row["clips"] for row in clips], [row["sparse"] for row in clips]),
        "two_threads_clock": threads[1]["clock"] / threads[2]["clock"],
        "two_threads_processor": threads[2]["processor"] / threads[1]["processor"],
    }


def table_rows(found):
    """The rows of the page's two tables, as words."""
    numbers, counted, step = found["summary"], found["large"]["gflops"], found["large"]["step"]
    tokens = [row["tokens"] for row in found["tokens"]]
    span, last = f"{tokens[0]:,} to {tokens[-1]:,}", f"{tokens[-3]:,} to {tokens[-1]:,}"
    ratios = {row["ratio"]: row["seconds"] / found["ratios"][0]["seconds"] for row in found["ratios"]}
    versus = [
        ["FLOPs, dense", f"{PAPER['dense']} G", f"{counted['dense']:.1f} G"],
        ["FLOPs, sparse", f"{PAPER['sparse']} G", f"{counted['sparse']:.1f} G"],
        ["FLOPs, sparse, as the kernels compute it", "-", f"{counted['ops']:.1f} G"],
        ["FLOPs, ratio", f"{PAPER['dense'] / PAPER['sparse']:.1f}x", f"{numbers['flops_ratio']:.1f}x"],
        ["time of a training step, ratio", f"{PAPER_SPEED}x", f"{step['dense'] / step['sparse']:.1f}x"],
    ]
    growth = [
        [f"tokens a clip, {span}, {name}", f"{numbers[f'tokens_{name}']:.2f}", f"{numbers[f'tokens_{name}_gflops']:.2f}"]
        for name in PAPER
    ]
    growth += [
        [f"the same, {last}, {name}", f"{numbers[f'tokens_{name}_last']:.2f}", f"{numbers[f'tokens_{name}_gflops_last']:.2f}"]
        for name in PAPER
    ]
    growth.append([f"clips a step, {CLIPS[0]} to {CLIPS[-1]}", f"{numbers['clips']:.2f}", "1.00"])
    growth.append(["visible tokens of 1568, 5 to 100 %", f"{numbers['visible']:.2f}", "-"])
    masked = [[f"{ratio:.0%}", f"{value:.2f}"] for ratio, value in ratios.items()]
    return versus + growth + masked


def draw(found, path):
    """Four panels: FLOPs and time beside the paper's; growth over tokens, clips and mask ratio."""
    from matplotlib.figure import Figure

    figure, numbers = Figure(figsize=(13, 3.2)), summary(found)
    bars, tokens, clips, ratios = figure.subplots(1, 4)
    flops, step = found["large"]["gflops"], found["large"]["step"]
    rows = [PAPER, flops, {name: flops["sparse"] * step[name] / step["sparse"] for name in PAPER}]
    for number, values in enumerate(rows):
        for shift, name in enumerate(PAPER):
            bars.bar(number + 0.4 * shift, values[name], 0.38, color=f"C{shift}", label=name if not number else None)
        bars.text(number + 0.2, 655, f"{values['dense'] / values['sparse']:.1f}x", ha="center", fontsize=8)
    bars.set(title="ViT-L, 90 % masked", ylabel="GFLOPs a clip", ylim=(0, 950))
    bars.set_xticks([0.2, 1.2, 2.2], ["paper", "counted", "time"], fontsize=7)
    bars.legend(fontsize=8, loc="upper right", ncol=2)
    counts = [row["tokens"] for row in found["tokens"]]
    for shift, name in enumerate(PAPER):
        label = f"{name}: exponent {numbers[f'tokens_{name}']:.2f}, at the end {numbers[f'tokens_{name}_last']:.2f}"
        tokens.plot(counts, [row[name] for row in found["tokens"]], "o-", color=f"C{shift}", markersize=3, label=label)
    tokens.set(xscale="log", yscale="log", title="one clip", xlabel="tokens a clip", ylabel="seconds a step")
    clips.plot(*zip(*((row["clips"], row["sparse"]) for row in found["clips"])), "o-", color="C1", markersize=3)
    clips.set(xscale="log", yscale="log", title=f"1568 tokens: exponent {numbers['clips']:.2f}", xlabel="clips a step")
    ratios.plot(
        *zip(*((row["ratio"], row["seconds"] / found["ratios"][0]["seconds"]) for row in found["ratios"])), "o-", markersize=3
    )
    ratios.set(title="two clips of 1568 tokens", xlabel="mask ratio", ylabel="of the dense step's time", ylim=(0, None))
    tokens.set_ylim(top=200)  # room for the legend
    tokens.legend(fontsize=6, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs"), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "precision": choose_precision("auto", torch.device("cpu"))[1],
        "large": {"gflops": count_large()},
    }
    print(found, flush=True)
    for name, measure in (
        ("clips", measure_clips),
        ("ratios", measure_ratios),
        ("threads", measure_threads),
        ("tokens", measure_tokens),
    ):
        found[name] = measure(arguments.rounds)
        print(name, found[name], flush=True)
    found["large"]["step"] = measure_large(max(1, arguments.rounds - 1))  # half a minute a round
    found["summary"] = summary(found)
    print(found["summary"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "cost.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, arguments.output / "cost.png")


if __name__ == "__main__":
    main()
