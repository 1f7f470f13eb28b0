"""``stmae plan``: how to run a recipe on the GPUs that there are: what fits, what follows from it, and the command."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stmae import checkpoint
from stmae.masking import num_keep, num_reconstructed
from stmae.models import (
    EncoderConfig,
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
    VideoClassifier,
    VideoClassifierConfig,
)

from ..config import FinetuneConfig, PretrainConfig, about_preset, check_common, parse, presets, read_settings
from ..data.video_list import find_videos
from ..engine.optimizer import peak_learning_rate, total_steps
from ..engine.run_folder import weights_file

GB = 1e9
KINETICS_400 = 240_000  # videos to train on, about: what a plan is for when it is told nothing else
STATE_BYTES = 16  # a parameter's float32 weight, gradient and AdamW's two moments
BUCKET_BYTES = 4  # its place in DistributedDataParallel's buckets
CONTEXT_GB = 1.0  # CUDA's own, and the libraries'
SLACK = 1.1  # what an allocator holds beyond what is asked of it


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
    """their number; null: as in data, without data about as many as Kinetics-400 has (240,000)"""
    batch: int | None = None
    """videos a step; null: the recipe's"""
    encoder: str | None = None
    """for fine-tuning, where the encoder's shape is from: a pre-training preset or weights; null: as the preset says"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """as run.parallel"""
    checkpoint_activations: bool = False
    """as run.checkpoint_activations"""
    precision: Literal["bf16", "float32"] = "bf16"
    """as run.precision"""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: what every step needs, and what each clip adds."""

    state: float
    """weights, gradients, AdamW's moments, and copies of them"""
    clip: float
    """what the backward pass needs of a clip, its pixels, and the gradients that are alive at the same time"""

    def total(self, clips):
        return (self.state + self.clip * clips) * SLACK + CONTEXT_GB * GB


