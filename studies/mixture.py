"""The study of mixed clips: what does a model learn from clips of many lengths and sizes, at equal tokens?

    python -m studies.mixture       # from the repository's root; writes docs/mixed-clips.png and docs/mixed-clips.json

Models are trained on the clips of the study of motion (docs/results.md), alike but for the shapes of the clips: one on the
standard shape, others on mixtures of shapes in packed batches (docs/packed.md) that have as many tokens. All are probed on the
standard shape and on others. Finished experiments are kept: the same command continues.
"""

import argparse
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
from .record import write_record

PATCH = (2, 4, 4)
STANDARD = (8, 32, 32)  # frames, height, width
MIXTURE = (STANDARD, (4, 32, 32), (8, 24, 24), (4, 48, 48), (4, 24, 48), (4, 48, 24))
UNSEEN = ((16, 32, 32), (8, 24, 48), (6, 24, 64))
TESTED = MIXTURE[:-1] + UNSEEN
SHAPES = {
    "standard": (STANDARD,),
    "mixture": MIXTURE,
    "larger": (STANDARD, (4, 32, 32), (16, 32, 32), (8, 24, 48), (8, 48, 24), (4, 48, 48), (16, 24, 24)),
    "4 and 8 frames": (STANDARD, (4, 32, 32)),
    "8 and 16 frames": (STANDARD, (16, 32, 32)),
    "five sizes": (STANDARD, (8, 24, 48), (8, 48, 24), (8, 48, 48), (8, 24, 24)),
}
MODELS, PARTS = ("standard", "mixture", "larger"), ("4 and 8 frames", "8 and 16 frames", "five sizes")
CONTROLS = (
    21,
    44,
)  # clips of standard batches that have more or fewer tokens, as many clips as batches of "8 and 16 frames", "mixture"
CELLS = 4  # of features along each of time, height and width, whatever the grid
MEASURES = ("few_labels", "accuracy", "transfer")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number that the results depend on, but for the pictures, the shapes and the seeds."""

    unlabelled: int = 8400
    train: int = 400
    few: int = 80
    """labels of a second probe, the first of ``train``"""
    test: int = 1000
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    decoder_width: int = 64
    mask_ratio: float = 0.75
    tokens: int = 8192
    """of a step, masked ones too: 32 standard clips"""
    steps: int = 600
    """after which all models are probed"""
    long_steps: int = 1800
    """after which those that every seed has are probed again"""
    lr: float = 3e-3
    warmup: int = 60
    average: float = 0.98

    def to_dict(self):
        return asdict(self)

    def read_by(self, function):
        return {key: value for key, value in self.to_dict().items() if key != "long_steps" or function == "train_long"}


@dataclass(frozen=True)
class Study:
    """What every experiment is given besides its arguments."""

    pictures: str
    plan: Plan
    work: str
    functions: str = "studies.mixture"

    def part(self, name, count, seed, shape):
        return _part(self.pictures, name, count, seed, shape)


@lru_cache(maxsize=8)
def _part(folder, name, count, seed, shape):
    return clips.make_part(*_pictures(folder), name, count, seed, frames=shape[0], size=shape[1:])


@lru_cache(maxsize=1)
def _pictures(folder):
    return clips.load_pictures(folder)


def all_experiments(seeds):
    """The most important first: both models of every seed, then what explains them."""
    standard, mixture, larger = (
        [Experiment(f"{name}-seed{seed}", "train_long", {"name": name, "seed": seed}) for seed in seeds] for name in MODELS
    )
    parts = [Experiment(f"{name}-seed{seeds[0]}", "train", {"name": name, "seed": seeds[0]}) for name in PARTS]
    for count in CONTROLS:
        arguments = {"name": MODELS[0], "seed": seeds[0], "tokens": count * num_tokens(STANDARD)}
        parts.append(Experiment(f"{control(count)}-seed{seeds[0]}", "train", arguments))
    return [experiment for pair in zip(standard, mixture) for experiment in pair] + larger[:1] + parts + larger[1:]


def control(count):
    return f"{MODELS[0]}, {count} clips"


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


def train_long(study, results, name, seed):
    """The same as ``train``, which goes on to the plan's ``long_steps`` and probes there, too."""
    return train(study, results, name, seed, evaluate_at=(study.plan.steps, study.plan.long_steps))


