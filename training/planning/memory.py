"""How much of a GPU's memory a training step needs, by formula: what every step needs, and what each clip, or token, adds."""

import math
from dataclasses import dataclass

import torch

from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier

GB = 1e9
STATE_BYTES = 16  # a parameter's float32 weight, gradient and AdamW's two moments
BUCKET_BYTES = 4  # its place in DistributedDataParallel's buckets
CONTEXT_GB = 1.0  # CUDA's own, and the libraries'
SLACK = 1.1  # what an allocator holds beyond what is asked of it


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: what every step needs, and what each clip adds; of packed batches each token, as they are counted."""

    state: float
    """weights, gradients, AdamW's moments, and copies of them"""
    clip: float
    """what the backward pass needs of a clip, its pixels, and the gradients that are alive at the same time"""

    def total(self, clips):
        return (self.state + self.clip * clips) * SLACK + CONTEXT_GB * GB


def estimate(model, config, shapes=None):
    """The Memory that training a model of this configuration needs on a GPU; with ``shapes``, the ClipShapes of packed batches,
    what a token adds in the clips in which it adds most.

    Parameters: 16 bytes each; with DDP 4 more for its buckets; with FSDP a shard of the 16 and, gathered, those of two blocks.
    Under bf16 autocast a bfloat16 copy of each weight is kept from the forward pass to the backward. Activations: see
    ``activation_bytes``; on top of them, the gradients that flow through one block.
    """
    bf16, together = config.precision == "bf16", config.gpus > 1
    size, blocks = parameters(model)
    largest = max(blocks)
    if together and config.parallel == "fsdp":
        state = STATE_BYTES * size / config.gpus + 2 * 4 * largest
    else:
        state = (STATE_BYTES + BUCKET_BYTES * together) * size
    if bf16:
        state += 2 * (largest if config.checkpoint_activations else size)
    options = {"bf16": bf16, "checkpointed": config.checkpoint_activations}
    if shapes is None:
        return Memory(state, sum(activation_bytes(model, **options)) + math.prod(model.video_shape))  # pixels are uint8
    token = 0.0
    for slices in shapes.slices:
        for area in {*shapes.areas}:
            counts = shapes.counts(slices, area)
            clip = sum(activation_bytes(model, counts=counts, **options)) + counts.tokens * shapes.token_bytes
            token = max(token, clip / shapes.cost(slices, area))
    return Memory(state, token)


def parameters(model):
    """(number of parameters, number in each block)."""
    made = MaskedAutoencoder if isinstance(model, MaskedAutoencoderConfig) else VideoClassifier
    with torch.device("meta"):
        network = made(model)
    return sum(p.numel() for p in network.parameters()), [sum(p.numel() for p in b.parameters()) for b in network.blocks()]


def activation_bytes(model, *, bf16, checkpointed=False, gpu=True, counts=None):
    """(bytes that the forward pass of one clip keeps for the backward, bytes of its largest block). counts: the TokenCounts of a
    clip of a packed batch, which has positions and ids of its own; None: as of the configuration.

    A block over n tokens of width D, of which m go on after the attention, keeps (a: bytes of an activation, 2 in bf16, else 4)

        the residual stream before each norm        4 n D + 4 m D, and each norm's statistics, 8 n + 8 m
        the first norm's output, q, k and v         a (1 + 3) n D
        the attention's output and log-sum-exps     a n D + 4 n H
        the second norm's output                    a m D
        the hidden layer before and after its GELU  a (1 + 1) r m D, r = mlp_ratio; the CPU's kernel keeps only the first

    and with activation checkpointing only its input: the stream and, but for the first block, the branch to add, (4 + a) n D.
    """
    a = 2 if bf16 else 4
    hidden = 2 if gpu else 1

    def block(n, width, heads, m=None):
        m, gathered = (n, 0) if m is None else (m, a * m * width)
        stream = (4 * width + 8) * (n + m)
        return stream + 5 * a * n * width + gathered + 4 * n * heads + a * m * width * (1 + hidden * model.mlp_ratio)

    def entering(n, width, depth):
        return n * width * (4 * depth + a * (depth - 1))

    class_tokens = int(model.class_token)
    is_autoencoder = isinstance(model, MaskedAutoencoderConfig)
    own = 0 if counts is None else (4 * model.width + 2 * 8) * counts.tokens
    if is_autoencoder and counts is None:
        counts = model.token_counts()
    seen = counts.visible if is_autoencoder else model.num_tokens
    encoder = [block(seen + class_tokens, model.width, model.num_heads)] * model.depth
    inputs = entering(seen + class_tokens, model.width, model.depth)
    ends, decoder = 0, []
    if is_autoencoder:
        width, predicted = model.decoder_width, counts.reconstructed
        there = seen + predicted + class_tokens
        decoder = [block(there, width, model.decoder_num_heads)] * (model.decoder_depth - 1)
        decoder.append(block(there, width, model.decoder_num_heads, predicted))
        inputs += entering(there, width, model.decoder_depth)
        ends = (4 + a) * (seen + class_tokens) * model.width + (4 + a) * predicted * width
        ends += (4 if model.target == "hog" else a) * predicted * model.patch_values
    blocks = encoder + decoder
    return (inputs if checkpointed else sum(blocks)) + ends + own, max(blocks)
