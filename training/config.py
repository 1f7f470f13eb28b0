"""What a run is made of, as dataclasses: every field is a line in a preset or configuration file and an option on the command line.

Order of precedence: the command line, then ``--config FILE``, then ``--preset NAME``, then the defaults below (the paper's).
A path in a preset or configuration file is relative to that file.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jsonargparse
import yaml

from stmae.models import MaskedAutoencoderConfig

PRESETS = Path(__file__).parent / "presets"
PATH_FIELDS = ("data", "held_out", "checkpoint", "video", "test_data")  # in a file, relative to it


@dataclass(kw_only=True)
class ClipConfig:
    """Clips: how they are cut from a video and augmented."""

    stride: int = 4
    """every stride-th frame of the video"""
    spacing: Literal["stride", "linspace"] = "stride"
    """'stride': exactly that; 'linspace': evenly over T*stride frames, rounded down, as the paper's published code (4.2 apart, not 4)"""
    repeats: int = 4
    """clips taken from one opened video (repeated sampling)"""
    scale: tuple[float, float] = (0.5, 1.0)
    """random resized crop: share of the frame's area"""
    aspect: tuple[float, float] = (0.75, 1.3333)
    """random resized crop: width over height"""
    flip: bool = True
    """mirror every second clip (not for data where left and right mean something)"""


@dataclass(kw_only=True)
class OptimizerConfig:
    """Optimisation: AdamW, linear warm-up, cosine decay, all per step."""

    batch: int = 512
    """videos a step, over all processes and accumulated parts; repeats are not counted"""
    accumulate: int = 1
    """parts that a step's batch is computed in, to save memory; the result is the same"""
    epochs: float = 800
    """effective epochs: passes over the videos times repeats"""
    warmup_epochs: float = 120
    """effective epochs of linear warm-up from 0"""
    base_lr: float = 1.6e-3
    """learning rate at a batch of base_batch videos; the rate used is base_lr * batch / base_batch"""
    base_batch: int = 512
    """the batch that base_lr is meant for"""
    min_lr: float = 0.0
    """where the cosine ends"""
    weight_decay: float = 0.05
    """on matrices, positions and tokens; never on biases and norms"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's"""
    clip_grad: float | None = 0.02
    """largest gradient norm; null: no clipping"""


@dataclass(kw_only=True)
class RunConfig:
    """Running: nothing here changes what is computed, but for the number format."""

    device: str = "auto"
    """'auto': cuda where there is one, else cpu"""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 autocast, or float32; 'auto': bf16, but float32 on a CPU without bf16 instructions"""
    workers: int | None = None
    """processes that decode videos; 0: none; null: 1 beside a model on the CPU, up to 12 beside a GPU"""
    save_every: int = 500
    """steps between checkpoints"""
    log_every: int = 10
    """steps between lines of the log"""
    evaluate_every: int = 0
    """steps between losses on held_out; 0: only at the start and at the end"""
    backend: Literal["ops", "reference"] = "ops"
    """'ops': the kernels; 'reference': the same in plain PyTorch"""
    compile: bool = False
    """torch.compile the model"""
    tensorboard: bool = True
    """write TensorBoard's event files too"""


@dataclass(kw_only=True)
class PretrainConfig:
    """The run: what is read, what is written."""

    data: str
    """videos: a folder, searched recursively, or a list file with a line 'path' or 'path label' each, relative to the list"""
    output: str
    """folder of the run; the same command again continues what is there"""
    held_out: str | None = None
    """videos kept out of training, as data; their loss is shown before and after"""
    seed: int = 0
    """of the weights, the order, the crops and the masks"""
    clips: ClipConfig = field(default_factory=ClipConfig)
    model: MaskedAutoencoderConfig = field(default_factory=MaskedAutoencoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def parse(config_class, argv, *, prog, description):
    """The configuration that ``argv`` asks for. Prints what is wrong and exits, as argparse does, when it cannot be made."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    has_presets = config_class is PretrainConfig
    required = [f"--{f.name} {f.name.upper()}" for f in dataclasses.fields(config_class) if _is_required(f)]
    usage = [prog, *["[--preset NAME]"] * has_presets, "[--config FILE]", *required, "[--SETTING VALUE ...]"]
    parser = jsonargparse.ArgumentParser(prog=prog, usage=" ".join(usage), description=description)
    # Files become the parser's defaults, so that --help shows what would be used and the order of the options does not matter.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    if has_presets:
        parser.add_argument("--preset", metavar="NAME", help=f"settings to start from: {', '.join(presets())}")
        early.add_argument("--preset")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file of settings" + ", on top of the preset's" * has_presets
    )
    early.add_argument("--config")
    parser.add_class_arguments(config_class, None)
    try:
        files = vars(early.parse_known_args(argv)[0])
        if files.get("preset") is not None:
            _set_defaults(parser, preset_path(files["preset"]))
        if files.get("config") is not None:
            _set_defaults(parser, Path(files["config"]))
        parsed = parser.parse_args(argv)
        for name in files:
            parsed.pop(name)
        return config_class(**vars(parser.instantiate(parsed)))
    except (ValueError, argparse.ArgumentError) as error:
        parser.error(str(error))


def from_preset(config_class, name, **settings):
    """The configuration of a preset, with the top-level ``settings`` given."""
    return parse(
        config_class, [f"--preset={name}", *(f"--{key}={value}" for key, value in settings.items())], prog="stmae", description=""
    )


def presets():
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_path(name):
    if name not in presets():
        raise ValueError(f"expected --preset to be one of {', '.join(presets())}, got {name!r}")
    return PRESETS / f"{name}.yaml"


def read_settings(file):
    """Settings of a YAML or JSON file as {"section.field": value}, its relative paths made absolute."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the settings in {file}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected 'field: value' lines, got {type(tree).__name__}")
    settings = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            settings.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            settings[name] = str(file.parent.joinpath(value).resolve()) if name in PATH_FIELDS and value else value
    return settings


def _set_defaults(parser, file):
    for name, value in read_settings(file).items():
        try:
            parser.set_defaults({name: value})
        except KeyError as error:
            raise ValueError(f"{file}: there is no setting {name!r}") from error


def _is_required(f):
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def to_dict(config):
    """A configuration as plain values, for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return list(config) if isinstance(config, tuple) else config
