"""Small models, clips and noise for them, and how far two results may lie apart."""

import torch

from stmae.masking import sample_noise
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier, VideoClassifierConfig

BACKENDS = ("reference", "ops")
RELATIVE = 1e-4

SMALL = {
    "image_size": (24, 32),
    "patch_size": (4, 8),
    "in_channels": 2,
    "num_frames": 6,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "mean": (0.4, 0.5),
    "std": (0.2, 0.3),
}
SMALL_MAE = {**SMALL, "decoder_width": 16, "decoder_depth": 2, "decoder_num_heads": 2, "mask_ratio": 0.75}


def autoencoder(seed=0, **changes):
    torch.manual_seed(seed)
    return MaskedAutoencoder(MaskedAutoencoderConfig(**{**SMALL_MAE, **changes}))


def classifier(seed=0, **changes):
    torch.manual_seed(seed)
    return VideoClassifier(VideoClassifierConfig(**{**SMALL, "num_classes": 5, **changes}))


def clip(config, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *config.video_shape), dtype=torch.uint8, generator=generator)


def random_noise(config, batch=2, seed=0):
    """Noise of the configuration's strategy, float32 [batch, N]."""
    generator = torch.Generator().manual_seed(seed)
    return sample_noise(config.mask_strategy, batch, config.grid, config.mask_ratio, generator=generator)


def error(got, expected):
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


# Of transformers' VideoMAEConfig; the hidden layers are no multiple of the width.
SMALL_VIDEOMAE = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "decoder_hidden_size": 32,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 2,
    "decoder_intermediate_size": 72,
}
