"""Tuned PyTorch: what can be had without kernels of one's own. Same names and signatures as `stmae.ops`.

SDPA for attention, Conv3d and then a gather, `argsort` for masking, a materialised target for the loss;
autocast and fused AdamW are the caller's.
"""

import torch.nn.functional as F

from stmae.reference import (  # noqa: F401  nothing to tune
    add_layer_norm,
    gather_tokens,
    linear,
    masked_patchify,
    mlp,
    patch_loss,
    random_masking,
    restore_tokens,
)


def attention(q, k, v, *, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def attention_qkvpacked(qkv, *, scale=None):
    return attention(*qkv.unbind(2), scale=scale)
