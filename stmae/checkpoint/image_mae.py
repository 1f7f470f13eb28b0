"""From an image MAE (facebookresearch/mae) to video and back: the patch kernel inflated over time or summed, temporal positions
zero.

Source: Feichtenhofer et al., "Masked Autoencoders As Spatiotemporal Learners", section 5.2 and
appendix (image -> video, video -> image).
"""

import torch

from stmae.checkpoint.names import ENCODER, block_names, build_renamed, unwrap
from stmae.models.config import EncoderConfig, MaskedAutoencoderConfig
from stmae.models.encoder import VideoModel


def from_image_mae(state_dict: dict, config: EncoderConfig) -> VideoModel:
    """A video model that computes for a still clip what the image model computes for its frame.

    Args:
        state_dict: weights of the image MAE's ``MaskedAutoencoderViT`` or ``VisionTransformer`` by its names.
        config: our configuration, with ``separable_position``; its frame size is the image's.

    Raises:
        CheckpointMismatch: weights and config do not fit; lists what differs, by the image MAE's names.
    """
    weights = {}
    for name, value in unwrap(state_dict).items():
        if name == "patch_embed.proj.weight":
            weights[name] = value[:, :, None].expand(-1, -1, config.tubelet_size, -1, -1) / config.tubelet_size
        elif name in ("pos_embed", "decoder_pos_embed"):
            weights.update(_separate(name, value, config))
        else:
            weights[name] = value
    table = ENCODER | block_names("encoder.blocks.", "blocks.", config.depth)
    if isinstance(config, MaskedAutoencoderConfig):
        table |= {
            "decoder.embed.": "decoder_embed.",
            "decoder.mask_token": "mask_token",
            "decoder.position.spatial": "decoder_pos_embed_spatial",
            "decoder.position.temporal": "decoder_pos_embed_temporal",
            "decoder.position.class_token": "decoder_pos_embed_class",
            "decoder.norm.": "decoder_norm.",
            "decoder.head.": "decoder_pred.",
        } | block_names("decoder.blocks.", "decoder_blocks.", config.decoder_depth)
    else:
        table |= {"head.": "head."}
        if "fc_norm.weight" in weights:
            table["encoder.norm."] = "fc_norm."
    return build_renamed(config, weights, table, "the image MAE checkpoint")


def _separate(name: str, value: torch.Tensor, config: EncoderConfig) -> dict[str, torch.Tensor]:
    """An image's joint positions [1, (1 +) h * w, D] as separable ones, whose temporal part is zero."""
    value = value.reshape(-1, value.shape[-1])
    first = int(config.class_token)
    result = {
        f"{name}_spatial": value[first:],
        f"{name}_temporal": value.new_zeros(config.grid[0], value.shape[-1]),
    }
    if first:
        result[f"{name}_class"] = value[:1]
    return result
