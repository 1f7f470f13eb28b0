"""For tests and benches alike."""

from tests.support.optional_packages import pytest_pycollect_makemodule  # noqa: F401
