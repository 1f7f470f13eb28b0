"""``stmae reconstruct``: what a pre-trained model makes of a video, as pictures: original | masked | reconstruction."""

import dataclasses

from ..evaluation.pictures import ReconstructionConfig, write_reconstructions

Config = ReconstructionConfig


def run(config):
    """Writes the pictures; returns their paths."""
    return write_reconstructions(**dataclasses.asdict(config))
