"""Kernels can be checked and timed where there is torch, Triton, NumPy and pytest alone, in a checkout that is not installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.optional_packages import OPTIONAL

ROOT = Path(__file__).parents[2]
BLOCK = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(OPTIONAL)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A function that runs pytest in a checkout elsewhere, with no optional package, and no plugin but the benches'."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "block").mkdir()
    (folder / "block" / "sitecustomize.py").write_text(BLOCK)
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "*_cache", "__pycache__", "build", "*.egg-info", "*.safetensors", "*results", "runs"
    )
    shutil.copytree(ROOT, checkout, ignore=ignored)

    def run(*arguments):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder / "block"), str(checkout)]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)

    return run


def test_tests_on_a_gpu_are_collected(bare):
    done = bare("-m", "gpu", "tests", "--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stdout.lower().splitlines()[-1]
    assert "test_on_gpu.py::test_captured_in_a_cuda_graph[attention]" in done.stdout
    assert "needs the package av" in done.stdout


def test_benches_run(bare):
    pytest.importorskip("pytest_benchmark")
    arguments = ("-p", "pytest_benchmark.plugin", "bench", "--benchmark-only", "--device", "cpu")
    done = bare(*arguments, "--collect-only")
    assert done.returncode == 0 and "needs the package av" in done.stdout, done.stdout + done.stderr
    assert "bench_step[small-bfloat16]" in done.stdout and "bench_attention" in done.stdout
    done = bare(*arguments, "-k", "random_masking and 4x1568", "-s")
    assert done.returncode == 0 and " us = " in done.stdout, done.stdout + done.stderr


def test_a_package_that_is_not_optional_is_an_error(bare, tmp_path):
    (tmp_path / "test_typo.py").write_text("import stmae.no_such_module\n")
    done = bare(str(tmp_path / "test_typo.py"), "--rootdir", str(tmp_path))
    assert done.returncode != 0 and "no_such_module" in done.stdout + done.stderr
