"""The ops in plain PyTorch: the definition of what is right. Same names and signatures as `stmae.ops`, written to be read.

Shapes, here and everywhere: B batch; C T H W video; t h w the patch grid; N = t*h*w tokens, token (it*h + ih)*w + iw;
K kept (visible) tokens, M = N - K masked; D width; P values in a patch, in the order (frame, row, column, channel).
"""

from .add_layer_norm import add_layer_norm
from .attention import attention, packed_attention
from .gather_tokens import gather_tokens
from .linear import linear
from .masked_patchify import masked_patchify
from .mlp import mlp
from .patch_loss import patch_loss
from .random_masking import random_masking
from .restore_tokens import restore_tokens

__all__ = [
    "add_layer_norm",
    "attention",
    "gather_tokens",
    "linear",
    "masked_patchify",
    "mlp",
    "packed_attention",
    "patch_loss",
    "random_masking",
    "restore_tokens",
]
