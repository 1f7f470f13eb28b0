import os

import pytest
import torch

from stmae.ops import library

os.environ["STMAE_INDEX"] = "off"  # here and in what the tests start: nothing is left in, or taken from, the user's cache folder
os.environ["STMAE_CACHE"] = "off"
for _name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[_name]  # a pytest that a test starts is no part of this one: pytest-benchmark would refuse to measure

BEST = library.best_cpu_capability()
CAPABILITIES = ["portable", "neon"] if BEST == "neon" else ["portable", "avx2", "avx512", "avx512_bf16"]
OFFERED = CAPABILITIES[: CAPABILITIES.index(BEST) + 1]


def pytest_addoption(parser):
    parser.addoption(
        "--every-target", action="store_true", help="compile the Triton kernels for every kind of GPU, not for sm_90 alone"
    )


@pytest.fixture(params=OFFERED)
def capability(request):
    """Runs a test once for each instruction set that this processor offers."""
    before = library.cpu_capability()
    library.set_cpu_capability(request.param)
    yield request.param
    library.set_cpu_capability(before)


@pytest.fixture
def threads():
    """A function that sets the number of threads; the number is put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def nan_filled():
    """Fresh tensors hold NaN (or the largest integer) instead of zeros by luck, so that an element never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
