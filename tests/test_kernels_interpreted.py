"""The Triton kernels on a machine without a GPU: interpreted, sanitised, and their traffic counted. See tests/gpu.

A process that has imported triton either interprets or compiles, so each part runs in one of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PARTS = {
    "interpreter": ("check_interpreter.py", ""),
    "attention": ("check_interpreted.py", "attention or tile or tf32"),
    "masked_patchify": ("check_interpreted.py", "patchify"),
    "the rest": ("check_interpreted.py", "not (attention or tile or tf32 or patchify)"),
    "traffic": ("check_traffic.py", ""),
}


@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part):
    file, keyword = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", TESTS / "gpu" / file]
    run = subprocess.run(
        [*command, "-k", keyword],
        cwd=TESTS.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(run.stdout, run.stderr)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1], run.stdout
