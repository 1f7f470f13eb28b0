"""``stmae features``: what a frozen encoder makes of each video, as one file for other tools."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from stmae import checkpoint

from ..config import EncodingConfig
from ..config.checks import require_text
from ..config.wording import counted
from ..data.video_list import find_videos
from ..engine.outputs import is_features, is_list_of, require_own, write_list
from ..evaluation.features import encode


@dataclass(kw_only=True)
class FeaturesConfig(EncodingConfig):
    """The features: of what, by which model, where to."""

    checkpoint: str
    """weights: a run's folder, or a model.safetensors, of an autoencoder or a classifier"""
    data: str
    """videos: a folder, searched recursively, a list file, or Something-Something's json"""
    output: str
    """FILE.safetensors (features, labels, paths) or FILE.npy (features; paths and labels in FILE.txt).
    Nothing that this command did not write is overwritten"""

    def __post_init__(self):
        super().__post_init__()
        require_text(self, "checkpoint", "data")
        if Path(self.output).suffix not in (".safetensors", ".npy"):
            raise ValueError(f"output: expected a name in .safetensors or .npy, got {Path(self.output).name}")


Config = FeaturesConfig


def run(config):
    """Writes features [videos, D] and labels [videos] (-1: none), and the paths; .safetensors or .npy by the output's name."""
    output = Path(config.output)
    require_unwritten(output)
    entries = find_videos(config.data, config.data_root, config.data_labels)
    features, labels, paths, errors = encode(config.checkpoint, entries, config)
    for error in errors:
        print(f"left out: {error}")
    if not paths:
        raise ValueError(f"none of the videos in {config.data} could be used")
    require_unwritten(output)  # nor by whoever wrote there meanwhile
    with checkpoint.atomic_write(output) as temporary:
        if output.suffix == ".npy":
            with open(temporary, "wb") as file:
                np.save(file, features.numpy())
        else:
            metadata = {"paths": json.dumps(paths), "checkpoint": str(config.checkpoint)}
            save_file({"features": features.contiguous(), "labels": labels}, temporary, metadata)
    if output.suffix == ".npy":  # an array holds no names
        lines = (f"{path} {label}" for path, label in zip(paths, labels.tolist()))
        write_list(output.with_suffix(".txt"), lines, "features")
    print(f"{output}: {counted(len(paths), 'video')} x {counted(features.shape[1], 'feature')}, {len(errors)} left out")


def require_unwritten(output):
    """Raises ValueError where ``output``, or the list beside an array, is a file that this command did not write."""
    if output.suffix == ".npy":
        listing = output.with_suffix(".txt")
        require_own(listing, is_list_of("features"))
        require_own(output, lambda path: listing.exists())  # an array says not whose it is: its list does
    else:
        require_own(output, is_features)
