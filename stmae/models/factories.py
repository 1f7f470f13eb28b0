"""The paper's models by name. Every keyword is a field of the configuration and overrides the default."""

from typing import Any

from stmae.models.config import MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.masked_autoencoder import MaskedAutoencoder
from stmae.models.video_classifier import VideoClassifier

_SMALL = {"patch_size": 16, "width": 384, "depth": 12, "num_heads": 6}
_BASE = {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12}
_LARGE = {"patch_size": 16, "width": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"patch_size": 14, "width": 1280, "depth": 32, "num_heads": 16}


def mae_vit_small_patch16(**overrides: Any) -> MaskedAutoencoder:
    """ViT-S: width 384, 12 blocks, 6 heads (not in the paper)."""
    return MaskedAutoencoder(MaskedAutoencoderConfig.from_dict({**_SMALL, **overrides}))


def mae_vit_base_patch16(**overrides: Any) -> MaskedAutoencoder:
    """ViT-B: width 768, 12 blocks, 12 heads."""
    return MaskedAutoencoder(MaskedAutoencoderConfig.from_dict({**_BASE, **overrides}))


def mae_vit_large_patch16(**overrides: Any) -> MaskedAutoencoder:
    """ViT-L: width 1024, 24 blocks, 16 heads."""
    return MaskedAutoencoder(MaskedAutoencoderConfig.from_dict({**_LARGE, **overrides}))


def mae_vit_huge_patch14(**overrides: Any) -> MaskedAutoencoder:
    """ViT-H: width 1280, 32 blocks, 16 heads (head dim 80), patch 14. The paper's own ViT-H has patch 16:
    pass ``patch_size=16``."""
    return MaskedAutoencoder(MaskedAutoencoderConfig.from_dict({**_HUGE, **overrides}))


def vit_small_patch16(**overrides: Any) -> VideoClassifier:
    """Classifier on ViT-S."""
    return VideoClassifier(VideoClassifierConfig.from_dict({**_SMALL, **overrides}))


def vit_base_patch16(**overrides: Any) -> VideoClassifier:
    """Classifier on ViT-B."""
    return VideoClassifier(VideoClassifierConfig.from_dict({**_BASE, **overrides}))


def vit_large_patch16(**overrides: Any) -> VideoClassifier:
    """Classifier on ViT-L."""
    return VideoClassifier(VideoClassifierConfig.from_dict({**_LARGE, **overrides}))


def vit_huge_patch14(**overrides: Any) -> VideoClassifier:
    """Classifier on ViT-H with patch 14, as its name says and as ``mae_vit_huge_patch14``; mae_st's function
    of this name has patch 16."""
    return VideoClassifier(VideoClassifierConfig.from_dict({**_HUGE, **overrides}))
