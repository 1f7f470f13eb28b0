import os

import pytest
import torch

_outcomes = []


def pytest_runtest_logreport(report):  # in the main process, whichever one ran the test
    if "gpu" in report.keywords and (report.when == "call" or report.skipped):
        _outcomes.append(report.outcome)


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
