"""timm's Vision Transformer blocks on this library's ops: the same weights, outputs and gradients, in one line.

    model = stmae.integrations.timm.accelerate(timm.create_model("vit_base_patch16_224"))

Attention builds no matrix, and each norm takes the sum of the residual stream and the branch before it. Layers that are not plain
(adapters, hooks, quantized weights, another class) are called as before.
"""

import types
from typing import Any

import torch
from torch import nn

from stmae import ops
from stmae.models.layers import add, add_layer_norm, is_plain, linear, mlp
from stmae.ops.attention import takes_head_dim


def accelerate(model: nn.Module) -> nn.Module:
    """Makes every ``timm.models.vision_transformer.Block`` in ``model`` compute with this library's ops, in place; the weights
    stay where and what they are.

    Args:
        model: a ``VisionTransformer`` of timm or any module that holds such blocks, on a CPU or a GPU, in float32 or bfloat16,
            under autocast or not. A block of another class (parallel, post-norm) stays as it is; so does attention that drops
            weights, and a block that is called with a mask.

    Returns:
        ``model``; ``state_dict`` is as before.

    Raises:
        ValueError: no such block in the model.
        ImportError: timm is not installed.
    """
    from timm.models.vision_transformer import Block

    blocks = [module for module in model.modules() if type(module) is Block]
    if not blocks:
        raise ValueError(f"accelerate: expected a model with timm.models.vision_transformer.Block, got {type(model).__name__}")
    for block in blocks:
        block.forward = types.MethodType(_block, block)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes ``accelerate``, in place; returns ``model``."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) is _block:
            del module.forward
    return model


def _block(self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
    """x [B, N, D] -> [B, N, D]."""
    if attn_mask is not None or is_causal:
        return type(self).forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
    x, normal = _add_norm(x, None, self.norm1)
    branch = self.drop_path1(self.ls1(_attention(self.attn, normal)))
    x, normal = _add_norm(x, branch, self.norm2)
    return add(x, self.drop_path2(self.ls2(_mlp(self.mlp, normal))))


def _add_norm(x: torch.Tensor, branch: torch.Tensor | None, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + branch, norm(x + branch)). timm's own LayerNorm is torch's, unless its fast norm is on."""
    from timm.layers import LayerNorm

    if is_plain(norm, LayerNorm) and not norm._fast_norm and type(norm.weight) is type(norm.bias) is nn.Parameter:
        return ops.add_layer_norm(x, branch, norm.weight, norm.bias, eps=norm.eps)
    return add_layer_norm(x, branch, norm, ops)


def _attention(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """attn(x), for x [B, N, D]."""
    from timm.layers import Attention

    if not is_plain(attn, Attention) or (attn.training and attn.attn_drop.p > 0) or not takes_head_dim(attn.head_dim):
        return attn(x)
    gate = getattr(attn, "gate", None)
    qkv = linear(attn.qkv, x, ops).unflatten(2, (3, attn.num_heads, attn.head_dim))
    if _is_identity(attn.q_norm) and _is_identity(attn.k_norm):
        out = ops.attention_qkvpacked(qkv, scale=attn.scale)
    else:
        q, k, v = qkv.unbind(2)  # [B, N, H, D / H]
        out = ops.attention(attn.q_norm(q), attn.k_norm(k), v, scale=attn.scale)
    out = attn.norm(out.flatten(2))
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attn.proj_drop(linear(attn.proj, out, ops))


def _mlp(layers: Any, x: torch.Tensor) -> torch.Tensor:
    """layers(x), for x [B, N, D]."""
    from timm.layers import Mlp

    fused = is_plain(layers, Mlp) and _is_identity(layers.norm) and _drops_nothing(layers.drop1) and _drops_nothing(layers.drop2)
    return mlp(layers.fc1, layers.act, layers.fc2, x, ops) if fused else layers(x)


def _is_identity(module: nn.Module) -> bool:
    return is_plain(module, nn.Identity)


def _drops_nothing(module: nn.Module) -> bool:
    return is_plain(module, nn.Dropout) and (module.p == 0 or not module.training)
