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


def adamw(groups, settings):
    """AdamW as the optimiser settings say; its learning rate is set at every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(settings.betas), fused=True)


def peak_learning_rate(settings):
    """base_lr * batch / base_batch. In pre-training a batch counts videos: the repeats of one video are not counted."""
    return settings.base_lr * settings.batch / settings.base_batch


def total_steps(settings, num_videos, repeats):
    """Steps in ``settings.epochs`` effective epochs: a pass over the videos with R clips of each is R effective epochs."""
    return max(1, math.ceil(settings.epochs / repeats * num_videos / settings.batch - 1e-9))


def learning_rate(step, steps, settings):
    """At ``step`` of ``steps`` (0-based): linear from 0 over the warm-up, then half a cosine down to min_lr."""
    peak = peak_learning_rate(settings)
    warmup = steps * settings.warmup_epochs / settings.epochs
    if step < warmup:
        return peak * step / warmup
    return settings.min_lr + (peak - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
