"""The paper's ablations in small: mask strategy, target, decoder width and depth, repeated sampling.

    python -m studies.ablations     # from the repository's root; writes docs/ablations.png and docs/ablations.json

Each run changes one thing of the base: the clips, the model and the training of the study of the mask ratio on its grid of 256
smaller patches, 90 % masked. Runs take equal steps of as many clips; what a setting costs is set beside what it gives. Finished
experiments are kept: the same command continues, and with --finished it writes what there is.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import stmae.training
from stmae.masking import make_mask
from stmae.training.config import ClipConfig
from stmae.training.data.dataset import PretrainClips
from stmae.training.data.video_list import find_videos
from stmae.training.engine.device import keep_freed_memory
from stmae.training.planning.flops import autoencoder_flops

from .mask_ratio import Plan, Study, train_and_probe
from .motion import clips
from .motion.experiments import Experiment, autoencoder
from .motion.page import differences, show, table
from .motion.schedule import load, run
from .record import write_record

EVALUATE_AT = (150, 300, 600)  # steps
REPEATS = (1, 2, 4)
SMALL, LARGE = {"patch_size": 4}, {"image_size": 64}  # grids of 256 tokens; patches of HOG are 8 x 8 pixels at least

# {name: (changes of the study of motion's model, clips taken from a loaded one)}; in the order that they run.
SETTINGS = {
    "base": (SMALL, 1),
    "tube-90": ({**SMALL, "mask_strategy": "tube"}, 1),
    "block-90": ({**SMALL, "mask_strategy": "block"}, 1),
    "random-75": ({**SMALL, "mask_ratio": 0.75}, 1),
    "frame-75": ({**SMALL, "mask_strategy": "frame", "mask_ratio": 0.75}, 1),
    "block-75": ({**SMALL, "mask_strategy": "block", "mask_ratio": 0.75}, 1),
    "normalized": ({**SMALL, "target": "normalized_pixels"}, 1),
    "channel-normalized": ({**SMALL, "target": "channel_normalized_pixels"}, 1),
    "width-16": ({**SMALL, "decoder_width": 16}, 1),
    "width-32": ({**SMALL, "decoder_width": 32}, 1),
    "width-128": ({**SMALL, "decoder_width": 128}, 1),
    "repeats-2": (SMALL, 2),
    "repeats-4": (SMALL, 4),
    "depth-2": ({**SMALL, "decoder_depth": 2}, 1),
    "depth-4": ({**SMALL, "decoder_depth": 4}, 1),
    "large-pixels": (LARGE, 1),
    "large-normalized": ({**LARGE, "target": "normalized_pixels"}, 1),
    "large-hog": ({**LARGE, "target": "hog"}, 1),
    "multi-block": ({**SMALL, "mask_strategy": "multi_block"}, 1),
    "depth-8": ({**SMALL, "decoder_depth": 8}, 1),
}


class Row(NamedTuple):
    """A line of an ablation: a setting, or what the paper alone has."""

    label: str
    setting: str | None
    paper: float | None = None
    """its accuracy there, %: ViT-L, 800 epochs, Kinetics-400 after fine-tuning"""
    paper_label: str | None = None
    """what it is called there, where it is something else"""
    short: str | None = None
    """the label in the picture"""


# The paper's decoder is 512 wide, half of its encoder, and 4 blocks deep; the base's 64, half of its encoder, and 1 deep.
ABLATIONS = {
    "mask strategy": (
        Row("random 90 %", "base", 84.4, short="random\n90"),
        Row("tube 90 %", "tube-90", 83.5, short="tube\n90"),
        Row("block 90 %", "block-90", short="block\n90"),
        Row("random 75 %", "random-75", short="random\n75"),
        Row("frame 75 %", "frame-75", 79.1, short="frame\n75"),
        Row("block 75 %", "block-75", 83.2, short="block\n75"),
        Row("frame 87.5 %", None, 75.4, short="frame\n87.5"),
        Row("multi-block", "multi-block", short="multi-\nblock"),
    ),
    "target": (
        Row("pixels", "base", 83.8, short="pixels"),
        Row("normalised pixels", "normalized", 84.4, short="norm."),
        Row("normalised by channel", "channel-normalized", short="norm. by\nchannel"),
        Row("larger frames: pixels", "large-pixels", 83.8, short="large:\npixels"),
        Row("larger frames: normalised pixels", "large-normalized", 84.4, short="large:\nnorm."),
        Row("larger frames: HOG", "large-hog", 84.0, short="large:\nHOG"),
        Row("dVAE tokens", None, 83.8, short="dVAE"),
    ),
    "decoder width": (
        Row("16", "width-16", 80.8, "128", short="1/8"),
        Row("32", "width-32", 83.1, "256", short="1/4"),
        Row("64", "base", 84.4, "512", short="1/2"),
        Row("128", "width-128", 83.7, "1024", short="1"),
    ),
    "decoder depth": (
        Row("1", "base", 83.2),
        Row("2", "depth-2", 83.6),
        Row("4", "depth-4", 84.4),
        Row("8", "depth-8", 84.3),
    ),
    "repeated sampling": (
        Row("1", "base", 83.7),
        Row("2", "repeats-2", 84.3),
        Row("4", "repeats-4", 84.4),
    ),
}
UNITS = {"decoder width": "of the encoder's width", "decoder depth": "blocks", "repeated sampling": "clips from a loaded one"}
PAPER_SPEED = {1: 1.0, 2: 1.8, 4: 3.0}  # of its training by the clock, with the loading

# What the paper finds, as (the better one, the worse one, the paper's difference in points); None: not in the paper.
FINDINGS = {
    "random 90 % above tube 90 %": ("base", "tube-90", 0.9),
    "random 90 % above frame 75 %": ("base", "frame-75", 5.3),
    "random 90 % above block 75 %": ("base", "block-75", 1.2),
    "random 90 % above block 90 %": ("base", "block-90", None),
    "random 75 % above frame 75 %": ("random-75", "frame-75", None),
    "random 75 % above block 75 %": ("random-75", "block-75", None),
    "normalised pixels above pixels": ("normalized", "base", 0.6),
    "larger frames: normalised pixels above pixels": ("large-normalized", "large-pixels", 0.6),
    "larger frames: HOG above pixels": ("large-hog", "large-pixels", 0.2),
    "larger frames: normalised pixels above HOG": ("large-normalized", "large-hog", 0.4),
    "decoder width: half of the encoder's above an eighth": ("base", "width-16", 3.6),
    "decoder width: half of the encoder's above a quarter": ("base", "width-32", 1.3),
    "decoder width: half of the encoder's above all": ("base", "width-128", 0.7),
    "decoder depth: 2 above 1": ("depth-2", "base", 0.4),
    "decoder depth: 4 above 1": ("depth-4", "base", 1.2),
    "decoder depth: 4 above 2": ("depth-4", "depth-2", 0.8),
    "decoder depth: 4 above 8": ("depth-4", "depth-8", 0.1),
    "repeated sampling: 2 above 1": ("repeats-2", "base", 0.6),
    "repeated sampling: 4 above 1": ("repeats-4", "base", 0.7),
}


def all_experiments(seeds):
    """All experiments: the base of every seed, whose spread tells what a difference means, then a seed after the other."""
    runs = [("base", seed) for seed in seeds] + [(name, seed) for seed in seeds for name in SETTINGS if name != "base"]
    experiments = [Experiment("loading", "loading", {"rounds": 9})]
    for name, seed in runs:
        changes, repeats = SETTINGS[name]
        arguments = {"changes": changes, "repeats": repeats, "evaluate_at": list(EVALUATE_AT), "seed": seed}
        experiments.append(Experiment(name_of(name, seed), "ablation", arguments))
    return experiments


def name_of(setting, seed):
    return f"{setting}-seed{seed}"


def ablation(study, results, changes, repeats, evaluate_at, seed):
    """One pre-training: accuracy of the linear probe and mean loss after each of ``evaluate_at`` steps, and what a clip costs."""
    keep_freed_memory()
    model = autoencoder(study.plan, seed, **changes)
    label = ", ".join(f"{key} {value}" for key, value in changes.items())
    found = train_and_probe(study, model, seed, evaluate_at, f"{label}, {repeats} repeats", repeats)
    visible, masked = mean_counts(model)
    gflops = autoencoder_flops(model.config, visible, masked)[1] / 1e9
    return {**found, "tokens": model.config.num_tokens, "visible": visible, "gflops_a_clip": gflops}


def mean_counts(model, clips=256):
    """(visible, reconstructed) tokens of a clip; under multi-block masks, whose clips differ, the mean of some."""
    config = model.config
    if config.mask_strategy != "multi_block":
        counts = config.token_counts()
        return counts.visible, counts.reconstructed
    masks = model.sample_masks([config.grid] * clips, generator=torch.Generator().manual_seed(0))
    visible = sum(len(mask.keep) for mask in masks) / clips
    return visible, config.num_tokens - visible


def loading(study, results, rounds):
    """Milliseconds of processor time that the loader takes for a clip, by the number of clips from an opened video: {"repeats":
    {number: median over ``rounds``}}, alternating; the demonstration's videos, clips of 16 frames of 224 x 224."""
    videos = find_videos(Path(stmae.training.__file__).parent / "assets")

    def sample_mask(generator):
        return make_mask("random", 1, (8, 14, 14), 0.9, generator=generator)

    sets = {
        count: PretrainClips(videos, ClipConfig(repeats=count), frames=16, size=(224, 224), sample_mask=sample_mask, seed=0)
        for count in REPEATS
    }
    taken = {count: [] for count in REPEATS}
    for number in range(rounds + 1):
        for count, data in sets.items():
            start = time.process_time()
            for video in range(len(data)):
                data[number, video]
            if number:  # the first one loads libraries and files
                taken[count].append(1e3 * (time.process_time() - start) / (count * len(data)))
    return {"videos": len(videos), "milliseconds": {count: statistics.median(values) for count, values in taken.items()}}


