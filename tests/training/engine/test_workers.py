"""How many data workers there are where nobody says: from the cores, the processes of the machine and what a step needs."""

import pytest
import torch

from stmae.training.engine import device
from stmae.training.engine.device import choose_workers, useful_workers, workers_in_shared_memory


@pytest.mark.parametrize(
    "cores, kind, videos, processes, expected",
    [
        (64, "cpu", 512, 1, 1),  # the model has the cores
        (16, "cuda", 64, 1, 15),
        (96, "cuda", 64, 8, 11),  # eight GPUs: no core is promised twice
        (64, "cuda", 512, 1, 24),
        (64, "cuda", 8, 1, 8),  # a video is decoded by one worker
        (64, "cuda", None, 1, 24),
        (4, "cuda", 64, 8, 1),
        (1, "cuda", 1, 1, 1),
    ],
)
def test_useful_workers(cores, kind, videos, processes, expected):
    assert useful_workers(cores, kind, videos, processes) == expected


def test_what_is_asked_for_counts(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: range(32), raising=False)
    assert choose_workers(40, torch.device("cuda"), 8) == 40 and choose_workers(0, torch.device("cuda")) == 0
    assert choose_workers(None, torch.device("cuda")) == 7 and choose_workers(None, torch.device("cuda"), 3) == 3


@pytest.mark.parametrize(
    "workers, item, free, expected",
    [(12, 50e6, 64e6, 0), (12, 2.4e6, 64e6, 7), (12, 2.4e6, 64e9, 12), (12, 2.4e6, None, 12), (0, 1e9, 1, 0), (2, 0, 0, 2)],
)
def test_workers_that_fit_into_shared_memory(workers, item, free, expected):
    assert workers_in_shared_memory(workers, int(item), None if free is None else int(free)) == expected
