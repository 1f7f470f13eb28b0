"""Ratios that hold on a shared machine: both sides alternate within one run, medians are compared, results checked first."""

import statistics
import time

import torch


def clock(device="cpu"):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(sides, *, rounds, device="cpu"):
    """Time each callable of `sides` {name: function} in turn, `rounds` times; return {name: [seconds, ...]}."""
    for side in sides.values():  # warm-up: allocation, packing of weights, autotuning, compilation
        side()
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = clock(device)
            side()
            seconds[name].append(clock(device) - start)
    return seconds


def quantiles(seconds):
    ordered = sorted(seconds)
    return {f"p{q}": ordered[min(len(ordered) - 1, round(q / 100 * (len(ordered) - 1)))] for q in (20, 50, 80)}


def ratio(slow, fast):
    """Median over rounds of slow / fast, each pair measured back to back."""
    return statistics.median(s / f for s, f in zip(slow, fast))


def rounds_for(sides, *, seconds, least=3, most=101):
    """How many alternating rounds fit into `seconds`."""
    start = time.perf_counter()
    for side in sides.values():
        side()
    once = time.perf_counter() - start
    return max(least, min(most, int(seconds / max(once, 1e-6))))
