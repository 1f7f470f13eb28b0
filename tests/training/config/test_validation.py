"""Every field of every configuration refuses values that it cannot have, in the same words from Python, files and options."""

import dataclasses
import importlib
import pkgutil
import typing

import pytest

from stmae.models import MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.field_types import field_types
from stmae.training import commands, config
from stmae.training.config import PretrainConfig, parse
from stmae.training.config.wording import counted

REQUIRED = {"data", "output", "checkpoint", "test_data", "input", "recipe", "memory", "video"}
VALUES = {"memory": 80.0, "output": "out.npy"}

# Field -> values out of its range: of all configurations that have it.
OUT_OF_RANGE = {
    "accumulate": (0, -1),
    "aspect": ((0, 1), (2, 1), (1, float("inf"))),
    "average_decay": (-0.1, 1),
    "base_batch": (0,),
    "base_lr": (0, -1, float("inf")),
    "batch": (0, -1),
    "betas": ((0.9, 1), (-0.1, 0.9)),
    "clip": (-0.1, 1.1),
    "clip_grad": (-1,),
    "box_threshold": (-0.1, 1.1),
    "crf": (-1, 52),
    "crop_pct": (0, 1.1, (0, 1), (0.9, 0.8), (0.9, 1.1)),
    "cutmix": (-1,),
    "data_patience": (-1,),
    "data_timeout": (-1,),
    "drop_path": (-0.1, 1),
    "dropout": (-0.1, 1),
    "epochs": (0, -1, float("inf")),
    "erasing": (-0.1, 1.1),
    "evaluate_every": (-1,),
    "every": (-1,),
    "extend_epochs": (-1,),
    "fps": (0,),
    "frames": (0,),
    "gop": (0,),
    "gpus": (0,),
    "gpus_per_machine": (0,),
    "image_size": (0, (32, 0)),
    "label_smoothing": (-0.1, 1),
    "layer_decay": (0, 1.1),
    "log_every": (0,),
    "magnitude": (-1, 11),
    "magnitude_std": (-1,),
    "mask_ratio": (-0.1, 1),
    "memory": (0, float("inf")),
    "min_lr": (-1,),
    "mixup": (-1,),
    "neighbours": (0,),
    "num_classes": (0,),
    "num_frames": (0,),
    "operations": (-1,),
    "process_timeout": (0, -1),
    "reconstruct_every": (-1,),
    "repeats": (0,),
    "roi_size": (0,),
    "save_every": (0,),
    "scale": ((0, 1), (0.5, 0.2), (0.5, 1.1)),
    "seed": (-1, 2**63),
    "short_side": (0,),
    "side": ((0, 32), (48, 32), (32, float("inf"))),
    "spatial": (0,),
    "start_second": (-1,),
    "stride": (0,),
    "temporal": (0,),
    "timeout": (-1,),
    "tokens": (0, -1),
    "tried": (-1,),
    "tubelet_size": (0,),
    "videos": (0,),
    "warmup_epochs": (-1, 1e9),
    "weight_decay": (-1,),
    "workers": (-1,),
}
TEXT = {
    "device": ("gpu0", ""),
    "kinds": ("", "knn,quadratic"),
}


def configurations():
    """Every dataclass of settings: of the package ``config`` and of each command."""
    found = [value for value in vars(config).values() if dataclasses.is_dataclass(value) and isinstance(value, type)]
    for module in pkgutil.iter_modules(commands.__path__):
        found.append(importlib.import_module(f"{commands.__name__}.{module.name}").Config)
    return list(dict.fromkeys(found))


def make(config_class, **values):
    missing = [field.name for field in dataclasses.fields(config_class) if field.default is field.default_factory]
    return config_class(**{**{name: VALUES.get(name, "x") for name in missing}, **values})


def is_numeric(annotation):
    parts = [annotation, *typing.get_args(annotation)]
    return any(part in (int, float) or typing.get_origin(part) is tuple for part in parts)


CONFIGURATIONS = configurations()
FIELDS = [(config_class, name) for config_class in CONFIGURATIONS for name in field_types(config_class)]


def identify(value):
    return f"{value.__module__.rpartition('.')[2]}.{value.__name__}" if isinstance(value, type) else None


def test_all_commands_are_covered():
    assert len(CONFIGURATIONS) >= 20
    assert {name for _, name in FIELDS if name in OUT_OF_RANGE} == set(OUT_OF_RANGE)


