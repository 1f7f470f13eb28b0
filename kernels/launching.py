"""How every kernel is launched: which of its configurations, on which device, and in which precision its products are."""

import functools
import os

import torch
import triton


def backend():
    """The compiler's name for the GPUs that this build of torch drives."""
    return "hip" if torch.version.hip else "cuda"


def configs(*options):
    """Launch configurations, the default first, from (num_warps, num_stages, {tile: size})."""
    return _configs(backend(), tuple((warps, stages, *tiles.items()) for warps, stages, tiles in options))


def one(num_warps, **tiles):
    """The one configuration of a kernel that only streams through memory."""
    return configs((num_warps, 3, tiles))


@functools.cache
def _configs(backend, options):
    # gfx942 has 64 KiB of shared memory for a program, where sm_80 and later have 99 KiB or more: two stages at most fit.
    most_stages = 2 if backend == "hip" else 8
    return tuple(
        triton.Config(dict(tiles), num_warps=warps, num_stages=min(stages, most_stages)) for warps, stages, *tiles in options
    )


def launch(kernel, grid, *args, configs, key=(), **constants):
    """Run `kernel` in the best of `configs`, or in the first where timing them is not possible or not wanted.

    Timing waits for the device and may pick another configuration, hence another order of summation, in the next process:
    never while a CUDA graph is captured, and never under torch.use_deterministic_algorithms(True) or STMAE_AUTOTUNE=0.
    The choice holds for all launches that agree in the arguments named in `key`, and is cached on disk.
    """
    constants["enable_fp_fusion"] = True  # the default of Triton up to 3.9; without it, other instructions and other bits
    with torch.cuda.device_of(args[0]):
        if len(configs) > 1 and may_tune(args[0]):
            _tuner(kernel, configs, key)[grid](*args, **constants)
        else:
            kernel[grid](*args, **constants, **configs[0].all_kwargs())


def may_tune(tensor):
    return (
        tensor.is_cuda
        and os.environ.get("STMAE_AUTOTUNE", "1") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


@functools.cache
def _tuner(kernel, configs, key):
    return triton.autotune(configs=list(configs), key=list(key), cache_results=True)(kernel)


def dot_precision(dtype):
    """tl.dot's input_precision. float32 operands are rounded to tf32 only where torch's own products are.

    Otherwise NVIDIA's tensor cores multiply them as sums of two tf32 numbers (tf32x3, an error of some 2^-22, as torch's own
    memory-efficient attention does); AMD's multiply float32 as it is.
    """
    if dtype != torch.float32:
        return None
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if backend() == "hip" else "tf32x3"


def columns_tile(D, largest=512):
    """How many of D columns a program takes: a power of two that wastes no lane where D allows it."""
    tile = min(largest, triton.next_power_of_2(D))
    while tile > 128 and D % tile:
        tile //= 2
    return tile
