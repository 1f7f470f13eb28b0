"""The study of mixed clips: what does a model learn from clips of many lengths and sizes, at equal tokens?

    python -m studies.mixture       # from the repository's root; writes docs/mixed-clips.png and docs/mixed-clips.json

Two models are trained on the clips of the study of motion (docs/results.md), alike but for the shapes of the clips: one on the
standard shape, one on a mixture of shapes in packed batches (docs/packed.md) that have as many tokens. Both are probed on the
standard shape, on the others of the mixture, and on shapes that neither was trained on. Finished experiments are kept: the same
command continues.
"""

import argparse
import datetime
import json
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from stmae.training.engine.device import keep_freed_memory

from .averaged_training import AveragedTraining
from .motion import clips
from .motion.experiments import Experiment, autocast, autoencoder, linear
from .motion.page import agreement, differences, show, table
from .motion.schedule import run
from .processor import processor

PATCH = (2, 8, 8)
STANDARD = (8, 32, 32)  # frames, height, width
MIXTURE = (STANDARD, (4, 32, 32), (16, 32, 32), (8, 24, 48), (8, 48, 24), (4, 48, 48), (16, 24, 24))
UNSEEN = ((12, 40, 40), (6, 24, 64))
TESTED = MIXTURE + UNSEEN
SHAPES = {
    "standard": (STANDARD,),
    "mixture": MIXTURE,
    "lengths": tuple(shape for shape in MIXTURE if shape[1:] == STANDARD[1:]),
    "sizes": tuple(shape for shape in MIXTURE if shape[0] == STANDARD[0]),
}
MODELS, PARTS = ("standard", "mixture"), ("lengths", "sizes")  # trained with every seed, with the first
CELLS = 4  # of features along each of time, height and width, whatever the grid


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number that the results depend on, but for the pictures, the shapes and the seeds."""

    unlabelled: int = 8400
    train: int = 400
    test: int = 1000
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    decoder_width: int = 64
    mask_ratio: float = 0.75
    tokens: int = 2048
    """of a step, masked ones too: 32 standard clips"""
    steps: int = 1000
    long_steps: int = 6000
    """of one more run of each, of the first seed"""
    lr: float = 3e-3
    warmup: int = 60
    average: float = 0.98

    def to_dict(self):
        return asdict(self)

    def read_by(self, function):
        return {key: value for key, value in self.to_dict().items() if key != "long_steps" or function == "train_longer"}


@dataclass(frozen=True)
class Study:
    """What every experiment is given besides its arguments."""

    pictures: str
    plan: Plan
    work: str
    functions: str = "studies.mixture"

    def part(self, name, count, seed, shape):
        return _part(self.pictures, name, count, seed, shape)


@lru_cache(maxsize=len(MIXTURE))
def _part(folder, name, count, seed, shape):
    return clips.make_part(*_pictures(folder), name, count, seed, frames=shape[0], size=shape[1:])


@lru_cache(maxsize=1)
def _pictures(folder):
    return clips.load_pictures(folder)


def all_experiments(seeds):
    experiments = [Experiment(f"{name}-seed{seed}", "train", {"name": name, "seed": seed}) for seed in seeds for name in MODELS]
    parts = [Experiment(f"{name}-seed{seeds[0]}", "train", {"name": name, "seed": seeds[0]}) for name in PARTS]
    longer = [Experiment(f"{name}-longer", "train_longer", {"name": name, "seed": seeds[0]}) for name in MODELS]
    return experiments + parts + longer


def num_tokens(shape):
    return shape[0] // PATCH[0] * (shape[1] // PATCH[1]) * (shape[2] // PATCH[2])


def draw_batch(shapes, tokens, generator):
    """[count of each of ``shapes``]: clips are added, each of a shape drawn at random, while they fit into ``tokens``."""
    counts, left = [0] * len(shapes), tokens
    while True:
        index = torch.randint(len(shapes), (), generator=generator).item()
        if num_tokens(shapes[index]) > left:
            return counts
        counts[index] += 1
        left -= num_tokens(shapes[index])


def train_longer(study, results, name, seed):
    """The same as ``train``, which goes on to the plan's ``long_steps``."""
    return train(study, results, name, seed, study.plan.long_steps)


