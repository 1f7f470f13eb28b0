"""Ratios that hold on a shared machine: both sides alternate within one run, medians are compared, results checked first."""

import math
import statistics
import time

import torch

_LARGER_THAN_ANY_CACHE = 512 * 2**20


def compiled(function):
    """torch.compile for this shape alone; without the reset it gives up, silently, after a few shapes."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def finished(side, device):
    """`side`, and a synchronisation with the device: for clocks on the host."""

    def run():
        side()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def alternate(sides, *, rounds, device="cpu"):
    """Time each callable of `sides` {name: function} alternately, `rounds` times; return {name: [seconds, ...]}.

    On a GPU the device's own clock is read, by events around each call, and nothing waits until all rounds are queued.
    """
    for _ in range(2 if device == "cuda" else 1):
        for side in sides.values():  # warm-up: allocation, packing of weights, autotuning, compilation, clocks
            finished(side, device)()
    return (_on_the_device if device == "cuda" else _on_the_host)(sides, rounds)


def _on_the_host(sides, rounds):
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _on_the_device(sides, rounds):
    # Written before each call: it empties the caches, so that no side finds its arguments there, and keeps the device busy
    # while the host queues the call, so that the time between the events is not the host's.
    buffer = torch.empty(_LARGER_THAN_ANY_CACHE, dtype=torch.int8, device="cuda")
    events = {name: [] for name in sides}
    flushes = {name: _flushes(buffer, side) for name, side in sides.items()}
    for _ in range(rounds):
        for name, side in sides.items():
            for _ in range(flushes[name]):
                buffer.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            side()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def _flushes(buffer, side, *, maximum=100):
    """How often `buffer` is to be written so that the device needs twice as long for it as the host for queueing `side`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    buffer.zero_()
    end.record()
    torch.cuda.synchronize()
    flush = start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    side()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    return max(1, min(maximum, math.ceil(2 * host / max(flush, 1e-6))))


def duration(seconds):
    """A time as it is shown: microseconds below 10 ms, where kernels are."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"


def quantiles(seconds):
    ordered = sorted(seconds)
    return {f"p{q}": ordered[min(len(ordered) - 1, round(q / 100 * (len(ordered) - 1)))] for q in (20, 50, 80)}


def ratio(slow, fast):
    """Median over rounds of slow / fast, each pair measured back to back."""
    return statistics.median(s / f for s, f in zip(slow, fast))


def rounds_for(sides, *, seconds, device="cpu", minimum=3, maximum=101):
    """How many alternating rounds fit into `seconds`. The first call is not counted: it may compile and tune."""
    for side in sides.values():
        finished(side, device)()
    start = time.perf_counter()
    for side in sides.values():
        finished(side, device)()
    once = time.perf_counter() - start
    return max(minimum, min(maximum, int(seconds / max(once, 1e-6))))
