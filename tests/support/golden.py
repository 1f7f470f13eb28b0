"""The golden files: the numbers of the official implementations; see tests/golden/README.md."""

import json
from pathlib import Path

from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden"


def read_golden(name):
    """(configuration, tensors, weights, gradients) of a file, the last two by the official names."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    parts = {"weight": {}, "grad": {}}
    for key in list(tensors):
        kind, _, rest = key.partition(".")
        if kind in parts:
            parts[kind][rest] = tensors.pop(key)
    return config, tensors, parts["weight"], parts["grad"]
