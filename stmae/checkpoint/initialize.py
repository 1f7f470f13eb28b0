"""Weights as the start of a new training: put into a model that the caller has configured."""

import dataclasses
import os
from typing import Any, cast

from stmae.checkpoint.errors import CheckpointError
from stmae.checkpoint.files import load
from stmae.checkpoint.report import LoadReport
from stmae.checkpoint.resize import classifier_from_autoencoder, resize
from stmae.models.config import EncoderConfig, MaskedAutoencoderConfig
from stmae.models.encoder import VideoModel
from stmae.models.masked_autoencoder import MaskedAutoencoder

_SIZES = ("num_frames", "image_size", "tubelet_size", "patch_size")  # weights are resized to the model's


def initialize(model: MaskedAutoencoder, path: str | os.PathLike, *, decoder: bool = True, ema: bool = False) -> LoadReport:
    """Puts the weights of ``path``, of any code base that ``load`` reads, into ``model``, in place.

    Another clip length, frame size or patch is carried over as by ``resize``. Every choice that decides what the weights compute
    must be the model's own: one that differs is refused, also where no shape shows it (the number of heads). What decides only
    how training goes on (targets of the same size, masks, the normalisation of frames) may differ, and the report says so.

    Args:
        model: on any device; its dtype is kept.
        path: a file or folder.
        decoder: whether the file's decoder is taken; false: the model's stays as it is. So it does in any case where the file has
            none (a classifier, an encoder).
        ema: the running average of the weights, where the file has one beside them.

    Returns:
        ``load``'s report; under ``new`` the parameters that the file did not fill, under ``unused`` what it has beside, and
        among the ``notes`` the choices that differ.

    Raises:
        CheckpointError: as ``load``; or a choice that differs, each by its name. The model is then untouched.
    """
    source = load(path, ema=ema)
    report = cast(LoadReport, source.load_report)
    takes_decoder = decoder and isinstance(source, MaskedAutoencoder)
    _require_same(path, source.config, model.config, _choices(takes_decoder))
    sizes = {name: getattr(model.config, name) for name in _SIZES if getattr(model.config, name) != getattr(source.config, name)}
    try:
        weights = _resized(source, sizes, takes_decoder)
    except ValueError as error:
        raise CheckpointError(f"cannot start from {path}: {error}") from error
    _require_same(path, weights.config, model.config, _choices_after_resizing(takes_decoder))

    state = {name: value for name, value in weights.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(state, strict=False)
    for name in source.state_dict():
        if name not in state:
            report.unused[name] = "of the head" if name.startswith("head.") else "the decoder is not taken"
    for name in model.state_dict():
        if name not in state:
            report.new[name] = "not in the file" if not isinstance(source, MaskedAutoencoder) else "the decoder is not taken"
    report.inferred.update({name: f"{value!r}, to which the weights were resized" for name, value in sizes.items()})
    report.notes += _changes(source.config, model.config, takes_decoder)
    return report


def _resized(source: VideoModel, sizes: dict[str, Any], takes_decoder: bool) -> VideoModel:
    if isinstance(source, MaskedAutoencoder) and not takes_decoder:
        return classifier_from_autoencoder(source, num_classes=0, **sizes)
    return resize(source, **sizes) if sizes else source


def _choices(decoder: bool) -> dict[str, Any]:
    """Configuration field -> what of it decides how the weights are computed with."""

    def plain(name: str) -> Any:
        return lambda config: getattr(config, name)

    names = ["in_channels", "width", "depth", "num_heads", "qkv_bias", "class_token", "separable_position", "position"]
    choices: dict[str, Any] = {name: plain(name) for name in [*names, "encoder_norm"]}
    choices["mlp_ratio"] = lambda config: int(config.width * config.mlp_ratio)
    choices["key_bias"] = lambda config: config.qkv_bias and config.key_bias
    choices["layer_scale"] = lambda config: config.layer_scale is not None
    if decoder:
        names = ["decoder_width", "decoder_depth", "decoder_num_heads", "decoder_embed_bias"]
        choices |= {name: plain(name) for name in names}
        choices["decoder_mlp_ratio"] = lambda config: int(config.decoder_width * (config.decoder_mlp_ratio or config.mlp_ratio))
        choices["decoder_class_token"] = lambda config: config.class_token and config.decoder_class_token
        choices["decoder_separable_position"] = lambda config: (
            config.separable_position if config.decoder_separable_position is None else config.decoder_separable_position
        )
    return choices


def _choices_after_resizing(decoder: bool) -> dict[str, Any]:
    choices: dict[str, Any] = {"position_grid": lambda config: config.position_grid}
    if decoder:
        choices["predicted_frames"] = lambda config: config.target_patch_size[0]
        choices["target"] = lambda config: config.target == "hog"  # the others predict as many values
    return choices


def _require_same(path: str | os.PathLike, theirs: EncoderConfig, ours: EncoderConfig, choices: dict[str, Any]) -> None:
    differs = [name for name, choice in choices.items() if choice(theirs) != choice(ours)]
    if not differs:
        return
    listed = ", ".join(f"{name} {getattr(theirs, name)!r}, not {getattr(ours, name)!r}" for name in differs)
    decoder = all(name.startswith("decoder_") or name in ("predicted_frames", "target") for name in differs)
    hint = "; without its decoder they fit" if decoder else ""
    raise CheckpointError(f"cannot start from {path}: its weights are of a model with {listed}{hint}")


def _changes(theirs: EncoderConfig, ours: MaskedAutoencoderConfig, decoder: bool) -> list[str]:
    """What the checks let pass and yet differs, for the report."""
    checked = {*_choices(True), *_choices_after_resizing(True), *_SIZES} - {"target"}
    names = [field.name for field in dataclasses.fields(type(ours) if decoder else EncoderConfig)]
    return [
        f"{name} was {getattr(theirs, name)!r}, and is {getattr(ours, name)!r} from here on"
        for name in names
        if name not in checked and getattr(theirs, name) != getattr(ours, name)
    ]
