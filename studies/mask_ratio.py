"""The study of the mask ratio: where is its optimum, and what moves it?

    python -m studies.mask_ratio    # from the repository's root; writes docs/mask-ratio.png and docs/mask-ratio.json

In the study of motion (docs/results.md) 90 % masked loses to 75 and 50 %, where the paper has its optimum. Its clips have 64
tokens, the paper's 1568. Here the ratio is varied on grids of more tokens, got in three ways (smaller patches, larger frames,
longer clips), and along the training, so that ratios are compared after equal steps and after equal FLOPs.

The clips, the model and the optimiser are those of the study of motion. The learning rate stays constant after its warm-up, and
what is probed is a running average of the weights, so that every point of a run is the end of a shorter one. Finished experiments
are kept: the same command continues.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from stmae.masking import num_keep
from stmae.training.engine.device import keep_freed_memory
from stmae.training.planning.flops import autoencoder_flops

from .averaged_training import AveragedTraining
from .motion import clips
from .motion.experiments import Experiment, autoencoder, in_batches, linear
from .motion.page import show, table
from .motion.schedule import run
from .record import write_record


class Grid(NamedTuple):
    """A way to cut clips into tokens."""

    name: str
    frames: int
    size: int
    patch: int
    evaluate_at: tuple[int, ...]
    """steps after which the features are probed"""

    def changes(self):
        """Of the study of motion's model."""
        return {"num_frames": self.frames, "image_size": self.size, "patch_size": self.patch}


