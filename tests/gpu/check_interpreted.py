"""The suite, interpreted and sanitised. Run by tests/test_kernels_interpreted.py, in a process that interprets."""

from gpu import interpreted

interpreted.install()

import pytest  # noqa: E402
from gpu.suite import *  # noqa: E402, F403
from gpu.suite import _seeded  # noqa: E402, F401


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def guarded():
    return interpreted.sanitized