def train(study, results, name, seed, steps=None):
    """One pre-training: accuracy of the linear probe on each of TESTED, the last loss, and tokens and clips of all steps."""
    keep_freed_memory()
    plan, shapes = study.plan, SHAPES[name]
    steps = plan.steps if steps is None else steps
    parts = [study.part("unlabelled", plan.unlabelled // len(shapes), seed, shape) for shape in shapes]
    model = autoencoder(plan, seed, mask_ratio=plan.mask_ratio)
    training = AveragedTraining(model, plan)
    generator = torch.Generator().manual_seed(seed)
    tokens, seen = 0, 0
    for step in range(1, steps + 1):
        counts = draw_batch(shapes, plan.tokens, generator)
        videos = []
        for part, count in zip(parts, counts):
            rows = torch.randint(len(part.labels), (count,), generator=generator)
            videos += part.video(rows).unbind()
        tokens += sum(count * num_tokens(shape) for count, shape in zip(counts, shapes))
        seen += len(videos)
        training.step(videos, generator)
        if step % 100 == 0:
            print(f"  {name}, seed {seed}, step {step}: loss {training.mean_loss:.3f}", flush=True)
    accuracy = {}
    for shape in TESTED:
        train, test = (study.part(part, getattr(plan, part), seed, shape) for part in ("train", "test"))
        x, test_x = features(training.averaged, train), features(training.averaged, test)
        accuracy[show_shape(shape)] = linear(x, train.labels, test_x, test.labels, len(clips.CLASSES), seed)
    return {"accuracy": accuracy, "loss": training.mean_loss, "tokens": tokens, "clips": seen}


@torch.no_grad()
def features(model, part, batch=50):
    """[n, CELLS**3 * D]: the encoder's tokens averaged over the cells of a grid that is the same for every shape."""
    outputs = []
    for start in range(0, len(part.labels), batch):
        videos = list(part.video(slice(start, start + batch)).unbind())
        with autocast():
            tokens = torch.stack(model.encode(videos)).float()  # [B, N, D]: without a class token
        t, h, w = (side // patch for side, patch in zip((part.clips.shape[1:4]), PATCH))
        volume = tokens.transpose(1, 2).unflatten(2, (t, h, w))
        outputs.append(F.adaptive_avg_pool3d(volume, CELLS).flatten(1))
    return torch.cat(outputs)


def show_shape(shape):
    return "x".join(map(str, shape))


def rows(found, seeds):
    """Rows of (shape, its tokens, whether it was in the mixture, accuracy of both models, their difference, agreement)."""
    lines = []
    for shape in TESTED:
        name = show_shape(shape)
        ours, theirs = (
            {seed: found[f"{kind}-seed{seed}"]["accuracy"][name] for seed in seeds if f"{kind}-seed{seed}" in found}
            for kind in ("mixture", "standard")
        )
        values = differences(ours, theirs)
        margin = f"{100 * sum(values) / len(values):+.1f} ({', '.join(f'{100 * value:+.1f}' for value in values)})"
        trained = "both" if shape == STANDARD else "neither" if shape in UNSEEN else "mixture"
        lines.append([name, num_tokens(shape), trained, show(theirs), show(ours), margin, agreement(values)])
    return lines


def text(found, seeds):
    """The page's table."""
    head = ["clips tested", "tokens", "trained on by", "standard", "mixture", "difference", "mixture is ahead"]
    return table(head, rows(found, seeds))


def longer_text(found):
    """The page's second table: the longer runs, of one seed."""
    lines = []
    for shape in TESTED:
        name = show_shape(shape)
        theirs, ours = (found[f"{kind}-longer"]["accuracy"][name] for kind in MODELS)
        lines.append([name, f"{100 * theirs:.1f}", f"{100 * ours:.1f}", f"{100 * (ours - theirs):+.1f}"])
    return table(["clips tested", "standard", "mixture", "difference"], lines)


def parts_text(found, seed):
    """The page's third table: the models of one seed, by what was mixed."""
    kinds = (MODELS[0], *PARTS, MODELS[1])
    lines = []
    for shape in TESTED:
        accuracy = [found[f"{kind}-seed{seed}"]["accuracy"][show_shape(shape)] for kind in kinds]
        lines.append([show_shape(shape), *(f"{100 * value:.1f}" for value in accuracy)])
    return table(["clips tested", "standard", "lengths mixed", "sizes mixed", "both"], lines)


def draw(found, seeds, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4))
    axis = figure.subplots()
    for shift, name in enumerate(MODELS):
        for x, shape in enumerate(TESTED):
            values = [100 * found[f"{name}-seed{seed}"]["accuracy"][show_shape(shape)] for seed in seeds]
            axis.bar(x + 0.4 * shift, sum(values) / len(values), 0.38, color=f"C{shift}", alpha=0.6, label=None if x else name)
            axis.plot([x + 0.4 * shift] * len(values), values, "k.", markersize=4)
    names = [
        show_shape(shape) + ("\n(new)" if shape in UNSEEN else "\n(standard)" if shape == STANDARD else "") for shape in TESTED
    ]
    axis.set_xticks([x + 0.2 for x in range(len(TESTED))], names, fontsize=8)
    axis.axhline(100 / len(clips.CLASSES), color="grey", linewidth=0.8, linestyle=":")
    axis.set(ylim=(0, 100), ylabel="linear probe, %", xlabel="clips tested: frames x height x width")
    axis.legend(title="trained on", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})


def write(output, plan, seeds, records):
    """mixed-clips.json and its picture in ``output``; records: of all experiments, {name: record}."""
    found = {name: record["found"] for name, record in records.items()}
    everything = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": sorted({record["torch"] for record in records.values()}),
        "precision": sorted({record["precision"] for record in records.values()}),
        "cpu_minutes": sum(record["cpu_seconds"] for record in records.values()) / 60,
        "plan": plan.to_dict(),
        "seeds": list(seeds),
        "experiments": found,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "mixed-clips.json").write_text(json.dumps(everything, indent=1) + "\n")
    draw(found, seeds, output / "mixed-clips.png")
    print(text(found, seeds), parts_text(found, seeds[0]), longer_text(found), sep="\n\n")


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.mixture", description=__doc__.splitlines()[0])
    parser.add_argument("--images", default=clips.DEBIAN, help="folder with Fashion-MNIST's image files (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="(default: %(default)s)")
    parser.add_argument("--work", default="runs/mixture_study", help="where finished experiments are kept (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="side by side, of one thread each (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    arguments = parser.parse_args()
    try:
        clips.load_pictures(arguments.images)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    plan = Plan()
    records = run(Study(arguments.images, plan, arguments.work), all_experiments(arguments.seeds), arguments.processes)
    write(arguments.output, plan, arguments.seeds, records)


if __name__ == "__main__":
    main()
