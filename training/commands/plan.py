"""``stmae plan``: how to run a recipe on the GPUs that there are: what fits, what follows from it, and the command."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stmae import checkpoint
from stmae.models import EncoderConfig, VideoClassifierConfig
from stmae.models.field_types import show

from ..config import DetectionConfig, FinetuneConfig, PretrainConfig, parse, preset_header, presets, read_settings
from ..config.checks import check_types, require_positive, require_text
from ..config.wording import counted
from ..data.ava import count_key_frames
from ..data.batch_sampler import VideoOrder
from ..data.clip_shapes import ClipShapes
from ..data.loader import ring_slots
from ..data.packed_batch_sampler import PackedOrder, capacity
from ..data.video_list import find_mixture
from ..engine.device import MOST_WORKERS
from ..engine.optimizer import peak_learning_rate, total_steps
from ..engine.run_folder import weights_file
from ..planning.flops import autoencoder_flops, classifier_flops
from ..planning.memory import GB, estimate

KINETICS_400 = 240_000  # videos to train on, about: the data set that a plan assumes, where the recipe names none


@dataclass(kw_only=True)
class Config:
    """The plan: for which recipe, on what."""

    recipe: str
    """a preset, or a YAML or JSON file of settings that starts from one or names its 'command'"""
    memory: float
    """of a GPU, in GB"""
    gpus: int = 1
    """on all machines together"""
    gpus_per_machine: int = 8
    """at most"""
    data: str | None = None
    """videos to count, and to name in the command; null: as the recipe says"""
    videos: int | None = None
    """their number; null: as in data, without data as many as the recipe's data set has, Kinetics-400's 240,000 if it names
    none"""
    batch: int | None = None
    """videos a step; null: the recipe's"""
    tokens: int | None = None
    """the most tokens a step, as optimizer.tokens, in the place of batch; null: the recipe's"""
    encoder: str | None = None
    """for fine-tuning, where the encoder's shape is from: a pre-training preset or weights; null: as the preset says"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """as run.parallel"""
    checkpoint_activations: bool = False
    """as run.checkpoint_activations"""
    precision: Literal["bf16", "float32"] = "bf16"
    """as run.precision"""

    def __post_init__(self):
        check_types(self)
        require_text(self, "recipe", "data", "encoder")
        require_positive(self, "memory", "gpus", "gpus_per_machine", "videos", "batch", "tokens")
        if self.batch is not None and self.tokens is not None:
            raise ValueError(f"tokens: expected null beside batch {self.batch}, got {self.tokens}")


def run(config):
    """Prints the plan as a table and the command; returns it as a dict."""
    command, recipe, header = read_recipe(config.recipe)
    model = recipe.model if command == "pretrain" else classifier_config(config, recipe, header)
    dataset, size = header.get("dataset") or "Kinetics-400", header.get("videos") or KINETICS_400
    count = count_key_frames if command == "finetune detector" else lambda data: len(find_mixture(data).entries)
    videos = config.videos or (count(config.data) if config.data else size)
    changed = with_step(recipe, command, config)
    step = step_of(changed, command, model)
    if step.shapes is None and changed.optimizer.batch % config.gpus:
        lower = changed.optimizer.batch // config.gpus * config.gpus
        raise ValueError(
            f"a batch of {counted(changed.optimizer.batch, 'video')} does not divide into {counted(config.gpus, 'GPU')}: "
            f"try --batch {lower or config.gpus}{f' or {lower + config.gpus}' if lower else ''}"
        )
    micro_batches, memory = fit(config, model, step)

    def numbers(videos, step, gpus):
        steps = step.steps(videos)
        return {
            "GPUs": gpus,
            "videos in the data": videos,
            **({"tokens a step": step.settings.tokens} if step.has_budget else {}),
            "videos a step": step.videos,
            "clips a step": step.videos * step.repeats,
            "clips of each video (repeats)": step.repeats,
            "learning rate": peak_learning_rate(step.settings, step.rate_batch),
            "effective epochs": step.settings.epochs,
            "passes over the videos": step.settings.epochs / step.repeats,
            "steps": steps,
            "steps of warm-up": round(steps * step.settings.warmup_epochs / step.settings.epochs),
            "EFLOP in all": step.flops * step.videos * step.repeats * steps / 1e18,
        }

    units = step.units(config.gpus, micro_batches)
    plan = numbers(videos, step, config.gpus)
    plan |= {
        "micro-batches a step": micro_batches,
        "clips on a GPU at a time": step.videos * step.repeats / config.gpus / micro_batches if step.shapes else units,
        "GB of a GPU: weights, gradients, AdamW": memory.state / GB,
        "GB of a GPU: activations": memory.clip * units / GB,
        "GB of a GPU: in all, expected": memory.total(units) / GB,
        "GB beside a GPU: clips of data workers": step.shared_bytes(model, videos, config.gpus, micro_batches) / GB,
    }
    source = numbers(size, step_of(recipe, command, model), header["gpus"] or "-")
    words = command_line(config, command, changed, micro_batches, recipe)
    print(table(plan, source, f"{config.recipe}, on {dataset}"))
    samples = "clips (repeats are counted)" if command == "finetune" else "videos (repeats are not counted)"
    print(f"\nThe learning rate is base_lr * {samples} / base_batch. The memory is an estimate: see planning/memory.py.")
    if step.shapes is not None:
        print(
            "Batches are packed: videos, clips, steps and FLOPs are those expected of videos, without pictures. With a budget of "
            "tokens\nthe learning rate is that of as many tokens in clips of the model's own size."
        )
    print("\n" + words)
    return {**plan, "command": words}


def with_step(recipe, command, config):
    """The recipe with the batch, or the budget of tokens, that the plan asks for."""
    if config.tokens is not None and command != "pretrain":
        raise ValueError(f"tokens: expected null for 'stmae {command}', got {config.tokens}: only pre-training takes a budget")
    asked = {} if config.batch is None else {"batch": config.batch}
    if command == "pretrain" and (config.batch or config.tokens):
        asked["tokens"] = config.tokens
    return dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, **asked))


@dataclass(kw_only=True)
class Step:
    """What a recipe's step takes, of videos as they are expected where batches are packed."""

    settings: object
    """the recipe's ``optimizer``"""
    repeats: int
    videos: float
    rate_batch: float
    """videos or clips, what the learning rate counts of it"""
    flops: float
    """of a clip, forward and backward"""
    shapes: ClipShapes | None = None
    """of packed batches"""

    @property
    def has_budget(self):
        return self.shapes is not None and self.settings.tokens is not None

    def steps(self, videos):
        """In all, with so many videos in the data."""
        if self.has_budget:
            return max(1, math.ceil(self.settings.epochs / self.repeats * videos / self.videos))
        return total_steps(self.settings, videos, self.repeats)

    def units(self, gpus, micro_batches):
        """How many clips, or of packed batches tokens, a GPU has at a time at most."""
        if self.shapes is None:
            return self.settings.batch // gpus // micro_batches * self.repeats
        return self.videos * self.shapes.mean_cost / gpus / micro_batches + self.shapes.most_cost

    def shared_bytes(self, model, videos, gpus, micro_batches):
        """What the data workers of a process share with it, with so many ``videos`` in the data and as many workers as a process
        has at most."""
        own = max(1, round(self.videos / gpus / micro_batches))
        workers = min(MOST_WORKERS, max(1, int(self.videos / gpus)))
        slots, ids = ring_slots(own, workers, 2 * micro_batches), 8
        if self.shapes is None:
            return slots * own * self.repeats * (math.prod(model.video_shape) + ids * model.num_tokens)
        size = {"tokens": self.settings.tokens} if self.has_budget else {"batch": self.settings.batch}
        order = PackedOrder(VideoOrder([(videos, 1.0)], 0), self.shapes, [False] * videos, seed=0, **size)
        cost = order.most_cost(max(1, math.ceil(videos / self.videos)))  # of an epoch
        return slots * capacity(self.shapes, cost, gpus * micro_batches) * (self.shapes.token_bytes + ids)

    def divisions(self, gpus):
        """The numbers of micro-batches that it can be computed in, ascending."""
        if self.shapes is None:
            videos = self.settings.batch // gpus
            return [parts for parts in range(1, videos + 1) if videos % parts == 0]
        most = self.settings.tokens // self.shapes.most_cost if self.has_budget else self.settings.batch
        return range(1, most // gpus + 1)


def step_of(recipe, command, model):
    """The Step of a recipe."""
    settings, repeats = recipe.optimizer, getattr(recipe.clips, "repeats", 1)  # a detector takes one clip around a frame
    batch = settings.batch
    if command != "pretrain":
        rate_batch = batch * repeats if command == "finetune" else batch
        return Step(settings=settings, repeats=repeats, videos=batch, rate_batch=rate_batch, flops=classifier_flops(model)[1])
    if not recipe.packed:
        return Step(settings=settings, repeats=repeats, videos=batch, rate_batch=batch, flops=autoencoder_flops(model)[1])
    shapes, rate_batch = ClipShapes(model, recipe.clips), batch
    if settings.tokens is not None:
        batch, rate_batch = settings.tokens / shapes.mean_cost, settings.tokens / shapes.standard_cost

    def flops(slices, area):
        counts = shapes.counts(slices, area)
        return autoencoder_flops(model, counts.visible, counts.reconstructed)[1]

    return Step(settings=settings, repeats=repeats, videos=batch, rate_batch=rate_batch, flops=shapes.mean(flops), shapes=shapes)


def read_recipe(name):
    """(command, configuration, header) of a preset or a file; ``header`` as of ``preset_header``."""
    file = Path(name)
    if name in presets():
        header, argument = preset_header(name), f"--preset={name}"
    elif file.suffix in (".yaml", ".yml", ".json"):
        own, _ = read_settings(file)
        base = preset_header(own["preset"]) if own.get("preset") in presets() else {}
        header, argument = {**dict.fromkeys(("command", "pretrained", "gpus")), **base, **own}, f"--config={name}"
    else:
        raise ValueError(f"recipe: expected a file of settings or one of the presets {', '.join(presets())}, got {name!r}")
    classes = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "finetune detector": DetectionConfig}
    if header["command"] not in classes:
        raise ValueError(f"{name}: expected 'preset: NAME' or 'command: ' and one of {', '.join(classes)} at its top")
    needed = ["--data=videos", "--output=run", *["--checkpoint=weights"] * (header["command"] != "pretrain")]
    needed += ["--data_root=videos"] * (header["command"] == "finetune detector")
    made = parse(classes[header["command"]], [*needed, argument], prog="stmae plan", description="")
    return header["command"], made, header


