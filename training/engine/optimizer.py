"""Parameter groups, the learning-rate rule and the schedule."""

import math

import torch


def weight_decay_groups(model, weight_decay, *, decay_tokens=True):
    """AdamW parameter groups: biases and norms (fewer than two dimensions) are never decayed.

    decay_tokens: whether positions, class and mask tokens are decayed; mae_st decays them in pre-training, not in fine-tuning.
    """
    exempt = set() if decay_tokens else model.no_weight_decay()
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def layer_decay_groups(model, weight_decay, layer_decay):
    """AdamW parameter groups for fine-tuning a VideoClassifier: the nearer to the input, the lower the learning rate.

    Patches, positions and class token are layer 0, block i is layer i + 1, norm and head come last; a group's ``scale`` is
    layer_decay ** (last layer - its layer). Biases, norms, positions and class token are not decayed (mae_st).
    """
    last = model.config.depth + 1
    exempt = model.no_weight_decay()
    groups = {}
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("head.", "encoder.norm.")):
            layer = last
        else:
            layer = 0
        decay = 0.0 if parameter.ndim < 2 or name in exempt else weight_decay
        group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay, "scale": layer_decay ** (last - layer)})
        group["params"].append(parameter)
    return list(groups.values())


def adamw(groups, settings):
    """AdamW as the optimiser settings say; its learning rate is set at every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(settings.betas), fused=True)


def peak_learning_rate(settings, batch):
    """base_lr * batch / base_batch. What a ``batch`` counts differs: videos in pre-training, clips (with repeats) in
    fine-tuning."""
    return settings.base_lr * batch / settings.base_batch


def total_steps(settings, num_videos, repeats):
    """Steps in ``settings.epochs`` effective epochs: a pass over the videos with R clips of each is R effective epochs."""
    return max(1, math.ceil(settings.epochs / repeats * num_videos / settings.batch - 1e-9))


def learning_rate(step, steps, settings, peak):
    """At ``step`` of ``steps`` (0-based): linear from 0 to ``peak`` over the warm-up, then half a cosine down to min_lr."""
    warmup = steps * settings.warmup_epochs / settings.epochs
    if step < warmup:
        return peak * step / warmup
    return settings.min_lr + (peak - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
