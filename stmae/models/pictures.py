"""From predictions back to pictures, as in the figures of the paper: original, masked, reconstruction."""

from typing import NamedTuple

import torch

from stmae.models.config import MaskedAutoencoderConfig


class Reconstruction(NamedTuple):
    """Pictures [B, C, F, H, W], float32 in [0, 1], of the F frames that the model predicts.

    original: the clip's frames ``frames``.
    masked: the same with every masked patch filled with grey.
    reconstruction: visible patches as they are, masked ones as predicted.
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
    fill: float = 0.5,
) -> Reconstruction:
    """Turns predictions pred [B, M, P] for the tokens masked [B, M] of video [B, C, T, H, W] into pictures.

    uint8 videos are pictures as they are; floating ones are brought back with the configuration's mean and
    std.
    """
    if pred.shape != (video.shape[0], masked.shape[1], config.patch_values):
        raise ValueError(
            f"reconstruct: expected pred [{video.shape[0]}, {masked.shape[1]}, {config.patch_values}] "
            f"(B, M, P), got {list(pred.shape)}"
        )
    frames = config.frames
    clip = video[:, :, torch.tensor(frames, device=video.device)].float()
    mean = torch.as_tensor(config.mean, device=video.device).view(-1, 1, 1, 1)
    std = torch.as_tensor(config.std, device=video.device).view(-1, 1, 1, 1)
    if video.dtype == torch.uint8:
        clip = (clip / 255 - mean) / std

    original = _patchify(clip, config)
    ids = masked[:, :, None].expand(-1, -1, original.shape[2])
    values = pred.float()
    if config.normalize_target:
        patches = original.gather(1, ids)
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        values = values * deviation + patches.mean(dim=-1, keepdim=True)
    predicted = _unpatchify(original.scatter(1, ids, values), config)
    grey = torch.zeros_like(original).scatter(1, ids, 1.0)
    hidden = _unpatchify(grey, config) > 0

    picture = (clip * std + mean).clamp(0, 1)
    return Reconstruction(
        original=picture,
        masked=picture.masked_fill(hidden, fill),
        reconstruction=torch.where(hidden, (predicted * std + mean).clamp(0, 1), picture),
        frames=frames,
        patch_statistics="original" if config.normalize_target else "predicted",
    )


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