@pytest.mark.parametrize("config_class, name", FIELDS, ids=identify)
def test_bad_values_are_refused(config_class, name):
    annotation = field_types(config_class)[name]
    bad = [object(), {"a": 1}]
    if annotation is not str and type(None) not in typing.get_args(annotation):
        bad.append(None)
    if is_numeric(annotation):
        assert name in OUT_OF_RANGE, f"{config_class.__name__}.{name} has a range: add values outside of it to OUT_OF_RANGE"
        bad += ["ten", True, float("nan"), *OUT_OF_RANGE[name]]
    elif annotation is bool or typing.get_origin(annotation) is typing.Literal:
        bad += ["maybe", 2]
    else:
        bad += TEXT.get(name, ())
        if str in (annotation, *typing.get_args(annotation)):
            bad += [1, ["a"], *([""] if name in REQUIRED else [])]
    message = rf"^{name}: expected .*, got|^MaskedAutoencoderConfig: expected {name} to "
    for value in bad:
        with pytest.raises(ValueError, match=message):
            make(config_class, **{name: value})


@pytest.mark.parametrize("config_class", [MaskedAutoencoderConfig, VideoClassifierConfig])
def test_a_model_s_values_are_checked(config_class):
    for name in field_types(config_class):
        for value in (object(), {"a": 1}, "nonsense", float("nan")):
            with pytest.raises(ValueError, match=rf"^{config_class.__name__}: expected {name} to "):
                config_class(**{name: value})


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("seed", "1.5", "seed: expected an integer, got 1.5"),
        ("seed", "-1", "seed: expected 0 or more, at most 9223372036854775807, got -1"),
        ("run.precision", "fp32", "run.precision: expected one of 'auto', 'bf16', 'float32', got 'fp32'"),
        ("run.compile", "maybe", "run.compile: expected true or false, got 'maybe'"),
        ("run.device", "gpu0", "run.device: expected a device such as 'auto', 'cpu' or 'cuda:0', got 'gpu0'"),
        ("optimizer.batch", "ten", "optimizer.batch: expected an integer, got 'ten'"),
        ("optimizer.betas", "[0.9]", "optimizer.betas: expected 2 numbers, got [0.9]"),
        ("optimizer.warmup_epochs", "900", "optimizer.warmup_epochs: expected 0 or more, and less than epochs (800), got 900"),
        ("clips.scale", "[0.5, 2]", "clips.scale: expected two numbers above 0, at most 1, the smaller first, got [0.5, 2.0]"),
        ("model.depth", "many", "MaskedAutoencoderConfig: expected depth to be a positive integer, got 'many'"),
        ("model.mask_ratio", "1.5", "MaskedAutoencoderConfig: expected mask_ratio to lie between 0 and 1 (exclusive), got 1.5"),
    ],
)
def test_the_same_words_from_every_source(name, value, words, tmp_path, capsys):
    section, _, field = name.rpartition(".")
    arguments = ["--data=a", f"--output={tmp_path}"]
    file = tmp_path / "mine.yaml"
    file.write_text(f"{section}:\n  {field}: {value}\n" if section else f"{field}: {value}\n")
    for more in ([f"--{name}", value], ["--config", str(file)]):
        with pytest.raises(SystemExit):
            parse(PretrainConfig, [*arguments, *more], prog="stmae pretrain", description="")
        printed = capsys.readouterr().err
        assert printed.rstrip().endswith(words) and printed.count("expected") == 1
    owner = type(make(PretrainConfig).__dict__[section]) if section else PretrainConfig
    loaded = config.load_yaml(f"value: {value}")["value"]
    with pytest.raises(ValueError) as refused:
        make(owner, **{field: loaded})
    assert str(refused.value) in (words, words.removeprefix(f"{section}."))


def test_missing_options_are_named_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        parse(PretrainConfig, ["--seed=1"], prog="stmae pretrain", description="")
    assert capsys.readouterr().err.rstrip().endswith("the following arguments are required: --data, --output")


def test_numbers_with_their_nouns():
    assert [counted(n, "video") for n in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]
    assert [counted(n, "class") for n in (1, 3)] == ["1 class", "3 classes"] and counted(2, "box") == "2 boxes"
    assert counted(1.0, "pass", ".3g") == "1 pass" and counted(1.5, "batch", "g") == "1.5 batches"
    assert counted(441344, "token", ",") == "441,344 tokens"
