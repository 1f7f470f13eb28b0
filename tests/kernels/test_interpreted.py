"""The Triton kernels on a machine without a GPU: interpreted, sanitised, and their traffic counted.

A process that has imported triton either interprets or compiles, so each part runs in one of its own, as many at a time as
there are cores: the interpreter uses one.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stmae.kernels import support

pytestmark = pytest.mark.skipif(support.TRITON_PROBLEM is not None, reason=f"nothing is interpreted: {support.TRITON_PROBLEM}")

HERE = Path(__file__).parent
PARTS = {  # those that take long first
    "traffic of attention": ("check_traffic.py", "attention"),
    "attention": ("check_interpreted.py", "attention or tile or tf32"),
    "traffic": ("check_traffic.py", "not attention"),
    "masked_patchify": ("check_interpreted.py", "patchify"),
    **{op: ("check_interpreted.py", op) for op in ("random_masking", "gather_tokens", "restore_tokens", "patch_loss")},
    "every op": (
        "check_interpreted.py",
        "not (attention or tile or tf32 or patchify or random_masking or gather_tokens or restore_tokens or patch_loss)",
    ),
    "interpreter": ("check_interpreter.py", ""),
}


def interpret(part):
    file, keyword = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", HERE / file]
    return subprocess.run(
        [*command, "-k", keyword],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(request):
    """The parts that were selected, running: {part: future}."""
    selected = [item.callspec.params["part"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {part: pool.submit(interpret, part) for part in PARTS if part in selected}


@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part, runs):
    run = runs[part].result()
    print(run.stdout, run.stderr)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1], run.stdout
