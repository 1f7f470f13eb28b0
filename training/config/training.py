"""Sections about training, and the two configurations made of them: of pre-training and of fine-tuning."""

import math
from dataclasses import dataclass, field
from typing import Literal

from stmae.models import MaskedAutoencoderConfig
from stmae.models.config import as_pair

from .checks import (
    check_types,
    require,
    require_device,
    require_fraction,
    require_not_negative,
    require_positive,
    require_seed,
    require_text,
)
from .data import AugmentationConfig, ClipConfig, DataLocationConfig, FinetuneClipConfig, ViewConfig


@dataclass(kw_only=True)
class AdamWConfig:
    """Optimisation: AdamW, linear warm-up, cosine decay, all per step."""

    batch: int = 512
    """videos a step, over all processes and micro-batches; repeats are not counted"""
    accumulate: int = 1
    """micro-batches that a step's batch is computed in, to save memory; the result is the same"""
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

    def __post_init__(self):
        check_types(self)
        require_positive(self, "batch", "accumulate", "epochs", "base_lr", "base_batch")
        require_not_negative(self, "min_lr", "weight_decay", "clip_grad")
        require(self, "betas", lambda value: all(0 <= beta < 1 for beta in value), "two numbers of 0 or more, less than 1")
        expected = f"0 or more, and less than epochs ({self.epochs:g})"
        require(self, "warmup_epochs", lambda value: 0 <= value < self.epochs, expected)


@dataclass(kw_only=True)
class OptimizerConfig(AdamWConfig):
    """Optimisation: AdamW, linear warm-up, cosine decay, all per step."""

    tokens: int | None = None
    """in the place of batch: a step takes as many videos as have so many tokens at most, in packed batches. Counted are the
    tokens that the encoder and those that the decoder sees; the learning rate is that of as many clips of the model's own size"""

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "tokens")


