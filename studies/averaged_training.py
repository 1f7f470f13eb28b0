"""The training that the studies of the mask ratio, of ablations and of mixed clips share."""

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stmae.training.config import OptimizerConfig
from stmae.training.engine.optimizer import adamw, weight_decay_groups

from .motion.experiments import autocast

SHOWN = 50  # steps that ``mean_loss`` looks back on


class AveragedTraining:
    """AdamW at a constant rate after a warm-up, and a running average of the weights, so that every step is the end of a shorter
    run: ``averaged``, a model, and ``mean_loss`` of the last steps.

    plan: with ``lr``, ``warmup`` in steps and ``average``, the decay of the running average.
    """

    def __init__(self, model, plan):
        self.model, self.plan, self.losses = model, plan, []
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(plan.average))
        self._optimizer = adamw(weight_decay_groups(model, 0.05), OptimizerConfig(betas=(0.9, 0.95)))

    def step(self, video, generator):
        """video: as the model takes it; generator: of the masks."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.plan.lr * min(1.0, (len(self.losses) + 1) / self.plan.warmup)
        with autocast():
            loss = self.model(video, generator=generator).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._average.update_parameters(self.model)
        self.losses.append(loss.item())

    @property
    def averaged(self):
        return self._average.module

    @property
    def mean_loss(self):
        shown = self.losses[-SHOWN:]
        return sum(shown) / len(shown)
