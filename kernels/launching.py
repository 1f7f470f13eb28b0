"""How every kernel is launched: which of its configurations, on which device, and in which precision its products are."""

import contextlib
import functools
import os
import threading

import torch
import triton

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # that tiles are chosen for, and that the tests compile for


def backend():
    """The compiler's name for the GPUs that this build of torch drives."""
    return "hip" if torch.version.hip else "cuda"


def target(device):
    """Which of TARGETS to take the tiles of, for a torch.device."""
    return "gfx942" if backend() == "hip" else _target(device.index) if device.type == "cuda" else "sm_90"


@functools.cache
def _target(index):
    # Consumer Blackwell (12.x) has the tensor cores and the shared memory of sm_80's family, not those of sm_100.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(torch.cuda.get_device_capability(index)[0], "sm_80")


class Configurations:
    """The launch configurations of a kernel: `options`, the default first, and what timing has chosen among them."""

    def __init__(self, options):
        # gfx942 has 64 KiB of shared memory for a program, sm_80 and later have 99 KiB or more: two stages at most fit there.
        most_stages = 2 if backend() == "hip" else 8
        self.options = tuple(
            triton.Config(dict(constants), num_warps=warps, num_stages=min(stages, most_stages))
            for warps, stages, constants in options
        )
        self.default = self.options[0].all_kwargs()
        self.chosen = {}  # of a kernel, for what it is tuned by


def configs(*options):
    """Launch configurations, the default first, from (num_warps, num_stages, {constant: value}). Made once, not a launch."""
    return _configs(backend(), tuple((warps, stages, *constants.items()) for warps, stages, constants in options))


def one(num_warps, **tiles):
    """The one configuration of a kernel that only streams through memory."""
    return configs((num_warps, 3, tiles))


@functools.cache
def _configs(backend, options):
    return Configurations((warps, stages, dict(constants)) for warps, stages, *constants in options)


def launch(kernel, grid, *args, configs, key=(), **constants):
    """Run `kernel` in the best of `configs`, or in the first where timing them is not possible or not wanted.

    Timing waits for the device and may pick another configuration, hence another order of summation, in the next process:
    never under torch.use_deterministic_algorithms(True) or STMAE_AUTOTUNE=0. A choice holds for all launches that agree in the
    arguments named in `key` and in the dtypes of tensors, and is cached on disk. While a CUDA graph is captured nothing is
    timed and nothing loaded: the choice of an earlier launch is taken, so that a graph has what the calls before it had.

    Raises:
        RuntimeError: the kernel would have to be loaded while a CUDA graph is captured, which ends the capture.
    """
    constants["enable_fp_fusion"] = True  # the default of Triton up to 3.9; without it, other instructions and other bits
    with _on_device_of(args[0]):
        chosen = configs.default
        if len(configs.options) > 1 and may_tune(args[0]):
            chosen = _tuned(kernel, grid, args, configs, key, constants)
        if chosen is not None:
            if capturing():
                _require_loaded(kernel, grid, args, {**constants, **chosen})
            kernel[grid](*args, **constants, **chosen)


_SAME_DEVICE = contextlib.nullcontext()


def _on_device_of(tensor):
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _SAME_DEVICE
    return torch.cuda.device(tensor.device)


def may_tune(tensor):
    return tensor.is_cuda and not torch.are_deterministic_algorithms_enabled() and os.environ.get("STMAE_AUTOTUNE", "1") != "0"


_tuning = threading.Lock()  # the backward runs in another thread, and a tuner holds the arguments of one launch


def _tuned(kernel, grid, args, configs, key, constants):
    """The constants that timing chose for such a launch; None where that was timed just now, and has run."""
    values = (args[place] if place < len(args) else constants[name] for name, place in _places(kernel, key))
    case = (kernel, args[0].device, *values, *(x.dtype for x in args if isinstance(x, torch.Tensor)))
    chosen = configs.chosen.get(case)
    if chosen is not None:
        return chosen
    if capturing():
        return configs.default
    with _tuning:
        tuner = _tuner(kernel, configs, key)
        tuner[grid](*args, **constants)
        configs.chosen[case] = tuner.best_config.all_kwargs()


def capturing():
    """Whether launches of this thread go into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _require_loaded(kernel, grid, args, constants):
    # A warm-up of Triton compiles, if it must, and gives the kernel that a launch takes, but never loads it.
    if isinstance(kernel, triton.JITFunction) and kernel.run(*args, grid=grid, warmup=True, **constants).module is None:
        raise RuntimeError(
            f"{kernel.fn.__name__.lstrip('_')}: its kernel is not on the GPU yet and cannot be loaded while a CUDA graph is "
            "captured: make the same call, forward and backward, once before the capture"
        )


@functools.cache
def _places(kernel, key):
    """The names in `key`, each with its place among the kernel's parameters."""
    return tuple((name, kernel.arg_names.index(name)) for name in key)


@functools.cache
def _tuner(kernel, configs, key):
    return triton.autotune(configs=list(configs.options), key=list(key), cache_results=True)(kernel)


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
