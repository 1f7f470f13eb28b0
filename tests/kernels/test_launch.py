"""What the launcher hands to the driver: see check_launch.py, which runs in a process of its own, that compiles."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stmae.kernels import support

pytestmark = [
    pytest.mark.skipif(support.TRITON_PROBLEM is not None, reason=f"nothing is launched: {support.TRITON_PROBLEM}"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="nothing is launched: no C compiler to build a libcuda.so.1 with"),
]


def test_every_argument_of_every_kernel_arrives():
    check = Path(__file__).with_name("check_launch.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", check]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=check.parents[2], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1], run.stdout
