"""Reading and writing weights, and bridges to other code bases."""

from stmae.checkpoint.errors import CheckpointError
from stmae.checkpoint.files import atomic_write, load, load_classifier, load_detector, save
from stmae.checkpoint.formats import UnknownFormat
from stmae.checkpoint.huggingface import from_huggingface, to_huggingface
from stmae.checkpoint.image_mae import from_image_mae
from stmae.checkpoint.initialize import initialize
from stmae.checkpoint.mae_st import from_mae_st, to_mae_st
from stmae.checkpoint.report import LoadReport
from stmae.checkpoint.resize import classifier_from_autoencoder, detector_from_classifier, resize
from stmae.checkpoint.slowfast import from_slowfast
from stmae.checkpoint.state import CheckpointMismatch
from stmae.checkpoint.videomae import from_videomae, to_videomae

__all__ = [
    "CheckpointError",
    "CheckpointMismatch",
    "LoadReport",
    "UnknownFormat",
    "atomic_write",
    "classifier_from_autoencoder",
    "detector_from_classifier",
    "from_huggingface",
    "from_image_mae",
    "from_mae_st",
    "from_slowfast",
    "from_videomae",
    "initialize",
    "load",
    "load_classifier",
    "load_detector",
    "resize",
    "save",
    "to_huggingface",
    "to_mae_st",
    "to_videomae",
]
