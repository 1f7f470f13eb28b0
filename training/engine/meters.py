"""A line of the log about the steps since the last one: loss, speed, utilisation, memory."""

import contextlib
import math
import resource
import sys
import time
from pathlib import Path

import torch


class StepMeter:
    """Collects the numbers of a line of the log; ``summary`` gives them and starts over.

    peak_flops: what all devices together reach, in FLOP/s.
    """

    def __init__(self, peak_flops, device):
        self.peak_flops, self.device = peak_flops, device
        self._reset()

    def _reset(self):
        self.start = time.perf_counter()
        self.data_wait, self.clips, self.tokens, self.flops = 0.0, 0, 0, 0.0
        self.losses, self.norms = [], []

    def add_clips(self, clips, tokens, flops):
        """``clips`` clips, with the tokens and FLOPs of all of them."""
        self.clips += clips
        self.tokens += tokens
        self.flops += flops

    def add_step(self, loss, norm):
        self.losses.append(loss)
        self.norms.append(norm)

    @contextlib.contextmanager
    def waiting_for_data(self):
        start = time.perf_counter()
        yield
        self.data_wait += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        """Context whose time does not count: the log's speeds are those of training alone."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def summary(self):
        """{name: number} of the steps since the last call."""
        seconds = time.perf_counter() - self.start
        count = len(self.losses)
        values = {
            "loss": sum(self.losses) / count if count else math.nan,
            "gradient_norm": sum(self.norms) / count if count else math.nan,
            "clips_per_second": self.clips / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait": self.data_wait / seconds,
            "mfu": self.flops / seconds / self.peak_flops,
            "memory_gb": peak_memory(self.device) / 1e9,
        }
        self._reset()
        return values


def peak_memory(device):
    """The most bytes that this process held so far: of the GPU's memory, or resident in the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux, where getrusage may speak of the process that started this one
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
