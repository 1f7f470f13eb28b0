"""Which device and which precision a run uses, and how many decoding processes."""

import ctypes
import os

import torch

from ..config.checks import is_device
from ..config.wording import counted

# 24 cores decode 2,000 clips a second of 340x256 videos, four from each (10.6 ms each: docs/performance-cpu.md), as an
# H100 takes of ViT-B. A worker has 260 MB of its own.
MOST_WORKERS = 24
SHARED_PART = 0.8  # of what is free in /dev/shm
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def choose_device(name):
    """'auto': cuda where there is one, else cpu. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not is_device(name):
        raise ValueError(f"expected a device such as 'auto', 'cpu' or 'cuda:0', got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was requested, but this PyTorch ({torch.__version__}) finds no CUDA device")
    return device


def choose_precision(name, device):
    """(dtype or None, why): the autocast dtype, None for float32.

    bf16 has float32's range, where float16 is the most reported source of NaN in this method. On a CPU without bf16
    instructions it
    would be emulated and slower than float32, so 'auto' then means float32.
    """
    if name == "float32":
        return None, "float32, as requested"
    if name == "bf16":
        return torch.bfloat16, "bf16 autocast, as requested"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16 autocast"
        return None, "float32 (this GPU has no bf16)"
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if features.get("avx512_bf16") or features.get("amx_bf16"):
        return torch.bfloat16, "bf16 autocast"
    return None, "float32 (this CPU has no bf16 instructions; --run.precision bf16 emulates them)"


def choose_workers(requested, device, videos=None):
    """``requested``, or as many processes that decode as ``useful_workers`` says of this machine. videos: in a step of this
    process; None: unknown."""
    if requested is not None:
        return requested
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's
    return useful_workers(cores, device.type, videos, int(processes) if processes.isdigit() else 1)


def useful_workers(cores, device_type, videos=None, processes=1):
    """How many processes should decode for one that trains.

    On a CPU one: the model needs the cores. Beside a GPU one for each core that the process has for itself, but for its own: of
    ``cores`` divided among the ``processes`` of the machine. No more than the ``videos`` of a step, for a video is decoded by one
    worker, nor than MOST_WORKERS.
    """
    if device_type == "cpu":
        return 1
    return max(1, min(cores // max(processes, 1) - 1, MOST_WORKERS, videos or MOST_WORKERS))


def workers_in_shared_memory(workers, item_bytes, free):
    """Of ``workers`` that send tensors through /dev/shm as many as fit into its ``free`` bytes, each with three items of
    ``item_bytes``: two that wait and one that is made. 0: this process decodes. free: None: no limit."""
    if free is None or item_bytes == 0:
        return workers
    return min(workers, int(free * SHARED_PART / (3 * item_bytes)))


def free_shared_memory():
    """Bytes that are free in /dev/shm, of which a container may have 64 MB; None where there is none."""
    try:
        status = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return None
    return status.f_bavail * status.f_frsize


def keep_freed_memory():
    """Has the C library keep what a step on a CPU frees for the next one.

    By itself, glibc hands every block above 32 MB back to the system as it is freed, and the system clears its pages when they
    are next touched: 6 % of a float32 step of ViT-B, at the same peak memory. Nothing happens with other C libraries, or where
    the environment has set malloc already.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    if mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_THRESHOLD, 2**25):  # some versions take no more than that
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def describe(device):
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({counted(torch.get_num_threads(), 'thread')})"