def run(config):
    """Prints the plan as a table and the command; returns it as a dict."""
    for name in ("memory", "gpus", "gpus_per_machine"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: expected more than 0, got {getattr(config, name)}")
    for name in ("videos", "batch"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(config, name)}")
    command, recipe, about = read_recipe(config.recipe)
    check_common(recipe)
    model = recipe.model if command == "pretrain" else classifier_config(config, recipe, about)
    videos = config.videos or (len(find_videos(config.data)) if config.data else KINETICS_400)
    batch = config.batch or recipe.optimizer.batch
    if batch % config.gpus:
        lower = batch // config.gpus * config.gpus
        raise ValueError(
            f"a batch of {batch} videos does not divide into {config.gpus} GPUs: "
            f"try --batch {lower or config.gpus}{f' or {lower + config.gpus}' if lower else ''}"
        )
    parts, memory = fit(config, model, batch // config.gpus, recipe.clips.repeats)

    def numbers(videos, batch, gpus):
        settings, repeats = dataclasses.replace(recipe.optimizer, batch=batch), recipe.clips.repeats
        steps = total_steps(settings, videos, repeats)
        counted = batch * repeats if command == "finetune" else batch
        return {
            "GPUs": gpus,
            "videos in the data": videos,
            "videos a step": batch,
            "clips a step": batch * repeats,
            "clips of each video (repeats)": repeats,
            "learning rate": peak_learning_rate(settings, counted),
            "effective epochs": settings.epochs,
            "passes over the videos": settings.epochs / repeats,
            "steps": steps,
            "steps of warm-up": round(steps * settings.warmup_epochs / settings.epochs),
        }

    clips = batch // config.gpus // parts * recipe.clips.repeats
    plan = numbers(videos, batch, config.gpus)
    plan |= {
        "parts that a step is computed in": parts,
        "clips on a GPU at a time": clips,
        "GB of a GPU: weights, gradients, AdamW": memory.state / GB,
        "GB of a GPU: activations": memory.clip * clips / GB,
        "GB of a GPU: in all, expected": memory.total(clips) / GB,
    }
    source = numbers(KINETICS_400, recipe.optimizer.batch, about["gpus"] or "-")
    words = command_line(config, command, batch, parts, recipe)
    print(table(plan, source, config.recipe))
    counted = "clips (repeats are counted)" if command == "finetune" else "videos (repeats are not counted)"
    print(f"\nThe learning rate is base_lr * {counted} / base_batch. The memory is an estimate: see stmae/training/plan.py.")
    print("\n" + words)
    return {**plan, "command": words}


def read_recipe(name):
    """(command, configuration, about) of a preset or a file; ``about`` as of ``about_preset``."""
    file = Path(name)
    if name in presets():
        about, argument = about_preset(name), f"--preset={name}"
    elif file.suffix in (".yaml", ".yml", ".json"):
        told, _ = read_settings(file)
        base = about_preset(told["preset"]) if told.get("preset") in presets() else {}
        about, argument = {"command": None, "pretrained": None, "gpus": None, **base, **told}, f"--config={name}"
    else:
        raise ValueError(f"recipe: expected a file of settings or one of the presets {', '.join(presets())}, got {name!r}")
    classes = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    if about["command"] not in classes:
        raise ValueError(f"{name}: expected 'preset: NAME', 'command: pretrain' or 'command: finetune' at its top")
    needed = ["--data=videos", "--output=run", *["--checkpoint=weights"] * (about["command"] == "finetune")]
    made = parse(classes[about["command"]], [*needed, argument], prog="stmae plan", description="")
    return about["command"], made, about


def classifier_config(config, recipe, about):
    """What fine-tuning will train: the encoder's shape from a pre-training preset or from weights, the rest from the recipe."""
    source = config.encoder or about["pretrained"]
    if source is None:
        raise ValueError("encoder: expected a pre-training preset or weights, for the recipe does not name one")
    if source in presets("pretrain"):
        encoder = read_recipe(source)[1].model
    else:
        encoder = checkpoint.load(weights_file(source)).config
    shape = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(EncoderConfig)}
    for name in ("num_frames", "image_size"):
        if getattr(recipe.model, name) is not None:
            shape[name] = getattr(recipe.model, name)
    return VideoClassifierConfig(**shape, num_classes=recipe.model.num_classes or 400)


def fit(config, model, videos, repeats):
    """(parts, Memory): in how few parts the ``videos`` of a GPU's share of a step fit into its memory.

    Raises ValueError that says how much one video needs, and what would help.
    """
    memory = estimate(model, config)
    for parts in range(1, videos + 1):
        if videos % parts == 0 and memory.total(videos // parts * repeats) <= config.memory * GB:
            return parts, memory
    advice = []
    for words, change in (
        ("--checkpoint_activations true", {"checkpoint_activations": True}),
        ("--parallel fsdp", {"parallel": "fsdp"}),
        ("both", {"checkpoint_activations": True, "parallel": "fsdp"}),
    ):
        other = dataclasses.replace(config, **change)
        need = estimate(model, other).total(repeats) / GB
        if other != config and (config.gpus > 1 or "parallel" not in change) and need < memory.total(repeats) / GB:
            advice.append(f"{words} needs {need:.1f} GB")
    clips = "clip" if repeats == 1 else f"{repeats} clips"
    raise ValueError(
        f"it does not fit: a single video of {clips} needs {memory.total(repeats) / GB:.1f} GB, of which "
        f"{memory.state / GB:.1f} GB are weights, gradients and AdamW's moments, and a GPU has {config.memory:g} GB"
        + ("; " + ", ".join(advice) if advice else "")
    )


def estimate(model, config):
    """The Memory that training a model of this configuration needs on a GPU.

    Parameters: 16 bytes each; with DDP 4 more for its buckets; with FSDP a share of the 16 and, gathered, those of two blocks.
    Under bf16 autocast a bfloat16 copy of each weight is kept from the forward pass to the backward. Activations: see
    ``activation_bytes``; on top of them, the gradients that flow through one block.
    """
    bf16, together = config.precision == "bf16", config.gpus > 1
    size, blocks = parameters(model)
    largest = max(blocks)
    if together and config.parallel == "fsdp":
        state = STATE_BYTES * size / config.gpus + 2 * 4 * largest
    else:
        state = (STATE_BYTES + BUCKET_BYTES * together) * size
    if bf16:
        state += 2 * (largest if config.checkpoint_activations else size)
    kept, block = activation_bytes(model, bf16=bf16, checkpointed=config.checkpoint_activations)
    pixels = math.prod(model.video_shape)  # uint8
    return Memory(state, kept + pixels + block)


def parameters(model):
    """(number of parameters, number in each block)."""
    made = MaskedAutoencoder if isinstance(model, MaskedAutoencoderConfig) else VideoClassifier
    with torch.device("meta"):
        network = made(model)
    return sum(p.numel() for p in network.parameters()), [sum(p.numel() for p in b.parameters()) for b in network.blocks()]


def activation_bytes(model, *, bf16, checkpointed=False, gpu=True):
    """(bytes that the forward pass of one clip keeps for the backward, bytes of its largest block).

    A block over n tokens of width D, of which m go on after the attention, keeps (a: bytes of an activation, 2 in bf16, else 4)

        the residual stream before each norm        4 n D + 4 m D, and each norm's statistics, 8 n + 8 m
        the first norm's output, q, k and v         a (1 + 3) n D
        the attention's output and log-sum-exps     a n D + 4 n H
        the second norm's output                    a m D
        the hidden layer before and after its GELU  a (1 + 1) r m D, r = mlp_ratio; the CPU's kernel keeps only the first

    and with activation checkpointing only its input: the stream and, but for the first block, the branch to add, (4 + a) n D.
    """
    a = 2 if bf16 else 4
    hidden = 2 if gpu else 1

    def block(n, width, heads, m=None):
        m, gathered = (n, 0) if m is None else (m, a * m * width)
        stream = (4 * width + 8) * (n + m)
        return stream + 5 * a * n * width + gathered + 4 * n * heads + a * m * width * (1 + hidden * model.mlp_ratio)

    def entering(n, width, depth):
        return n * width * (4 * depth + a * (depth - 1))

    first = int(model.class_token)
    is_autoencoder = isinstance(model, MaskedAutoencoderConfig)
    seen = num_keep(model.mask_strategy, model.grid, model.mask_ratio) if is_autoencoder else model.num_tokens
    encoder = [block(seen + first, model.width, model.num_heads)] * model.depth
    inputs = entering(seen + first, model.width, model.depth)
    ends, decoder = 0, []
    if is_autoencoder:
        width, predicted = model.decoder_width, num_reconstructed(model.num_tokens - seen, model.decoder_mask_ratio)
        there = seen + predicted + first
        decoder = [block(there, width, model.decoder_num_heads)] * (model.decoder_depth - 1)
        decoder.append(block(there, width, model.decoder_num_heads, predicted))
        inputs += entering(there, width, model.decoder_depth)
        ends = (4 + a) * (seen + first) * model.width + (4 + a) * predicted * width
        ends += (4 if model.target == "hog" else a) * predicted * model.patch_values
    blocks = encoder + decoder
    return (inputs if checkpointed else sum(blocks)) + ends, max(blocks)


def command_line(config, command, batch, parts, recipe):
    """What to type."""
    machines = math.ceil(config.gpus / config.gpus_per_machine)
    if config.gpus % machines:
        raise ValueError(f"gpus: expected as many on each of {machines} machines, got {config.gpus} in all")
    start = "stmae"
    if config.gpus > 1:
        several = f"--nnodes {machines} --rdzv_backend c10d --rdzv_endpoint HOST:29400 " if machines > 1 else ""
        start = f"torchrun {several}--nproc_per_node {config.gpus // machines} -m stmae.training"
    words = [start, command, f"--{'preset' if config.recipe in presets() else 'config'} {config.recipe}"]
    words += [f"--data {config.data or 'DATA'}", *["--checkpoint WEIGHTS"] * (command == "finetune"), "--output RUN"]
    for name, value, usual in (
        ("optimizer.batch", batch, recipe.optimizer.batch),
        ("optimizer.accumulate", parts, recipe.optimizer.accumulate),
        ("run.parallel", config.parallel, recipe.run.parallel),
        ("run.checkpoint_activations", config.checkpoint_activations, recipe.run.checkpoint_activations),
        ("run.precision", config.precision, "bf16"),
    ):
        if value != usual:
            words.append(f"--{name} {str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


def table(plan, source, recipe):
    """Rows of name, this plan's value, and that of the recipe as its source used it."""

    def text(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    rows = [("", "this plan", f"{recipe}, on Kinetics-400"), *((k, text(v), text(source.get(k, ""))) for k, v in plan.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows)
