import pytest


@pytest.fixture(autouse=True)
def two_threads(threads):
    """The kernels divide their work, also where each process of the suite has one thread."""
    threads(2)
