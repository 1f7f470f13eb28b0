"""One process or many: what torchrun started, and the few things the loop asks of the others.

    torchrun --nproc_per_node 8 -m stmae.training pretrain --preset paper-large --data ... --output ...

A batch counts videos over all processes, so the same command computes the same on any number of them. The output folder must
be seen by all of them.
"""

import contextlib
import datetime
import gc
import os
import traceback

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .fsdp import shard_model

TIMEOUT = 1800.0  # as torch's own between CPUs


class ProcessLostError(RuntimeError):
    """Another process of the run ended, or cannot be reached; the message says from where the run can be continued."""


class Processes:
    """This process and its process group, as torchrun's environment describes them.

    rank, world_size: 0 of 1 where there is no torchrun; ``is_main``: whether this is rank 0, which writes and prints.
    environment: the variables that torchrun sets. timeout: seconds to wait for the others at the end of a step.
    """

    def __init__(self, environment=os.environ, *, timeout=TIMEOUT):
        self.timeout, self._round = timeout, 0
        self.rank = int(environment.get("RANK", "0"))
        self.world_size = int(environment.get("WORLD_SIZE", "1"))
        self.local_rank = int(environment.get("LOCAL_RANK", "0"))

    @property
    def is_main(self):
        return self.rank == 0

    def local_device(self, device):
        """cuda without a number becomes this process's GPU."""
        return torch.device("cuda", self.local_rank) if device.type == "cuda" and device.index is None else device

    @contextlib.contextmanager
    def process_group(self, device):
        """Context in which the processes are a group (NCCL between GPUs, gloo between CPUs) and ``device`` is the current one."""
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if self.world_size == 1:
                yield
            else:
                yield from self._initialized(device)

    def _initialized(self, device):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            try:
                yield
            except BaseException as error:
                forget_frames(error)
                raise
            gc.collect()
            dist.barrier()
        finally:
            # With nothing of the group alive, its end joins gloo's threads and closes its connections, which ends the others'
            # waiting. DistributedDataParallel is freed by the collector alone, for it holds cycles.
            gc.collect()
            dist.destroy_process_group()

    def wrap(self, model, device, parallel):
        """The model whose gradients are averaged over the processes; with "fsdp" it is itself sharded, in place."""
        if self.world_size == 1:
            return model
        if parallel == "fsdp":
            shard_model(model, device, self.world_size)
            return model
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def no_sync(self, model, *, last):
        """Context for a micro-batch: gradients are exchanged only after the last one (``last``)."""
        if isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext() if last else model.no_sync()
        if self.world_size > 1:
            model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def lost(self, error):
        """Whether ``error`` is what torch.distributed raises where another process ended or cannot be reached."""
        return self.world_size > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def mean(self, *values, device):
        """The means of numbers over the processes, as floats: every process sees the same. Raises TimeoutError where one of them
        does not come, with its rank."""
        self._require_all()
        values = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values.tolist()

    def sum(self, *values, device):
        """The sums of numbers over the processes, as floats."""
        values = torch.tensor(values, dtype=torch.float64, device=device)
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def _require_all(self):
        """Waits for all processes to come here. A collective that times out does not say who was missing: this does, by a key
        that every process sets in the group's store."""
        if self.world_size == 1:
            return
        store, keys = (
            dist.distributed_c10d._get_default_store(),
            [f"stmae/{self._round}/{rank}" for rank in range(self.world_size)],
        )
        store.set(keys[self.rank], "")
        if self._round > 1:  # everybody has left the round before the last
            store.delete_key(f"stmae/{self._round - 2}/{self.rank}")
        self._round += 1
        try:
            store.wait(keys, datetime.timedelta(seconds=self.timeout))
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            if not missing:
                raise
            ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            raise TimeoutError(
                f"rank {self.rank} waited {self.timeout:g} s at the end of a step for {ranks} of {self.world_size}, which did "
                "not come (run.process_timeout)"
            ) from error

    def gather(self, value):
        """Every process's value, by rank."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_results(self, work):
        """What ``work()`` gives in every process, by rank; an OSError that it raises in one is raised in all."""
        result, error = None, None
        try:
            result = work()
        except OSError as failure:
            error = failure
        gathered = self.gather((result, error))
        for _, error in gathered:
            if error is not None:
                raise error
        return [result for result, _ in gathered]

    def run_on_main(self, work):
        """Rank 0 calls ``work``, the others wait for it; what it raises is raised in all of them."""
        error = None
        if self.is_main:
            try:
                work()
            except Exception as failure:
                error = failure
        if self.world_size > 1:
            error = self.gather(error)[0]
        if error is not None:
            raise error

    def gather_dict(self, mapping):
        """All processes' mappings, merged into one."""
        return {key: value for part in self.gather(mapping) for key, value in part.items()}

    def shard(self, items):
        """This process's shard of ``items``, in order: one in world_size."""
        return items[self.rank :: self.world_size]


SINGLE_PROCESS = Processes({})  # for what reads a run's folder outside a run


def forget_frames(error):
    """Frees the local variables of an exception's frames, and of those of its causes; its traceback can still be printed."""
    seen = set()
    pending = [error]
    while pending:
        error = pending.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        pending += [error.__cause__, error.__context__]
