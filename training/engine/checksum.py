"""Checksums, so that a flipped bit in what a run wrote is noticed: SHA-256, of a file or of named tensors."""

import hashlib
import json
import os

import torch
from safetensors import SafetensorError, safe_open

from .run_lock import open_regular

KEY = "stmae_checksum"  # in the metadata of a safetensors file


class ChecksumError(RuntimeError):
    """The content is not what was written."""


def of_tensors(tensors, text=""):
    """The checksum of ``tensors`` by name (on any device, in any order) and of ``text``, as hex digits."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def of_file(path):
    """The checksum of the bytes of the regular file ``path``, as hex digits."""
    digest = hashlib.sha256()
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(tensors, metadata, text=""):
    """Raises ChecksumError unless ``tensors`` have the checksum that ``metadata`` names. An older version wrote none: then they
    pass."""
    expected = metadata.get(KEY)
    if expected is not None and of_tensors(tensors, text) != expected:
        raise ChecksumError("its content does not have the checksum that was written with it")


def verify_weights(path):
    """Raises ChecksumError where the safetensors file ``path`` is not what a run wrote. A file without a checksum, and what is no
    safetensors file, passes: whoever loads it reports what is wrong."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                return
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return
    verify(tensors, metadata)
