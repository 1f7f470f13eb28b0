"""``stmae finetune``: a classifier from a pre-trained encoder, or from random weights for comparison."""

from ..config import FinetuneConfig
from ..data.loader import LoaderError
from ..engine.device import choose_device, keep_freed_memory
from ..engine.loop import TrainingError
from ..tasks.finetuning import finetune

Config = FinetuneConfig
ERRORS = (TrainingError, LoaderError)  # the second: too little memory to begin with


def run(config):
    """Fine-tunes, or continues the run in the output folder. Returns its TrainState."""
    if choose_device(config.run.device).type == "cpu":
        keep_freed_memory()
    return finetune(config)
