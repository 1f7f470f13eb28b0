"""Hugging Face's VideoMAE on this library's kernels: the same weights, outputs and gradients, in one line.

    model = stmae.integrations.transformers.accelerate(VideoMAEForPreTraining.from_pretrained(...))

The patch embedding computes the visible patches only, attention builds no matrix, the MLP and the norms are fused, and the loss
reads its target from the frames. Layers that are not plain (adapters, hooks, quantized weights) are called as before.
"""

import types
from typing import Any

import torch
from torch import nn

from stmae import ops
from stmae.checkpoint.videomae import IMAGENET_MEAN, IMAGENET_STD
from stmae.models.layers import add, add_layer_norm, is_plain, linear, mlp

_GELU = nn.GELU()


def accelerate(model: nn.Module) -> nn.Module:
    """Makes a Hugging Face VideoMAE compute with this library's ops, in place; its weights stay where and what they are.

    Args:
        model: ``VideoMAEModel``, ``VideoMAEForPreTraining`` or ``VideoMAEForVideoClassification``, on a CPU or a GPU, in float32
            or bfloat16, under autocast or not.

    Returns:
        ``model``. ``save_pretrained`` and ``state_dict`` are as before. As with SDPA, no attention weights are returned.

    Raises:
        ValueError: another model, another activation than GELU, or dropout inside the blocks.
        ImportError: transformers is not installed.
    """
    from transformers.models.videomae import modeling_videomae as theirs

    if not isinstance(model, theirs.VideoMAEPreTrainedModel):
        raise ValueError(f"accelerate: expected a VideoMAE model of transformers, got {type(model).__name__}")
    config = model.config
    if config.hidden_act != "gelu":
        raise ValueError(f"accelerate: expected hidden_act 'gelu', got {config.hidden_act!r}")
    if config.hidden_dropout_prob or config.attention_probs_dropout_prob:
        raise ValueError(
            "accelerate: expected hidden_dropout_prob and attention_probs_dropout_prob 0, got "
            f"{config.hidden_dropout_prob} and {config.attention_probs_dropout_prob}"
        )
    forwards: dict[type, Any] = {
        theirs.VideoMAEEmbeddings: _embeddings,
        theirs.VideoMAESelfAttention: _self_attention,
        theirs.VideoMAELayer: _layer,
        theirs.VideoMAEForPreTraining: _for_pretraining,
    }
    for module in model.modules():
        forward = forwards.get(type(module))
        if forward is not None:
            module.forward = types.MethodType(forward, module)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes ``accelerate``, in place; returns ``model``."""
    ours = {_embeddings, _self_attention, _layer, _for_pretraining}
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) in ours:
            del module.forward
    return model


def _embeddings(self: Any, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None) -> torch.Tensor:
    """pixel_values [B, T, C, H, W], bool_masked_pos [B, N] or None -> [B, K, D]."""
    patches = self.patch_embeddings
    expected = [patches.num_channels, *patches.image_size]
    if list(pixel_values.shape[2:]) != expected:
        raise ValueError(
            f"VideoMAE: expected pixel_values [B, T, {', '.join(map(str, expected))}], got {list(pixel_values.shape)}"
        )
    batch = pixel_values.shape[0]
    keep = _ids(~bool_masked_pos) if bool_masked_pos is not None else None
    projection = patches.projection
    position = self.position_embeddings[0].detach().to(device=pixel_values.device, dtype=projection.weight.dtype)
    if not is_plain(patches, type(patches)) or not is_plain(projection, nn.Conv3d) or pixel_values.requires_grad:
        x = patches(pixel_values) + position
        return x if keep is None else ops.gather_tokens(x, keep)
    if keep is None:
        keep = torch.arange(patches.num_patches, device=pixel_values.device).expand(batch, -1)
    video = pixel_values.transpose(1, 2)
    return ops.masked_patchify(video, keep, projection.weight, projection.bias, position)


def _ids(mask: torch.Tensor) -> torch.Tensor:
    """The places of True in each row of mask [B, N], ascending: [B, K] int64. Every row must have as many."""
    counts = mask.sum(1)
    if len(mask) and not bool((counts == counts[0]).all()):
        raise ValueError(
            f"VideoMAE: expected bool_masked_pos with as many masked patches in each clip, got {counts.tolist()} visible"
        )
    return mask.nonzero()[:, 1].view(len(mask), -1)


def _self_attention(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
    heads = (self.num_attention_heads, self.attention_head_size)
    q, k, v = (linear(layer, hidden_states, ops).unflatten(-1, heads) for layer in (self.query, self.key, self.value))
    return ops.attention(q, k, v, scale=self.scaling).flatten(2), None


def _layer(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    x, normal = add_layer_norm(hidden_states, None, self.layernorm_before, ops)
    attention = self.attention
    if is_plain(attention, type(attention)) and is_plain(attention.output, type(attention.output)):
        branch = linear(attention.output.dense, attention.attention(normal)[0], ops)
    else:
        branch = attention(normal, **kwargs)
    x, normal = add_layer_norm(x, branch, self.layernorm_after, ops)
    fc1, fc2 = self.intermediate, self.output
    if is_plain(fc1, type(fc1)) and is_plain(fc2, type(fc2)):
        return add(x, mlp(fc1.dense, _GELU, fc2.dense, normal, ops))
    return fc2(fc1(normal), x)


def _for_pretraining(self: Any, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor, **kwargs: Any) -> Any:
    from transformers.models.videomae.modeling_videomae import VideoMAEForPreTrainingOutput

    return_dict = kwargs.pop("return_dict", None)
    if bool_masked_pos is None:
        raise ValueError("VideoMAE: expected bool_masked_pos [B, N], got None")
    outputs = self.videomae(pixel_values, bool_masked_pos=bool_masked_pos, **kwargs)
    x = linear(self.encoder_to_decoder, outputs.last_hidden_state, ops)
    position = self.position_embeddings[0].detach().to(device=x.device, dtype=torch.promote_types(x.dtype, pixel_values.dtype))
    keep, masked = _ids(~bool_masked_pos), _ids(bool_masked_pos)
    x = torch.cat([x + position[keep], self.mask_token + position[masked]], dim=1)
    logits = self.decoder(x, masked.shape[1]).logits
    config = self.config
    frames = pixel_values.transpose(1, 2).detach()
    if config.num_channels == len(IMAGENET_MEAN):
        mean, std = (
            torch.tensor(value, device=x.device, dtype=frames.dtype).view(-1, 1, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD)
        )
        frames = frames * std + mean
    elif not config.norm_pix_loss:
        raise ValueError(
            f"VideoMAE: expected 3 channels without norm_pix_loss, whose frames it un-normalises, got {config.num_channels}"
        )
    loss = ops.patch_loss(
        logits,
        frames,
        masked,
        patch_size=(config.tubelet_size, config.patch_size, config.patch_size),
        normalize="channel" if config.norm_pix_loss else False,
    )
    result = VideoMAEForPreTrainingOutput(
        loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )
    wanted = config.return_dict if return_dict is None else return_dict
    return result if wanted else result.to_tuple()
