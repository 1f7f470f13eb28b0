"""How much a model computes, by formula, and how much the machine could: their ratio over time is the model FLOPs utilisation.

A multiplication with its addition counts two. Only what the model needs is counted (Chowdhery et al. 2022, arXiv 2204.02311,
appendix B): products of weights and of attention over the tokens that are really computed, forward, and twice that backward.
What activation checkpointing or the attention kernels compute a second time is not, nor are norms, softmax and other
element-wise work.
"""

import time

import torch

from stmae import ops

REPEATS = 5


def autoencoder_flops(config, kept=None, predicted=None):
    """(forward, forward and backward) of one clip through a MaskedAutoencoder; config: its MaskedAutoencoderConfig. kept,
    predicted: how many of its tokens are visible and how many are reconstructed; None: as of its configuration."""
    if kept is None or predicted is None:
        _, kept, _, predicted = config.token_counts()
    class_tokens = int(config.class_token)
    patches, encoder = _encoder(config, kept)
    width, tokens = config.decoder_width, kept + predicted + class_tokens
    decoder = 2 * (kept + class_tokens) * config.width * width
    decoder += (config.decoder_depth - 1) * _block(tokens, width, config.mlp_ratio)
    decoder += _block(tokens, width, config.mlp_ratio, rows=predicted)  # nothing else leaves the last block
    decoder += 2 * predicted * width * config.patch_values
    return _training(patches, encoder + decoder)


def classifier_flops(config, kept=None):
    """(forward, forward and backward) of one clip through a VideoClassifier that sees ``kept`` of its tokens; None: all."""
    patches, encoder = _encoder(config, config.num_tokens if kept is None else kept)
    return _training(patches, encoder + 2 * config.width * config.num_classes)


def _encoder(config, kept):
    patches = 2 * kept * config.width * config.in_channels * config.tubelet_size * config.patch_size[0] * config.patch_size[1]
    return patches, config.depth * _block(kept + int(config.class_token), config.width, config.mlp_ratio)


def _block(tokens, width, mlp_ratio, rows=None):
    """Of a transformer block over ``tokens``; with ``rows``, only that many go on after the attention."""
    rows = tokens if rows is None else rows
    hidden = int(width * mlp_ratio)
    return 2 * tokens * width * 3 * width + 4 * tokens * tokens * width + 2 * rows * width * width + 4 * rows * width * hidden


def _training(patches, rest):
    """Backward is a product for the weights and one for the input, which the pixels have no use for."""
    return patches + rest, 2 * patches + 3 * rest


@torch.no_grad()
def measured_peak_flops(device, dtype):
    """FLOP/s of a large square product on ``device``, the best of a few: what the model's products could reach. Takes a tenth of
    a second.

    dtype: bfloat16, or None for float32. On a CPU two libraries are tried, for which one is faster depends on the processor.
    """
    size = 4096 if device.type == "cuda" else 1024
    x = torch.full((size, size), 0.5, dtype=dtype or torch.float32, device=device)
    products = [torch.mm] if device.type == "cuda" else [torch.mm, ops.linear]
    best = float("inf")
    for product in products:
        for _ in range(REPEATS + 1):  # the first one is warm-up
            _finish(device)
            start = time.perf_counter()
            product(x, x)
            _finish(device)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
