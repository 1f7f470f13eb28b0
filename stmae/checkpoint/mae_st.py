"""The bridge to and from mae_st (facebookresearch/mae_st), by its parameter and argument names."""

import warnings
from typing import Any

import torch

from stmae.checkpoint.names import (
    ENCODER,
    block_names,
    build_renamed,
    fields,
    has_leading_one,
    translate,
    unwrap,
)
from stmae.checkpoint.state import CheckpointMismatch
from stmae.models.config import EncoderConfig, MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.encoder import VideoModel

# mae_st's argument -> (our field, mae_st's default).
_SHARED = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("in_channels", 3),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "sep_pos_embed": ("separable_position", False),
    "cls_embed": ("class_token", False),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
}
_PRETRAIN = _SHARED | {
    "embed_dim": ("width", 1024),
    "depth": ("depth", 24),
    "num_heads": ("num_heads", 16),
    "num_frames": ("num_frames", 16),
    "t_patch_size": ("tubelet_size", 4),
    "decoder_embed_dim": ("decoder_width", 512),
    "decoder_depth": ("decoder_depth", 8),
    "decoder_num_heads": ("decoder_num_heads", 16),
    "norm_pix_loss": ("target", False),
    "pred_t_dim": ("predicted_frames", 8),
    "mask_ratio": ("mask_ratio", 0.75),
}
_CLASSIFY = _SHARED | {
    "embed_dim": ("width", 768),
    "depth": ("depth", 12),
    "num_heads": ("num_heads", 12),
    "num_frames": ("num_frames", None),
    "t_patch_size": ("tubelet_size", None),
    "num_classes": ("num_classes", 400),
    "dropout": ("dropout", 0.5),
    "drop_path_rate": ("drop_path", 0.0),
}
# Besides no_qkv_bias: how weights start, what mae_st itself ignores, and notes beside the arguments.
_WITHOUT_FIELD = {
    "no_qkv_bias",
    "trunc_init",
    "qk_scale",
    "drop_rate",
    "attn_drop_rate",
    "kind",
    "objective",
    "note",
}

_DECODER = {
    "decoder.embed.": "decoder_embed.",
    "decoder.mask_token": "mask_token",
    "decoder.class_token": "decoder_cls_token",
    "decoder.position.spatial": "decoder_pos_embed_spatial",
    "decoder.position.temporal": "decoder_pos_embed_temporal",
    "decoder.position.class_token": "decoder_pos_embed_class",
    "decoder.position.joint": "decoder_pos_embed",
    "decoder.norm.": "decoder_norm.",
    "decoder.head.": "decoder_pred.",
}


def from_mae_st(state_dict: dict, config: dict | EncoderConfig) -> VideoModel:
    """A model with the weights of mae_st's ``MaskedAutoencoderViT`` or ``VisionTransformer``, computing what
    that computes.

    Args:
        state_dict: its weights; also a checkpoint that nests them under ``model`` or ``model_state``,
            and names with the prefixes ``module.`` (DDP) and ``_orig_mod.`` (torch.compile). Separate ``q``,
            ``k``, ``v`` projections are fused.
        config: the arguments of its constructor by mae_st's names (``img_size``, ``embed_dim``,
            ``t_patch_size``, ...); what is absent has mae_st's default. In addition ``mask_ratio``,
            ``layer_norm_eps`` (1e-6, as in all of mae_st's factories), and ``kind``, ``pretrain`` or
            ``classify``; without it, the weights decide. Or one of our configuration classes.

    Returns:
        A ``MaskedAutoencoder`` or ``VideoClassifier`` on the CPU, in evaluation mode.

    Raises:
        CheckpointMismatch: weights and config do not fit; lists what differs, by mae_st's names.
        ValueError: an argument that mae_st does not have, or weights of another code base.
    """
    weights = unwrap(state_dict)
    if isinstance(config, EncoderConfig):
        return build_renamed(config, _fuse_qkv(weights), _names(config), "the mae_st checkpoint")
    if any("attn.qkv." in name or name.startswith(("pred_head.", "head.projection.")) for name in weights):
        raise ValueError(
            "from_mae_st: these weights carry SlowFast's names (fused qkv, pred_head), as the published ones do, "
            "and need its semantics; use stmae.checkpoint.from_slowfast"
        )
    kind = config.get("kind", "pretrain" if "mask_token" in weights else "classify")
    if kind not in ("pretrain", "classify"):
        raise ValueError(f"from_mae_st: expected kind to be pretrain or classify, got {kind!r}")
    values = fields("from_mae_st", config, _PRETRAIN if kind == "pretrain" else _CLASSIFY, _WITHOUT_FIELD)
    values["qkv_bias"] = not config.get("no_qkv_bias", False)
    model_config: MaskedAutoencoderConfig | VideoClassifierConfig
    if kind == "pretrain":
        values["target"] = "normalized_pixels" if values["target"] else "pixels"
        model_config = MaskedAutoencoderConfig(**values)
        if model_config.predicted_frames == model_config.grid[0]:
            # One per time slice, also after a change of length.
            model_config = model_config.replace(predicted_frames=None)
    else:
        model_config = VideoClassifierConfig(**values)
        if not model_config.class_token:
            warnings.warn(
                "from_mae_st: mae_st's classifier without a class token leaves the first patch out of its "
                "mean; this one averages all, and so gives other logits",
                stacklevel=2,
            )
    table = _names(model_config)
    return build_renamed(model_config, _fuse_qkv(weights), table, "the mae_st checkpoint")


