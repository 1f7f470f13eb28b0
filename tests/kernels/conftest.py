import os

import pytest
import torch

_outcomes = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.get_closest_marker("gpu") and (call.when == "call" or report.skipped):
        _outcomes.append(report.outcome)
    return report


def pytest_terminal_summary(terminalreporter):
    if _outcomes:
        ran = len(_outcomes) - _outcomes.count("skipped")
        missing = "" if torch.cuda.is_available() else ": none is here; the kernels were interpreted and compiled, not run"
        terminalreporter.write_sep("=" if ran else "!", f"{ran} tests ran on a GPU{missing}", red=not ran, green=bool(ran))


@pytest.fixture(scope="session")
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    # The suite asks for deterministic algorithms, under which torch refuses cuBLAS's products without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return "cuda"
