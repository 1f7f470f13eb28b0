"""``stmae pretrain``: masked-autoencoder pre-training, from a folder of videos to weights."""

from ..config import PretrainConfig
from ..data.loader import LoaderError
from ..engine.device import choose_device, keep_freed_memory
from ..engine.loop import TrainingError
from ..tasks.pretraining import pretrain

Config = PretrainConfig
ERRORS = (TrainingError, LoaderError)  # the second: too little memory to begin with


def run(config):
    """Pre-trains, or continues the run in the output folder. Returns its TrainState."""
    if choose_device(config.run.device).type == "cpu":
        keep_freed_memory()
    return pretrain(config)
