"""FSDP2: weights, gradients and AdamW's moments in shares, one for each process; and the way back to whole tensors.

Every block is sharded by itself, so that only one block's weights are whole at a time, and the rest is one more share. The
numbers stay float32, as without sharding: bfloat16 is autocast's, so that the same losses come out.
"""

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

ALONE_SAYS = "torch.distributed is disabled, unavailable or uninitialized"  # its warning of what is meant: one process


class ShardError(RuntimeError):
    """Shards cannot be written or read; the message says why, and every process has one."""


def shard(model, device, world_size):
    """Shards ``model``, whose weights must be the same in every process, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second to import: only where it is used

    # A block's results are views of what a product wrote; nothing here changes them in place, which is what it warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world_size,))
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_tensor(value):
    """The whole of a tensor that may be sharded: a collective, so every process must ask for the same ones in the same order."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value, own):
    """The whole ``value``, which every process has, in the device and the shares of ``own``."""
    value = value.to(own.device)
    if isinstance(own, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)  # None: no exchange is needed
    return value


def assemble(kind, model, tensors, device, *, keep=True):
    """A model of class ``kind`` on ``device`` with the whole weights ``tensors`` (by name): for evaluation and for files.

    Called by all processes; those that do not ``keep`` it get None.
    model: the sharded one, which is left as it is.
    """
    weights = {}
    for name, value in tensors.items():
        value = whole_tensor(value)
        if keep:
            weights[name] = value.to(device)
    if not keep:
        return None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        whole = kind(model.config)
    whole.backend = model.backend
    whole.load_state_dict(weights)
    return whole


def write(folder, tensors, processes):
    """Write ``tensors`` by name, sharded or not, to the new ``folder``, every process its share, and to disk before it returns.

    Called by all processes. Raises ShardError in all of them when one of them fails.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=ALONE_SAYS)
            dcp.save(tensors, storage_writer=writer, no_dist=processes.world_size == 1)
    except CheckpointException as error:
        raise ShardError(_reasons(error)) from error


def read(folder, owner, processes):
    """The tensors that ``write`` wrote, by name, whatever the number of processes was; called by all processes.

    owner: name -> the tensor whose shares the one of this name takes; where that is unsharded, unknown or of another shape, it is
        read whole, on the CPU.
    Raises ShardError in every process when one of them cannot read its share. The index is a pickle, so a folder from somebody
    who is not trusted must not be read.
    """
    reader = dcp.FileSystemReader(folder)
    described, error = {}, None
    try:
        described = reader.read_metadata().state_dict_metadata
    except Exception as failure:  # a damaged pickle raises whatever it likes
        error = f"{type(failure).__name__}: {failure}"
    agree(error, processes)
    owners = {name: owner(name) for name in described}
    together = any(isinstance(own, DTensor) for own in owners.values())
    tensors = {}
    for name, about in described.items():
        own, dtype = owners[name], about.properties.dtype
        if isinstance(own, DTensor) and own.shape == about.size:
            tensors[name] = torch.empty_like(own, dtype=dtype)
        else:
            tensors[name] = torch.empty(about.size, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=ALONE_SAYS)
            dcp.load(tensors, storage_reader=reader, no_dist=not together)
    except CheckpointException as failure:
        error = _reasons(failure)
    except Exception as failure:  # as above: what a cut file raises depends on where it was cut
        error = f"{type(failure).__name__}: {failure}"
    agree(error, processes)
    return tensors


def agree(error, processes):
    """Raises ShardError in every process where one of them found an ``error`` (str or None)."""
    for found in processes.gather(error):
        if found is not None:
            raise ShardError(found)


def _reasons(error):
    reasons = {f"{type(failure).__name__}: {failure}".splitlines()[0] for failure, _ in error.failures.values()}
    return "; ".join(sorted(reasons))
