"""``stmae demo``: pre-trains the small model of the preset ``demo`` on the clips that ship with the package, and shows what
it learnt."""

from dataclasses import dataclass
from pathlib import Path

from ..config import PretrainConfig, from_preset
from ..config.checks import check_types, require_seed, require_text
from ..data.loader import LoaderError
from ..engine.device import choose_device, keep_freed_memory
from ..engine.loop import TrainingError
from ..evaluation.pictures import write_reconstructions
from ..tasks.pretraining import pretrain

ERRORS = (TrainingError, LoaderError)  # the second: too little memory to begin with


@dataclass(kw_only=True)
class Config:
    """The demonstration."""

    output: str
    """folder for the run and its pictures"""
    seed: int = 0
    """of weights, order, crops and masks"""

    def __post_init__(self):
        check_types(self)
        require_text(self, "output")
        require_seed(self)


def run(config):
    settings = from_preset(PretrainConfig, "demo", output=config.output, seed=config.seed)
    if choose_device(settings.run.device).type == "cpu":
        keep_freed_memory()
    state = pretrain(settings)
    if not state.done:
        return  # stopped by a signal, and saved
    pictures = Path(config.output) / "pictures"
    write_reconstructions(config.output, settings.held_out, pictures)
    before, after = state.before["held_out_loss"], state.after["held_out_loss"]
    print(
        f"On clips never trained on, the loss went from {before:.3f} to {after:.3f}; "
        f"predicting each patch's mean would give 1.0. Pictures: {pictures}"
    )
