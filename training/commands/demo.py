"""``stmae demo``: pre-trains the small model of the preset ``demo`` on the clips that ship with the package, and shows what
it learnt."""

from dataclasses import dataclass
from pathlib import Path

from ..config import PretrainConfig, from_preset
from . import pretrain, reconstruct


@dataclass(kw_only=True)
class Config:
    """The demonstration."""

    output: str
    """folder for the run and its pictures"""
    seed: int = 0
    """of weights, order, crops and masks"""


def run(config):
    settings = from_preset(PretrainConfig, "demo", output=config.output, seed=config.seed)
    counters = pretrain.run(settings)
    if not counters["done"]:
        return  # stopped by a signal, and saved
    pictures = Path(config.output) / "pictures"
    reconstruct.run(reconstruct.Config(checkpoint=config.output, video=settings.held_out, output=str(pictures)))
    before, after = counters["before"]["held_out_loss"], counters["after"]["held_out_loss"]
    print(
        f"On clips never trained on, the loss went from {before:.3f} to {after:.3f}; "
        f"predicting each patch's mean would give 1.0. Pictures: {pictures}"
    )