def train(study, results, name, seed, evaluate_at=None, tokens=None):
    """One pre-training: what ``evaluate`` finds after each of ``evaluate_at`` steps, by default the plan's ``steps``; the last
    loss; tokens and clips of all steps."""
    keep_freed_memory()
    plan, shapes = study.plan, SHAPES[name]
    evaluate_at, most_tokens = evaluate_at or (plan.steps,), tokens or plan.tokens
    parts = [study.part("unlabelled", plan.unlabelled // len(shapes), seed, shape) for shape in shapes]
    model = autoencoder(plan, seed, mask_ratio=plan.mask_ratio, patch_size=PATCH[1])
    training = AveragedTraining(model, plan)
    generator = torch.Generator().manual_seed(seed)
    tokens, seen, found = 0, 0, {}
    for step in range(1, max(evaluate_at) + 1):
        counts = draw_batch(shapes, most_tokens, generator)
        videos = []
        for part, count in zip(parts, counts):
            rows = torch.randint(len(part.labels), (count,), generator=generator)
            videos += part.video(rows).unbind()
        tokens += sum(count * num_tokens(shape) for count, shape in zip(counts, shapes))
        seen += len(videos)
        training.step(videos, generator)
        if step in evaluate_at:
            found[str(step)] = evaluate(study, training.averaged, seed)
            print(f"  {name}, seed {seed}, step {step}: {found[str(step)]}", flush=True)
    return {"at": found, "loss": training.mean_loss, "tokens_a_step": tokens / step, "clips_a_step": seen / step}


def evaluate(study, model, seed):
    """Of each shape of TESTED: ``accuracy`` of a linear probe that was trained on clips of this shape, ``few_labels`` of one
    with few of them, ``transfer`` of one that was trained on standard clips, and the ``test_loss``, of masked patches."""
    plan, measured = study.plan, {}
    for shape in TESTED:
        train, test = (study.part(part, getattr(plan, part), seed, shape) for part in ("train", "test"))
        x, test_x = features(model, train), features(model, test)
        if shape == STANDARD:
            standard_x, standard_y = x, train.labels

        def probe(x, labels, test_x=test_x, test=test):
            return linear(x, labels, test_x, test.labels, len(clips.CLASSES), seed)

        measured[show_shape(shape)] = {
            "accuracy": probe(x, train.labels),
            "few_labels": probe(x[: plan.few], train.labels[: plan.few]),
            "transfer": probe(standard_x, standard_y),
            "test_loss": test_loss(model, test, seed),
        }
    return {measure: {shape: values[measure] for shape, values in measured.items()} for measure in (*MEASURES, "test_loss")}


@torch.no_grad()
def test_loss(model, part, seed, batch=50):
    """Mean over the masked patches of all clips, under masks that are the same for every model."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for start in range(0, len(part.labels), batch):
        videos = list(part.video(slice(start, start + batch)).unbind())
        with autocast():
            total += model(videos, generator=generator).loss.item() * len(videos)
    return total / len(part.labels)


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


def of_seeds(found, name, seeds, step, measure, shape):
    """{seed: value} of a model, of the seeds that are there."""
    experiments = {seed: found.get(f"{name}-seed{seed}") for seed in seeds}
    return {seed: numbers["at"][str(step)][measure][shape] for seed, numbers in experiments.items() if numbers}


def text(found, seeds, step, measure, name="mixture"):
    """A table of the standard model and another at a step, by one of MEASURES."""
    lines = []
    for shape in map(show_shape, TESTED):
        theirs, ours = (of_seeds(found, model, seeds, step, measure, shape) for model in (MODELS[0], name))
        values = differences(ours, theirs)
        margin = f"{100 * sum(values) / len(values):+.1f} ({', '.join(f'{100 * value:+.1f}' for value in values)})"
        lines.append([shape, show(theirs), show(ours), margin, agreement(values)])
    return table(["clips tested", "standard", name, "difference", f"{name} is ahead"], lines)


def loss_text(found, seeds, step):
    """A table of the loss on test clips, of all models."""
    lines = []
    for shape in map(show_shape, TESTED):
        values = [of_seeds(found, name, seeds, step, "test_loss", shape).values() for name in MODELS]
        lines.append([shape, *(f"{sum(one) / len(one):.3f}" for one in values)])
    return table(["clips tested", *MODELS], lines)


def clips_text(found, seed, step):
    """A table of all models of one seed at a step, by how many clips they see in one."""
    names = [name for name in (*SHAPES, *map(control, CONTROLS)) if f"{name}-seed{seed}" in found]
    names.sort(key=lambda name: -clips_a_step(found, name, seed))
    lines = []
    for name in names:
        measured = found[f"{name}-seed{seed}"]["at"][str(step)]
        standard, others = measured["accuracy"][show_shape(STANDARD)], odd(measured["accuracy"])
        numbers = found[f"{name}-seed{seed}"]
        size = f"{numbers['clips_a_step']:.1f}", f"{numbers['tokens_a_step']:,.0f}"
        lines.append([name, *size, f"{100 * standard:.1f}", f"{100 * others:.1f}"])
    return table(["model", "clips a step", "tokens a step", "standard clips", "other shapes, mean"], lines)


def clips_a_step(found, name, seed):
    return found[f"{name}-seed{seed}"]["clips_a_step"]


def odd(values):
    """Mean over the shapes that are not the standard one."""
    others = [value for shape, value in values.items() if shape != show_shape(STANDARD)]
    return sum(others) / len(others)


def draw(found, seeds, plan, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4))
    grid = figure.add_gridspec(2, 2, width_ratios=(5, 3))
    wide = 0.8 / len(MODELS)
    for row, step in enumerate((plan.steps, plan.long_steps)):
        axis = figure.add_subplot(grid[row, 0])
        for index, name in enumerate(MODELS):
            for x, shape in enumerate(map(show_shape, TESTED)):
                values = [100 * value for value in of_seeds(found, name, seeds, step, "accuracy", shape).values()]
                if values:
                    place = x + wide * (index - 1)
                    axis.bar(
                        place, sum(values) / len(values), 0.9 * wide, color=f"C{index}", alpha=0.6, label=None if x else name
                    )
                    axis.plot([place] * len(values), values, "k.", markersize=3)
        names = [f"{shape[0]}\n{shape[1]}\u00d7{shape[2]}" for shape in TESTED]
        axis.set_xticks(range(len(TESTED)), names, fontsize=7)
        axis.axhline(100 / len(clips.CLASSES), color="grey", linewidth=0.8, linestyle=":")
        axis.set(ylim=(0, 100), ylabel="linear probe, %")
        axis.set_title(f"after {step} steps", fontsize=10)
        if row == 0:
            axis.legend(title="trained on", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    axis.set(xlabel="clips tested: frames, height \u00d7 width")
    axis = figure.add_subplot(grid[:, 1])
    for name in (*SHAPES, *map(control, CONTROLS)):
        if (numbers := found.get(f"{name}-seed{seeds[0]}")) is not None:
            y = 100 * numbers["at"][str(plan.steps)]["accuracy"][show_shape(STANDARD)]
            equal = name in SHAPES
            colour = f"C{MODELS.index(name)}" if name in MODELS else "grey" if equal else "C0"
            axis.plot(numbers["clips_a_step"], y, "o", color=colour, fillstyle="full" if equal else "none")
            axis.annotate(name, (numbers["clips_a_step"], y), (6, 4 if equal else -12), textcoords="offset points", fontsize=8)
    axis.set(ylim=(30, 90), xlim=(18, 62), xlabel="clips a step", ylabel="linear probe, standard clips, %")
    axis.set_title(f"after {plan.steps} steps, one seed\n(rings: of more or fewer tokens)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})


def write(output, plan, seeds, records):
    """mixed-clips.json and its picture in ``output``; records: of all experiments, {name: record}."""
    found = write_record(output / "mixed-clips.json", plan, seeds, records)
    draw(found, seeds, plan, output / "mixed-clips.png")
    for step in (plan.steps, plan.long_steps):
        for measure in MEASURES:
            print(f"{measure} after {step} steps\n\n{text(found, seeds, step, measure)}\n")
        print(loss_text(found, seeds, step), "\n")
    print(text(found, seeds, plan.long_steps, "accuracy", "larger"), clips_text(found, seeds[0], plan.steps), sep="\n\n")


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
