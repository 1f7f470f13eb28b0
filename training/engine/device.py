"""Which device and which precision a run uses, and how many decoding processes."""

import ctypes
import os

import torch

from ..config.checks import is_device

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


def choose_workers(requested, device):
    """Processes that decode: on the CPU the model needs the cores, beside a GPU all but one of them are free."""
    if requested is not None:
        return requested
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device.type == "cpu" else max(1, min(12, cores - 1))


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
    return f"{device} ({torch.get_num_threads()} threads)"
