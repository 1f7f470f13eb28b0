"""``stmae reconstruct``: what a pre-trained model makes of a video, as pictures: original | masked | reconstruction."""

import dataclasses
from dataclasses import dataclass

from ..evaluation.pictures import write_reconstructions


@dataclass(kw_only=True)
class Config:
    """The pictures: of what, by which model, where to."""

    checkpoint: str
    """weights of a masked autoencoder: a run's folder, or a model.safetensors"""
    video: str
    """a video; or a folder or list, for pictures of each"""
    output: str
    """folder for NAME.png (all frames) and NAME.gif (moving)"""
    clip: float = 0.5
    """where in the video the clip lies: 0 its start, 1 its end"""
    stride: int | None = None
    """every stride-th frame; null: as the run was trained, else 4"""
    mask_ratio: float | None = None
    """masked fraction; null: the model's own"""
    seed: int = 0
    """of the mask"""
    device: str = "auto"
    """'auto': cuda where there is one, else cpu"""


def run(config):
    """Writes the pictures; returns their paths."""
    return write_reconstructions(**dataclasses.asdict(config))
