import pytest
import torch

_ran = 0


def pytest_runtest_logreport(report):
    global _ran
    _ran += report.when == "call" and report.passed and "gpu" in report.keywords


def pytest_terminal_summary(terminalreporter, config):
    missing = "" if torch.cuda.is_available() else ": there is no GPU here; the kernels were interpreted and compiled, not run"
    terminalreporter.write_sep("!" if not _ran else "=", f"{_ran} tests ran on a GPU{missing}", red=not _ran, green=bool(_ran))


@pytest.fixture(scope="session")
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return "cuda"
