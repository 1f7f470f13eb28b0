"""The masked autoencoder, the video classifier and the action detector, written against ``stmae.ops``."""

from stmae.models.action_detector import ActionDetector
from stmae.models.config import ActionDetectorConfig, EncoderConfig, MaskedAutoencoderConfig, VideoClassifierConfig
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
    "ActionDetector",
    "ActionDetectorConfig",
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
