"""``stmae finetune detector``: an action detector from a pre-trained encoder, on AVA's annotated boxes."""

from ..config import DetectionConfig
from ..data.loader import LoaderError
from ..engine.device import choose_device, keep_freed_memory
from ..engine.loop import TrainingError
from ..tasks.detection import finetune_detector

Config = DetectionConfig
ERRORS = (TrainingError, LoaderError)  # the second: too little memory to begin with


def run(config):
    """Fine-tunes, or continues the run in the output folder. Returns its TrainState."""
    if choose_device(config.run.device).type == "cpu":
        keep_freed_memory()
    return finetune_detector(config)
