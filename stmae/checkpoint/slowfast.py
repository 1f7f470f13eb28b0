"""The bridge from SlowFast (facebookresearch/SlowFast), whose names and semantics the published MAE-ST
weights have."""

from typing import Any

from stmae.checkpoint.names import ENCODER, block_names, build_renamed, fields, unwrap
from stmae.models.config import EncoderConfig, MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.encoder import VideoModel

# Argument, by mae_st's name where there is one -> (our field, default of SlowFast's MAE configurations; None:
# must be given).
_SHARED = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("in_channels", 3),
    "num_frames": ("num_frames", 16),
    "t_patch_size": ("tubelet_size", 2),
    "embed_dim": ("width", None),
    "depth": ("depth", None),
    "num_heads": ("num_heads", None),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
}
_PRETRAIN = _SHARED | {
    "decoder_embed_dim": ("decoder_width", 512),
    "decoder_depth": ("decoder_depth", 4),
    "norm_pix_loss": ("target", True),
    "mask_ratio": ("mask_ratio", 0.9),
}
_CLASSIFY = _SHARED | {
    "num_classes": ("num_classes", 400),
    "dropout": ("dropout", 0.0),
    "drop_path_rate": ("drop_path", 0.0),
}
_WITHOUT_FIELD = {"kind", "objective", "note"}

_DECODER = {
    "decoder.embed.": "decoder_embed.",
    "decoder.mask_token": "mask_token",
    "decoder.position.spatial": "dec_pos_embed_spatial",
    "decoder.position.temporal": "dec_pos_embed_temporal",
    "decoder.position.class_token": "dec_pos_embed_class",
    "decoder.position.joint": "decoder_pos_embed",
    "decoder.head.": "pred_head.projections.0.",
}


def from_slowfast(state_dict: dict, config: dict | EncoderConfig) -> VideoModel:
    """A model with the weights of SlowFast's ``MaskMViT`` or ``MViT`` in its MAE configurations, computing
    what that computes.

    Its semantics, against mae_st's: fused ``qkv``; the encoder's class token passed through the decoder;
    joint decoder positions (unless the weights have separable ones); target frames at a stride; ``width /
    64`` decoder heads. The logits are those before the softmax that SlowFast's head applies in evaluation.

    Args:
        state_dict: the weights; also nested under ``model_state`` (as published) or ``model``, and with the
            prefixes ``module.`` and ``_orig_mod.``. They show whether there are a class token, separable
            positions and biases of q, k, v.
        config: arguments by mae_st's names. ``embed_dim``, ``depth`` and ``num_heads`` are needed, the others
            default to SlowFast's. ``decoder_num_heads`` defaults to ``decoder_embed_dim / 64``. ``kind`` is
            ``slowfast_pretrain`` or ``slowfast_classify``; without it, the weights decide. Or one of our configuration classes.

    Returns:
        A ``MaskedAutoencoder`` or ``VideoClassifier`` on the CPU, in evaluation mode.

    Raises:
        CheckpointMismatch: weights and config do not fit; lists what differs, by SlowFast's names.
        ValueError: an argument that is not known or is missing.
    """
    weights = unwrap(state_dict)
    if isinstance(config, EncoderConfig):
        return build_renamed(config, weights, _names(config), "the SlowFast checkpoint")
    kind = config.get("kind", "slowfast_pretrain" if "mask_token" in weights else "slowfast_classify")
    if kind not in ("slowfast_pretrain", "slowfast_classify"):
        raise ValueError(f"from_slowfast: expected kind slowfast_pretrain or slowfast_classify, got {kind!r}")
    seen: dict[str, Any] = {
        "class_token": "cls_token" in weights,
        "separable_position": "pos_embed_spatial" in weights,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
    }
    if kind == "slowfast_classify":
        values = fields("from_slowfast", config, _CLASSIFY, _WITHOUT_FIELD)
        classifier_config = VideoClassifierConfig(**values, **seen)
        return build_renamed(classifier_config, weights, _names(classifier_config), "the SlowFast checkpoint")

    values = fields("from_slowfast", config, _PRETRAIN, _WITHOUT_FIELD | {"decoder_num_heads"})
    values["target"] = "normalized_pixels" if values["target"] else "pixels"
    model_config = MaskedAutoencoderConfig(
        **values,
        **seen,
        decoder_num_heads=config.get("decoder_num_heads", max(1, values["decoder_width"] // 64)),
        decoder_separable_position="dec_pos_embed_spatial" in weights,
        decoder_class_token="encoder",
        frame_choice="stride",
    )
    return build_renamed(model_config, weights, _names(model_config), "the SlowFast checkpoint")


def _names(config: EncoderConfig) -> dict[str, str]:
    table = ENCODER | block_names("encoder.blocks.", "blocks.", config.depth)
    if not isinstance(config, MaskedAutoencoderConfig):
        return table | {"head.": "head.projection."}
    table |= _DECODER | block_names("decoder.blocks.", "pred_head.transforms.0.", config.decoder_depth)
    table["decoder.norm."] = f"pred_head.transforms.0.{config.decoder_depth}."  # behind the blocks, in one list with them
    return table
