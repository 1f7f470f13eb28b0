"""What a model is: every choice that changes its weights' shapes or its results, validated when it is made.

Configurations are immutable, compare by value and turn into plain JSON and back (``to_dict``, ``from_dict``);
a checkpoint carries one.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar, get_origin

import torch

from stmae.masking import ALL_STRATEGIES, Blocks, TokenCounts, num_reconstructed, token_counts
from stmae.models.field_types import describe, field_types, match
from stmae.models.hog import BINS, CELL
from stmae.ops.attention import takes_head_dim

Config = TypeVar("Config", bound="EncoderConfig")
TARGETS = ("pixels", "normalized_pixels", "channel_normalized_pixels", "hog")
POSITIONS = ("learned", "sincos")

# The largest that is built. No model comes near; a damaged or hostile file says more, which would take hours or all memory.
LARGEST = {
    "image_size": 2**16,
    "patch_size": 2**16,
    "in_channels": 2**12,
    "num_frames": 2**16,
    "tubelet_size": 2**16,
    "predicted_frames": 2**16,
    "width": 2**16,
    "decoder_width": 2**16,
    "depth": 1000,
    "decoder_depth": 1000,
    "num_heads": 2**13,
    "decoder_num_heads": 2**13,
    "num_classes": 10**6,
    "mask_blocks": 2**16,
    "roi_size": 64,
}
LARGEST_HIDDEN = 2**20  # width of a block's hidden layer
LARGEST_PATCH = 2**24  # values in a patch
LARGEST_POSITIONS = 2**28  # values of position embeddings, tokens times width: 1 GB


def _fail(config: "EncoderConfig", field: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{type(config).__name__}: expected {field} {expected}, got {got!r}")


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else size


def _pair(config: "EncoderConfig", field: str) -> tuple[int, int]:
    value = getattr(config, field)
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if isinstance(value, bool) or len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
        _fail(config, field, "to be a positive size or (height, width)", value)
    if max(pair) > LARGEST[field]:
        _fail(config, field, f"to be at most {LARGEST[field]:,}", value)
    return pair


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder, shared by autoencoder and classifier.

    Args:
        image_size: frame height and width; one number for both, or (H, W). Kept as (H, W).
        in_channels: ``C``.
        num_frames: ``T``, frames in a clip.
        patch_size: patch height and width; one number for both, or (ph, pw). Kept as (ph, pw).
        tubelet_size: frames in a patch.
        width: of the transformer.
        depth: blocks of the transformer.
        num_heads: attention heads in a block.
        mlp_ratio: width of a block's hidden layer, over ``width``.
        qkv_bias: whether the query, key and value projections have biases.
        class_token: whether a class token is put before the patch tokens.
        key_bias: whether, with ``qkv_bias``, the key projection has one, too (VideoMAE's has not).
        separable_position: position embeddings ``space[h * w] + time[t]`` instead of one per token.
        position: ``learned``, or ``sincos``: VideoMAE's fixed table over all tokens, in no checkpoint; not separable.
        position_grid: patch grid (t, h, w) that the fixed table is made for; another grid's is interpolated from it. None: its
            own. Only with ``sincos``.
        layer_scale: start of the learned scale of each branch (LayerScale, Touvron et al. 2021); None: no scale.
        mean: what uint8 frames are normalised with, ``(x / 255 - mean) / std``; one number or one per channel.
        std: as ``mean``.
        layer_norm_eps: of every LayerNorm but those with an eps of their own.
        norm_eps: of the encoder's final LayerNorm; None: ``layer_norm_eps``.
        encoder_norm: whether there is a final LayerNorm at all.
    """

    image_size: int | tuple[int, int] = 224
    in_channels: int = 3
    num_frames: int = 16
    patch_size: int | tuple[int, int] = 16
    tubelet_size: int = 2
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    key_bias: bool = True
    class_token: bool = True
    separable_position: bool = True
    position: Literal["learned", "sincos"] = "learned"
    position_grid: tuple[int, int, int] | None = None
    layer_scale: float | None = None
    mean: float | tuple[float, ...] = 0.45
    std: float | tuple[float, ...] = 0.225
    layer_norm_eps: float = 1e-6
    norm_eps: float | None = None
    encoder_norm: bool = True

    def __post_init__(self) -> None:
        own_class: Any = type(self)
        for field, annotation in field_types(own_class).items():
            if annotation is int or get_origin(annotation) is Literal or field in ("image_size", "patch_size"):
                continue  # checked below
            if not match(annotation, getattr(self, field))[0]:
                _fail(self, field, f"to be {describe(annotation)}", getattr(self, field))
        for field in ("image_size", "patch_size"):
            object.__setattr__(self, field, _pair(self, field))
        for field in ("in_channels", "num_frames", "tubelet_size", "width", "depth", "num_heads"):
            self._check_count(field)
        for axis, size, patch in zip(("height", "width"), as_pair(self.image_size), as_pair(self.patch_size)):
            if size % patch:
                _fail(self, "image_size", f"to be a multiple of patch_size {patch} in {axis}", size)
        if self.num_frames % self.tubelet_size:
            expected = f"to be a multiple of tubelet_size {self.tubelet_size}"
            _fail(self, "num_frames", expected, self.num_frames)
        self._check_heads("width", "num_heads")
        self._check_hidden("width", "mlp_ratio")
        in_patch = math.prod((self.in_channels, self.tubelet_size, *as_pair(self.patch_size)))
        if in_patch > LARGEST_PATCH:
            _fail(self, "patch_size", f"to give a patch of at most {LARGEST_PATCH:,} values", self.patch_size)
        self._check_positions("width", self.grid)
        self._check_eps("layer_norm_eps")
        self._check_eps("norm_eps")
        if self.layer_scale is not None and not math.isfinite(self.layer_scale):
            _fail(self, "layer_scale", "to be a finite number or None", self.layer_scale)
        if self.position not in POSITIONS:
            _fail(self, "position", f"to be one of {', '.join(POSITIONS)}", self.position)
        if self.position_grid is not None:
            grid = tuple(self.position_grid)
            if len(grid) != 3 or not all(isinstance(size, int) and size > 0 for size in grid):
                _fail(self, "position_grid", "to be a patch grid (t, h, w)", self.position_grid)
            if self.position != "sincos":
                _fail(self, "position_grid", "to be None unless position is 'sincos'", self.position_grid)
            self._check_positions("width", grid)
            object.__setattr__(self, "position_grid", None if grid == self.grid else grid)
        if self.position == "sincos" and self.separable_position:
            _fail(self, "separable_position", "to be false with position 'sincos'", self.separable_position)
        for field in ("mean", "std"):
            value = getattr(self, field)
            values = (value,) if isinstance(value, (int, float)) else tuple(value)
            if len(values) not in (1, self.in_channels) or not all(math.isfinite(v) for v in values):
                _fail(self, field, f"to be a number or one for each of {self.in_channels} channels", value)
            if field == "std" and min(values) <= 0:
                _fail(self, field, "to be positive", value)
            object.__setattr__(self, field, values if len(values) > 1 else float(values[0]))

    def _check_count(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            _fail(self, field, "to be a positive integer", value)
        if value > LARGEST[field]:
            _fail(self, field, f"to be at most {LARGEST[field]:,}", value)

    def _check_hidden(self, width: str, field: str) -> None:
        """``field``: the ratio of a block's hidden width to ``width``."""
        ratio = getattr(self, field)
        if not (ratio > 0 and math.isfinite(ratio)):
            _fail(self, field, "to be positive and finite", ratio)
        if not 1 <= getattr(self, width) * ratio <= LARGEST_HIDDEN:
            _fail(self, field, f"times {width} {getattr(self, width)} to lie between 1 and {LARGEST_HIDDEN:,}", ratio)

    def _check_positions(self, width: str, grid: tuple[int, int, int]) -> None:
        if math.prod(grid) * getattr(self, width) > LARGEST_POSITIONS:
            _fail(self, width, f"times the tokens of a grid {grid} to be at most {LARGEST_POSITIONS:,}", getattr(self, width))

    def _check_eps(self, field: str) -> None:
        value = getattr(self, field)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            _fail(self, field, "to be at least 0 and finite", value)

    def _check_heads(self, width: str, heads: str) -> None:
        if getattr(self, width) % getattr(self, heads):
            _fail(self, width, f"to be a multiple of {heads} {getattr(self, heads)}", getattr(self, width))
        if not takes_head_dim(getattr(self, width) // getattr(self, heads)):
            expected = f"to be {heads} {getattr(self, heads)} times a head dim that is a multiple of 8 and at most 128"
            _fail(self, width, expected, getattr(self, width))

    @property
    def grid(self) -> tuple[int, int, int]:
        """The patch grid (t, h, w)."""
        (H, W), (p, q) = as_pair(self.image_size), as_pair(self.patch_size)
        return (self.num_frames // self.tubelet_size, H // p, W // q)

    @property
    def num_tokens(self) -> int:
        """``N = t * h * w``, without the class token."""
        return math.prod(self.grid)

    @property
    def video_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the clips that the model takes."""
        return (self.in_channels, self.num_frames, *as_pair(self.image_size))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ``from_dict`` takes them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Raises ValueError for a name that this configuration does not have."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {', '.join(unknown)}")
        return cls(**values)

    def replace(self: Config, **changes: Any) -> Config:
        """A copy with some fields changed, validated anew."""
        return type(self).from_dict({**self.to_dict(), **changes})


@dataclass(frozen=True, kw_only=True)
class MaskedAutoencoderConfig(EncoderConfig):
    """The masked autoencoder. The defaults are the paper's ViT-B on 16x224x224 clips.

    Args:
        decoder_width: of the decoder; its MLP ratio and biases are the encoder's.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: not visible in the weights: mae_st has 16 (head dim 32), SlowFast width / 64.
        decoder_separable_position: None: as the encoder's.
        decoder_class_token: ``own``: the encoder's class token is dropped and the decoder has a new one
            (mae_st); ``encoder``: it is passed through the decoder (SlowFast). Without ``class_token`` it
            means nothing.
        predicted_frames: how many of the clip's frames are reconstructed, a multiple of t; None: one for each
            time slice.
        frame_choice: which ones. ``linspace``: ``linspace(0, T - 1, n)`` truncated, the last frame included
            (mae_st: 0, 2, ..., 12, 15 of 16); ``stride``: every (T / n)-th (SlowFast: 0, 2, ..., 14).
        target: what is predicted of a patch. ``pixels``; ``normalized_pixels``: normalised by the patch's own mean and
            variance ("norm-pix"); ``channel_normalized_pixels``: each channel of a patch by its own mean and deviation
            (VideoMAE: ``(x - mean) / (sqrt(var) + 1e-6)``); ``hog``: histograms of oriented gradients, see ``stmae.models.hog``.
        target_range: of which pixels the targets are: ``normalized``: of frames normalised with ``mean`` and ``std`` (mae_st);
            ``unit``: of frames in [0, 1] (VideoMAE).
        decoder_embed_bias: whether the projection to the decoder has a bias (VideoMAE's has not).
        decoder_mlp_ratio: None: the encoder's.
        decoder_norm_eps: of the decoder's final LayerNorm; None: ``layer_norm_eps``.
        mask_ratio: masked fraction of the tokens, in (0, 1), unless the forward call says otherwise.
        mask_strategy: which tokens are masked: ``random``; ``tube``: the same places in every time slice; ``frame``: all of some
            time slices; ``block``: boxes in space and time; ``multi_block``: V-JEPA's, the union of several blocks, so that every
            clip has its own number of visible tokens and ``mask_ratio`` has no say. See ``stmae.masking``.
        mask_blocks: of ``multi_block``: how many blocks are masked.
        mask_block_scale: of ``multi_block``: the range of a block's fraction of a frame's patches.
        mask_block_aspect: of ``multi_block``: the range of a block's height over its width.
        mask_block_length: of ``multi_block``: the range of a block's fraction of the time slices; 1: the full length.
        decoder_mask_ratio: fraction of the masked tokens that the decoder neither sees nor reconstructs, 0, 0.25, 0.5 or
            0.75: dual masking with running cells (VideoMAE V2); see ``stmae.masking.reconstructed``.
        loss_reduction: ``patch``: the loss is the mean over the reconstructed patches of all clips, so that a clip with more of
            them weighs more; ``clip``: the mean over clips of the mean over each one's. The same where all clips have as many.
    """

    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_num_heads: int = 16
    decoder_separable_position: bool | None = None
    decoder_class_token: Literal["own", "encoder"] = "own"
    predicted_frames: int | None = None
    frame_choice: Literal["linspace", "stride"] = "linspace"
    target: Literal["pixels", "normalized_pixels", "channel_normalized_pixels", "hog"] = "normalized_pixels"
    target_range: Literal["normalized", "unit"] = "normalized"
    decoder_embed_bias: bool = True
    decoder_mlp_ratio: float | None = None
    decoder_norm_eps: float | None = None
    mask_ratio: float = 0.9
    mask_strategy: Literal["random", "tube", "frame", "block", "multi_block"] = "random"
    mask_blocks: int = 8
    mask_block_scale: tuple[float, float] = (0.15, 0.15)
    mask_block_aspect: tuple[float, float] = (0.75, 1.5)
    mask_block_length: tuple[float, float] = (1.0, 1.0)
    decoder_mask_ratio: float = 0.0
    loss_reduction: Literal["patch", "clip"] = "patch"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("decoder_width", "decoder_depth", "decoder_num_heads"):
            self._check_count(field)
        self._check_heads("decoder_width", "decoder_num_heads")
        for field, choices in (
            ("decoder_class_token", ("own", "encoder")),
            ("frame_choice", ("linspace", "stride")),
            ("mask_strategy", ALL_STRATEGIES),
            ("target", TARGETS),
            ("target_range", ("normalized", "unit")),
            ("loss_reduction", ("patch", "clip")),
        ):
            if getattr(self, field) not in choices:
                _fail(self, field, f"to be one of {', '.join(choices)}", getattr(self, field))
        self._check_eps("decoder_norm_eps")
        self._check_hidden("decoder_width", "mlp_ratio" if self.decoder_mlp_ratio is None else "decoder_mlp_ratio")
        self._check_positions("decoder_width", self.position_grid or self.grid)
        if self.predicted_frames is not None:
            self._check_count("predicted_frames")
            if self.predicted_frames % self.grid[0] or self.predicted_frames > self.num_frames:
                expected = f"to be a multiple of the {self.grid[0]} time slices, at most {self.num_frames}"
                _fail(self, "predicted_frames", expected, self.predicted_frames)
        self._check_count("mask_blocks")
        for field, top in (("mask_block_scale", 1), ("mask_block_aspect", math.inf), ("mask_block_length", 1)):
            values = getattr(self, field)
            values = tuple(values) if isinstance(values, (list, tuple)) else ()
            if len(values) != 2 or not all(isinstance(x, (int, float)) for x in values) or not 0 < values[0] <= values[1] <= top:
                most = " up to 1" if top == 1 else ""
                _fail(self, field, f"to be a range (lowest, highest) above 0{most}", getattr(self, field))
            object.__setattr__(self, field, tuple(float(x) for x in values))
        if self.mask_strategy == "multi_block" and self.decoder_mask_ratio:
            _fail(self, "decoder_mask_ratio", "to be 0 with mask_strategy 'multi_block'", self.decoder_mask_ratio)
        if not 0 < self.mask_ratio < 1:
            _fail(self, "mask_ratio", "to lie between 0 and 1 (exclusive)", self.mask_ratio)
        try:
            num_reconstructed(self.num_tokens, self.decoder_mask_ratio)
        except ValueError:
            _fail(self, "decoder_mask_ratio", "to be 0, 0.25, 0.5 or 0.75", self.decoder_mask_ratio)
        if self.target == "hog" and any(size % CELL for size in as_pair(self.patch_size)):
            _fail(self, "patch_size", f"to be a multiple of {CELL}, the cell of target hog,", self.patch_size)

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Raises ValueError for a name that this configuration does not have."""
        values = dict(values)
        if "normalize_target" in values:  # what ``target`` was called when there were two
            values["target"] = "normalized_pixels" if values.pop("normalize_target") else "pixels"
        return super().from_dict(values)

    @property
    def blocks(self) -> Blocks:
        """Of ``multi_block``: how many blocks are masked, and how large."""
        return Blocks(self.mask_blocks, self.mask_block_scale, self.mask_block_aspect, self.mask_block_length)

    @property
    def frames(self) -> list[int]:
        """Indices of the clip's frames that are reconstructed: the target clip."""
        return self.frames_of(self.num_frames)

    def frames_of(self, num_frames: int) -> list[int]:
        """``frames`` of a clip of another length: as many for each time slice, chosen in the same way."""
        count = self.target_patch_size[0] * (num_frames // self.tubelet_size)
        if self.frame_choice == "stride":
            return [index * num_frames // count for index in range(count)]
        # torch's own linspace: its rounding decides the truncation, and the weights were trained with it.
        return torch.linspace(0, num_frames - 1, count, device="cpu", dtype=torch.float32).long().tolist()

    def token_counts(
        self,
        mask_ratio: float | None = None,
        decoder_mask_ratio: float | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> TokenCounts:
        """How many tokens there are, are visible, masked and reconstructed, without the class token.

        Args:
            mask_ratio, decoder_mask_ratio, grid: instead of the configuration's.

        Raises:
            ValueError: a ratio that keeps nothing or everything.
        """
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        decoder_ratio = self.decoder_mask_ratio if decoder_mask_ratio is None else decoder_mask_ratio
        return token_counts(self.mask_strategy, self.grid if grid is None else grid, ratio, decoder_ratio)

    @property
    def target_patch_size(self) -> tuple[int, int, int]:
        """(u, ph, pw) of a predicted patch: u target frames per time slice."""
        return ((self.predicted_frames or self.grid[0]) // self.grid[0], *as_pair(self.patch_size))

    @property
    def patch_values(self) -> int:
        """``P``, values in a predicted patch."""
        u, p, q = self.target_patch_size
        if self.target == "hog":
            return u * (p // CELL) * (q // CELL) * self.in_channels * BINS
        return u * p * q * self.in_channels


@dataclass(frozen=True, kw_only=True)
class VideoClassifierConfig(EncoderConfig):
    """The classifier.

    Args:
        num_classes: outputs of the head; 0: no head, the model gives the pooled features.
        dropout: before the head, in training.
        drop_path: stochastic depth in training: the rate of the last block; it grows linearly from 0 in the
            first.
        pooling: ``mean`` of the patch tokens, then the final LayerNorm; ``first``: the first token (the class token, where there
            is one) after it.
    """

    num_classes: int = 400
    dropout: float = 0.0
    drop_path: float = 0.0
    pooling: Literal["mean", "first"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes != 0:
            self._check_count("num_classes")
        if self.pooling not in ("mean", "first"):
            _fail(self, "pooling", "to be one of mean, first", self.pooling)
        for field in ("dropout", "drop_path"):
            if not 0 <= getattr(self, field) < 1:
                _fail(self, field, "to lie in [0, 1)", getattr(self, field))


@dataclass(frozen=True, kw_only=True)
class ActionDetectorConfig(EncoderConfig):
    """The action detector.

    Args:
        num_classes: actions, each with a score of its own.
        dropout: before the head, in training.
        drop_path: stochastic depth in training: the rate of the last block; it grows linearly from 0 in the
            first.
        roi_size: cells along a side of what RoIAlign takes of a box.
    """

    num_classes: int = 80
    dropout: float = 0.0
    drop_path: float = 0.0
    roi_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("num_classes")
        self._check_count("roi_size")
        for field in ("dropout", "drop_path"):
            if not 0 <= getattr(self, field) < 1:
                _fail(self, field, "to lie in [0, 1)", getattr(self, field))
