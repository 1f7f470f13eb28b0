"""Whose weights are these? Recognised by names and shapes; each choice of the model is inferred from the weights, from what the
format's code base always does, or from an argument, and the report says which."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from stmae.checkpoint.huggingface import from_huggingface, huggingface_config, ratio
from stmae.checkpoint.image_mae import from_image_mae
from stmae.checkpoint.mae_st import from_mae_st
from stmae.checkpoint.report import LoadReport
from stmae.checkpoint.slowfast import from_slowfast
from stmae.checkpoint.videomae import IMAGENET_MEAN, IMAGENET_STD, from_videomae
from stmae.models.config import MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.encoder import VideoModel

# (width, depth) of the factories that mae_st, SlowFast, VideoMAE and the image MAE have -> heads.
_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 16, (1408, 40): 16}

_REFUSED_MODEL_TYPES = {
    "hiera": "Hiera",
    "vjepa2": "V-JEPA 2",
    "timesformer": "TimeSformer",
    "vivit": "ViViT",
    "internvideo2": "InternVideo2",
}
# Name of another architecture -> a name that only its weights have.
_REFUSED_NAMES = {
    "Hiera": r"multi_scale_fusion_heads\.|blocks\.\d+\.proj\.weight$|encoder_norm\.weight$",
    "V-JEPA": r"(^|\.)predictor_embed\.|(^|\.)mask_tokens\.\d+$|^backbone\.blocks\.|target_encoder",
    "InternVideo": r"clip_projector\.|clip_decoder\.|\.q_norm\.|^vision_encoder\.|^transformer\.resblocks\.",
    "MViT": r"attn\.pool_[qkv]\.|attn\.norm_[qkv]\.|rel_pos_[hwt]",
}


_EXPECTED = "expected a masked video autoencoder of a plain ViT"


class UnknownFormat(ValueError):
    """Weights that this library does not read; the message names what they resemble."""


def recognize(weights: dict[str, torch.Tensor], model_type: str | None = None) -> str:
    """The format of ``weights``: ``huggingface-videomae``, ``videomae``, ``slowfast``, ``mae_st`` or ``image-mae``.

    Args:
        weights: tensors by their plain names.
        model_type: of a Hugging Face ``config.json`` beside them.

    Raises:
        UnknownFormat: another architecture, by its name where it is known.
    """
    if model_type is not None and model_type != "videomae":
        name = _REFUSED_MODEL_TYPES.get(model_type, f"model_type {model_type!r}")
        raise UnknownFormat(f"{_EXPECTED}, got {name}, another architecture")

    def has(*names: str) -> bool:
        return all(name in weights for name in names)

    if any("attention.attention.query.weight" in name for name in weights):
        return "huggingface-videomae"
    if has("encoder_to_decoder.weight", "encoder.patch_embed.proj.weight"):
        return "videomae"
    for name, pattern in _REFUSED_NAMES.items():
        found = next((key for key in weights if re.search(pattern, key)), None)
        if found:
            raise UnknownFormat(f"{_EXPECTED}, got {name}, another architecture (it has {found})")
    patches = weights.get("patch_embed.proj.weight")
    if patches is not None and patches.dim() == 4 and has("blocks.0.attn.qkv.weight"):
        return "image-mae"
    if patches is not None and patches.dim() == 5:
        if any(name.startswith(("pred_head.", "head.projection.")) for name in weights):
            return "slowfast"
        if has("blocks.0.attn.q.weight"):
            return "mae_st"
        if has("blocks.0.attn.qkv.weight"):
            learned = any(name.startswith("pos_embed") for name in weights)
            qv = has("blocks.0.attn.q_bias") or not learned
            return "videomae" if qv else "slowfast"
    listed = ", ".join(list(weights)[:4])
    raise UnknownFormat(
        "expected weights of mae_st, SlowFast, VideoMAE, VideoMAE V2, Hugging Face's VideoMAE or the image MAE, "
        f"got {len(weights)} tensors with other names ({listed}, ...)"
    )


def build_foreign(
    weights: dict[str, torch.Tensor],
    report: LoadReport,
    *,
    arguments: dict | None = None,
    hub_config: dict | None = None,
    stated: dict | None = None,
) -> tuple[VideoModel, dict]:
    """A model from another code base's weights.

    Args:
        weights: tensors by their plain names.
        report: filled in.
        arguments: what the file itself says of how it was trained (the ``args`` of mae_st and VideoMAE).
        hub_config: a Hugging Face ``config.json``.
        stated: configuration fields that the caller states; those that the weights do not determine describe the file, and the
            rest is given back.

    Returns:
        (model, the fields of ``stated`` that are not about the file but changes to it).
    """
    format = recognize(weights, (hub_config or {}).get("model_type"))
    report.format = format
    report.check_values(weights)
    reader = {
        "huggingface-videomae": _huggingface,
        "videomae": _videomae,
        "slowfast": _slowfast,
        "mae_st": _mae_st,
        "image-mae": _image_mae,
    }[format]
    inference = _Inference(report, dict(arguments or {}), dict(stated or {}))
    return reader(weights, inference, hub_config), inference.remaining


class _Inference:
    """The configuration as it comes together, with the source of each field."""

    def __init__(self, report: LoadReport, arguments: dict, stated: dict):
        self.report = report
        self.arguments = arguments
        self.remaining = stated
        self.values: dict = {}

    def seen(self, field: str, value: Any, where: str) -> Any:
        """A field that the weights show."""
        self.values[field] = value
        self.report.inferred[field] = f"{value!r}, from {where}"
        return value

    def always(self, why: str, **fields: Any) -> None:
        """Fields that follow from the format."""
        for field, value in fields.items():
            self.values[field] = value
            self.report.inferred[field] = f"{value!r}, {why}"

    def undetermined(
        self, field: str, default: Any, why: str, argument: str | None = None, convert: Callable[[Any], Any] = lambda value: value
    ) -> Any:
        """A field that weights do not determine: stated by the caller, by the file's own arguments, or assumed."""
        if field in self.remaining:
            value = self.remaining.pop(field)
            self.report.inferred[field] = f"{value!r}, as stated"
        elif argument is not None and self.arguments.get(argument) is not None:
            value = convert(self.arguments[argument])
            self.report.inferred[field] = f"{value!r}, from the file's own args.{argument}"
        elif default is None:
            raise UnknownFormat(f"{field} cannot be determined from these weights ({why}); {_state_it(field)}")
        else:
            value = default
            self.report.assumed[field] = f"{value!r}, {why}"
        self.values[field] = value
        return value

    def heads(self) -> None:
        key = self.values["width"], self.values["depth"]
        if "num_heads" not in self.remaining and key in _HEADS:
            self.always(f"as in the only factory with width {key[0]} and depth {key[1]}", num_heads=_HEADS[key])
        else:
            self.undetermined("num_heads", None, f"no factory has width {key[0]} and depth {key[1]}")


