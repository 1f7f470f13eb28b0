"""The results as a page."""

import json
import os
import platform

from studies.motion import clips
from studies.motion.experiments import STARTS
from studies.motion.page import agreement, differences, show, table

from .experiments import CLASSES


def write(folder, plan, seeds, records):
    """results-stills.md and results-stills.json in ``folder``; records: of all experiments, {name: record}."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: record["found"] for name, record in records.items()}
    run = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": sorted({record["torch"] for record in records.values()}),
        "precision": sorted({record["precision"] for record in records.values()}),
        "cpu_minutes": sum(record["cpu_seconds"] for record in records.values()) / 60,
    }
    everything = {"plan": plan.to_dict(), "seeds": list(seeds), "run": run, "experiments": found}
    (folder / "results-stills.json").write_text(json.dumps(everything, indent=1) + "\n")
    (folder / "results-stills.md").write_text(text(plan, seeds, found, run))


def text(plan, seeds, found, run):
    rows = []
    for labels in plan.finetune_labels:
        ours, theirs = ({seed: found[f"finetune-{labels}-{start}-seed{seed}"]["accuracy"] for seed in seeds} for start in STARTS)
        rates = [f"{found[f'tune-{labels}-{start}']['lr']:g}" for start in STARTS]
        values = differences(ours, theirs)
        each = ", ".join(f"{100 * value:+.1f}" for value in values)
        margin = f"{100 * sum(values) / len(values):+.1f} ({each})"
        rows.append([labels, show(ours), rates[0], show(theirs), rates[1], margin, agreement(values)])
    parts = [
        "# From clips to stills: a study on small images",
        "`python -m studies.stills` pre-trains on clips without labels, fine-tunes image classifiers, and writes this page. "
        "Every number is in [results-stills.json](results-stills.json).",
        f"This run: {run['cpu_minutes']:.0f} minutes of CPU time, a thread a process; {run['machine']}, torch "
        f"{', '.join(run['torch'])}, {', '.join(run['precision'])}.",
        f"Accuracies are in percent, on {plan.test} test stills: the mean over {len(seeds)} seeds (lowest-highest). A seed draws "
        "the clips, the stills, their colours, the weights, the order and the crops. *Yes* and *no* want all seeds to agree.",
        table(["labels", "fine-tuned", "rate", "from scratch", "rate", "difference", "fine-tuned is ahead"], rows),
        "## Conditions",
        f"The autoencoder is the one of [the study of motion](results.md): a ViT of width {plan.width} with {plan.depth} blocks "
        f"and patches of 8 x 8 x 2 frames, pre-trained for {plan.pretrain_steps} steps of {plan.pretrain_batch} clips of "
        f"{clips.FRAMES} frames of {clips.SIZE} x {clips.SIZE} pixels, in which a camera moves over Fashion-MNIST's pictures.",
        f"The stills are single pictures of Fashion-MNIST (Xiao et al., 2017; MIT licence, Zalando SE), upright, on {clips.SIZE} "
        f"x {clips.SIZE} pixels, in two random colours; {CLASSES} classes, so that chance is {100 / CLASSES:.0f} %, as many "
        "stills of each. Training stills are training pictures, which the clips of pre-training show too; test stills are test "
        "pictures, which nothing in training shows.",
        "Both starts are trained by `stmae finetune` on class folders of PNG files, with `--model.num_frames 1 "
        "--model.tubelet_size 1`: the fine-tuned one from the model of clips, its patch kernel summed over time and its temporal "
        "positions interpolated to one; the other from an untrained image model with the same start of the positions. "
        "Both get the same budget: "
        f"{' or '.join(map(str, plan.finetune_steps))} steps of {plan.finetune_batch} stills, AdamW, weight decay 0.05, label "
        "smoothing 0.1, crops of [0.5, 1] and mirroring, and the best of "
        f"{len(plan.finetune_lrs)} learning rates ({', '.join(f'{lr:g}' for lr in plan.finetune_lrs)}), chosen for each start "
        f"and number of labels on a quarter of seed {seeds[0]}'s labels. Layer decay is {plan.layer_decay} for the fine-tuned "
        "and 1 from scratch. The cost of pre-training is not counted.",
        "The presets for ImageNet-1K go the same way at full size (see [Training](training.md)); they have not been run here.",
    ]
    return "\n\n".join(parts) + "\n"