def classifier_config(config, recipe, header):
    """What fine-tuning will train: the encoder's shape from a pre-training preset or from weights, the rest from the recipe."""
    source = config.encoder or header["pretrained"]
    if source is None:
        raise ValueError("encoder: expected a pre-training preset or weights, for the recipe does not name one")
    if source in presets("pretrain"):
        encoder = read_recipe(source)[1].model
    else:
        encoder = checkpoint.load(weights_file(source)).config
    shape = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(EncoderConfig)}
    for name in ("num_frames", "image_size", "tubelet_size"):
        if getattr(recipe.model, name, None) is not None:
            shape[name] = getattr(recipe.model, name)
    return VideoClassifierConfig(**shape, num_classes=recipe.model.num_classes or 400)


def fit(config, model, step):
    """(micro_batches, Memory): in how few micro-batches the part of a Step that a GPU has fits into its memory.

    Raises ValueError that says how much one video needs, and what would help.
    """
    memory = estimate(model, config, step.shapes)
    divisions = step.divisions(config.gpus)
    if not len(divisions):
        most = step.shapes.most_cost
        expected = f"expected {config.gpus * most} or more, {most} for each, {step.shapes.what_costs_most}"
        batch = counted(step.settings.tokens, "token") if step.has_budget else counted(step.settings.batch, "video")
        raise ValueError(
            f"a {'budget' if step.has_budget else 'batch'} of {batch} does not divide into {counted(config.gpus, 'GPU')}"
            + (f": {expected}" if step.has_budget else "")
        )
    for micro_batches in divisions:
        if memory.total(step.units(config.gpus, micro_batches)) <= config.memory * GB:
            return micro_batches, memory
    least, repeats = step.units(config.gpus, divisions[-1]), step.repeats
    advice = []
    for words, change in (
        ("--checkpoint_activations true", {"checkpoint_activations": True}),
        ("--parallel fsdp", {"parallel": "fsdp"}),
        ("both", {"checkpoint_activations": True, "parallel": "fsdp"}),
    ):
        other = dataclasses.replace(config, **change)
        need = estimate(model, other, step.shapes).total(least) / GB
        if other != config and (config.gpus > 1 or "parallel" not in change) and need < memory.total(least) / GB:
            advice.append(f"{words} needs {need:.1f} GB")
    raise ValueError(
        f"it does not fit: a single video of {counted(repeats, 'clip')} needs {memory.total(least) / GB:.1f} GB, of which "
        f"{memory.state / GB:.1f} GB are weights, gradients and AdamW's moments, and a GPU has {config.memory:g} GB"
        + ("; " + ", ".join(advice) if advice else "")
    )