def to_mae_st(model: VideoModel) -> dict[str, torch.Tensor]:
    """The weights by mae_st's names and shapes, q, k and v apart, copied to the CPU: what mae_st's own models
    load.

    Raises:
        ValueError: a model with a choice that mae_st does not have; the message names it.
    """
    config: Any = model.config
    differs = not_mae_st(config)
    if differs:
        raise ValueError(f"to_mae_st: mae_st has no model with {', '.join(differs)}")
    if isinstance(config, VideoClassifierConfig) and not config.class_token:
        warnings.warn(
            "to_mae_st: mae_st's classifier without a class token leaves the first patch out of its mean: other logits",
            stacklevel=2,
        )
    table = _names(config)
    result = {}
    for name, value in model.state_dict().items():
        theirs = translate(name, table)
        value = value.detach().cpu()
        if ".attn.qkv." in theirs:
            for key, part in zip("qkv", value.chunk(3)):
                result[theirs.replace(".qkv.", f".{key}.")] = part.clone()
        else:
            result[theirs] = (value[None] if has_leading_one(name) else value).clone()
    return result


def not_mae_st(config: EncoderConfig) -> list[str]:
    """The choices of ``config`` that mae_st's code does not have."""
    expected: dict[str, Any] = {"position": "learned", "layer_scale": None, "encoder_norm": True}
    if config.qkv_bias:
        expected["key_bias"] = True
    if config.norm_eps not in (None, config.layer_norm_eps):
        expected["norm_eps"] = None
    if isinstance(config, VideoClassifierConfig):
        expected["pooling"] = "mean"
    if isinstance(config, MaskedAutoencoderConfig):
        expected.update(frame_choice="linspace", target_range="normalized", decoder_embed_bias=True)
        if config.class_token:
            expected["decoder_class_token"] = "own"
        if config.decoder_separable_position not in (None, config.separable_position):
            expected["decoder_separable_position"] = None
        if config.target not in ("pixels", "normalized_pixels"):
            expected["target"] = "normalized_pixels"
        if config.decoder_mlp_ratio not in (None, config.mlp_ratio):
            expected["decoder_mlp_ratio"] = None
        if config.decoder_norm_eps not in (None, config.layer_norm_eps):
            expected["decoder_norm_eps"] = None
    return [f"{name}={getattr(config, name)!r}" for name, want in expected.items() if getattr(config, name) != want]


def _names(config: EncoderConfig) -> dict[str, str]:
    table = ENCODER | block_names("encoder.blocks.", "blocks.", config.depth)
    if isinstance(config, MaskedAutoencoderConfig):
        return table | _DECODER | block_names("decoder.blocks.", "decoder_blocks.", config.decoder_depth)
    return table | {"head.": "head."}


def _fuse_qkv(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concatenates separate projections: ``attn.{q,k,v}.weight`` -> ``attn.qkv.weight``, rows of q first."""
    result = dict(weights)
    for name in weights:
        if ".attn.q." not in name:
            continue
        names = [name.replace(".attn.q.", f".attn.{key}.") for key in "qkv"]
        absent = [part for part in names if part not in weights]
        if absent:
            raise CheckpointMismatch("the mae_st checkpoint", absent, [], {})
        result[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([result.pop(part) for part in names])
    return result
