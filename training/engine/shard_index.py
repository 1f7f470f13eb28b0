"""The index of a sharded state, read so that a hostile one runs nothing.

``torch.distributed.checkpoint`` writes its index, ``.metadata``, as a pickle, and reads it with Python's unpickler, which calls
whatever the file names. Here only the classes of such an index can be named.
"""

import collections
import json
import math
import os
import pathlib
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from . import checksum
from .run_lock import open_regular

CHECKSUMS = "checksums"  # {file: checksum} of the other files, as json

_CLASSES = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # finds a layout by its name
    ("collections", "OrderedDict"): collections.OrderedDict,
    # The folder's name; Python 3.13 keeps these classes elsewhere.
    **{(module, name): pathlib.PurePath for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        found = _CLASSES.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"its index names {module}.{name}, which has no place in one: nothing of it was run")
        return found


class ShardReader(dcp.FileSystemReader):
    """A FileSystemReader whose index is unpickled by classes of an index alone, and which reads files of its folder alone."""

    def read_metadata(self):
        """The Metadata. Raises ValueError or pickle.UnpicklingError, or what a damaged pickle raises: anything."""
        folder = Path(self.path)
        stored = 0
        for entry in os.scandir(folder):
            if not entry.is_file(follow_symlinks=False):
                raise ValueError(f"{entry.name} is not a regular file")
            stored += entry.stat(follow_symlinks=False).st_size
        with open(folder / ".metadata", "rb") as file:
            index = _Unpickler(file).load()
        _check(index, stored)
        if index.storage_meta is None:
            index.storage_meta = metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


def _check(index, stored):
    """Raises ValueError unless ``index`` describes tensors of no more than the ``stored`` bytes, in files of its own folder."""
    if not isinstance(index, metadata.Metadata) or not isinstance(index.state_dict_metadata, dict):
        raise ValueError(f"its index holds {type(index).__name__}, not the description of a state")
    described = 0
    for name, info in index.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(info, metadata.TensorStorageMetadata):
            raise ValueError(f"expected tensors in its index, got {type(info).__name__} for {name!r}")
        size, dtype = info.size, getattr(info.properties, "dtype", None)
        if not isinstance(dtype, torch.dtype) or not isinstance(size, torch.Size):
            raise ValueError(f"its index does not say what {name} is")
        if any(length < 0 for length in size):
            raise ValueError(f"its index gives {name} the shape {list(size)}")
        described += math.prod(size) * dtype.itemsize
    if described > stored:
        raise ValueError(f"its index describes {described} bytes of tensors, and its files have {stored}")
    for info in index.storage_data.values():
        if not isinstance(info, filesystem._StorageInfo) or info.relative_path != os.path.basename(str(info.relative_path)):
            raise ValueError("its index names files outside of its folder")


def write_checksums(folder, digests):
    """Write ``digests``, {file: checksum}, to disk, into the new ``folder``."""
    with open(Path(folder) / CHECKSUMS, "x", encoding="utf-8") as file:
        json.dump(digests, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def damaged_file(folder, rank, world_size):
    """Why the files of a state's folder are not what was written, or None. Of ``world_size`` processes each reads its part.

    A state without checksums, an older version's, passes.
    """
    try:
        with open(open_regular(Path(folder) / CHECKSUMS, os.O_RDONLY), encoding="utf-8") as file:
            expected = json.load(file)
        if not isinstance(expected, dict):
            return "its checksums cannot be read"
        for name in sorted(expected)[rank::world_size]:
            if name != os.path.basename(name) or checksum.of_file(Path(folder) / name) != expected[name]:
                return f"{name} does not have the checksum that was written with it"
    except FileNotFoundError as error:
        return None if Path(error.filename).name == CHECKSUMS else f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None
