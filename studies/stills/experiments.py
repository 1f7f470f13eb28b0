"""What the study computes: pre-training on clips, and the fine-tuning of image classifiers by ``stmae finetune`` itself.

Image models start from a model of clips: its patch kernel summed over time, one frame a clip. As in ``studies.motion``, an
experiment is a pure function of the pictures, the plan and its own arguments.
"""

import contextlib
import io
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from stmae import checkpoint
from stmae.training import finetune as finetune_run
from stmae.training.config import (
    AugmentationConfig,
    ClassifierConfig,
    FinetuneClipConfig,
    FinetuneConfig,
    FinetuneOptimizerConfig,
    RunConfig,
)
from studies.motion import clips, experiments
from studies.motion.experiments import STARTS, Experiment

CLASSES = 10  # Fashion-MNIST's
MARGIN = (clips.SIZE - clips.ITEM) // 2


@dataclass(frozen=True, kw_only=True)
class Plan(experiments.Plan):
    """Every number that the results depend on, but for the pictures and seeds: those of pre-training are the motion study's."""

    finetune_labels: tuple[int, ...] = (100, 300, 1000)
    test: int = 2000
    finetune_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    finetune_steps: tuple[int, ...] = (400,)
    layer_decay: float = 0.75

    def read_by(self, function):
        return self.to_dict()


@dataclass(frozen=True)
class Study(experiments.Study):
    functions: str = __name__


def all_experiments(plan, seeds):
    """All experiments, each after those that it needs."""
    made = [Experiment(f"pretrain-seed{seed}", "pretrain", {"seed": seed}) for seed in seeds]
    for labels in plan.finetune_labels:
        for start in STARTS:
            arguments = {"labels": labels, "start": start}
            tuned = f"tune-{labels}-{start}"
            made.append(Experiment(tuned, "tune", {**arguments, "seed": seeds[0]}, (f"pretrain-seed{seeds[0]}",)))
            for seed in seeds:
                needs = (f"pretrain-seed{seed}", tuned)
                made.append(Experiment(f"finetune-{labels}-{start}-seed{seed}", "finetune", {**arguments, "seed": seed}, needs))
    return made


def pretrain(study, results, seed):
    """The motion study's pre-training at 90 % random, on clips without labels; its weights, and untrained ones of an image model
    beside them."""
    model, loss = experiments.pretrain(study, seed, study.plan.pretrain_steps)
    checkpoint.save(model, study.weights(seed))
    checkpoint.save(experiments.autoencoder(study.plan, seed, num_frames=1, tubelet_size=1), untrained(study, seed))
    return {"loss": loss}


def untrained(study, seed):
    return study.weights(seed).with_name(f"untrained-seed{seed}.safetensors")


def tune(study, results, labels, start, seed):
    """The grid of learning rates on a quarter of the labelled stills, which the other three quarters predict."""
    pictures, numbers = stills(study, "train", labels, seed)
    held = math.ceil(labels / 4 / CLASSES) * CLASSES  # balanced, as labels go round
    fit, held_out = (pictures[:-held], numbers[:-held]), (pictures[-held:], numbers[-held:])
    grid = []
    for steps in study.plan.finetune_steps:
        for lr in study.plan.finetune_lrs:
            accuracy, _ = train_classifier(study, start, seed, fit, held_out, lr=lr, steps=steps)
            grid.append({"lr": lr, "steps": steps, "accuracy": accuracy})
    best = max(grid, key=lambda tried: tried["accuracy"])
    return {"held_out": held, "grid": grid, "lr": best["lr"], "steps": best["steps"]}


def finetune(study, results, labels, start, seed):
    """A classifier trained on all the labelled stills at the rate that the tuning found best, on the test stills."""
    chosen = results[f"tune-{labels}-{start}"]
    train, test = stills(study, "train", labels, seed), stills(study, "test", study.plan.test, seed)
    accuracy, before = train_classifier(study, start, seed, train, test, lr=chosen["lr"], steps=chosen["steps"])
    return {"accuracy": accuracy, "before": before}


def stills(study, part, count, seed):
    """(uint8 [count, 32, 32, 3], labels [count]): random pictures of a part, as many of each class, in random colours as the
    clips have; classes go round. Training stills show training pictures, test stills test pictures."""
    index = ("train", "test").index(part)
    pictures, numbers = clips.load_pictures(study.pictures)[index], clips.load_labels(study.pictures)[index]
    generator = torch.Generator().manual_seed(1000 * seed + index)
    shuffled = torch.randperm(len(numbers), generator=generator)
    by_class = [shuffled[numbers[shuffled] == number][: math.ceil(count / CLASSES)] for number in range(CLASSES)]
    chosen = torch.stack(by_class, dim=1).flatten()[:count]
    shades = torch.nn.functional.pad(pictures[chosen].float() / 255, (MARGIN,) * 4)[..., None]
    colours = torch.rand(2, count, 1, 1, 3, generator=generator)
    black, white = (low + (high - low) * values for (low, high), values in zip((clips.DARK, clips.LIGHT), colours))
    return (255 * torch.lerp(black, white, shades)).round().to(torch.uint8), numbers[chosen]


def train_classifier(study, start, seed, train, test, *, lr, steps):
    """(accuracy on ``test`` after, before) of ``stmae finetune`` on class folders of the ``train`` stills."""
    batch = study.plan.finetune_batch
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for name, (pictures, numbers) in (("train", train), ("test", test)):
            write_class_folders(Path(folder) / name, pictures, numbers)
        state = finetune_run(
            FinetuneConfig(
                data=f"{folder}/train",
                test_data=f"{folder}/test",
                output=f"{folder}/run",
                checkpoint=str(study.weights(seed) if start == STARTS[0] else untrained(study, seed)),
                seed=seed,
                layer_decay=study.plan.layer_decay if start == STARTS[0] else 1.0,
                model=ClassifierConfig(num_frames=1, tubelet_size=1, dropout=0.0, drop_path=0.0),
                clips=FinetuneClipConfig(repeats=1, stride=1, scale=(0.5, 1.0)),
                augmentation=AugmentationConfig(operations=0, erasing=0.0, mixup=0.0, cutmix=0.0),
                optimizer=FinetuneOptimizerConfig(
                    batch=batch,
                    base_batch=batch,
                    base_lr=lr,
                    epochs=steps * batch / len(train[1]),
                    warmup_epochs=steps * batch / len(train[1]) / 10,
                ),
                run=RunConfig(device="cpu", workers=0, save_every=steps, log_every=steps, tensorboard=False),
            )
        )
    return state.after["top1"], state.before["top1"]


def write_class_folders(folder, pictures, numbers):
    for index, (picture, number) in enumerate(zip(pictures.numpy(), numbers.tolist())):
        place = folder / f"{number}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{index}.png")