def command_line(config, command, changed, micro_batches, recipe):
    """What to type."""
    machines = math.ceil(config.gpus / config.gpus_per_machine)
    if config.gpus % machines:
        raise ValueError(f"gpus: expected as many on each of {counted(machines, 'machine')}, got {config.gpus} in all")
    start = "stmae"
    if config.gpus > 1:
        several = f"--nnodes {machines} --rdzv_backend c10d --rdzv_endpoint HOST:29400 " if machines > 1 else ""
        start = f"torchrun {several}--nproc_per_node {config.gpus // machines} -m stmae.training"
    words = [start, command, f"--{'preset' if config.recipe in presets() else 'config'} {config.recipe}"]
    words += [f"--data {config.data or 'DATA'}", *["--data_root VIDEOS"] * (command == "finetune detector")]
    words += [*["--checkpoint WEIGHTS"] * (command != "pretrain"), "--output RUN"]
    for name, value, usual in (
        ("optimizer.batch", changed.optimizer.batch, recipe.optimizer.batch),
        ("optimizer.tokens", getattr(changed.optimizer, "tokens", None), getattr(recipe.optimizer, "tokens", None)),
        ("optimizer.accumulate", micro_batches, recipe.optimizer.accumulate),
        ("run.parallel", config.parallel, recipe.run.parallel),
        ("run.checkpoint_activations", config.checkpoint_activations, recipe.run.checkpoint_activations),
        ("run.precision", config.precision, "bf16"),
    ):
        if value != usual:
            words.append(f"--{name} {show(value) if value is None or isinstance(value, bool) else value}")
    return " ".join(words)


def table(plan, source, recipe):
    """Rows of name, this plan's value, and that of the recipe as its source used it."""

    def text(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    rows = [("", "this plan", recipe), *((k, text(v), text(source.get(k, ""))) for k, v in plan.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows)
