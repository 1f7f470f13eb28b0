"""The same weights for another clip length, frame size or patch, or for another task."""

import dataclasses
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from stmae.checkpoint.state import build
from stmae.models.action_detector import ActionDetector
from stmae.models.config import ActionDetectorConfig, EncoderConfig, MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.encoder import VideoModel
from stmae.models.masked_autoencoder import MaskedAutoencoder
from stmae.models.position import interpolate_position
from stmae.models.video_classifier import VideoClassifier

Model = TypeVar("Model", bound=VideoModel)


def resize(model: Model, **changes: Any) -> Model:
    """A new model with some fields of the configuration changed and the weights carried over.

    Another ``num_frames`` or ``image_size`` interpolates the position embeddings, separable and joint, learned and sine-cosine:
    bicubic in space, linear in time; the class token's is kept. Another ``patch_size`` or ``tubelet_size`` resamples the patch
    kernel so that it gives for a resampled patch what it gave for the patch (FlexiViT's pseudo-inverse), and the prediction with
    it. Another ``num_classes`` starts a new head. Any change that the weights do not fit is refused.

    ``num_frames=1, tubelet_size=1`` makes an image model of a video model: the kernel summed over time, as in the paper.

    Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes", section 3.4; Feichtenhofer et al., "Masked Autoencoders As
    Spatiotemporal Learners", section 5.2.

    Raises:
        ValueError: a field that does not exist or a value that is not valid.
        CheckpointMismatch: the weights do not fit the changed configuration; lists what differs.
    """
    config: Any = _changed(model.config, changes)
    state = _resized(model.state_dict(), model.config, config)
    if isinstance(model.config, VideoClassifierConfig | ActionDetectorConfig) and config.num_classes != model.config.num_classes:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state.update(_new_head(config, state))
    return _finish(build(type(model), config, state, "the resized model"), model)


def classifier_from_autoencoder(model: MaskedAutoencoder, **changes: Any) -> VideoClassifier:
    """A ``VideoClassifier`` with the autoencoder's encoder, its final norm included, and a new head.

    Args:
        model: the pre-trained autoencoder; its weights are copied.
        **changes: fields of ``VideoClassifierConfig``: ``num_classes``, ``dropout``, ``drop_path``, or another clip length, frame
            size or patch, as for ``resize``.
    """
    if not isinstance(model, MaskedAutoencoder):
        name = type(model).__name__
        raise ValueError(f"classifier_from_autoencoder: expected a MaskedAutoencoder, got {name}")
    shared = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(EncoderConfig)}
    config: Any = _changed(VideoClassifierConfig.from_dict(shared), changes)
    encoder = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    state = _resized(encoder, model.config, config)
    if config.encoder_norm and not model.config.encoder_norm:
        state["encoder.norm.weight"] = torch.ones(config.width)
        state["encoder.norm.bias"] = torch.zeros(config.width)
    state.update(_new_head(config, state))
    return _finish(build(VideoClassifier, config, state, "the autoencoder's encoder"), model)


def detector_from_classifier(model: VideoClassifier, **changes: Any) -> ActionDetector:
    """An ``ActionDetector`` with the classifier's encoder, its final norm included, and a new head.

    Args:
        model: the classifier; its weights are copied.
        **changes: fields of ``ActionDetectorConfig``: ``num_classes``, ``dropout``, ``drop_path``, ``roi_size``, or another clip
            length, frame size or patch, as for ``resize``.
    """
    if not isinstance(model, VideoClassifier):
        raise ValueError(f"detector_from_classifier: expected a VideoClassifier, got {type(model).__name__}")
    shared = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(EncoderConfig)}
    config: Any = _changed(ActionDetectorConfig.from_dict(shared), changes)
    encoder = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    state = _resized(encoder, model.config, config)
    state.update(_new_head(config, state))
    return _finish(build(ActionDetector, config, state, "the classifier's encoder"), model)


