"""The benches' way of timing a GPU, on a device that is not there: events on a clock that each kernel moves on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import compare

BENCH = Path(__file__).parents[2] / "bench"


class Device:
    """Runs what is queued when someone waits for it; `queue` is what a kernel launch does, at once, on the host."""

    def __init__(self):
        self.now, self.queued, self.log = 0.0, [], []

    def queue(self, name, seconds):
        self.log.append(name)
        self.queued.append(lambda: setattr(self, "now", self.now + seconds))

    def synchronize(self):
        self.log.append("wait")
        for work in self.queued:
            work()
        self.queued.clear()

    def event(self, *, enable_timing):
        assert enable_timing
        return Event(self)

    def buffer(self, size, *, dtype, device):
        assert device == "cuda"
        return Buffer(self)


class Event:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        self.device.queued.append(lambda: setattr(self, "at", self.device.now))

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Buffer:
    def __init__(self, device):
        self.device = device

    def zero_(self):
        self.device.queue("flush", 0.5)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(compare.torch, "empty", device.buffer)
    return device


def test_times_are_the_devices_alone(device):
    """Each call's own kernels, not the flush before it, nor the first calls, which are slower; no wait between the calls."""
    calls = {"ours": 0, "theirs": 0}

    def side(name, seconds):
        def run():
            calls[name] += 1
            device.queue(name, seconds if calls[name] > 2 else 100.0)  # compiles, tunes

        return run

    seconds = compare.alternate({"ours": side("ours", 2.0), "theirs": side("theirs", 3.0)}, rounds=4, device="cuda")
    assert seconds == {"ours": pytest.approx([2.0] * 4), "theirs": pytest.approx([3.0] * 4)}
    assert device.log[-17:] == ["flush", "ours", "flush", "theirs"] * 4 + ["wait"]
    assert compare.ratio(seconds["theirs"], seconds["ours"]) == pytest.approx(1.5)


def test_rounds_are_counted_by_what_the_device_takes(device, monkeypatch):
    """A launch returns at once: without a wait any side would seem to fit any number of times."""
    monkeypatch.setattr(compare.time, "perf_counter", lambda: device.now)
    first = iter([50.0])
    rounds = compare.rounds_for({"ours": lambda: device.queue("ours", next(first, 0.1))}, seconds=2.05, device="cuda")
    assert rounds == 20


def test_a_gpu_that_is_not_there_is_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "pytest", BENCH / "bench_ceilings.py", "--benchmark-only", "--device", "cuda", "-q"]
    run = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=BENCH.parent, capture_output=True, text=True)
    assert run.returncode and "--device cuda: torch" in run.stdout + run.stderr and "finds no GPU" in run.stdout + run.stderr


def test_attention_is_compared_with_what_can_serve(monkeypatch):
    """On a GPU beside SDPA, installed packages and the compiled reference; the names that the results carry."""
    from bench import bench_attention
    from stmae.kernels import attention_backends

    monkeypatch.setattr(attention_backends, "unusable", lambda name, **_: "not installed" if name == "xformers" else None)
    sides = bench_attention.implementations(2, 3, 40, torch.bfloat16, "cuda", True)
    assert list(sides) == ["ours", "sdpa", "flash_attn", "reference", "compiled"]
    assert "compiled" not in bench_attention.implementations(2, 3, 40, torch.bfloat16, "cuda", False)
    assert list(bench_attention.implementations(64, 16, 9000, torch.bfloat16, "cuda", True)) == ["ours", "sdpa", "flash_attn"]
    q, k, v = torch.randn(3, 2, 40, 3, 8).unbind(0)
    torch.testing.assert_close(sides["sdpa"](q, k, v), sides["reference"](q, k, v))
    monkeypatch.undo()
    assert list(bench_attention.implementations(2, 3, 40, torch.bfloat16, "cpu", True)) == ["ours", "sdpa", "reference"]


def test_the_flush_outlasts_the_hosts_work(device, monkeypatch):
    """A call that the host takes long to queue is begun only after more than that time of flushes, here of 0.5 s each."""
    clock = iter([0.0, 1.1])
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(clock))
    assert compare._flushes(Buffer(device), lambda: None) == 5


def test_durations_show_kernels_in_microseconds():
    assert (
        compare.duration(12.34e-6) == "12.3 us" and compare.duration(2e-3) == "2000.0 us" and compare.duration(0.5) == "500.0 ms"
    )