class Results:
    """What was found, {name of an experiment: its numbers}."""

    def __init__(self, found, seeds):
        self.found, self.seeds = found, seeds

    def of(self, setting):
        names = {seed: name_of(setting, seed) for seed in self.seeds}
        return {seed: self.found[name] for seed, name in names.items() if name in self.found}

    def accuracy(self, setting, step=EVALUATE_AT[-1]):
        """{seed: number}"""
        return {seed: found["accuracy"][str(step)] for seed, found in self.of(setting).items()}

    def one(self, setting, key):
        """A number that is the same for every seed; None if none was run."""
        return next((found[key] for found in self.of(setting).values()), None)

    def spread(self):
        """Of the base's accuracy over the seeds: highest less lowest."""
        values = self.accuracy("base").values()
        return max(values) - min(values)


def verdict(values, spread):
    """Of paired differences, one per seed: decided where all seeds of two or more agree, and the mean is more than ``spread``."""
    if not values:
        return "not run"
    if len(values) < 2:
        return "one seed"
    mean = sum(values) / len(values)
    if abs(mean) <= spread or min(values) < 0 < max(values):
        return "undecided"
    return "yes" if mean > 0 else "**no**"


def ablation_table(results, name):
    """Rows of an ablation: the paper's accuracy, what a clip costs and ours after each number of steps."""
    cost = results.one("base", "gflops_a_clip")
    rows = []
    for row in ABLATIONS[name]:
        paper = "-" if row.paper is None else f"{row.paper:.1f}" + (f" ({row.paper_label})" if row.paper_label else "")
        if row.setting is None:
            rows.append([row.label, paper, *["-"] * (2 + len(EVALUATE_AT[1:]))])
            continue
        gflops, visible = results.one(row.setting, "gflops_a_clip"), results.one(row.setting, "visible")
        costs = ["-", "-"] if gflops is None else [f"{visible:.0f}", f"{gflops / cost:.2f}x"]
        rows.append([row.label, paper, *costs, *(show(results.accuracy(row.setting, step)) for step in EVALUATE_AT[1:])])
    head = [name, "paper", "visible tokens", "FLOPs a clip", *(f"{step} steps" for step in EVALUATE_AT[1:])]
    return table(head, rows)


