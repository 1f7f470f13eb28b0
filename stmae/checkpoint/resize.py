"""The same weights for another clip length or frame size, or for another task."""

import dataclasses
from typing import Any

import torch

from stmae.checkpoint.state import Model, build
from stmae.models.config import EncoderConfig, VideoClassifierConfig
from stmae.models.encoder import VideoModel
from stmae.models.masked_autoencoder import MaskedAutoencoder
from stmae.models.position import interpolate_position
from stmae.models.video_classifier import VideoClassifier


def resize(model: Model, **changes: Any) -> Model:
    """A new model with some fields of the configuration changed and the weights carried over.

    Another ``num_frames`` or ``image_size`` interpolates the position embeddings, separable and joint alike:
    bicubic in space, linear in time; the class token's is kept. Another ``num_classes`` starts a new head.
    Any change that the weights do not fit is refused.

    Raises:
        ValueError: a field that does not exist or a value that is not valid.
        CheckpointMismatch: the weights do not fit the changed configuration; lists what differs.
    """
    old, config = model.config, model.config.replace(**changes)
    state = _resized(model.state_dict(), old, config)
    if (
        isinstance(old, VideoClassifierConfig)
        and isinstance(config, VideoClassifierConfig)
        and old.num_classes != config.num_classes
    ):
        state = _with_new_head(config, state)
    return _finish(build(type(model), config, state, "the resized model"), model)


def classifier_from_autoencoder(model: MaskedAutoencoder, **changes: Any) -> VideoClassifier:
    """A ``VideoClassifier`` with the autoencoder's encoder, its final norm included, and a new head.

    Args:
        model: the pre-trained autoencoder; its weights are copied.
        **changes: fields of ``VideoClassifierConfig``: ``num_classes``, ``dropout``, ``drop_path``, or
            another clip length or frame size, for which the position embeddings are interpolated.
    """
    if not isinstance(model, MaskedAutoencoder):
        name = type(model).__name__
        raise ValueError(f"classifier_from_autoencoder: expected a MaskedAutoencoder, got {name}")
    shared = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(EncoderConfig)}
    config = VideoClassifierConfig.from_dict({**shared, **changes})
    encoder = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    state = _resized(encoder, model.config, config)
    state = _with_new_head(config, state)
    return _finish(build(VideoClassifier, config, state, "the autoencoder's encoder"), model)


def _finish(new: Model, old: VideoModel) -> Model:
    new.backend = old.backend
    return new.to(next(old.parameters()).device).train(old.training)


def _with_new_head(config: VideoClassifierConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """state with head weights as ``VideoClassifier`` starts them, in the dtype of the others; with no classes, without any."""
    dtype = state["encoder.norm.weight"].dtype
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    if config.num_classes == 0:
        return state
    return state | {
        "head.weight": torch.empty(config.num_classes, config.width, dtype=torch.float32).normal_(std=0.02).to(dtype),
        "head.bias": torch.zeros(config.num_classes, dtype=dtype),
    }


def _resized(state: dict[str, torch.Tensor], old: EncoderConfig, new: EncoderConfig) -> dict[str, torch.Tensor]:
    """Every position embedding in ``state`` carried from the old grid to the new one; the rest as it is."""
    state = {name: value.detach().cpu() for name, value in state.items()}
    if old.grid == new.grid:
        return state
    (t, h, w), (new_t, new_h, new_w) = old.grid, new.grid
    for name, value in state.items():
        if name.endswith("position.spatial"):
            state[name] = interpolate_position(value, (1, h, w), (1, new_h, new_w))
        elif name.endswith("position.temporal"):
            state[name] = interpolate_position(value, (t, 1, 1), (new_t, 1, 1))
        elif name.endswith("position.joint"):
            first = value.shape[0] - t * h * w  # 1 with a class token
            state[name] = torch.cat([value[:first], interpolate_position(value[first:], old.grid, new.grid)])
    return state
