"""The bridge to and from VideoMAE and VideoMAE V2 (MCG-NJU/VideoMAE, OpenGVLab/VideoMAEv2), by their names."""

from typing import Any

import torch

from stmae.checkpoint.names import block_names, build_renamed, fields, translate, unwrap
from stmae.models.config import EncoderConfig, MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.encoder import VideoModel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Their argument -> (our field, their default).
_PRETRAIN = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "encoder_in_chans": ("in_channels", 3),
    "encoder_embed_dim": ("width", 768),
    "encoder_depth": ("depth", 12),
    "encoder_num_heads": ("num_heads", 12),
    "decoder_embed_dim": ("decoder_width", 512),
    "decoder_depth": ("decoder_depth", 8),
    "decoder_num_heads": ("decoder_num_heads", 8),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "tubelet_size": ("tubelet_size", 2),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "mask_ratio": ("mask_ratio", 0.9),
    "normlize_target": ("target", True),
}
_CLASSIFY = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("in_channels", 3),
    "embed_dim": ("width", 768),
    "depth": ("depth", 12),
    "num_heads": ("num_heads", 12),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "tubelet_size": ("tubelet_size", 2),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "num_classes": ("num_classes", 1000),
    "fc_drop_rate": ("dropout", 0.0),
    "drop_path_rate": ("drop_path", 0.0),
}
_WITHOUT_FIELD = {
    "kind",
    "num_frames",
    "all_frames",
    "qkv_bias",
    "init_values",
    "use_learnable_pos_emb",
    "use_mean_pooling",
    "decoder_mask",
    "decoder_num_classes",
    "objective",
    "note",
}
_KINDS = ("videomae_pretrain", "videomae_classify", "videomae_v2_pretrain", "videomae_v2_classify")


def from_videomae(state_dict: dict, config: dict | EncoderConfig) -> VideoModel:
    """A model with the weights of VideoMAE's or VideoMAE V2's ``PretrainVisionTransformer`` or ``VisionTransformer``,
    computing what that computes.

    Its semantics, against mae_st's: no class token; fixed sine-cosine positions; biases on q and v, none on k; no bias in
    the projection to the decoder; tubes as masks; all frames predicted; pixels of the clip in [0, 1], normalised for each
    channel of a patch; frames normalised with ImageNet's mean and deviation.

    Args:
        state_dict: the weights; also a checkpoint that nests them under ``model`` or ``module``, and names with the
            prefixes ``module.`` and ``_orig_mod.``.
        config: the arguments of its constructor by its names (``img_size``, ``encoder_embed_dim``, ``num_frames`` or
            ``all_frames``, ...), and ``mask_ratio``, ``normlize_target``, ``decoder_mask`` (V2), ``layer_norm_eps``; what is
            absent has VideoMAE's default. ``kind``, one of ``videomae_pretrain``, ``videomae_classify``,
            ``videomae_v2_pretrain`` and ``videomae_v2_classify``; without it, the weights decide. Or a
            ``MaskedAutoencoderConfig`` or ``VideoClassifierConfig``.

    Returns:
        A ``MaskedAutoencoder`` or ``VideoClassifier`` on the CPU, in evaluation mode.

    Raises:
        CheckpointMismatch: weights and config do not fit; lists what differs, by VideoMAE's names.
        ValueError: an argument that VideoMAE does not have, or weights of another code base.
    """
    weights = unwrap(state_dict)
    if not isinstance(config, EncoderConfig):
        config = videomae_config(weights, config)
    return build_renamed(config, weights, videomae_names(config), "the VideoMAE checkpoint")


