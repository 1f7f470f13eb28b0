"""One process or many: what torchrun started, and the few things the loop asks of the others.

    torchrun --nproc_per_node 8 -m stmae.training pretrain --preset paper-large --data ... --output ...

A batch counts videos over all processes, so the same command computes the same on any number of them. The output folder must
be seen by all of them.
"""

import contextlib
import gc
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """This process among its peers. Context manager: joins the group on entry where torchrun set one up, leaves it at the end.

    rank, world_size: 0 of 1 where there is no torchrun; ``first``: whether this is rank 0, which writes and speaks.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def first(self):
        return self.rank == 0

    def own_device(self, device):
        """cuda without a number becomes this process's GPU."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    @contextlib.contextmanager
    def joined(self, device):
        """Inside, the processes are a group (NCCL between GPUs, gloo between CPUs)."""
        if self.world_size == 1:
            yield
            return
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield
            # Leave together, and with nothing of the group alive: a gloo thread that still lets go of a Python object while the
            # interpreter ends aborts the process. DistributedDataParallel is freed by the collector alone, for it holds cycles.
            gc.collect()
            dist.barrier()
        finally:
            dist.destroy_process_group()

    def wrap(self, model, device):
        """The model whose gradients are averaged over the processes."""
        if self.world_size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def unsynchronised(self, model, last):
        """Context for a part of an accumulated batch: gradients are exchanged only after the last one."""
        return model.no_sync() if self.world_size > 1 and not last else contextlib.nullcontext()

    def wait(self):
        if self.world_size > 1:
            dist.barrier()

    def mean(self, *values, device):
        """The means of numbers over the processes, as floats: every process sees the same."""
        values = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values.tolist()

    def union(self, mapping):
        """All processes' mappings in one."""
        if self.world_size == 1:
            return mapping
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, mapping)
        return {key: value for part in gathered for key, value in part.items()}