GRIDS = (
    Grid("64 tokens", 8, 32, 8, (150, 300, 600, 1200, 1800)),
    Grid("256, smaller patches", 8, 32, 4, (150, 300, 600)),
    Grid("256, larger frames", 8, 64, 8, (150, 300, 600)),
    Grid("128, longer clips", 16, 32, 8, (150, 300, 600)),
)
RATIOS = (0.5, 0.75, 0.9, 0.95)
CELLS = 4  # of features along each of time, height and width: tokens are averaged to these, so that all grids' are as many


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number that the results depend on, but for the pictures, the grids and the seeds."""

    unlabelled: int = 8192
    train: int = 400
    test: int = 1000
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    decoder_width: int = 64
    batch: int = 64
    lr: float = 3e-3
    warmup: int = 60
    average: float = 0.98

    def to_dict(self):
        return asdict(self)

    def read_by(self, function):
        return self.to_dict()


@dataclass(frozen=True)
class Study:
    """What every experiment is given besides its arguments."""

    pictures: str
    plan: Plan
    work: str
    functions: str = "studies.mask_ratio"

    def part(self, name, seed, frames, size):
        return _part(self.pictures, getattr(self.plan, name), name, seed, frames, size)


@lru_cache(maxsize=3)
def _part(folder, count, name, seed, frames, size):
    return clips.make_part(*_pictures(folder), name, count, seed, frames=frames, size=(size, size))


@lru_cache(maxsize=1)
def _pictures(folder):
    return clips.load_pictures(folder)


def all_experiments(seeds, grids=GRIDS, ratios=RATIOS):
    """All experiments, a seed after the other, and in it a grid after the other."""
    return [
        Experiment(
            name_of(grid, ratio, seed),
            "curve",
            {**grid._asdict(), "evaluate_at": list(grid.evaluate_at), "ratio": ratio, "seed": seed},
        )
        for seed in seeds
        for grid in grids
        for ratio in ratios
    ]


def curve(study, results, ratio, seed, **grid):
    """One pre-training: accuracy of the linear probe and mean loss after each of ``evaluate_at`` steps, and what a step costs."""
    keep_freed_memory()
    plan, grid = study.plan, Grid(**{**grid, "evaluate_at": tuple(grid["evaluate_at"])})
    model = autoencoder(plan, seed, mask_ratio=ratio, **grid.changes())
    found = train_and_probe(study, model, seed, grid.evaluate_at, f"{grid.name}, {ratio:.0%}")
    return {
        **found,
        "tokens": model.config.num_tokens,
        "visible": num_keep("random", model.config.grid, ratio),
        "gflops_a_step": plan.batch * autoencoder_flops(model.config)[1] / 1e9,
    }


def train_and_probe(study, model, seed, evaluate_at, name, repeats=1):
    """Pre-trains on ``plan.batch`` clips a step, each clip ``repeats`` times under masks of its own. Returns the linear probe's
    accuracy and the mean loss after each of ``evaluate_at`` steps, {step: number}. name: for the lines that it prints."""
    plan, config = study.plan, model.config
    unlabelled, train, test = (
        study.part(part, seed, config.num_frames, config.image_size[0]) for part in ("unlabelled", "train", "test")
    )
    training, distinct = AveragedTraining(model, plan), plan.batch // repeats
    generator = torch.Generator().manual_seed(seed)
    order, accuracy, mean_loss = torch.empty(0, dtype=torch.long), {}, {}
    for step in range(1, max(evaluate_at) + 1):
        if len(order) < distinct:
            order = torch.cat([order, torch.randperm(len(unlabelled.labels), generator=generator)])
        rows, order = order[:distinct].repeat_interleave(repeats), order[distinct:]
        video = unlabelled.video(rows)
        # Where every clip has its own number of visible tokens, they are packed.
        training.step(list(video.unbind()) if config.mask_strategy == "multi_block" else video, generator)
        if step in evaluate_at:
            x, test_x = features(training.averaged, train), features(training.averaged, test)
            accuracy[step] = linear(x, train.labels, test_x, test.labels, len(clips.CLASSES), seed)
            mean_loss[step] = training.mean_loss
            print(f"  {name}, seed {seed}, step {step}: {100 * accuracy[step]:.1f} %", flush=True)
    return {"accuracy": accuracy, "loss": mean_loss}


def features(model, part):
    """[n, CELLS**3 * D]: the encoder's tokens, those of a cell averaged."""
    grid = model.config.grid
    sides = [size // CELLS for size in grid]

    def of(video):
        tokens = model.encode(video)  # [B, N, D]: without a class token
        return cells(tokens, grid, sides).flatten(1)

    return in_batches(of, part)


def cells(tokens, grid, sides):
    """The mean of each box of ``sides`` (t, h, w) tokens: [B, N, D] -> [B, boxes, D]."""
    (t, h, w), (u, p, q) = grid, sides
    boxes = tokens.view(len(tokens), t // u, u, h // p, p, w // q, q, -1)
    return boxes.mean((2, 4, 6)).flatten(1, 3)


class Results:
    """What was found, {name of an experiment: its numbers}, by grid and ratio: every method gives {seed: number}."""

    def __init__(self, found, seeds):
        self.found, self.seeds = found, seeds

    def of(self, grid, ratio):
        names = {seed: name_of(grid, ratio, seed) for seed in self.seeds}
        return {seed: self.found[name] for seed, name in names.items() if name in self.found}

    def at_step(self, grid, ratio, step):
        return {seed: found["accuracy"][str(step)] for seed, found in self.of(grid, ratio).items()}

    def at_flops(self, grid, ratio, gflops):
        """Between two points of a run, on the straight line over the logarithm of FLOPs; none where the run ends before."""
        values = {}
        for seed, found in self.of(grid, ratio).items():
            steps = [int(step) for step in found["accuracy"]]
            value = interpolate([step * found["gflops_a_step"] for step in steps], list(found["accuracy"].values()), gflops)
            if value is not None:
                values[seed] = value
        return values

    def budget(self, grid):
        """GFLOPs that every ratio's run has reached: all of the cheapest."""
        totals = [max(map(int, x["accuracy"])) * x["gflops_a_step"] for ratio in RATIOS for x in self.of(grid, ratio).values()]
        return min(totals)


def name_of(grid, ratio, seed):
    return f"{grid.frames}x{grid.size}-patch{grid.patch}-{ratio:g}-seed{seed}"


def interpolate(xs, ys, x):
    """y at ``x`` on the straight lines between the points (log x, y); None outside of them. xs ascend."""
    if not xs[0] <= x <= xs[-1]:
        return None
    for (x0, y0), (x1, y1) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        if x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
    return ys[-1]


def best(values):
    """The ratio with the highest mean, of {ratio: {seed: number}}; "" where there is none."""
    means = {ratio: sum(found.values()) / len(found) for ratio, found in values.items() if found}
    return f"{max(means, key=means.get):.0%}" if means else ""


def text(results):
    """The page's table: for each grid accuracies after equal steps, and after equal FLOPs, at every ratio."""
    rows = []
    for grid in GRIDS:
        if not any(results.of(grid, ratio) for ratio in RATIOS):
            continue
        for step in grid.evaluate_at[1:]:
            values = {ratio: results.at_step(grid, ratio, step) for ratio in RATIOS}
            rows.append([grid.name, f"{step} steps", *map(show, values.values()), best(values)])
        budget = results.budget(grid)
        values = {ratio: results.at_flops(grid, ratio, budget) for ratio in RATIOS}
        rows.append([grid.name, f"{budget / 1000:.0f} TFLOPs", *map(show, values.values()), best(values)])
    return table(["grid", "after", *(f"{ratio:.0%}" for ratio in RATIOS), "best"], rows)


def draw(results, path):
    """Accuracy over the mask ratio and over the visible tokens at equal steps, and over FLOPs along the runs of two grids."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.6))
    by_ratio, by_visible, *by_flops = figure.subplots(1, 4)
    step = min(grid.evaluate_at[-1] for grid in GRIDS)
    for number, grid in enumerate(GRIDS):
        found = {ratio: results.of(grid, ratio) for ratio in RATIOS if results.of(grid, ratio)}
        values = {ratio: [100 * x for x in results.at_step(grid, ratio, step).values()] for ratio in found}
        visible = [next(iter(of_seeds.values()))["visible"] for of_seeds in found.values()]
        for axis, xs in ((by_ratio, [100 * ratio for ratio in found]), (by_visible, visible)):
            means = [sum(of_seeds) / len(of_seeds) for of_seeds in values.values()]
            axis.plot(xs, means, "o-", color=f"C{number}", markersize=4, label=grid.name if found else None)
            for x, of_seeds in zip(xs, values.values()):
                axis.plot([x] * len(of_seeds), of_seeds, ".", color=f"C{number}", alpha=0.5, markersize=4)
    for axis, grid in zip(by_flops, GRIDS):
        for number, ratio in enumerate(RATIOS):
            label = f"{ratio:.0%}"
            for found in results.of(grid, ratio).values():
                xs = [int(after) * found["gflops_a_step"] / 1000 for after in found["accuracy"]]
                ys = [100 * accuracy for accuracy in found["accuracy"].values()]
                axis.plot(xs, ys, "o-", color=f"C{number + 4}", markersize=3, label=label)
                label = None  # of the other seeds
        axis.set(title=grid.name, xlabel="TFLOPs of training", xscale="log", xlim=(0.4, 40))
        axis.set_xticks([0.5, 1, 2, 4, 8, 16, 32], [0.5, 1, 2, 4, 8, 16, 32])
        axis.minorticks_off()
    by_ratio.set(title=f"after {step} steps", xlabel="masked, %", xticks=[100 * ratio for ratio in RATIOS])
    by_visible.set(title=f"after {step} steps", xlabel="visible tokens of a clip", xscale="log")
    ticks = [3, 6, 12, 25, 50, 100]
    by_visible.set_xticks(ticks, ticks)
    by_visible.minorticks_off()
    for axis, where in zip((by_ratio, by_visible, *by_flops), ("lower left", "lower right", "upper left", "upper left")):
        axis.axhline(100 / len(clips.CLASSES), color="grey", linewidth=0.8, linestyle=":")
        axis.set(ylim=(0, 100), ylabel="linear probe, %")
        axis.legend(fontsize=7, loc=where)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})


def write(output, plan, seeds, records):
    """mask-ratio.json and its picture in ``output``; records: of the experiments that are finished, {name: record}."""
    found = write_record(output / "mask-ratio.json", plan, seeds, records)
    results = Results(found, seeds)
    draw(results, output / "mask-ratio.png")
    print(text(results))


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.mask_ratio", description=__doc__.splitlines()[0])
    parser.add_argument("--images", default=clips.DEBIAN, help="folder with Fashion-MNIST's image files (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="(default: %(default)s)")
    parser.add_argument(
        "--work", default="runs/mask_ratio_study", help="where finished experiments are kept (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=2, help="side by side, of one thread each (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    arguments = parser.parse_args()
    try:
        clips.load_pictures(arguments.images)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    experiments = all_experiments(arguments.seeds)
    plan = Plan()
    records = run(Study(arguments.images, plan, arguments.work), experiments, arguments.processes)
    write(arguments.output, plan, arguments.seeds, records)


if __name__ == "__main__":
    main()
