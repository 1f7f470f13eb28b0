"""FSDP2: weights, gradients and AdamW's moments in shards, one for each process; and full tensors gathered from them.

Every block is sharded by itself, so that only one block's full weights are in memory at a time; what lies outside the blocks is
one more group. The numbers stay float32, as without sharding: bfloat16 is autocast's, so that the same losses come out.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from . import checksum
from .shard_index import ShardReader, damaged_file, write_checksums

SINGLE_PROCESS_WARNING = "torch.distributed is disabled, unavailable or uninitialized"  # as is meant: one process
# A block's results are views of what a product wrote; nothing here changes them in place, which is what FSDP2 warns of.
VIEW_WARNING = "FSDP2-wrapped module .* returned a view tensor"


class ShardError(RuntimeError):
    """Shards cannot be written or read; the message says why, and every process has one."""


def shard_model(model, device, world_size):
    """Shards ``model``, whose weights must be the same in every process, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second to import: only where it is used

    mesh = init_device_mesh(device.type, (world_size,))
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_tensor(value):
    """The full tensor of one that may be sharded: a collective, so every process must ask for the same ones in the same order."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def distribute_as(value, own):
    """The full ``value``, which every process has, on the device and in the shards of ``own``."""
    value = value.to(own.device)
    if isinstance(own, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)  # None: no exchange is needed
    return value


def gather_model(model_class, model, tensors, device, *, keep=True):
    """A model of class ``model_class`` on ``device`` with the full weights ``tensors`` (by name): for evaluation and for files.

    Called by all processes; those that do not ``keep`` it get None.
    model: the sharded one, which is left as it is.
    """
    weights = {}
    for name, value in tensors.items():
        value = full_tensor(value)
        if keep:
            weights[name] = value.to(device)
    if not keep:
        return None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        full = model_class(model.config)
    full.backend = model.backend
    full.load_state_dict(weights)
    return full


def write_shards(folder, tensors, processes):
    """Write ``tensors`` by name, sharded or not, to the new ``folder``, every process its shard, and to disk before it returns.

    Called by all processes. Raises ShardError in all of them when one of them fails.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=SINGLE_PROCESS_WARNING)
            dcp.save(tensors, storage_writer=writer, no_dist=processes.world_size == 1)
    except CheckpointException as error:
        raise ShardError(_reasons(error)) from error
    error, digests = None, {}
    try:
        own = [".metadata"] if processes.is_main else []
        own += [file.name for file in Path(folder).glob(f"__{processes.rank}_*")]
        digests = {name: checksum.of_file(Path(folder) / name) for name in own}
    except OSError as failure:
        error = str(failure)
    raise_in_all(error, processes)
    digests = processes.gather_dict(digests)
    try:
        if processes.is_main:
            write_checksums(folder, digests)
    except OSError as failure:
        error = str(failure)
    raise_in_all(error, processes)


def read_shards(folder, owner, processes):
    """The tensors that ``write_shards`` wrote, by name, whatever the number of processes was; called by all processes.

    owner: name -> the tensor whose sharding the one of this name takes; where that is unsharded, unknown or of another shape,
        it is read in full, on the CPU.
    Raises ShardError in every process when one of them cannot read its shard. The folder may come from anybody: its files are
    checked first, and its index, a pickle, can name nothing but the classes of an index.
    """
    raise_in_all(damaged_file(folder, processes.rank, processes.world_size), processes)
    reader = ShardReader(folder)
    described, error = {}, None
    try:
        described = reader.read_metadata().state_dict_metadata
    except Exception as failure:  # a damaged pickle raises whatever it likes
        error = f"{type(failure).__name__}: {failure}"
    raise_in_all(error, processes)
    owners = {name: owner(name) for name in described}
    together = any(isinstance(own, DTensor) for own in owners.values())
    tensors = {}
    for name, info in described.items():
        own, dtype = owners[name], info.properties.dtype
        if isinstance(own, DTensor) and own.shape == info.size:
            tensors[name] = torch.empty_like(own, dtype=dtype)
        else:
            tensors[name] = torch.empty(info.size, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=SINGLE_PROCESS_WARNING)
            dcp.load(tensors, storage_reader=reader, no_dist=not together)
    except CheckpointException as failure:
        error = _reasons(failure)
    except Exception as failure:  # as above: what a cut file raises depends on where it was cut
        error = f"{type(failure).__name__}: {failure}"
    raise_in_all(error, processes)
    return tensors


def raise_in_all(error, processes):
    """Raises ShardError in every process where one of them has an ``error`` (str or None)."""
    for found in processes.gather(error):
        if found is not None:
            raise ShardError(found)


def _reasons(error):
    reasons = {f"{type(failure).__name__}: {failure}".splitlines()[0] for failure, _ in error.failures.values()}
    return "; ".join(sorted(reasons))
