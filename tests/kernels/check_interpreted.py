"""The suite, interpreted and sanitised. Run by test_interpreted.py, in a process that interprets."""

from tests.support import interpreted

interpreted.install()

import functools  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

from stmae.kernels import launching, masked_patchify  # noqa: E402
from tests.kernels.suite import *  # noqa: E402, F403
from tests.kernels.suite import _seeded, launch, masks, random, video_of  # noqa: E402, F401


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def guarded():
    return interpreted.sanitized


@pytest.fixture
def tuned(monkeypatch):
    """Tuning is on, by the real autotuner, on a clock that prefers the second configuration it is shown; what was timed."""
    timed = []

    def clock(call, quantiles):
        call()
        timed.append(call)
        return [1.0 if len(timed) == 2 else 2.0] * 3

    def clear():
        for cached in (launching._tuner, launching._configs, masked_patchify._forward_tiles):
            cached.cache_clear()

    monkeypatch.setattr(triton, "autotune", functools.partial(triton.autotune, do_bench=clock))
    monkeypatch.setattr(launching, "may_tune", lambda tensor: True)
    clear()
    yield timed
    clear()


@pytest.fixture
def launched(monkeypatch):
    """The tiles of every launch of masked_patchify's forward, in order."""
    tiles, run = [], type(masked_patchify._masked_patchify).run

    def record(self, *args, **kwargs):
        if self is masked_patchify._masked_patchify:
            tiles.append({name: value for name, value in kwargs.items() if name.startswith("BLOCK")})
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(masked_patchify._masked_patchify), "run", record)
    return tiles


def _patchify(device, D=8):
    torch.manual_seed(0)
    keep, _ = masks(2, 6, 3, device)
    video, weight = video_of("planar", torch.uint8, (2, 3, 2, 16, 24), device), random(D, 3, 2, 8, 8)
    return launch("masked_patchify", video, keep, weight.bfloat16(), None, None, [0.5] * 3, [0.2] * 3)


def test_tuner_times_each_configuration_once(device, tuned, launched, monkeypatch):
    results = [_patchify(device) for _ in range(2)]
    options = [
        config.kwargs for config in masked_patchify._forward_tiles(False, launching.target(results[0].device), 6, 8).options
    ]
    assert len(tuned) == len(options)  # the second launch times nothing
    assert launched == [*options, options[1], options[1]]  # timed, then run, then run again
    assert torch.equal(*results)
    monkeypatch.undo()
    torch.testing.assert_close(results[0], _patchify(device), rtol=2e-2, atol=2e-2)


def test_a_captured_launch_takes_the_choice_of_those_before_it(device, tuned, launched, monkeypatch):
    _patchify(device)
    count, chosen = len(tuned), launched[-1]
    monkeypatch.setattr(launching, "capturing", lambda: True)
    _patchify(device)
    assert launched[-1] == chosen and len(tuned) == count
    _patchify(device, D=16)  # was never timed: the default, and no timing now
    assert launched[-1] != chosen and len(tuned) == count
    monkeypatch.setattr(launching, "capturing", lambda: False)
    _patchify(device, D=16)
    assert len(tuned) == 2 * count
