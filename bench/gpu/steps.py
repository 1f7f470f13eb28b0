"""Pre-training steps, one line of JSON a side, written as it ends.

    python -m bench.gpu.steps OUT.jsonl --size base --clips 32 --sides ours,tuned-compiled [--device cpu] [--limit 60]

The sides are those of bench/steps.py. A step's time is the device's, over steps queued without a wait; host_ms is what the host
needs to queue one on an idle device: where it is the larger, launches bound the step.
"""

import argparse
import gc
import json
import signal
import statistics
import sys
import time

import torch

from bench.steps import make


def measure(side, size, clips, device):
    cuda = device == "cuda"
    torch.compiler.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def wait():
        if cuda:
            torch.cuda.synchronize()

    begin = time.perf_counter()
    step = make(side, size, "bfloat16", device, clips)
    loss = step()
    wait()
    first = time.perf_counter() - begin
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()}")
    for _ in range(4 if cuda else 1):
        step()
    wait()
    host = []
    for _ in range(5 if cuda else 3):
        begin = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - begin))
        wait()  # for the queue is limited: a full one would make the host wait for the device
    times = queued(step, 20) if cuda else host
    median = statistics.median(times)
    return {
        "ms": median,
        "least_ms": min(times),
        "most_ms": max(times),
        "host_ms": statistics.median(host),
        "clips_per_s": 1e3 * clips / median,
        "first_step_s": first,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "loss": loss.item(),
    }


def queued(step, count):
    """Milliseconds of the device for each of ``count`` steps, queued without a wait."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in zip(marks, marks[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="JSON lines; added to")
    parser.add_argument("--size", default="base")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--sides", default="ours,reference,tuned,huggingface")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit", type=int, default=60, help="seconds for each side")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"

    def stop(*_):
        raise TimeoutError(f"took more than {options.limit} s")

    signal.signal(signal.SIGALRM, stop)
    failed = 0
    for side in options.sides.split(","):
        line = {"side": side, "size": options.size, "clips": options.clips, "device": device, "torch": torch.__version__}
        signal.alarm(options.limit)
        try:
            line.update(measure(side, options.size, options.clips, options.device))
        except Exception as error:  # the next one still runs
            failed = 1
            line["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        finally:
            signal.alarm(0)
        with open(options.output, "a") as file:
            file.write(json.dumps(line) + "\n")
        print({name: round(value, 2) if isinstance(value, float) else value for name, value in line.items()}, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
