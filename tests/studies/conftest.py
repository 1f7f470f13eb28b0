"""Studies compute with a thread a process, as in their schedule: more threads than cores wait for each other at every product."""

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)
