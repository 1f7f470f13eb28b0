"""Reading and writing weights, and bridges to other code bases."""

from stmae.checkpoint.files import CheckpointError, atomic_write, load, load_classifier, save
from stmae.checkpoint.mae_st import from_mae_st, to_mae_st
from stmae.checkpoint.resize import classifier_from_autoencoder, resize
from stmae.checkpoint.slowfast import from_slowfast
from stmae.checkpoint.state import CheckpointMismatch

__all__ = [
    "CheckpointError",
    "CheckpointMismatch",
    "atomic_write",
    "classifier_from_autoencoder",
    "from_mae_st",
    "from_slowfast",
    "load",
    "load_classifier",
    "resize",
    "save",
    "to_mae_st",
]
