"""From predictions back to pictures, as in the figures of the paper: original, masked, reconstruction."""

from typing import NamedTuple

import torch

from stmae.models.config import MaskedAutoencoderConfig
from stmae.models.hog import BINS, CELL, draw, hog_patches


class Reconstruction(NamedTuple):
    """Pictures [B, C, F, H, W], float32 in [0, 1], of the F frames that the model predicts.

    original: the clip's frames ``frames``.
    masked: the same with every masked patch filled with grey.
    reconstruction: visible patches as they are, masked ones as predicted; grey where nothing was predicted.
        If the model predicts histograms of oriented gradients, all three show these: strokes along the edges.
    frames: indices of these frames in the clip.
    patch_statistics: ``"original"``: the model predicts normalised patches, and each patch's mean and
        deviation, which it does not predict, were taken from the original frame, so brightness and contrast
        of a patch are not the model's merit; ``"predicted"``: everything shown in a masked patch was
        predicted.
    """

    original: torch.Tensor
    masked: torch.Tensor
    reconstruction: torch.Tensor
    frames: list[int]
    patch_statistics: str


def reconstruct(
    config: MaskedAutoencoderConfig,
    video: torch.Tensor,
    pred: torch.Tensor,
    masked: torch.Tensor,
    *,
    keep: torch.Tensor | None = None,
    fill: float = 0.5,
) -> Reconstruction:
    """Turns predictions pred [B, M, P] for the tokens masked [B, M] of video [B, C, T, H, W] into pictures.

    uint8 videos are pictures as they are; floating ones are brought back with the configuration's mean and
    std. keep: [B, K] tokens that the encoder saw; default: all that are not in ``masked``.
    """
    if pred.shape != (video.shape[0], masked.shape[1], config.patch_values):
        raise ValueError(
            f"reconstruct: expected pred [{video.shape[0]}, {masked.shape[1]}, {config.patch_values}] "
            f"(B, M, P), got {list(pred.shape)}"
        )
    frames = config.frames
    if config.target == "hog":
        patches = hog_patches(video, frames, config.target_patch_size)
        ids = masked[:, :, None].expand(-1, -1, patches.shape[2])
        picture, predicted = (_strokes(x, config) for x in (patches, patches.scatter(1, ids, pred.float())))
        return _reconstruction(config, picture, predicted, masked, keep, fill, frames, "predicted")
    clip = video[:, :, torch.tensor(frames, device=video.device)].float()
    mean = torch.as_tensor(config.mean, device=video.device).view(-1, 1, 1, 1)
    std = torch.as_tensor(config.std, device=video.device).view(-1, 1, 1, 1)
    if video.dtype == torch.uint8:
        clip = (clip / 255 - mean) / std

    original = _patchify(clip, config)
    ids = masked[:, :, None].expand(-1, -1, original.shape[2])
    values = pred.float()
    if config.target == "normalized_pixels":
        patches = original.gather(1, ids)
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        values = values * deviation + patches.mean(dim=-1, keepdim=True)
    predicted = _unpatchify(original.scatter(1, ids, values), config)
    statistics = "original" if config.target == "normalized_pixels" else "predicted"
    picture, predicted = ((x * std + mean).clamp(0, 1) for x in (clip, predicted))
    return _reconstruction(config, picture, predicted, masked, keep, fill, frames, statistics)


def _reconstruction(
    config: MaskedAutoencoderConfig,
    picture: torch.Tensor,
    predicted: torch.Tensor,
    masked: torch.Tensor,
    keep: torch.Tensor | None,
    fill: float,
    frames: list[int],
    statistics: str,
) -> Reconstruction:
    """picture, predicted: [B, C, F, H, W] in [0, 1]."""
    tokens = torch.zeros(picture.shape[0], config.num_tokens, dtype=torch.bool, device=picture.device)
    known = _spread(tokens.scatter(1, masked, True), config)
    hidden = known if keep is None else _spread(~tokens.scatter(1, keep, True), config)
    grey = picture.masked_fill(hidden, fill)
    return Reconstruction(picture, grey, torch.where(known & hidden, predicted, grey), frames, statistics)


def _spread(tokens: torch.Tensor, config: MaskedAutoencoderConfig) -> torch.Tensor:
    """tokens [B, N] -> [B, 1, F, H, W], each value all over its patch."""
    x = tokens.unflatten(1, config.grid)
    for axis, size in enumerate(config.target_patch_size):
        x = x.repeat_interleave(size, dim=axis + 1)
    return x[:, None]


def _strokes(patches: torch.Tensor, config: MaskedAutoencoderConfig) -> torch.Tensor:
    """Histograms [B, N, P] -> pictures [B, C, F, H, W] in [0, 1]."""
    (t, h, w), (u, p, q) = config.grid, config.target_patch_size
    x = patches.reshape(-1, t, h, w, u, p // CELL, q // CELL, config.in_channels, BINS)
    return draw(x.permute(0, 7, 1, 4, 2, 5, 3, 6, 8).flatten(6, 7).flatten(4, 5).flatten(2, 3))


def _patchify(clip: torch.Tensor, config: MaskedAutoencoderConfig) -> torch.Tensor:
    """clip [B, C, F, H, W] -> [B, N, P], element order (u, p, q, c) inside a patch."""
    (t, h, w), (u, p, q) = config.grid, config.target_patch_size
    x = clip.reshape(clip.shape[0], config.in_channels, t, u, h, p, w, q)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(clip.shape[0], t * h * w, u * p * q * config.in_channels)


def _unpatchify(patches: torch.Tensor, config: MaskedAutoencoderConfig) -> torch.Tensor:
    """The inverse of ``_patchify``."""
    (t, h, w), (u, p, q) = config.grid, config.target_patch_size
    x = patches.reshape(patches.shape[0], t, h, w, u, p, q, config.in_channels)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, config.in_channels, t * u, h * p, w * q)
