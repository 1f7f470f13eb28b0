"""The op of docs/adding-an-op.md, built from the page: its tests pass on the CPU and, interpreted, on what a GPU would run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/adding-an-op.md").read_text()
OP = "squared_relu"


def run(command, cwd, **environment):
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This checkout and the page's files; the op's kernels are in a library beside the extension, which is not built again."""
    target = tmp_path_factory.mktemp("checkout")
    for folder in ("stmae", "kernels", "csrc", "tests/support", "tests/ops", "tests/kernels"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / file, target / file)
    files = re.findall(r"^In `([\w/.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(files) == 5
    for name, text in files:
        assert not (target / name).exists(), f"{name} exists: choose another op for the page"
        (target / name).write_text(text)
    for layer in ("reference", "ops"):
        file = target / f"stmae/{layer}/__init__.py"
        file.write_text(f'{file.read_text()}\nfrom .{OP} import {OP}\n\n__all__ += ["{OP}"]\n')
    (suite,) = re.findall(r"^`tests/kernels/suite.py`:\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    with open(target / "tests/kernels/suite.py", "a") as file:
        file.write("\n\n" + suite)

    library = target / f"lib{OP}.so"
    macros = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{folder}" for folder in (target / "csrc", *cpp_extension.include_paths())]
    sources = [target / f"csrc/cpu/{OP}.cpp", target / "csrc/base/isa.cpp"]
    torch_libraries = Path(torch.__file__).parent / "lib"
    links = [f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++20", "-O1", "-Wall", "-fPIC", "-shared", "-fvisibility=hidden"]
    run([cpp_extension.get_cxx_compiler(), *flags, *macros, *includes, *sources, *links, "-o", library], target)
    with open(target / "stmae/ops/library.py", "a") as file:
        file.write(f"\n\ntorch.ops.load_library({str(library)!r})\n")
    return target


def test_on_cpus(checkout):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/test_{OP}.py"]
    assert re.search(r"\d\d passed", run(command, checkout, PYTHONPATH=str(checkout)))


def test_interpreted(checkout):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_interpreted.py", "-k", OP]
    assert " passed" in run(command, checkout, PYTHONPATH=str(checkout), TRITON_INTERPRET="1")
