"""The bridge to and from Hugging Face's VideoMAE: ``VideoMAEForPreTraining``, ``VideoMAEForVideoClassification`` and
``VideoMAEModel`` of the package transformers, by their names and configuration."""

import re
import warnings
from typing import Any

import torch

from stmae.checkpoint.names import build_renamed, translate, unwrap
from stmae.checkpoint.state import CheckpointMismatch
from stmae.checkpoint.videomae import IMAGENET_MEAN, IMAGENET_STD, not_videomae
from stmae.models.config import EncoderConfig, MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.encoder import VideoModel

# Their defaults (transformers 5), for a config.json that leaves out what has its default value.
_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "num_frames": 16,
    "tubelet_size": 2,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "use_mean_pooling": True,
    "decoder_num_attention_heads": 6,
    "decoder_hidden_size": 384,
    "decoder_num_hidden_layers": 4,
    "decoder_intermediate_size": 1536,
    "norm_pix_loss": True,
}
_LAYER_NORM_EPS = 1e-5  # of the decoder's norm and of fc_norm, which have torch's default whatever the configuration says
_BLOCK = {
    "norm1.": "layernorm_before.",
    "qkv.": "attention.attention.qkv.",  # put together from query, key and value, which see
    "proj.": "attention.output.dense.",
    "norm2.": "layernorm_after.",
    "fc1.": "intermediate.dense.",
    "fc2.": "output.dense.",
}
_QUERY_WEIGHT = re.compile(r"(.*attention\.attention\.)query\.weight")


def from_huggingface(state_dict: dict, config: dict | EncoderConfig) -> VideoModel:
    """A model with the weights of a Hugging Face VideoMAE, computing what that computes.

    Args:
        state_dict: the weights of ``VideoMAEForPreTraining``, ``VideoMAEForVideoClassification`` or ``VideoMAEModel``; the biases
            of q and v by their names of transformers 4 and of files (``q_bias``) or of transformers 5 (``query.bias``).
        config: the model's configuration as a dictionary (``config.json``, or ``model.config.to_dict()``); what is absent has
            transformers' default. Or one of our configuration classes.

    Returns:
        A ``MaskedAutoencoder`` or ``VideoClassifier`` on the CPU, in evaluation mode. Of ``VideoMAEModel``, a classifier without
        a head (``num_classes=0``).

    Raises:
        CheckpointMismatch: weights and config do not fit; lists what differs, by Hugging Face's names.
        ValueError: a configuration that this library cannot compute (another activation, dropout in the attention).
    """
    weights = _fuse(unwrap(state_dict))
    if not isinstance(config, EncoderConfig):
        config = huggingface_config(weights, config)
    # VideoMAEModel by itself has no prefix; in the other two models it is called videomae.
    prefix = "" if any(name.startswith("embeddings.") for name in weights) else "videomae."
    return build_renamed(config, weights, huggingface_names(config, prefix), "the Hugging Face checkpoint")


