"""What a run is made of, as dataclasses: every field is a line in a preset or configuration file and an option on the command
line.

Order of precedence: the command line, then ``--config FILE``, then ``--preset NAME``, then the defaults below (the paper's).
A path in a preset or configuration file is relative to that file. Such a file may start from a preset and hold only what
differs: ``preset: NAME`` at its top. A preset also says which command it is for (``command``), on how many GPUs its source ran it
(``gpus``) and, for fine-tuning, which preset the weights are from (``pretrained``).
"""

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jsonargparse
import yaml

from stmae.masking import num_keep
from stmae.models import MaskedAutoencoderConfig

PRESETS = Path(__file__).parents[1] / "presets"
ABOUT = ("command", "preset", "pretrained", "gpus")  # at the top of a preset or configuration file: not settings
PATH_FIELDS = (  # in a file, relative to it
    "data",
    "data_root",
    "data_labels",
    "held_out",
    "checkpoint",
    "video",
    "test_data",
    "probe.data",
    "probe.test_data",
)


@dataclass(kw_only=True)
class ClipConfig:
    """Clips: how they are cut from a video and augmented."""

    stride: int = 4
    """every stride-th frame of the video"""
    spacing: Literal["stride", "linspace", "segments"] = "stride"
    """'segments': one frame from each of T equal parts of the video, whatever the stride; 'stride': exactly that;
    'linspace': evenly over T*stride frames, rounded down, as the paper's published code (4.2
    apart, not 4)"""
    repeats: int = 4
    """clips taken from one opened video (repeated sampling)"""
    scale: tuple[float, float] = (0.5, 1.0)
    """random resized crop: share of the frame's area"""
    aspect: tuple[float, float] = (0.75, 1.3333)
    """random resized crop: width over height"""
    flip: bool = True
    """mirror every second clip (not for data where left and right mean something)"""
    decoder: Literal["pyav", "torchcodec", "auto"] = "pyav"
    """of videos; 'auto': torchcodec where it is installed and works, else PyAV. Both give the same frames"""


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
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """on several processes: 'ddp': each holds the whole model; 'fsdp': each holds a share of weights, gradients and AdamW's
    moments (FSDP2), and writes its share of a checkpoint. A run continues with either, on any number of processes"""
    checkpoint_activations: bool = False
    """keep only each block's input and compute the block again in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile the model (with fsdp: each block)"""
    tensorboard: bool = True
    """write TensorBoard's event files too"""


@dataclass(kw_only=True)
class PretrainRunConfig(RunConfig):
    """Running: nothing here changes what is computed, but for the number format."""

    reconstruct_every: int = 0
    """steps between pictures of what the model makes of three held-out videos (else of data); 0: only at the start and
    at the end"""


@dataclass(kw_only=True)
class OnlineProbeConfig:
    """Nearest neighbours on the encoder's features while it trains: whether it learns anything that labels want."""

    data: str | None = None
    """labelled videos that vote, as for stmae probe; null: no probe"""
    test_data: str | None = None
    """labelled videos that are judged"""
    every: int = 0
    """steps between probes; 0: only at the start and at the end"""
    neighbours: int = 20
    """that vote"""
    tokens: Literal["mean", "all"] = "mean"
    """'mean': the normalised mean of a clip's tokens; 'all': every token, side by side, for small models"""


@dataclass(kw_only=True)
class PlacesConfig:
    """Where the parts of a data set are that its list does not say."""

    data_root: str | None = None
    """folder that a list's relative paths start from (null: the list's own), or where Something-Something's videos lie"""
    data_labels: str | None = None
    """numbers of the classes, {class: number} in json or a text file with a class a line; null: class folders in the order of
    their names, Something-Something's labels.json beside its list"""