def _state_it(field: str, value: str = "...") -> str:
    return f"state it: load(path, {field}={value}), or stmae convert --set '[\"{field}={value}\"]'"


def _depth(weights: dict, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    found = [int(match[1]) for name in weights if (match := pattern.match(name))]
    depth = max(found) + 1 if found else 0
    if depth > len(weights):
        raise UnknownFormat(
            f"expected the blocks {prefix}* to be numbered from 0, got {prefix}{depth - 1} in {len(weights)} tensors"
        )
    return depth


def _patches(inference: _Inference, weights: dict, name: str) -> None:
    shape = weights[name].shape
    if len(shape) not in (4, 5) or not all(shape):
        raise UnknownFormat(f"expected {name} [D, C, (pt,) ph, pw], got {list(shape)}")
    width, channels, *patch = shape if len(shape) == 5 else (*shape[:2], None, *shape[2:])
    inference.seen("width", width, name)
    inference.seen("in_channels", channels, name)
    if patch[0] is not None:
        inference.seen("tubelet_size", patch[0], name)
    inference.seen("patch_size", (patch[1], patch[2]), name)


def _blocks(inference: _Inference, weights: dict, prefix: str, fc1: str) -> None:
    inference.seen("depth", _depth(weights, prefix), prefix + "*")
    name = f"{prefix}0.{fc1}"
    if name not in weights:
        raise UnknownFormat(f"expected {name} among the weights, and it is missing")
    inference.seen("mlp_ratio", ratio(inference.values["width"], weights[name].shape[0]), name)


def _qkv_bias(inference: _Inference, weights: dict, name: str) -> None:
    if name in weights:
        inference.seen("qkv_bias", True, name)
        return
    stated = "qkv_bias" in inference.remaining
    if not inference.undetermined("qkv_bias", False, f"no {name}; the published models have it") and not stated:
        inference.report.notes.append(f"{name} is missing, as in a model without biases; if it is one, say so: qkv_bias=False")


def _grid_from_positions(inference: _Inference, weights: dict, class_token: bool) -> None:
    """image_size and num_frames from learned positions, separable or joint."""
    patch, tubelet = inference.values["patch_size"], inference.values["tubelet_size"]
    if inference.values["separable_position"]:
        places, where = weights["pos_embed_spatial"].shape[-2], "pos_embed_spatial"
        inference.seen("num_frames", weights["pos_embed_temporal"].shape[-2] * tubelet, "pos_embed_temporal")
    else:
        tokens = weights["pos_embed"].shape[-2] - class_token
        frames = inference.undetermined("num_frames", 16, "the clip length of the published recipes", "num_frames")
        slices = frames // tubelet
        if not slices or tokens % slices:
            raise UnknownFormat(f"pos_embed has {tokens} tokens, which {frames} frames do not divide; {_state_it('num_frames')}")
        places, where = tokens // slices, "pos_embed"
    _square(inference, places, patch, where)


def _square(inference: _Inference, places: int, patch: tuple[int, int], where: str) -> None:
    side = math.isqrt(places)
    if "image_size" in inference.remaining:
        size = inference.remaining["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        if (height // patch[0]) * (width // patch[1]) == places:
            inference.undetermined("image_size", None, "")
            return
    if side * side != places:
        raise UnknownFormat(f"{where} has {places} places, which are no square; {_state_it('image_size', '[H,W]')}")
    inference.values["image_size"] = (side * patch[0], side * patch[1])
    inference.report.inferred["image_size"] = f"{inference.values['image_size']}, from {where}, as a square"


def _target(inference: _Inference, names: tuple[str, str], argument: str) -> None:
    plain, normalized = names
    inference.undetermined(
        "target", normalized, "the published recipes' choice", argument, lambda value: normalized if value else plain
    )


def _mae_st(weights: dict, inference: _Inference, _: dict[str, Any] | None) -> VideoModel:
    pretrain = "mask_token" in weights
    _patches(inference, weights, "patch_embed.proj.weight")
    _blocks(inference, weights, "blocks.", "mlp.fc1.weight")
    inference.heads()
    inference.seen("class_token", "cls_token" in weights, "cls_token")
    inference.seen("separable_position", "pos_embed_spatial" in weights, "pos_embed_spatial")
    _qkv_bias(inference, weights, "blocks.0.attn.q.bias")
    _grid_from_positions(inference, weights, inference.values["class_token"])
    if not pretrain:
        inference.seen("num_classes", weights["head.weight"].shape[0] if "head.weight" in weights else 0, "head.weight")
        return from_mae_st(weights, VideoClassifierConfig(**inference.values))
    _decoder(inference, weights, "decoder_embed.weight", "decoder_blocks.")
    heads = "the default of mae_st's constructor, which all its factories keep"
    inference.undetermined("decoder_num_heads", 16, heads, "decoder_num_heads")
    _predicted_frames(inference, weights["decoder_pred.weight"].shape[0], "decoder_pred.weight")
    inference.always("as mae_st does", decoder_class_token="own", frame_choice="linspace")
    _target(inference, ("pixels", "normalized_pixels"), "norm_pix_loss")
    inference.undetermined("mask_ratio", 0.9, "the paper's", "mask_ratio")
    return from_mae_st(weights, MaskedAutoencoderConfig(**inference.values))


def _slowfast(weights: dict, inference: _Inference, _: dict[str, Any] | None) -> VideoModel:
    _patches(inference, weights, "patch_embed.proj.weight")
    _blocks(inference, weights, "blocks.", "mlp.fc1.weight")
    inference.heads()
    inference.seen("class_token", "cls_token" in weights, "cls_token")
    inference.seen("separable_position", "pos_embed_spatial" in weights, "pos_embed_spatial")
    _qkv_bias(inference, weights, "blocks.0.attn.qkv.bias")
    _grid_from_positions(inference, weights, inference.values["class_token"])
    if "mask_token" not in weights:
        name = "head.projection.weight"
        inference.seen("num_classes", weights[name].shape[0] if name in weights else 0, name)
        return from_slowfast(weights, VideoClassifierConfig(**inference.values))
    _decoder(inference, weights, "decoder_embed.weight", "pred_head.transforms.0.", norm_in_list=True)
    inference.seen("decoder_separable_position", "dec_pos_embed_spatial" in weights, "dec_pos_embed_spatial")
    inference.undetermined(
        "decoder_num_heads", max(1, inference.values["decoder_width"] // 64), "width / 64, as SlowFast computes it"
    )
    _predicted_frames(inference, weights["pred_head.projections.0.weight"].shape[0], "pred_head.projections.0.weight")
    inference.always("as SlowFast does", decoder_class_token="encoder", frame_choice="stride")
    _target(inference, ("pixels", "normalized_pixels"), "norm_pix_loss")
    inference.undetermined("mask_ratio", 0.9, "the paper's", "mask_ratio")
    return from_slowfast(weights, MaskedAutoencoderConfig(**inference.values))


def _decoder(inference: _Inference, weights: dict, embed: str, blocks: str, norm_in_list: bool = False) -> None:
    inference.seen("decoder_width", weights[embed].shape[0], embed)
    inference.seen("decoder_depth", _depth(weights, blocks) - norm_in_list, blocks + "*")


def _predicted_frames(inference: _Inference, outputs: int, where: str) -> None:
    values = inference.values
    per_frame = math.prod(values["patch_size"]) * values["in_channels"]
    slices = values["num_frames"] // values["tubelet_size"]
    if outputs % per_frame:
        raise UnknownFormat(f"{where} has {outputs} rows, no multiple of the {per_frame} values of a patch of one frame")
    frames = outputs // per_frame * slices
    values["predicted_frames"] = None if frames == slices else frames
    inference.report.inferred["predicted_frames"] = f"{frames}, from {where}"


def _videomae(weights: dict, inference: _Inference, _: dict[str, Any] | None) -> VideoModel:
    pretrain = "encoder_to_decoder.weight" in weights
    prefix = "encoder." if pretrain else ""
    _patches(inference, weights, f"{prefix}patch_embed.proj.weight")
    _blocks(inference, weights, f"{prefix}blocks.", "mlp.fc1.weight")
    inference.heads()
    first = f"{prefix}blocks.0."
    _qkv_bias(inference, weights, f"{first}attn.q_bias")
    learned = f"{prefix}pos_embed" in weights
    inference.seen(
        "position", "learned" if learned else "sincos", f"{prefix}pos_embed, which is there" if learned else "no pos_embed"
    )
    inference.seen("layer_scale", 1e-5 if f"{first}gamma_1" in weights else None, f"{first}gamma_1")
    rgb = inference.values["in_channels"] == len(IMAGENET_MEAN)
    inference.always(
        "as VideoMAE does",
        key_bias=False,
        class_token=False,
        separable_position=False,
        mean=IMAGENET_MEAN if rgb else 0.0,
        std=IMAGENET_STD if rgb else 1.0,
    )
    why = "VideoMAE's positions are not in its files; its published models have this"
    frames = inference.undetermined("num_frames", 16, why, "num_frames")
    inference.undetermined("image_size", 224, why, "input_size")
    if learned:
        _check_tokens(inference, weights[f"{prefix}pos_embed"].shape[-2])
    if not pretrain:
        inference.seen("num_classes", weights["head.weight"].shape[0] if "head.weight" in weights else 0, "head.weight")
        inference.seen("pooling", "mean" if "fc_norm.weight" in weights else "first", "fc_norm.weight")
        return from_videomae(weights, VideoClassifierConfig(**inference.values))
    _decoder(inference, weights, "encoder_to_decoder.weight", "decoder.blocks.")
    inference.seen(
        "decoder_mlp_ratio",
        ratio(inference.values["decoder_width"], weights["decoder.blocks.0.mlp.fc1.weight"].shape[0]),
        "decoder.blocks.0.mlp.fc1.weight",
    )
    inference.undetermined(
        "decoder_num_heads", max(1, inference.values["decoder_width"] // 64), "width / 64, as in all of VideoMAE's factories"
    )
    inference.always(
        "as VideoMAE does", target_range="unit", mask_strategy="tube", decoder_embed_bias=False, predicted_frames=frames
    )
    inference.undetermined("decoder_mask_ratio", 0.0, "of VideoMAE; V2 has 0.5", "decoder_mask_ratio")
    _target(inference, ("pixels", "channel_normalized_pixels"), "normlize_target")
    inference.undetermined("mask_ratio", 0.9, "VideoMAE's", "mask_ratio")
    return from_videomae(weights, MaskedAutoencoderConfig(**inference.values))


def _check_tokens(inference: _Inference, tokens: int) -> None:
    values = inference.values
    size = values["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    patch = values["patch_size"]
    expected = values["num_frames"] // values["tubelet_size"] * (height // patch[0]) * (width // patch[1])
    if tokens != expected:
        raise UnknownFormat(
            f"pos_embed has {tokens} tokens, {values['num_frames']} frames of {height}x{width} give {expected}; "
            "state num_frames and image_size"
        )


def _huggingface(weights: dict, inference: _Inference, hub_config: dict | None) -> VideoModel:
    if hub_config is None:
        raise UnknownFormat("expected config.json beside the weights of Hugging Face's VideoMAE; give the folder")
    config = huggingface_config(weights, hub_config)
    inference.report.inferred["config"] = "all of it, from config.json"
    for field in ("mean", "std"):
        inference.report.assumed[field] = f"{getattr(config, field)!r}, which the model's loss takes for granted"
    return from_huggingface(weights, config)


def _image_mae(weights: dict, inference: _Inference, _: dict[str, Any] | None) -> VideoModel:
    _patches(inference, weights, "patch_embed.proj.weight")
    _blocks(inference, weights, "blocks.", "mlp.fc1.weight")
    inference.heads()
    inference.seen("class_token", "cls_token" in weights, "cls_token")
    _qkv_bias(inference, weights, "blocks.0.attn.qkv.bias")
    inference.always("spatial from the image's, temporal zero", separable_position=True)
    inference.always("as the image MAE does", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    inference.undetermined("tubelet_size", 2, "the paper's; the image kernel is divided over its frames")
    inference.undetermined("num_frames", 16, "the paper's; an image has none")
    if "pos_embed" not in weights:
        raise UnknownFormat("expected pos_embed among the weights of an image MAE, and it is missing")
    _square(
        inference, weights["pos_embed"].shape[-2] - inference.values["class_token"], inference.values["patch_size"], "pos_embed"
    )
    if "decoder_embed.weight" not in weights:
        inference.seen("num_classes", weights["head.weight"].shape[0] if "head.weight" in weights else 0, "head.weight")
        first = "head.weight" in weights and "fc_norm.weight" not in weights
        inference.seen("pooling", "first" if first else "mean", "fc_norm.weight")
        return from_image_mae(weights, VideoClassifierConfig(**inference.values))
    _decoder(inference, weights, "decoder_embed.weight", "decoder_blocks.")
    inference.undetermined("decoder_num_heads", 16, "as in all of the image MAE's factories")
    inference.always("one for each time slice", predicted_frames=None)
    inference.always("as the image MAE does", decoder_class_token="encoder")
    _target(inference, ("pixels", "normalized_pixels"), "norm_pix_loss")
    inference.undetermined("mask_ratio", 0.9, "for video; the image MAE has 0.75")
    return from_image_mae(weights, MaskedAutoencoderConfig(**inference.values))