def huggingface_config(weights: dict[str, torch.Tensor], config: dict) -> MaskedAutoencoderConfig | VideoClassifierConfig:
    """Our configuration for ``config.json``'s ``config``; ``weights`` show which of the three models it is."""
    if config.get("model_type", "videomae") != "videomae":
        raise ValueError(f"from_huggingface: expected model_type videomae, got {config['model_type']!r}")
    their = {**_DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
    for name in ("use_mean_pooling", "norm_pix_loss", "qkv_bias", "qv_bias"):
        if not isinstance(their.get(name, True), bool):
            raise ValueError(f"from_huggingface: expected {name} true or false, got {their[name]!r}")
    if their["hidden_act"] != "gelu":
        raise ValueError(f"from_huggingface: expected hidden_act gelu, got {their['hidden_act']!r}")
    if their["attention_probs_dropout_prob"] or their["hidden_dropout_prob"]:
        raise ValueError(
            "from_huggingface: expected attention_probs_dropout_prob and hidden_dropout_prob 0, as in this library's blocks, "
            f"got {their['attention_probs_dropout_prob']} and {their['hidden_dropout_prob']}"
        )
    rgb = their["num_channels"] == len(IMAGENET_MEAN)
    shared = dict(
        image_size=_size(their["image_size"]),
        patch_size=_size(their["patch_size"]),
        in_channels=their["num_channels"],
        num_frames=their["num_frames"],
        tubelet_size=their["tubelet_size"],
        width=their["hidden_size"],
        depth=their["num_hidden_layers"],
        num_heads=their["num_attention_heads"],
        mlp_ratio=ratio(their["hidden_size"], their["intermediate_size"]),
        qkv_bias=bool(config.get("qv_bias", config.get("qkv_bias", True))),
        key_bias=False,
        class_token=False,
        separable_position=False,
        position="sincos",
        mean=IMAGENET_MEAN if rgb else 0.0,
        std=IMAGENET_STD if rgb else 1.0,
        layer_norm_eps=their["layer_norm_eps"],
    )
    if "encoder_to_decoder.weight" in weights:
        return MaskedAutoencoderConfig(
            **shared,
            encoder_norm=not their["use_mean_pooling"],
            decoder_width=their["decoder_hidden_size"],
            decoder_depth=their["decoder_num_hidden_layers"],
            decoder_num_heads=their["decoder_num_attention_heads"],
            decoder_mlp_ratio=ratio(their["decoder_hidden_size"], their["decoder_intermediate_size"]),
            decoder_embed_bias=False,
            decoder_norm_eps=_LAYER_NORM_EPS,
            predicted_frames=their["num_frames"],
            target="channel_normalized_pixels" if their["norm_pix_loss"] else "pixels",
            target_range="unit",
            mask_strategy="tube",
        )
    if "classifier.weight" in weights:
        return VideoClassifierConfig(
            **shared,
            num_classes=weights["classifier.weight"].shape[0],
            pooling="mean" if their["use_mean_pooling"] else "first",
            norm_eps=_LAYER_NORM_EPS if their["use_mean_pooling"] else None,
        )
    has_norm = any(name.endswith(("layernorm.weight", "fc_norm.weight")) for name in weights)
    return VideoClassifierConfig(**shared, num_classes=0, encoder_norm=has_norm)


def to_huggingface(model: VideoModel) -> tuple[dict[str, torch.Tensor], dict]:
    """(weights, configuration) of a Hugging Face VideoMAE that computes what ``model`` computes: what transformers'
    ``VideoMAEForPreTraining`` or ``VideoMAEForVideoClassification`` loads.

    Raises:
        ValueError: a model with a choice that Hugging Face's does not have; the message names it.
    """
    config: Any = model.config
    pretrain = isinstance(config, MaskedAutoencoderConfig)
    differs = _not_huggingface(config)
    if differs:
        raise ValueError(
            f"to_huggingface: Hugging Face's VideoMAE has no model with {', '.join(differs)}; VideoMAE's own recipe makes one"
        )
    their_eps = _LAYER_NORM_EPS if pretrain or (config.num_classes and config.pooling == "mean") else config.layer_norm_eps
    field = "decoder_norm_eps" if pretrain else "norm_eps"
    ours = config.layer_norm_eps if getattr(config, field) is None else getattr(config, field)
    if ours != their_eps:
        warnings.warn(
            f"to_huggingface: this model's {field} is {ours:g}; Hugging Face's VideoMAE has {their_eps:g} there, so its results "
            "differ where a token's variance is as small as that",
            stacklevel=2,
        )
    table = huggingface_names(config, "videomae." if pretrain or config.num_classes else "")
    weights = {}
    for name, value in model.state_dict().items():
        theirs = translate(name, table)
        value = value.detach().cpu().clone()
        if name == "decoder.mask_token":
            value = value[None]
        if ".qkv." in theirs:
            weights.update(_split(theirs, value))
        else:
            weights[theirs] = value
    hidden = int(config.width * config.mlp_ratio)
    their = {
        "model_type": "videomae",
        "architectures": [
            "VideoMAEForPreTraining" if pretrain else "VideoMAEForVideoClassification" if config.num_classes else "VideoMAEModel"
        ],
        "image_size": config.image_size[0],
        "patch_size": config.patch_size[0],
        "num_channels": config.in_channels,
        "num_frames": config.num_frames,
        "tubelet_size": config.tubelet_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": hidden,
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.qkv_bias,
        "qv_bias": config.qkv_bias,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if pretrain:
        their.update(
            use_mean_pooling=not config.encoder_norm,
            decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_num_heads,
            decoder_intermediate_size=int(config.decoder_width * (config.decoder_mlp_ratio or config.mlp_ratio)),
            norm_pix_loss=config.target == "channel_normalized_pixels",
        )
    elif config.num_classes:
        classes = range(config.num_classes)
        their.update(
            use_mean_pooling=config.pooling == "mean",
            num_labels=config.num_classes,
            id2label={str(label): f"LABEL_{label}" for label in classes},
            label2id={f"LABEL_{label}": label for label in classes},
        )
    else:
        their.update(use_mean_pooling=not config.encoder_norm)
    return weights, their


def huggingface_names(config: Any, prefix: str) -> dict[str, str]:
    """Ours -> Hugging Face's, q, k and v still in one; ``prefix``: of the encoder."""
    names = {"encoder.patch_embed.": f"{prefix}embeddings.patch_embeddings.projection."}
    for index in range(config.depth):
        names |= {f"encoder.blocks.{index}.{ours}": f"{prefix}encoder.layer.{index}.{theirs}" for ours, theirs in _BLOCK.items()}
    if isinstance(config, VideoClassifierConfig):
        pooled = config.num_classes and config.pooling == "mean"
        return names | {"encoder.norm.": "fc_norm." if pooled else f"{prefix}layernorm.", "head.": "classifier."}
    for index in range(config.decoder_depth):
        names |= {f"decoder.blocks.{index}.{ours}": f"decoder.decoder_layers.{index}.{theirs}" for ours, theirs in _BLOCK.items()}
    return names | {
        "encoder.norm.": f"{prefix}layernorm.",
        "decoder.embed.": "encoder_to_decoder.",
        "decoder.mask_token": "mask_token",
        "decoder.norm.": "decoder.norm.",
        "decoder.head.": "decoder.head.",
    }


def ratio(width: int, hidden: int) -> float:
    """The ``mlp_ratio`` with which ``int(width * mlp_ratio)`` is ``hidden``."""
    value = hidden / width
    return value if int(width * value) == hidden else (hidden + 0.5) / width


def _size(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _fuse(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """query, key and value as one ``qkv.weight``, and their biases as ``qkv.q_bias`` and ``qkv.v_bias``."""
    result = dict(weights)
    for name in weights:
        match = _QUERY_WEIGHT.fullmatch(name)
        if not match:
            continue
        prefix = match[1]
        parts = [f"{prefix}{part}.weight" for part in ("query", "key", "value")]
        absent = [part for part in parts if part not in weights]
        if absent:
            raise CheckpointMismatch("the Hugging Face checkpoint", absent, [], {})
        result[f"{prefix}qkv.weight"] = torch.cat([result.pop(part) for part in parts])
        for ours, theirs in (("q_bias", "query.bias"), ("v_bias", "value.bias")):
            for old in (ours, theirs):
                if f"{prefix}{old}" in result:
                    value = result.pop(f"{prefix}{old}")
                    if f"{prefix}qkv.{ours}" in result:
                        raise ValueError(f"from_huggingface: expected one of {prefix}{ours} and {prefix}{theirs}, got both")
                    result[f"{prefix}qkv.{ours}"] = value
    return result


def _split(theirs: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The reverse of ``_fuse`` for one tensor, by the names that files have (``q_bias``), which every transformers reads."""
    prefix, last = theirs.split("qkv.")
    if last == "weight":
        return {f"{prefix}{part}.weight": x.clone() for part, x in zip(("query", "key", "value"), value.chunk(3))}
    return {f"{prefix}{last}": value}


def _not_huggingface(config: Any) -> list[str]:
    expected: dict[str, Any] = {"position": "sincos", "layer_scale": None}
    if isinstance(config, MaskedAutoencoderConfig):
        expected["decoder_mask_ratio"] = 0.0
    differs = [
        name
        for name in not_videomae(config)
        if not name.startswith(("decoder_norm_eps", "norm_eps", "decoder_mlp_ratio", "encoder_norm"))
    ]
    differs += [f"{name}={getattr(config, name)!r}" for name, want in expected.items() if getattr(config, name) != want]
    for name in ("image_size", "patch_size"):
        if len(set(getattr(config, name))) > 1:
            differs.append(f"{name}={getattr(config, name)!r}")
    return differs
