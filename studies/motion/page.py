"""The results as a page: tables, pictures, and for each finding whether it is seen at this size."""

import json
import os
import platform

from matplotlib.figure import Figure

from stmae.masking import num_keep

from . import clips
from .experiments import MASKS, STARTS, autoencoder

PICTURES = ("motion-set.png", "motion-probes.png", "motion-finetuning.png", "motion-masks.png")
CONTROLS = ("shuffled frames", "middle frame repeated")
FEATURES = ("pre-trained", "random weights", "raw pixels")
PAPER = {  # its ablation of masks; 84.4 is random at 90 %
    "tube": "paper: 84.4 against 83.5",
    "frame": "paper: 84.4 against 79.1 at 75 %",
    "block": "paper: 84.4 against 83.2 at 75 %",
}
CHANCE = 1 / len(clips.CLASSES)


def write(folder, plan, seeds, experiments, records, *, pictures):
    """results.md, results.json and PICTURES in ``folder``.

    records: of the experiments that are finished, {name: record}; what the others would have shown is left out, and the page
        lists them as not run.
    pictures: the folder of Fashion-MNIST, for examples of the clips.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: record["found"] for name, record in records.items()}
    run = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": sorted({record["torch"] for record in records.values()}),
        "precision": sorted({record["precision"] for record in records.values()}),
        "cpu_minutes": sum(record["cpu_seconds"] for record in records.values()) / 60,
        "wall_minutes_of_all_experiments": sum(record["seconds"] for record in records.values()) / 60,
        "finished_experiments": len(records),
        "experiments": len(experiments),
    }
    everything = {"plan": plan.to_dict(), "seeds": list(seeds), "run": run, "experiments": found}
    (folder / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    numbers = Numbers(plan, seeds, found)
    draw_set(folder / PICTURES[0], pictures)
    draw_probes(folder / PICTURES[1], numbers)
    draw_finetuning(folder / PICTURES[2], numbers)
    draw_masks(folder / PICTURES[3], numbers)
    missing = [experiment.name for experiment in experiments if experiment.name not in records]
    (folder / "results.md").write_text(text(numbers, run, missing))


class Numbers:
    """What was found, by what it is about: every method gives one accuracy per seed, of the seeds that are finished."""

    def __init__(self, plan, seeds, found):
        self.plan, self.seeds, self.found = plan, seeds, found
        self.model = autoencoder(plan, 0)

    def of(self, pattern, get):
        """{seed: number} of the experiments called ``pattern`` with a seed in it."""
        names = {seed: pattern.format(seed=seed) for seed in self.seeds}
        return {seed: get(self.found[name]) for seed, name in names.items() if name in self.found}

    def probe(self, features, kind, labels):
        return self.of("main-seed{seed}", lambda found: found["probes"][features][str(labels)][kind])

    def control(self, name, kind):
        return self.of("main-seed{seed}", lambda found: found["controls"][name][kind])

    def knn_at(self, step):
        return self.of("main-seed{seed}", lambda found: found["knn_at_step"][str(step)])

    def finetuned(self, labels, start):
        return self.of(f"finetune-{labels}-{start}-seed{{seed}}", lambda found: found["accuracy"])

    def mask(self, strategy, ratio, kind):
        return self.of(f"mask-{strategy}-{ratio:g}-seed{{seed}}", lambda found: found[kind])


def show(values):
    """Mean over seeds (lowest-highest), in percent."""
    if not values:
        return "not run"
    values = [100 * value for value in values.values()]
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.1f}{spread}"


def differences(ours, theirs):
    """One per seed that has both."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def agreement(values):
    """Of paired differences, one per seed: whether all agree."""
    if not values:
        return "not run"
    if all(value > 0 for value in values):
        return "yes"
    return "**no**" if all(value < 0 for value in values) else "**undecided**"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def findings(numbers):
    """Rows of (finding, where it is from, its numbers here, agreement)."""
    plan, max_labels = numbers.plan, max(numbers.plan.labels)
    first, last = numbers.knn_at(plan.evaluate_at[0]), numbers.knn_at(plan.evaluate_at[-1])
    rows = []

    def compare(finding, source, ours, theirs):
        values = differences(ours, theirs)
        each = ", ".join(f"{100 * value:+.1f}" for value in values)
        margin = f"{100 * sum(values) / len(values):+.1f} ({each})" if values else ""
        rows.append((finding, source, margin, agreement(values)))

    goal = "the aim of pre-training"
    for kind, name in (("linear", "linear probe"), ("knn", "nearest neighbours")):
        for other in FEATURES[1:]:
            for labels in plan.labels:
                ours, theirs = (numbers.probe(features, kind, labels) for features in (FEATURES[0], other))
                compare(f"{name}, {labels} labels: pre-trained above {other}", goal, ours, theirs)
    compare(f"nearest neighbours, {max_labels} labels: better after pre-training than before", goal, last, first)
    for labels in plan.finetune_labels:
        ours, theirs = (numbers.finetuned(labels, start) for start in STARTS)
        compare(f"{labels} labels: fine-tuned above from scratch", "paper: fine-tuned is ahead", ours, theirs)
    best = MASKS[0]
    for strategy, ratio in MASKS[1:]:
        source = PAPER.get(strategy, "paper: 90 % is best")
        finding = f"linear probe: random {best[1]:.0%} above {strategy} {ratio:.0%}"
        compare(finding, source, numbers.mask(*best, "linear"), numbers.mask(strategy, ratio, "linear"))
    # What a mask of complete time slices leaves visible is nearer to this ratio.
    equally_visible, frame = numbers.mask("random", 0.75, "linear"), numbers.mask("frame", 0.9, "linear")
    compare("linear probe: random 75% above frame 90%, with as many tokens visible", PAPER["frame"], equally_visible, frame)
    ordered, shuffled = numbers.probe(FEATURES[0], "linear", max_labels), numbers.control("shuffled frames", "linear")
    compare("linear probe: frames in order above frames shuffled", "the set's design", ordered, shuffled)
    compare("linear probe: 50 % above frames shuffled", "the set's design", dict.fromkeys(shuffled, 0.5), shuffled)
    return rows


