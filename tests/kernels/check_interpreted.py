"""The suite, interpreted and sanitised. Run by test_interpreted.py, in a process that interprets."""

from tests.support import interpreted

interpreted.install()

import functools  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

from stmae.kernels import launching  # noqa: E402
from tests.kernels.suite import *  # noqa: E402, F403
from tests.kernels.suite import _seeded, launch, masks, random, video_of  # noqa: E402, F401


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def guarded():
    return interpreted.sanitized


def test_tuner_times_each_configuration_once(device, monkeypatch):
    """The real autotuner, on a clock that prefers the second configuration it is shown."""
    timed = []

    def clock(call, quantiles):
        call()
        timed.append(call)
        return [1.0 if len(timed) == 2 else 2.0] * 3

    monkeypatch.setattr(triton, "autotune", functools.partial(triton.autotune, do_bench=clock))
    monkeypatch.setattr(launching, "may_tune", lambda tensor: True)
    launching._tuner.cache_clear()
    keep, _ = masks(2, 6, 3, device)
    video, weight = video_of("planar", torch.uint8, (2, 3, 2, 16, 24), device), random(8, 3, 2, 8, 8)
    tuned = [launch("masked_patchify", video, keep, weight.bfloat16(), None, None, [0.5] * 3, [0.2] * 3) for _ in range(2)]
    assert len(timed) == 2  # configurations; the second launch times nothing
    launching._tuner.cache_clear()
    monkeypatch.undo()
    assert torch.equal(tuned[0], tuned[1])
    plain = launch("masked_patchify", video, keep, weight.bfloat16(), None, None, [0.5] * 3, [0.2] * 3)
    torch.testing.assert_close(tuned[0], plain, rtol=2e-2, atol=2e-2)