def findings_table(results):
    rows = []
    for finding, (better, worse, paper) in FINDINGS.items():
        values = differences(results.accuracy(better), results.accuracy(worse))
        each = ", ".join(f"{100 * value:+.1f}" for value in values)
        mean = f"{100 * sum(values) / len(values):+.1f} ({each})" if values else "not run"
        rows.append([finding, "-" if paper is None else f"{paper:+.1f}", mean, verdict(values, results.spread())])
    return table(["finding", "paper", "here", "seen here"], rows)


def loading_table(results):
    """What repeats save: at equal clips into the model, those loaded; and at equal clips loaded, accuracy."""
    taken = results.found["loading"]["milliseconds"]
    rows = []
    for count in REPEATS:
        setting = "base" if count == 1 else f"repeats-{count}"
        step = EVALUATE_AT[-1] * count // max(REPEATS)
        rows.append(
            [
                count,
                f"{PAPER_SPEED[count]:.1f}x",
                f"{taken[str(count)]:.1f} ms",
                f"{taken['1'] / taken[str(count)]:.1f}x",
                show(results.accuracy(setting)),
                show(results.accuracy(setting, step)),
            ]
        )
    last = EVALUATE_AT[-1]
    loaded = Plan().batch * last // max(REPEATS)
    head = ["repeats", "paper: speed", "loader, a clip", "loader: speed", f"{last} steps", f"{loaded:,} clips loaded"]
    return table(head, rows)


