"""What the study computes: one function for each kind of experiment, which gives plain numbers.

An experiment is a pure function of the pictures, the plan and its own arguments. Experiments that need pre-trained weights read
those that an earlier one wrote.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from stmae import checkpoint
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig
from stmae.training.config import OptimizerConfig
from stmae.training.engine.device import choose_precision
from stmae.training.engine.optimizer import adamw, learning_rate, peak_learning_rate, weight_decay_groups
from stmae.training.evaluation import probes

from . import clips

NEIGHBOURS = 20  # as stmae probe's default


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number that the study's results depend on, but for the pictures and seeds."""

    unlabelled: int = 16384
    train: int = 1000
    test: int = 2000
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    decoder_width: int = 64
    pretrain_steps: int = 3000
    pretrain_batch: int = 64
    pretrain_lr: float = 3e-3
    evaluate_at: tuple[int, ...] = (0, 250, 500, 1000, 1500, 2000, 2500, 3000)
    ablation_steps: int = 600
    labels: tuple[int, ...] = (80, 160, 400, 1000)
    finetune_labels: tuple[int, ...] = (80, 400, 1000)
    finetune_batch: int = 32
    finetune_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    finetune_steps: tuple[int, ...] = (100, 300)

    def to_dict(self):
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def read_by(self, function):
        """The part of ``to_dict`` that experiments of a function depend on: the others stay valid when it changes."""
        return {key: value for key, value in self.to_dict().items() if function in READERS.get(key, (function,))}


# Functions that depend on a field, where it is not all of them.
READERS = {
    "pretrain_steps": ("main", "tune", "finetune"),
    "evaluate_at": ("main",),
    "labels": ("main",),
    "ablation_steps": ("mask",),
    "finetune_labels": (),
    **dict.fromkeys(("finetune_batch", "finetune_lrs", "finetune_steps"), ("tune", "finetune")),
}


@dataclass(frozen=True)
class Experiment:
    """A function of this module by name, its arguments, and the names of experiments whose numbers or weights it needs."""

    name: str
    function: str
    arguments: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()


STARTS = ("pretrained", "scratch")
MASKS = (("random", 0.9), ("tube", 0.9), ("frame", 0.9), ("block", 0.9), ("random", 0.5), ("random", 0.75), ("random", 0.95))


def all_experiments(plan, seeds):
    """All experiments, the most important first, and each after those that it needs."""
    experiments = [Experiment(f"main-seed{seed}", "main", {"seed": seed}) for seed in seeds]
    for labels in plan.finetune_labels:
        for start in STARTS:
            arguments = {"labels": labels, "start": start, "seed": seeds[0]}
            experiments.append(Experiment(f"tune-{labels}-{start}", "tune", arguments, (f"main-seed{seeds[0]}",)))
    for seed in seeds:
        for labels in plan.finetune_labels:
            for start in STARTS:
                arguments = {"labels": labels, "start": start, "seed": seed}
                needs = (f"main-seed{seed}", f"tune-{labels}-{start}")
                experiments.append(Experiment(f"finetune-{labels}-{start}-seed{seed}", "finetune", arguments, needs))
        for strategy, ratio in MASKS:
            arguments = {"strategy": strategy, "ratio": ratio, "seed": seed}
            experiments.append(Experiment(f"mask-{strategy}-{ratio:g}-seed{seed}", "mask", arguments))
    return experiments


@dataclass(frozen=True)
class Study:
    """What every experiment is given besides its arguments: the pictures' folder, the plan, and a folder for weights."""

    pictures: str
    plan: Plan
    work: str
    functions: str = __name__
    """module of the experiments' functions"""

    def part(self, name, seed):
        """``unlabelled``, ``train`` or ``test`` clips of a seed's set."""
        return _part(self.pictures, getattr(self.plan, name), name, seed)

    def weights(self, seed):
        return Path(self.work) / f"main-seed{seed}.safetensors"


@lru_cache(maxsize=2)
def _pictures(folder):
    return clips.load_pictures(folder)


@lru_cache(maxsize=3)
def _part(folder, count, name, seed):
    return clips.make_part(*_pictures(folder), name, count, seed)