def resample_patch_kernel(weight: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """The kernel ``weight`` [D, C, pt, ph, pw] for patches of another size (frames, rows, columns): its product with a linearly
    resampled patch is as near as can be, for all patches, to that of the old kernel with the old patch (and equal where the new
    patch is the larger one).

    Along each axis the new kernel is pinv(R^T) of the old one, R being the matrix that resamples. Over time, 2 frames to 1 is
    the sum of both, and 1 to 2 the same kernel halved.
    """
    result = weight.double()
    for axis, (old, new) in enumerate(zip(weight.shape[2:], patch), start=2):
        if old != new:
            result = _along(result, axis, torch.linalg.pinv(_linear_resampling(old, new).t()))
    return result.to(weight.dtype)


def _linear_resampling(old: int, new: int) -> torch.Tensor:
    """R [new, old] float64, which resamples old values to new ones linearly."""
    identity = torch.eye(old, dtype=torch.float64, device="cpu")[None]  # [1, old, old]: each value by itself
    return F.interpolate(identity, new, mode="linear", align_corners=False)[0].t()


def _along(x: torch.Tensor, axis: int, matrix: torch.Tensor) -> torch.Tensor:
    return torch.tensordot(x, matrix, dims=([axis], [1])).movedim(-1, axis)


def _changed(config: EncoderConfig, changes: dict[str, Any]) -> EncoderConfig:
    """``config`` with ``changes``, and what follows from them."""
    changes = dict(changes)
    if config.position == "sincos" and "position_grid" not in changes:
        changes["position_grid"] = config.position_grid or config.grid
    frames = changes.get("num_frames", config.num_frames)
    if isinstance(config, MaskedAutoencoderConfig) and config.predicted_frames == config.num_frames:
        changes.setdefault("predicted_frames", frames)  # all of them, also of another length
    return config.replace(**changes)


def _patch(config: EncoderConfig) -> tuple[int, int, int]:
    assert isinstance(config.patch_size, tuple)  # as __post_init__ leaves it
    return (config.tubelet_size, *config.patch_size)


def _finish(new: Model, old: VideoModel) -> Model:
    new.backend = old.backend
    new.load_report = old.load_report
    return new.to(next(old.parameters()).device).train(old.training)


def _new_head(config: VideoClassifierConfig | ActionDetectorConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Head weights as ``VideoClassifier`` and ``ActionDetector`` start them, in the dtype of the others."""
    if not config.num_classes:
        return {}
    dtype = state["encoder.patch_embed.weight"].dtype
    return {
        "head.weight": torch.empty(config.num_classes, config.width, dtype=torch.float32).normal_(std=0.02).to(dtype),
        "head.bias": torch.zeros(config.num_classes, dtype=dtype),
    }


def _resized(state: dict[str, torch.Tensor], old: EncoderConfig, new: EncoderConfig) -> dict[str, torch.Tensor]:
    """Every position embedding in ``state`` carried from the old grid to the new one, the patch kernel and the prediction from
    the old patch to the new one; the rest as it is."""
    state = {name: value.detach().cpu() for name, value in state.items()}
    patch = _patch(new)
    if patch != _patch(old):
        state["encoder.patch_embed.weight"] = resample_patch_kernel(state["encoder.patch_embed.weight"], patch)
        if isinstance(old, MaskedAutoencoderConfig) and isinstance(new, MaskedAutoencoderConfig):
            _resize_prediction(state, old, new)
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


def _resize_prediction(state: dict[str, torch.Tensor], old: MaskedAutoencoderConfig, new: MaskedAutoencoderConfig) -> None:
    """The decoder's head for another patch, in place: what it predicts is resampled as a picture is."""
    if old.target_patch_size == new.target_patch_size or "hog" in (old.target, new.target):
        return
    for name in ("decoder.head.weight", "decoder.head.bias"):
        value = state[name].double().unflatten(0, (*old.target_patch_size, old.in_channels))
        for axis, (size, wanted) in enumerate(zip(old.target_patch_size, new.target_patch_size)):
            if size != wanted:
                value = _along(value, axis, _linear_resampling(size, wanted))
        state[name] = value.flatten(0, 3).to(state[name].dtype)