def texts(results):
    """The page's tables."""
    return [*(ablation_table(results, name) for name in ABLATIONS), loading_table(results), findings_table(results)]


def draw(results, path):
    """A column for each ablation: ours, the mean of the seeds and, of the last step, a point for each, over the paper's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 6))
    width_ratios = [len(rows) + 1 for rows in ABLATIONS.values()]
    ours, papers = figure.subplots(2, len(ABLATIONS), width_ratios=width_ratios)
    for (name, rows), axis, paper in zip(ABLATIONS.items(), ours, papers):
        for x, row in enumerate(rows):
            colour = "C1" if row.setting == "base" else "C0"
            for step, width, alpha in zip(EVALUATE_AT[:0:-1], (0.8, 0.5), (0.5, 1.0)):
                values = [100 * value for value in results.accuracy(row.setting, step).values()]
                if values:
                    axis.bar(x, sum(values) / len(values), width, color=colour, alpha=alpha)
                    axis.plot([x] * len(values), values, "k.", markersize=4 if step == EVALUATE_AT[-1] else 0)
            if not results.of(row.setting):
                axis.text(x, 3, "not run" if row.setting else "paper only", rotation=90, ha="center", va="bottom", fontsize=8)
            if row.paper is not None:
                paper.bar(x, row.paper, 0.8, color="C2")
                paper.text(x, row.paper + 0.15, f"{row.paper:.1f}", ha="center", fontsize=8)
            else:
                paper.text(x, 74.3, "no number", rotation=90, ha="center", va="bottom", fontsize=8)
        axis.set(title=name, ylim=(0, 100))
        axis.axhline(100 / len(clips.CLASSES), color="grey", linewidth=0.8, linestyle=":")
        paper.set(ylim=(74, 86), xlabel=UNITS.get(name))
        for side in (axis, paper):
            side.set_xticks(range(len(rows)), [row.short or row.label for row in rows], fontsize=7)
            side.set_xlim(-0.6, len(rows) - 0.4)
    ours[0].set_ylabel(f"here: linear probe, %, after\n{EVALUATE_AT[-2]} (dark) and {EVALUATE_AT[-1]} steps")
    papers[0].set_ylabel("paper: fine-tuned, %\n(the axis starts at 74)")
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})


def write(output, plan, seeds, experiments, records):
    """ablations.json and its picture in ``output``; records: of the experiments that are finished, {name: record}."""
    found = write_record(
        output / "ablations.json", plan, seeds, records, finished_experiments=len(records), experiments_in_all=len(experiments)
    )
    results = Results(found, seeds)
    draw(results, output / "ablations.png")
    print(*texts(results), sep="\n\n")


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--images", default=clips.DEBIAN, help="folder with Fashion-MNIST's image files (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="(default: %(default)s)")
    parser.add_argument(
        "--work", default="runs/ablations_study", help="where finished experiments are kept (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=2, help="side by side, of one thread each (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--finished", action="store_true", help="run nothing; write what is finished")
    arguments = parser.parse_args()
    experiments, plan = all_experiments(arguments.seeds), Plan()
    study = Study(arguments.images, plan, arguments.work, "studies.ablations")
    if arguments.finished:
        work = Path(arguments.work)
        records = {item.name: record for item in experiments if (record := load(work, study, item))}
        if not {"loading", name_of("base", arguments.seeds[0])} <= set(records):
            sys.exit(f"error: {work}: the loading and the base of seed {arguments.seeds[0]} are not finished")
    else:
        try:
            clips.load_pictures(arguments.images)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        records = run(study, experiments, arguments.processes)
    write(arguments.output, plan, arguments.seeds, experiments, records)


if __name__ == "__main__":
    main()
