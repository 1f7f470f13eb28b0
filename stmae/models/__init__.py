"""The masked autoencoder and the video classifier, written against ``stmae.ops``."""

from stmae.models.config import EncoderConfig, MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.factories import (
    mae_vit_base_patch16,
    mae_vit_huge_patch14,
    mae_vit_large_patch16,
    mae_vit_small_patch16,
    vit_base_patch16,
    vit_huge_patch14,
    vit_large_patch16,
    vit_small_patch16,
)
from stmae.models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderOutput
from stmae.models.video_classifier import VideoClassifier
from stmae.models.visualization import Reconstruction, reconstruct

__all__ = [
    "EncoderConfig",
    "MaskedAutoencoder",
    "MaskedAutoencoderConfig",
    "MaskedAutoencoderOutput",
    "Reconstruction",
    "VideoClassifier",
    "VideoClassifierConfig",
    "mae_vit_base_patch16",
    "mae_vit_huge_patch14",
    "mae_vit_large_patch16",
    "mae_vit_small_patch16",
    "reconstruct",
    "vit_base_patch16",
    "vit_huge_patch14",
    "vit_large_patch16",
    "vit_small_patch16",
]
