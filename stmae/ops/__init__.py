"""The ops, forward and backward, in C++ on CPUs and Triton on GPUs. `stmae.reference` defines what they compute.

Each is registered with the dispatcher as `torch.ops.stmae.<name>`: it works under autograd, autocast and torch.compile.
Shapes: B batch; C T H W video; t h w the patch grid; N = t*h*w tokens, token (it*h + ih)*w + iw; K kept (visible) tokens,
M = N - K masked; D width; P values in a patch, in the order (frame, row, column, channel).
"""

from . import flops as _flops
from . import library as library  # loads the C++ kernels
from .add_layer_norm import add_layer_norm
from .attention import attention, attention_qkvpacked
from .attention import packed_attention as packed_attention  # deprecated
from .attention_varlen import attention_varlen, attention_varlen_qkvpacked
from .gather_tokens import gather_tokens
from .linear import linear, set_linear_backend
from .masked_patchify import masked_patchify
from .masked_patchify_varlen import masked_patchify_varlen
from .mlp import mlp
from .patch_loss import patch_loss
from .patch_loss_varlen import patch_loss_varlen
from .random_masking import random_masking
from .random_masking_varlen import random_masking_varlen
from .restore_tokens import restore_tokens

_flops.register()

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "attention_varlen_qkvpacked",
    "gather_tokens",
    "linear",
    "masked_patchify",
    "masked_patchify_varlen",
    "mlp",
    "patch_loss",
    "patch_loss_varlen",
    "random_masking",
    "random_masking_varlen",
    "restore_tokens",
    "set_linear_backend",
]