@dataclass(kw_only=True)
class FinetuneOptimizerConfig(AdamWConfig):
    """Optimisation: AdamW, linear warm-up, cosine decay, all per step."""

    batch: int = 256
    """videos a step, over all processes and micro-batches"""
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
class RunConfig:
    """Running: nothing here changes what is computed, but for the precision."""

    device: str = "auto"
    """'auto': cuda where there is one, else cpu"""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 autocast, or float32; 'auto': bf16, but float32 on a CPU without bf16 instructions"""
    workers: int | None = None
    """processes that decode videos; 0: none; null: 1 beside a model on the CPU; beside a GPU one for each core of its process but
    one, at most 24, and at most the videos of a step"""
    data_patience: float = 60.0
    """seconds to wait, with growing pauses, for data that are away (a network's disk that restarts); then the run saves and ends
    with status 75"""
    data_timeout: float = 600.0
    """seconds that a data worker may read one video; then the run saves, ends, and leaves that video out from its next start on;
    0: no limit"""
    process_timeout: float = 1800.0
    """seconds that a process waits for the others at the end of a step; then it ends, and names the rank that did not come"""
    save_every: int = 500
    """steps between checkpoints"""
    log_every: int = 10
    """steps between lines of the log"""
    evaluate_every: int = 0
    """steps between losses on held_out; 0: only at the start and at the end"""
    backend: Literal["ops", "reference"] = "ops"
    """'ops': the kernels; 'reference': the same in plain PyTorch"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """on several processes: 'ddp': each holds the full model; 'fsdp': each holds a shard of weights, gradients and AdamW's
    moments (FSDP2), and writes its shard of a checkpoint. A run continues with either, on any number of processes"""
    checkpoint_activations: bool = False
    """keep only each block's input and compute the block again in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile the model (with fsdp: each block)"""
    cuda_graph: bool = False
    """pre-training on one GPU: capture the step, update included, and replay it, with no work on the host between its launches"""
    extend_epochs: float = 0.0
    """continue a run, finished or not, for this many effective epochs more than optimizer.epochs. From where it is continued the
    learning rate follows the schedule of all of them: of a finished run it rises again, then falls to min_lr"""
    tensorboard: bool = True
    """write TensorBoard's event files too"""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """show the run in Weights & Biases or Trackio too; needs the extra of that name"""
    project: str = "stmae"
    """the tracker's project; the run is named as its folder"""

    def __post_init__(self):
        check_types(self)
        require_device(self)
        require_positive(self, "save_every", "log_every")
        require_not_negative(self, "evaluate_every", "workers", "extend_epochs", "data_patience", "data_timeout")
        require_positive(self, "process_timeout")
        if self.cuda_graph and self.checkpoint_activations:
            raise ValueError(
                "run.cuda_graph: expected false with run.checkpoint_activations, which saves the random state on the host: a "
                "capture does not allow that"
            )


@dataclass(kw_only=True)
class PretrainRunConfig(RunConfig):
    """Running: nothing here changes what is computed, but for the precision."""

    reconstruct_every: int = 0
    """steps between pictures of what the model makes of three held-out videos (else of data); 0: only at the start and
    at the end"""

    def __post_init__(self):
        super().__post_init__()
        require_not_negative(self, "reconstruct_every")


@dataclass(kw_only=True)
class OnlineProbeConfig:
    """Nearest neighbours on the encoder's features while it trains: how well they predict labels."""

    data: str | None = None
    """labelled videos whose features are the neighbours, as for stmae probe; null: no probe"""
    test_data: str | None = None
    """labelled videos that are classified"""
    every: int = 0
    """steps between probes; 0: only at the start and at the end"""
    neighbours: int = 20
    """k of the nearest neighbours"""
    tokens: Literal["mean", "all"] = "mean"
    """'mean': the normalised mean of a clip's tokens; 'all': every token, side by side, for small models"""

    def __post_init__(self):
        check_types(self)
        require_text(self, "data", "test_data")
        if (self.data is None) != (self.test_data is None):
            raise ValueError("probe: expected both of probe.data and probe.test_data, or neither")
        require_not_negative(self, "every")
        require_positive(self, "neighbours")


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
    tubelet_size: int | None = None
    """frames of a patch; null: as pre-trained. The patch kernel is resampled: with num_frames 1 and tubelet_size 1 the classifier
    is one of images, its kernel the sum over time"""
    image_size: int | tuple[int, int] | None = None
    """frame height and width; null: as pre-trained. Positions are interpolated"""

    def __post_init__(self):
        check_types(self)
        require_positive(self, "num_classes", "num_frames", "tubelet_size")
        require_fraction(self, "dropout", "drop_path")
        require(self, "image_size", lambda value: min(as_pair(value)) > 0, "more than 0")


@dataclass(kw_only=True)
class EncodingConfig(DataLocationConfig):
    """How videos are encoded."""

    tokens: Literal["mean", "all"] = "mean"
    """'mean': the normalised mean of a clip's tokens; 'all': every token, side by side, for small models"""
    stride: int | None = None
    """every stride-th frame; null: as the run was trained, else 4"""
    size: Literal["fixed", "native"] | None = None
    """'fixed': crops of the model's own size; 'native': the frames in their own aspect ratio, of at most as large an area, and a
    picture as a clip of one tubelet; null: as the run was trained, else 'fixed'"""
    views: ViewConfig = field(default_factory=ViewConfig)
    device: str = "auto"
    """'auto': cuda where there is one, else cpu"""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 autocast, or float32; 'auto': bf16, but float32 on a CPU without bf16 instructions"""
    workers: int | None = None
    """processes that decode videos; 0: none; null: 1 beside a model on the CPU; beside a GPU one for each core of its process but
    one, at most 24, and at most the videos of a step"""

    def __post_init__(self):
        super().__post_init__()
        require_device(self)
        require_positive(self, "stride")
        require_not_negative(self, "workers")


@dataclass(kw_only=True)
class PretrainConfig(DataLocationConfig):
    """The run: what is read, what is written."""

    data: str
    """videos: a folder, searched recursively, a list file with a line 'path' or 'path label' each,
    Something-Something's json, or split files of UCF101 or HMDB51 ('splits/*_test_split1.txt:train'); or several of them with
    weights, the parts of the samples that they give: 'a.csv:0.7,b.csv:0.3'"""
    output: str
    """folder of the run; the same command again continues what is there"""
    held_out: str | None = None
    """videos kept out of training, as data; their loss is shown before and after"""
    init: str | None = None
    """weights to start from, with a new schedule: a run's folder, a file of any code base that stmae reads, or a Hugging Face
    repository (owner/name). Every choice of the model must be theirs but for sizes, to which they are resized; null: random"""
    init_decoder: bool = True
    """take the decoder of init too, where it has one; false: start a new one"""
    seed: int = 0
    """of the weights, the order, the crops and the masks"""
    clips: ClipConfig = field(default_factory=ClipConfig)
    model: MaskedAutoencoderConfig = field(default_factory=MaskedAutoencoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    run: PretrainRunConfig = field(default_factory=PretrainRunConfig)

    def __post_init__(self):
        super().__post_init__()
        require_text(self, "data", "output", "held_out", "init")
        require_seed(self)
        if self.model.in_channels != 3:
            raise ValueError(f"model.in_channels: expected 3 for decoded video, got {self.model.in_channels}")
        if self.packed:
            self._check_packed()
        else:
            self.model.token_counts()  # a ratio that keeps nothing is an error

    @property
    def packed(self):
        """Whether its batches are packed: clips of unequal shapes, or as many as fit a budget of tokens."""
        unequal = self.clips.size == "native" or self.clips.frames is not None or self.model.mask_strategy == "multi_block"
        return unequal or self.optimizer.tokens is not None

    def _check_packed(self):
        tubelet, patch = self.model.tubelet_size, as_pair(self.model.patch_size)
        for frames in self.clips.frames or ():
            if frames % tubelet:
                raise ValueError(f"clips.frames: expected multiples of model.tubelet_size {tubelet}, got {frames}")
        if self.clips.side is not None and self.clips.side[0] ** 2 < math.prod(patch):
            raise ValueError(
                f"clips.side: expected at least the side of a square as large as a patch of {patch[0]}x{patch[1]}, "
                f"{math.prod(patch) ** 0.5:g}, got {self.clips.side[0]:g}"
            )
        if self.clips.size == "native" and self.probe.data is not None and self.probe.tokens == "all":
            raise ValueError(
                "probe.tokens: expected 'mean' with clips.size 'native', whose videos have unequal numbers, got 'all'"
            )
        if self.run.cuda_graph:
            raise ValueError("run.cuda_graph: expected false with packed batches, whose shapes differ from step to step")


@dataclass(kw_only=True)
class FinetuneConfig(DataLocationConfig):
    """The run: what is read, what is written."""

    data: str
    """labelled videos: a list file with a line 'path label' each, Something-Something's json, split files of UCF101 or
    HMDB51 ('splits/*_test_split1.txt:train'), or a folder with a folder for each class; or several of them with weights:
    'a.csv:0.7,b.csv:0.3'"""
    output: str
    """folder of the run; the same command again continues what is there"""
    checkpoint: str
    """pre-trained weights, or a classifier's: a run's folder, a file, or a Hugging Face repository (owner/name)"""
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
    """masked fine-tuning: fraction of masked tokens at the start, falling to 0 on a cosine"""
    clips: FinetuneClipConfig = field(default_factory=FinetuneClipConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        super().__post_init__()
        require_text(self, "data", "output", "checkpoint", "test_data")
        require_seed(self)
        require(self, "layer_decay", lambda value: 0 < value <= 1, "more than 0, at most 1")
        require_fraction(self, "average_decay", "mask_ratio")
        if self.run.cuda_graph:
            raise ValueError(
                "run.cuda_graph: expected false for fine-tuning: only a pre-training step has the same shapes and launches every "
                "time"
            )
