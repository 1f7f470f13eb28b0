"""Memory that data workers write clips into and the training process reads them from: batches in a ring, none of them copied.

It lies in none of the file system's folders: a container's /dev/shm may hold 64 MB. All of it is taken at the start, so that a
machine with too little of it says so then, and not by a signal in a worker.
"""

import errno
import mmap
import multiprocessing.reduction
import os
import tempfile
import warnings

import torch

from .free_memory import free_memory


class SharedMemory:
    """``size`` bytes that this process shares with those it starts, however it starts them. Raises OSError where there are not so
    many."""

    def __init__(self, size):
        self.size = size
        free = free_memory()
        if free is not None and size > free:  # or the system would end this process, or another
            raise OSError(errno.ENOMEM, f"{free / 2**20:.0f} MiB are free")
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("stmae-clips")
        else:
            with tempfile.TemporaryFile() as unnamed:
                file = os.dup(unnamed.fileno())
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)
            else:
                os.truncate(file, size)
            self._map(file)
        finally:
            os.close(file)

    def _map(self, file):
        self._file = os.dup(file)
        self.bytes = mmap.mmap(file, self.size)

    def __del__(self):
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            os.close(file)

    def __getstate__(self):  # to a process that is started and not forked
        return self.size, multiprocessing.reduction.DupFd(self._file)

    def __setstate__(self, state):
        self.size, duplicate = state
        file = duplicate.detach()
        try:
            self._map(file)
        finally:
            os.close(file)


class SharedRing:
    """``slots`` batches of tensors.

    layout: {name: (shape of a batch, dtype)}. ``ring[i]`` is {name: tensor} of batch i, whose memory is that of batch i + slots.
    """

    ALIGNED = 64

    def __init__(self, slots, layout):
        self.slots, self.layout, self.offsets = slots, layout, {}
        end = 0
        for name, (shape, dtype) in layout.items():
            self.offsets[name] = end
            count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
            end += -(-count // self.ALIGNED) * self.ALIGNED
        self.stride = end
        self.memory = SharedMemory(slots * end)

    def __getitem__(self, batch):
        start = batch % self.slots * self.stride
        return {
            name: torch.frombuffer(
                self.memory.bytes, dtype=dtype, count=torch.Size(shape).numel(), offset=start + self.offsets[name]
            ).view(shape)
            for name, (shape, dtype) in self.layout.items()
        }

    def pin(self):
        """For copies to a GPU that do not stop the processor; a warning where the system does not allow it."""
        whole = torch.frombuffer(self.memory.bytes, dtype=torch.uint8)
        error = int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0))
        if error:
            warnings.warn(f"the data workers' memory cannot be pinned (CUDA error {error}): copies to the GPU wait", stacklevel=2)
        return not error

    def unpin(self):
        torch.cuda.cudart().cudaHostUnregister(torch.frombuffer(self.memory.bytes, dtype=torch.uint8).data_ptr())