def text(numbers, run, missing):
    plan, seeds, config = numbers.plan, numbers.seeds, numbers.model.config
    t, h, w = config.grid
    max_labels = max(plan.labels)
    parts = [
        "# Does it learn? A study on clips that differ in motion only",
        "`python -m studies.motion` (from nothing: `make study`) makes the clips, pre-trains, probes, fine-tunes, and "
        "writes this page and its pictures. Every number is in [results.json](results.json). What such weights are worth on "
        "single images is [another study](results-stills.md).",
        f"This run: {run['finished_experiments']} of {run['experiments']} experiments, {run['cpu_minutes']:.0f} minutes of CPU "
        f"time, a thread a process, that is {run['cpu_minutes'] / 2:.0f} minutes on two idle cores. By the clock they took "
        f"{run['wall_minutes_of_all_experiments']:.0f} minutes together, two at a time, on {run['cores']} cores "
        f"({run['machine']}) that may have had other work; torch {', '.join(run['torch'])}, {', '.join(run['precision'])}.",
        f"Accuracies are in percent: the mean over {len(seeds)} seeds (lowest-highest). A seed draws the clips, the labelled and "
        "the test clips among them, the weights, the order and the masks.",
    ]
    if missing:
        parts.append(f"**Not run**, and so not in the numbers below (the same command goes on with them): {', '.join(missing)}.")
    compared = findings(numbers)
    unseen = [f"- {finding}: {seen}, {difference}" for finding, _, difference, seen in compared if seen not in ("yes", "not run")]
    parts += [
        "## In short",
        "\n".join(
            f"- linear probe, {n} labels: " + ", ".join(f"{name} {show(numbers.probe(name, 'linear', n))}" for name in FEATURES)
            for n in plan.labels
        ),
        "\n".join(
            "- {} labels: fine-tuned {}, from scratch {}".format(n, *(show(numbers.finetuned(n, start)) for start in STARTS))
            for n in plan.finetune_labels
        ),
        "What does not reproduce at this size:"
        if unseen
        else "Every finding in the last table that was run is seen at this size.",
        "\n".join(unseen),
        "## The clips",
        f"![a clip of each class]({PICTURES[0]})",
        f"*One clip of each class: {', '.join(clips.CLASSES)}.*",
        f"A camera moves over a {clips.SIDE} x {clips.SIDE} canvas of Fashion-MNIST's pictures (Xiao et al., 2017; MIT licence, "
        f"Zalando SE), each in two random colours. A clip has {clips.FRAMES} frames of {clips.SIZE} x {clips.SIZE} pixels. The "
        f"{len(clips.CLASSES)} classes are four motions, forwards and backwards in time, with random speed, drift, shake, place, "
        "angle and scale. The pose half-way has the same distribution in every class, so that a frame from the middle carries "
        "next to no information, and without the order of the frames no more than half of the answers are right. Chance is "
        f"{100 * CHANCE:.1f} %. There are {plan.unlabelled} clips for pre-training without labels, {plan.train} labelled ones, "
        f"and {plan.test} for the test, which show pictures that no other clip shows.",
        "## The model",
        f"A ViT of width {plan.width} with {plan.depth} blocks, patches of 8 x 8 x 2 frames ({config.num_tokens} tokens), a "
        f"decoder of width {plan.decoder_width} with one block, and plain pixels as the target. Positions start as sines and "
        "cosines: from small random ones, learning is slower. Pre-training takes "
        f"{plan.pretrain_steps} steps of {plan.pretrain_batch} clips at {config.mask_ratio:.0%} random masking; AdamW, "
        f"learning rate {plan.pretrain_lr:g} on a cosine after a tenth of warm-up, weight decay 0.05; no augmentation, since "
        "mirroring swaps classes. The pictures' colours, the positions' start and this learning rate were chosen by short runs "
        "of seed 0, with its test clips; the other seeds were not used for it.",
        "Features are all the encoder's tokens side by side, as `stmae probe --tokens all` takes them, since their mean "
        "forgets where and when. Nearest neighbours: 20, by cosine. The linear probe's weight decay is chosen on a fifth of "
        "the training labels.",
        "## Frozen features",
        f"![accuracy against labels, and during pre-training]({PICTURES[1]})",
    ]
    for kind, name in (("linear", "linear probe"), ("knn", "nearest neighbours")):
        rows = [[n, *(show(numbers.probe(features, kind, n)) for features in FEATURES)] for n in plan.labels]
        parts.append(table([f"{name}, labels", *FEATURES], rows))
    changed = [[name, *(show(numbers.control(name, kind)) for kind in ("linear", "knn"))] for name in CONTROLS]
    parts += [
        f"Nearest neighbours with {plan.train} labels during pre-training:",
        table(["step", *plan.evaluate_at], [["accuracy", *(show(numbers.knn_at(step)) for step in plan.evaluate_at)]]),
        "Order controls: the pre-trained features with all labels, where training and test clips are both changed and the probes "
        "trained anew.",
        table(
            ["clips", "linear probe", "nearest neighbours"],
            [["as they are", *(show(numbers.probe(FEATURES[0], kind, max_labels)) for kind in ("linear", "knn"))], *changed],
        ),
        "## Fine-tuning against training from scratch",
        f"![fine-tuned and from scratch]({PICTURES[2]})",
        f"Both are the same classifier and get the same: batches of {plan.finetune_batch}, AdamW, weight decay 0.05, no "
        f"augmentation, and the best of {len(plan.finetune_lrs)} learning rates "
        f"({', '.join(f'{lr:g}' for lr in plan.finetune_lrs)}) x {len(plan.finetune_steps)} lengths "
        f"({', '.join(map(str, plan.finetune_steps))} steps). The best was chosen for each start and number of labels on the "
        f"labels of seed {seeds[0]}: a quarter of them was held out and predicted from the others (ties by cross entropy). "
        f"With that choice, every seed was then trained on all its labels and tested once. The cost of pre-training is not "
        f"counted. With {min(plan.finetune_labels)} labels few are held out, so that choice is a coarse one; where the "
        "longest was chosen, more steps may give more.",
        table(
            ["labels", "fine-tuned", "chosen", "from scratch", "chosen", "linear probe, frozen"],
            [[n, *finetune_cells(numbers, n), show(numbers.probe(FEATURES[0], "linear", n))] for n in plan.finetune_labels],
        ),
        "## Masks",
        f"![masks compared]({PICTURES[3]})",
        f"Runs of their own, {plan.ablation_steps} steps each, the baseline (random 90 %) too; probes with {plan.train} "
        f"labels. With {t} time slices of {h} x {w} tokens, tube and frame masks come in coarse steps: see "
        "what they leave visible. At equal steps, a lower ratio costs more time. The curve above shows how early in learning "
        "these runs stop: they show how fast features form under a mask, not how good they become. Why 90 % is behind in them, "
        "and what moves that, is [another study](mask-ratio.md); masks on a finer grid are in [a third one](ablations.md).",
        table(
            ["mask", "tokens visible", "linear probe", "nearest neighbours"],
            [
                [
                    f"{strategy} {ratio:.0%}",
                    f"{num_keep(strategy, config.grid, ratio)} of {config.num_tokens}",
                    *(show(numbers.mask(strategy, ratio, kind)) for kind in ("linear", "knn")),
                ]
                for strategy, ratio in MASKS
            ],
        ),
        "## What is seen at this size, and what is not",
        "Differences are in percentage points: the mean, and each seed's own. *Yes* and *no* mean that all seeds agree. The "
        "paper's figures are of ViT-L, 800 epochs on Kinetics-400, after fine-tuning: a model four hundred times as large.",
        table(["finding", "from", "difference", "seen here"], compared),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def finetune_cells(numbers, labels):
    cells = []
    for start in STARTS:
        chosen = numbers.found.get(f"tune-{labels}-{start}")
        cells += [show(numbers.finetuned(labels, start)), f"{chosen['lr']:g}, {chosen['steps']} steps" if chosen else "not run"]
    return cells


def draw_set(path, pictures):
    part = clips.make_part(*clips.load_pictures(pictures), "train", len(clips.CLASSES), 0)
    figure = Figure(figsize=(clips.FRAMES, len(clips.CLASSES)))
    for clip, row in zip(part.clips.numpy(), figure.subplots(len(clips.CLASSES), clips.FRAMES)):
        for frame, cell in zip(clip, row):
            cell.imshow(frame)
            cell.axis("off")
    figure.tight_layout(pad=0.15)
    save(figure, path, dpi=50)


def draw_probes(path, numbers):
    plan = numbers.plan
    figure = Figure(figsize=(11, 3.4))
    axes = figure.subplots(1, 3)
    for axis, kind, name in zip(axes, ("linear", "knn"), ("linear probe", "nearest neighbours")):
        for features in FEATURES:
            line(axis, plan.labels, [numbers.probe(features, kind, n) for n in plan.labels], features)
        axis.set(title=name)
        by_labels(axis, plan.labels)
    line(axes[2], plan.evaluate_at, [numbers.knn_at(step) for step in plan.evaluate_at], None)
    axes[2].set(title=f"nearest neighbours, {plan.train} labels", xlabel="pre-training step")
    finish(figure, axes, path)


def draw_finetuning(path, numbers):
    figure = Figure(figsize=(5, 3.4))
    axis = figure.subplots()
    labels = numbers.plan.finetune_labels
    for start, name in zip(STARTS, ("fine-tuned", "from scratch")):
        line(axis, labels, [numbers.finetuned(n, start) for n in labels], name)
    line(axis, labels, [numbers.probe(FEATURES[0], "linear", n) for n in labels], "linear probe, frozen")
    by_labels(axis, labels)
    finish(figure, [axis], path)


def draw_masks(path, numbers):
    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots(1, 2)
    for axis, kind, name in zip(axes, ("linear", "knn"), ("linear probe", "nearest neighbours")):
        for x, (strategy, ratio) in enumerate(MASKS):
            values = [100 * value for value in numbers.mask(strategy, ratio, kind).values()]
            if values:
                axis.bar(x, sum(values) / len(values), color="C0" if x else "C1", alpha=0.6)
                axis.plot([x] * len(values), values, "k.", markersize=5)
        axis.set(title=f"{name}, {numbers.plan.train} labels")
        axis.set_xticks(range(len(MASKS)), [f"{strategy}\n{ratio:.0%}" for strategy, ratio in MASKS], fontsize=8)
    finish(figure, axes, path)


def line(axis, xs, values_at, label):
    """The mean over seeds, and a band from the lowest to the highest; xs with no seed are left out."""
    points = [(x, [100 * value for value in values.values()]) for x, values in zip(xs, values_at) if values]
    xs = [x for x, _ in points]
    axis.plot(xs, [sum(values) / len(values) for _, values in points], "o-", markersize=4, label=label)
    axis.fill_between(xs, [min(values) for _, values in points], [max(values) for _, values in points], alpha=0.2)


def by_labels(axis, labels):
    axis.set(xscale="log", xlabel="labels")
    axis.set_xticks(labels, labels)
    axis.minorticks_off()
    axis.legend(fontsize=8)


def finish(figure, axes, path):
    for axis in axes:
        axis.axhline(100 * CHANCE, color="grey", linewidth=0.8, linestyle=":")
        axis.set(ylim=(0, 100), ylabel="accuracy, %")
    figure.tight_layout()
    save(figure, path, dpi=100)


def save(figure, path, dpi):
    # Without the library's version inside, the same numbers give the same file.
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