@dataclass(kw_only=True)
class PretrainConfig(PlacesConfig):
    """The run: what is read, what is written."""

    data: str
    """videos: a folder, searched recursively, a list file with a line 'path' or 'path label' each, or
    Something-Something's json"""
    output: str
    """folder of the run; the same command again continues what is there"""
    held_out: str | None = None
    """videos kept out of training, as data; their loss is shown before and after"""
    seed: int = 0
    """of the weights, the order, the crops and the masks"""
    clips: ClipConfig = field(default_factory=ClipConfig)
    model: MaskedAutoencoderConfig = field(default_factory=MaskedAutoencoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    run: PretrainRunConfig = field(default_factory=PretrainRunConfig)


@dataclass(kw_only=True)
class FinetuneClipConfig(ClipConfig):
    """Clips: how they are cut from a video and augmented."""

    repeats: int = 2
    """clips taken from one opened video (repeated sampling)"""
    scale: tuple[float, float] = (0.08, 1.0)
    """random resized crop: share of the frame's area"""


@dataclass(kw_only=True)
class AugmentationConfig:
    """Further augmentation of labelled clips; defaults are the paper's."""

    operations: int = 2
    """RandAugment: operations per clip, each with probability one half; 0: none"""
    magnitude: float = 7.0
    """RandAugment: their strength, out of 10"""
    magnitude_std: float = 0.5
    """RandAugment: how much that varies"""
    erasing: float = 0.25
    """probability that a box becomes noise"""
    mixup: float = 0.8
    """mixing of two clips, parameter of the Beta distribution; 0: none"""
    cutmix: float = 1.0
    """a box from another clip, parameter of the Beta distribution; 0: none"""
    label_smoothing: float = 0.1
    """share of the target spread over all classes"""


@dataclass(kw_only=True)
class ClassifierConfig:
    """The classifier; the encoder's shape comes from the checkpoint."""

    num_classes: int | None = None
    """null: the highest label plus one"""
    dropout: float = 0.3
    """before the head"""
    drop_path: float = 0.1
    """stochastic depth of the last block, growing from 0 in the first"""
    num_frames: int | None = None
    """frames of a clip; null: as pre-trained. Positions are interpolated"""
    image_size: int | tuple[int, int] | None = None
    """frame height and width; null: as pre-trained. Positions are interpolated"""


@dataclass(kw_only=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    """Optimisation: AdamW, linear warm-up, cosine decay, all per step."""

    batch: int = 256
    """videos a step, over all processes and accumulated parts"""
    epochs: float = 150
    """effective epochs: passes over the videos times repeats"""
    warmup_epochs: float = 10
    """effective epochs of linear warm-up from 0"""
    base_lr: float = 4.8e-3
    """learning rate at base_batch clips; the rate used is base_lr * batch * repeats / base_batch: repeats count here"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's"""
    clip_grad: float | None = 5.0
    """largest gradient norm; null: no clipping"""


@dataclass(kw_only=True)
class ViewConfig:
    """Views of a video in a test, their scores averaged."""

    temporal: int = 1
    """clips, spread evenly over the video"""
    spatial: int = 1
    """crops of each, along the longer side"""


@dataclass(kw_only=True)
class FinetuneConfig(PlacesConfig):
    """The run: what is read, what is written."""

    data: str
    """labelled videos: a list file with a line 'path label' each, Something-Something's json, or a folder
    with a folder for each class"""
    output: str
    """folder of the run; the same command again continues what is there"""
    checkpoint: str
    """a pre-trained model.safetensors, or a classifier's"""
    random_weights: bool = False
    """take only the checkpoint's shape, to see what pre-training is worth"""
    test_data: str | None = None
    """labelled videos to test on before, after, and every run.evaluate_every steps"""
    seed: int = 0
    """of the head, the order, the crops and the mixing"""
    layer_decay: float = 0.75
    """each layer's learning rate is this times the next one's"""
    average_decay: float = 0.0
    """of a running average of the weights, which is then tested and saved in their place, such as 0.9999; 0: none"""
    mask_ratio: float = 0.0
    """masked fine-tuning: share of hidden patches at the start, falling to nothing on a cosine"""
    clips: FinetuneClipConfig = field(default_factory=FinetuneClipConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(kw_only=True)
class TestConfig(PlacesConfig):
    """The test: of what, on what."""

    __test__ = False  # not pytest's

    checkpoint: str
    """a classifier: a run's folder, or a model.safetensors"""
    data: str
    """labelled videos: a list file with a line 'path label' each, Something-Something's json, or a folder
    with a folder for each class"""
    output: str | None = None
    """a JSON file for the results"""
    stride: int | None = None
    """every stride-th frame; null: as the classifier was trained, else 4"""
    views: ViewConfig = field(default_factory=lambda: ViewConfig(temporal=7, spatial=3))
    device: str = "auto"
    """'auto': cuda where there is one, else cpu"""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 autocast, or float32; 'auto': bf16, but float32 on a CPU without bf16 instructions"""


@dataclass(kw_only=True)
class EncodingConfig(PlacesConfig):
    """How videos are encoded."""

    tokens: Literal["mean", "all"] = "mean"
    """'mean': the normalised mean of a clip's tokens; 'all': every token, side by side, for small models"""
    stride: int | None = None
    """every stride-th frame; null: as the run was trained, else 4"""
    views: ViewConfig = field(default_factory=ViewConfig)
    device: str = "auto"
    """'auto': cuda where there is one, else cpu"""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 autocast, or float32; 'auto': bf16, but float32 on a CPU without bf16 instructions"""
    workers: int | None = None
    """processes that decode videos; 0: none; null: 1 beside a model on the CPU, up to 12 beside a GPU"""


@dataclass(kw_only=True)
class FeaturesConfig(EncodingConfig):
    """The features: of what, by which model, where to."""

    checkpoint: str
    """weights: a run's folder, or a model.safetensors, of an autoencoder or a classifier"""
    data: str
    """videos: a folder, searched recursively, a list file, or Something-Something's json"""
    output: str
    """FILE.safetensors (features, labels, paths) or FILE.npy (features; paths and labels in FILE.txt)"""


@dataclass(kw_only=True)
class ProbeConfig(EncodingConfig):
    """The probe: of which model, on what."""

    checkpoint: str
    """weights: a run's folder, or a model.safetensors, of an autoencoder or a classifier"""
    data: str
    """labelled videos to learn from: a list file with 'path label' lines, Something-Something's json, or a
    folder with a folder for each class"""
    test_data: str
    """labelled videos to be judged on"""
    kinds: str = "knn,linear"
    """which probes, separated by commas: 'knn': nearest neighbours; 'linear': a linear classifier; 'attentive': attention with a
    learnt query over all tokens, then a linear classifier (keeps the tokens of all videos in memory: 2.4 MB a view for ViT-B)"""
    random_weights: bool = False
    """take only the checkpoint's shape, to see what training is worth"""
    neighbours: int = 20
    """that vote"""
    output: str | None = None
    """a JSON file for the results"""
    seed: int = 0
    """of random weights, of the training videos on which the probes' settings are chosen, of the attentive probe's training"""


@dataclass(kw_only=True)
class CheckConfig(PlacesConfig):
    """The check: of what, for which clips."""

    data: str
    """videos: a folder, searched recursively, a list file, or Something-Something's json"""
    frames: int = 16
    """of the clips that every video must give"""
    stride: int = 4
    """of the clips that every video must give"""
    decoder: Literal["pyav", "torchcodec", "auto"] = "pyav"
    """of videos; 'auto': torchcodec where it is installed and works, else PyAV. Both give the same frames"""
    every_frame: bool = False
    """decode all of every video instead of three clips"""
    workers: int = 2
    """processes that decode; 0: none"""
    output: str | None = None
    """a list file for the videos that can be used"""


def parse(config_class, argv, *, prog, description):
    """The configuration that ``argv`` asks for. Prints what is wrong and exits, as argparse does, when it cannot be made."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    command = {PretrainConfig: "pretrain", FinetuneConfig: "finetune"}.get(config_class)
    has_presets = command is not None
    required = [f"--{f.name} {f.name.upper()}" for f in dataclasses.fields(config_class) if _is_required(f)]
    usage = [prog, *["[--preset NAME]"] * has_presets, "[--config FILE]", *required, "[--SETTING VALUE ...]"]
    parser = jsonargparse.ArgumentParser(prog=prog, usage=" ".join(usage), description=description)
    # Files become the parser's defaults, so that --help shows what would be used and the order of the options does not matter.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    if has_presets:
        parser.add_argument("--preset", metavar="NAME", help=f"settings to start from: {', '.join(presets(command))}")
        early.add_argument("--preset")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file of settings" + ", on top of the preset's" * has_presets
    )
    early.add_argument("--config")
    parser.add_class_arguments(config_class, None)
    try:
        files = vars(early.parse_known_args(argv)[0])
        preset, config_file = files.get("preset"), files.get("config")
        if preset is not None:
            _set_defaults(parser, preset_path(preset, command), command)
        if config_file is not None:
            if preset is not None and read_settings(Path(config_file))[0].get("preset") is not None:
                raise ValueError(f"expected one preset to start from, got --preset {preset} and another in {config_file}")
            _set_defaults(parser, Path(config_file), command)
        parsed = parser.parse_args(argv)
        for name in files:
            parsed.pop(name)
        return _build(config_class, parsed)
    except (ValueError, argparse.ArgumentError) as error:
        parser.error(str(error))


def from_preset(config_class, name, **settings):
    """The configuration of a preset, with the top-level ``settings`` given."""
    return parse(
        config_class, [f"--preset={name}", *(f"--{key}={value}" for key, value in settings.items())], prog="stmae", description=""
    )


def _build(config_class, values):
    """The dataclass from parsed values, its sections too."""
    made = {}
    for f in dataclasses.fields(config_class):
        value = getattr(values, f.name)
        if isinstance(value, jsonargparse.Namespace):
            value = _build(type(f.default_factory()), value)
        made[f.name] = tuple(value) if isinstance(value, list) else value
    return config_class(**made)


def presets(command=None):
    """Names of the presets, of one command or of all."""
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    return [name for name in names if command in (None, about_preset(name)["command"])]


def preset_path(name, command=None):
    """The file of a preset, which must be for ``command`` if one is given."""
    if not (PRESETS / f"{name}.yaml").is_file() or Path(name).name != name:
        raise ValueError(f"expected --preset to be one of {', '.join(presets(command))}, got {name!r}")
    meant_for = about_preset(name)["command"]
    if command not in (None, meant_for):
        raise ValueError(
            f"the preset {name} is for 'stmae {meant_for}'; expected one for 'stmae {command}': {', '.join(presets(command))}"
        )
    return PRESETS / f"{name}.yaml"


def about_preset(name):
    """{"command": ..., "pretrained": ..., "gpus": ...} of a preset, its own or its base's; None where nothing is said."""
    about = {"command": None, "pretrained": None, "gpus": None}
    for _, told, _ in _with_bases(PRESETS / f"{name}.yaml"):
        about.update({key: value for key, value in told.items() if key in about})
    return about


def read_settings(file):
    """(about, settings) of a YAML or JSON file: ``about`` has what it says under ABOUT, ``settings`` is {"section.field": value},
    its relative paths made absolute."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the settings in {file}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected 'field: value' lines, got {type(tree).__name__}")
    about = {name: tree.pop(name) for name in ABOUT if name in tree}
    settings = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            settings.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            settings[name] = value
    paths = {name: str(file.parent.joinpath(settings[name]).resolve()) for name in PATH_FIELDS if settings.get(name)}
    return about, {**settings, **paths}


def _with_bases(file):
    """[(file, about, settings)] of the presets that ``file`` starts from, the first base first, and of the file itself."""
    chain, seen = [], set()
    while file is not None:
        if file in seen:
            raise ValueError(f"{file}: the presets that it starts from lead back to it")
        seen.add(file)
        about, settings = read_settings(file)
        chain.insert(0, (file, about, settings))
        base = about.get("preset")
        if base is not None and not (PRESETS / f"{base}.yaml").is_file():
            raise ValueError(f"{file}: expected preset to be the name of one, got {base!r}")
        file = None if base is None else PRESETS / f"{base}.yaml"
    return chain


def _set_defaults(parser, file, command):
    for source, about, settings in _with_bases(file):
        if about.get("command", command) != command:
            raise ValueError(f"{source}: its settings are for 'stmae {about['command']}', not for '{parser.prog}'")
        for name, value in settings.items():
            try:
                parser.set_defaults({name: value})
            except KeyError as error:
                raise ValueError(f"{source}: there is no setting {name!r}") from error


def _is_required(f):
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def check_common(config):
    """What can be refused before anything is read. Raises ValueError."""
    if getattr(config.model, "in_channels", 3) != 3:
        raise ValueError(f"model.in_channels: expected 3 for decoded video, got {config.model.in_channels}")
    for section, names in (
        ("clips", ("stride", "repeats")),
        ("optimizer", ("batch", "accumulate", "epochs")),
        ("run", ("save_every", "log_every")),
    ):
        for name in names:
            value = getattr(getattr(config, section), name)
            if not value > 0:
                raise ValueError(f"{section}.{name}: expected more than 0, got {value}")
    if not 0 <= config.optimizer.warmup_epochs < config.optimizer.epochs:
        raise ValueError(
            f"optimizer.warmup_epochs: expected less than optimizer.epochs ({config.optimizer.epochs:g}), "
            f"got {config.optimizer.warmup_epochs:g}"
        )
    for name in ("evaluate_every", "reconstruct_every"):
        if getattr(config.run, name, 0) < 0:
            raise ValueError(f"run.{name}: expected 0 or more, got {getattr(config.run, name)}")
    probe = getattr(config, "probe", None)
    if probe is not None:
        if (probe.data is None) != (probe.test_data is None):
            raise ValueError("probe: expected both of probe.data and probe.test_data, or neither")
        if probe.every < 0 or probe.neighbours < 1:
            raise ValueError(f"probe: expected every >= 0 and neighbours >= 1, got {probe.every} and {probe.neighbours}")
    if config.seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {config.seed}")
    for name in ("scale", "aspect"):
        value = getattr(config.clips, name, None)
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError(f"clips.{name}: expected two numbers above 0, the smaller first, got {list(value)}")
    if isinstance(config.run.workers, int) and config.run.workers < 0:
        raise ValueError(f"run.workers: expected 0 or more, got {config.run.workers}")
    if hasattr(config.model, "mask_strategy"):
        num_keep(config.model.mask_strategy, config.model.grid, config.model.mask_ratio)  # a ratio that keeps nothing is an error


def defaults(config_class):
    """Its defaults as plain values, nested; what has to be given is not among them."""
    values = {}
    for f in dataclasses.fields(config_class):
        if f.default_factory is not dataclasses.MISSING:
            values[f.name] = to_dict(f.default_factory())
        elif f.default is not dataclasses.MISSING:
            values[f.name] = to_dict(f.default)
    return values


def to_dict(config):
    """A configuration as plain values, for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return list(config) if isinstance(config, tuple) else config