def videomae_config(weights: dict[str, torch.Tensor], config: dict) -> MaskedAutoencoderConfig | VideoClassifierConfig:
    """Our configuration for VideoMAE's arguments ``config``; ``weights`` show what is visible in them."""
    pretrain = "encoder_to_decoder.weight" in weights
    kind = config.get("kind", "videomae_pretrain" if pretrain else "videomae_classify")
    if kind not in _KINDS:
        raise ValueError(f"from_videomae: expected kind to be one of {', '.join(_KINDS)}, got {kind!r}")
    pretrain = kind.endswith("pretrain")
    values = fields("from_videomae", config, _PRETRAIN if pretrain else _CLASSIFY, _WITHOUT_FIELD)
    prefix = "encoder." if pretrain else ""
    layer_scale = config.get("init_values") or None
    values.update(
        num_frames=config.get("num_frames", config.get("all_frames", 16)),
        qkv_bias=bool(config.get("qkv_bias", True)),
        key_bias=False,
        class_token=False,
        separable_position=False,
        position="learned" if config.get("use_learnable_pos_emb") else "sincos",
        layer_scale=layer_scale,
        mean=IMAGENET_MEAN if values["in_channels"] == len(IMAGENET_MEAN) else 0.0,
        std=IMAGENET_STD if values["in_channels"] == len(IMAGENET_STD) else 1.0,
    )
    if f"{prefix}pos_embed" in weights:
        values["position"] = "learned"
    if not pretrain:
        values["pooling"] = "mean" if config.get("use_mean_pooling", True) else "first"
        return VideoClassifierConfig(**values)
    values.update(
        target="channel_normalized_pixels" if values["target"] else "pixels",
        target_range="unit",
        predicted_frames=values["num_frames"],
        mask_strategy="tube",
        decoder_mask_ratio=config.get("decoder_mask") or 0.0,
        decoder_embed_bias=False,
    )
    return MaskedAutoencoderConfig(**values)


def to_videomae(model: VideoModel) -> dict[str, torch.Tensor]:
    """The weights by VideoMAE's names and shapes, copied to the CPU: what VideoMAE's own models load.

    Raises:
        ValueError: a model with a choice that VideoMAE does not have; the message names it.
    """
    config = model.config
    differs = not_videomae(config)
    if differs:
        raise ValueError(f"to_videomae: VideoMAE has no model with {', '.join(differs)}")
    table = videomae_names(config)
    result = {}
    for name, value in model.state_dict().items():
        theirs = translate(name, table)
        value = value.detach().cpu().clone()
        if name.endswith(("mask_token", "position.joint")):
            value = value[None]
        result[theirs] = value
    return result


def not_videomae(config: EncoderConfig) -> list[str]:
    """The choices of ``config`` that VideoMAE's code does not have."""
    expected: dict[str, Any] = {"class_token": False, "separable_position": False, "encoder_norm": True}
    if config.qkv_bias:
        expected["key_bias"] = False
    if config.norm_eps not in (None, config.layer_norm_eps):
        expected["norm_eps"] = None
    if isinstance(config, MaskedAutoencoderConfig):
        expected.update(target_range="unit", decoder_embed_bias=False, predicted_frames=config.num_frames)
        if config.in_channels == len(IMAGENET_MEAN):  # by which its loss undoes the normalisation
            expected.update(mean=IMAGENET_MEAN, std=IMAGENET_STD)
        if config.target not in ("pixels", "channel_normalized_pixels"):
            expected["target"] = "channel_normalized_pixels"
        if config.decoder_mlp_ratio not in (None, config.mlp_ratio):
            expected["decoder_mlp_ratio"] = None
        if config.decoder_norm_eps not in (None, config.layer_norm_eps):
            expected["decoder_norm_eps"] = None
    return [f"{name}={getattr(config, name)!r}" for name, want in expected.items() if getattr(config, name) != want]


def videomae_names(config: Any) -> dict[str, str]:
    """Ours -> VideoMAE's."""
    block = {
        "qkv.q_bias": "attn.q_bias",
        "qkv.v_bias": "attn.v_bias",
        "ls1.gamma": "gamma_1",
        "ls2.gamma": "gamma_2",
    }
    if isinstance(config, VideoClassifierConfig):
        norm = "fc_norm." if config.pooling == "mean" else "norm."
        return {
            "encoder.patch_embed.": "patch_embed.proj.",
            "encoder.position.joint": "pos_embed",
            "encoder.norm.": norm,
            "head.": "head.",
        } | block_names("encoder.blocks.", "blocks.", config.depth, block)
    names = {
        "encoder.patch_embed.": "encoder.patch_embed.proj.",
        "encoder.position.joint": "encoder.pos_embed",
        "encoder.norm.": "encoder.norm.",
        "decoder.embed.": "encoder_to_decoder.",
        "decoder.mask_token": "mask_token",
        "decoder.position.joint": "pos_embed",
        "decoder.norm.": "decoder.norm.",
        "decoder.head.": "decoder.head.",
    }
    names |= block_names("encoder.blocks.", "encoder.blocks.", config.depth, block)
    return names | block_names("decoder.blocks.", "decoder.blocks.", config.decoder_depth, block)