def main(study, results, seed):
    """Pre-training at 90 % random; probes of its features, of random weights and of raw pixels; order controls."""
    plan, train, test = study.plan, study.part("train", seed), study.part("test", seed)
    curve = {}

    def evaluate(step, model):
        if step in plan.evaluate_at:
            features = encode(model, train), encode(model, test)
            curve[step] = probes.knn(features[0], train.labels, features[1], test.labels, len(clips.CLASSES), NEIGHBOURS)

    random_model = autoencoder(plan, seed)
    random = encode(random_model, train), encode(random_model, test)
    model, losses = pretrain(study, seed, plan.pretrain_steps, evaluate=evaluate)
    checkpoint.save(model, study.weights(seed))
    learned = encode(model, train), encode(model, test)
    pixels = train.clips.flatten(1).float(), test.clips.flatten(1).float()
    controls = {}
    for name, change in (("shuffled frames", shuffle_frames), ("middle frame repeated", repeat_middle_frame)):
        changed = tuple(part._replace(clips=change(part.clips, seed)) for part in (train, test))
        controls[name] = probe_accuracies(*(encode(model, part) for part in changed), train.labels, test.labels, seed)
    probed = {}
    for name, (x, test_x) in (("pre-trained", learned), ("random weights", random), ("raw pixels", pixels)):
        probed[name] = {n: probe_accuracies(x[:n], test_x, train.labels[:n], test.labels, seed) for n in plan.labels}
    return {"probes": probed, "controls": controls, "knn_at_step": curve, "loss": losses}


def mask(study, results, strategy, ratio, seed):
    """A shorter pre-training under another mask, and the probes at all labels."""
    model, losses = pretrain(study, seed, study.plan.ablation_steps, mask_strategy=strategy, mask_ratio=ratio)
    train, test = study.part("train", seed), study.part("test", seed)
    numbers = probe_accuracies(encode(model, train), encode(model, test), train.labels, test.labels, seed)
    keep, masked = model.sample_mask(1)
    return {**numbers, "loss": losses, "visible": keep.shape[1], "tokens": keep.shape[1] + masked.shape[1]}


def tune(study, results, labels, start, seed):
    """The grid of learning rates and lengths on a quarter of the training labels, which the other three quarters predict."""
    train = study.part("train", seed).take(labels)
    num_held_out = math.ceil(labels / 4 / len(clips.CLASSES)) * len(clips.CLASSES)  # balanced, as labels go round
    fit = train.take(labels - num_held_out)
    held_out = clips.Clips(train.clips[labels - num_held_out :], train.labels[labels - num_held_out :])
    grid = []
    for steps in study.plan.finetune_steps:
        for lr in study.plan.finetune_lrs:
            model = classifier(study, start, seed)
            accuracy, loss = train_classifier(model, study.plan, seed, fit, held_out, lr=lr, steps=steps)
            grid.append({"lr": lr, "steps": steps, "accuracy": accuracy, "loss": loss})
    best = max(grid, key=lambda trial: (trial["accuracy"], -trial["loss"]))
    return {"held_out": num_held_out, "grid": grid, "lr": best["lr"], "steps": best["steps"]}


def finetune(study, results, labels, start, seed):
    """A classifier trained on all the labels as the tuning found best, on the test clips."""
    chosen = results[f"tune-{labels}-{start}"]
    train = study.part("train", seed).take(labels)
    model, test = classifier(study, start, seed), study.part("test", seed)
    accuracy, loss = train_classifier(model, study.plan, seed, train, test, lr=chosen["lr"], steps=chosen["steps"])
    return {"accuracy": accuracy, "loss": loss}


def autoencoder(plan, seed, **changes):
    torch.manual_seed(seed)
    config = MaskedAutoencoderConfig(
        image_size=clips.SIZE,
        num_frames=clips.FRAMES,
        patch_size=8,
        tubelet_size=2,
        width=plan.width,
        depth=plan.depth,
        num_heads=plan.num_heads,
        decoder_width=plan.decoder_width,
        decoder_depth=1,
        decoder_num_heads=max(1, plan.num_heads // 2),
        class_token=False,
        target="pixels",  # normalising would blow up the noise of flat patches, of which there are many
        mask_ratio=0.9,
    )
    model = MaskedAutoencoder(config.replace(**changes))
    for position in (model.encoder.position, model.decoder.position):
        initialize_sincos(position)
    return model


@torch.no_grad()
def initialize_sincos(position):
    """Positions start as sines and cosines, a quarter of the channels each for time, row and column, and are learned from there.

    Small random ones are learned from more slowly, which counts in a run as short as this: after 1000 steps, nearest neighbours
    with 1000 labels were right in 40 % of the cases instead of 47 % (one seed).
    """
    time, rows, columns = position.grid
    quarter = position.spatial.shape[1] // 4

    def sincos(count):
        rates = 1.5 * 10 ** -torch.linspace(0, 1, quarter // 2 + 1)[:-1]
        angles = torch.arange(count)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    position.temporal.zero_()
    position.spatial.zero_()
    position.temporal[:, : 2 * (quarter // 2)] = sincos(time)
    position.spatial[:, quarter : quarter + 2 * (quarter // 2)] = sincos(rows).repeat_interleave(columns, dim=0)
    position.spatial[:, 2 * quarter : 2 * quarter + 2 * (quarter // 2)] = sincos(columns).repeat(rows, 1)


def autocast():
    dtype, _ = choose_precision("auto", torch.device("cpu"))
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def optimize(parameter_groups, *, steps, batch, count, lr, betas, loss_of, seed, evaluate=lambda step: None):
    """``steps`` steps of AdamW over ``count`` clips in a random order, all of them before any comes again. Returns the mean loss
    of the last tenth."""
    settings = OptimizerConfig(batch=batch, base_batch=batch, epochs=steps, warmup_epochs=steps / 10, base_lr=lr, betas=betas)
    optimizer = adamw(parameter_groups, settings)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    last = []
    for step in range(steps):
        evaluate(step)
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings, peak_learning_rate(settings, batch))
        with autocast():
            loss = loss_of(rows, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= steps - max(1, steps // 10):
            last.append(loss.item())
    evaluate(steps)
    return sum(last) / len(last)


def pretrain(study, seed, steps, *, evaluate=lambda step, model: None, **changes):
    """(autoencoder, its loss at the end); ``evaluate(step, model)`` before every step and at the end."""
    plan, unlabelled = study.plan, study.part("unlabelled", seed)
    model = autoencoder(plan, seed, **changes)
    loss = optimize(
        weight_decay_groups(model, 0.05),
        steps=steps,
        batch=plan.pretrain_batch,
        count=len(unlabelled.labels),
        lr=plan.pretrain_lr,
        betas=(0.9, 0.95),
        loss_of=lambda rows, generator: model(unlabelled.video(rows), generator=generator).loss,
        seed=seed,
        evaluate=lambda step: evaluate(step, model),
    )
    return model, loss


def classifier(study, start, seed):
    """A classifier of clips that starts from the seed's pre-trained weights or from scratch."""
    model = checkpoint.load(study.weights(seed)) if start == "pretrained" else autoencoder(study.plan, seed)
    torch.manual_seed(seed)  # the head's
    return checkpoint.classifier_from_autoencoder(model, num_classes=len(clips.CLASSES))


def train_classifier(model, plan, seed, train, test, *, lr, steps):
    """Trains ``model`` on ``train``. Returns its (accuracy, cross entropy) on ``test``."""
    model.train()
    optimize(
        weight_decay_groups(model, 0.05, decay_tokens=False),
        steps=steps,
        batch=min(plan.finetune_batch, len(train.labels)),
        count=len(train.labels),
        lr=lr,
        betas=(0.9, 0.999),
        loss_of=lambda rows, generator: F.cross_entropy(model(train.video(rows)).float(), train.labels[rows]),
        seed=seed,
    )
    scores = in_batches(model.eval(), test)
    return (scores.argmax(1) == test.labels).float().mean().item(), F.cross_entropy(scores, test.labels).item()


@torch.no_grad()
def in_batches(function, part, batch=50):
    outputs = []
    for start in range(0, len(part.labels), batch):
        with autocast():
            outputs.append(function(part.video(slice(start, start + batch))).float())
    return torch.cat(outputs)


def encode(model, part):
    """Features [n, N * D]: every token of the encoder, side by side: where something is and when is what motion is made of."""
    classifier = checkpoint.classifier_from_autoencoder(model, num_classes=len(clips.CLASSES)).eval()
    return in_batches(lambda video: classifier.features(video, pooled=False).flatten(1), part)


def probe_accuracies(x, test_x, y, test_y, seed):
    return {
        "knn": probes.knn(x, y, test_x, test_y, len(clips.CLASSES), NEIGHBOURS),
        "linear": linear(x, y, test_x, test_y, len(clips.CLASSES), seed),
    }


def linear(x, y, test_x, test_y, classes, seed):
    """``probes.linear``, an order of magnitude sooner where features are many more than clips.

    The weights that it looks for lie in the span of the training clips, so the search is made there.
    """
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    if x.shape[1] > len(x):
        basis = torch.linalg.qr(x.T).Q
        x, test_x = x @ basis, test_x @ basis
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    validation, rest = shuffled[: len(y) // 5], shuffled[len(y) // 5 :]

    def accuracy(weight, features, labels):
        return (features @ weight[:-1] + weight[-1]).argmax(1).eq(labels).float().mean().item()

    def held_out_accuracy(penalty):
        return accuracy(probes.logistic_regression(x[rest], y[rest], classes, penalty), x[validation], y[validation])

    return accuracy(probes.logistic_regression(x, y, classes, max(probes.PENALTIES, key=held_out_accuracy)), test_x, test_y)


def shuffle_frames(frames, seed):
    """Each clip's frames in an order of their own: [n, T, H, W, C] -> the same."""
    order = torch.rand(frames.shape[:2], generator=torch.Generator().manual_seed(seed)).argsort(1)
    return frames[torch.arange(len(frames))[:, None], order]


def repeat_middle_frame(frames, seed):
    return frames[:, frames.shape[1] // 2, None].expand_as(frames).contiguous()
