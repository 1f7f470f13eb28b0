"""Installing and importing: what a newcomer meets first."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import stmae

ROOT = Path(__file__).resolve().parents[2]

USE = """
import pathlib, torch, stmae, stmae.kernels, stmae.training
keep, masked = stmae.ops.random_masking(torch.tensor([[3.0, 1.0, 2.0]]), 1)
assert keep.tolist() == [[1]] and masked.tolist() == [[0, 2]]
print(pathlib.Path(stmae.__file__).parent, pathlib.Path(stmae.training.__file__).parent)
"""


def run(*command, cwd, env=None):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clean copy of what is under version control or would be: no built files."""
    target = tmp_path_factory.mktemp("checkout") / "stmae"
    ignore = shutil.ignore_patterns("*.so", "build", "*.egg-info", "__pycache__", ".*", "golden", "demo-output", "runs")
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An empty virtual environment that sees this one's packages (torch above all), but not an installed stmae's finder."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    site = Path(run(folder / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "stmae" not in package.name and not package.name.endswith(".pth"):
            (site / package.name).symlink_to(package)
    return folder / "bin/python"


def test_wheel_and_editable_install(checkout, environment, tmp_path):
    # The wheel is built in isolation, where setup.py borrows the installed torch; one binary serves every Python.
    run(environment, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, checkout, cwd=tmp_path)
    (wheel,) = tmp_path.glob("stmae-*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "stmae/_C.abi3.so" in names
    for module in ("ops/attention.py", "kernels/__init__.py", "training/cli.py", "models/__init__.py", "checkpoint/__init__.py"):
        assert f"stmae/{module}" in names

    shutil.rmtree(checkout / "build", ignore_errors=True)
    run(environment, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert str(checkout) not in run(environment, "-c", USE, cwd=tmp_path)
    # From the checkout's root its folders shadow the installed ones, and borrow the installed extension.
    package, training = run(environment, "-c", USE, cwd=checkout).split()
    assert Path(package) == checkout / "stmae" and Path(training) == checkout / "training"

    run(environment, "-m", "pip", "uninstall", "--yes", "stmae", cwd=tmp_path)
    # The wheel's binary stands in for a second compilation: what differs is how the modules are found.
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("stmae/_C.abi3.so", checkout)
    run(environment, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", checkout, cwd=tmp_path)
    for folder in (tmp_path, checkout):
        package, training = run(environment, "-c", USE, cwd=folder).split()
        assert Path(package) == checkout / "stmae" and Path(training) == checkout / "training"


def test_without_torch_the_build_asks_for_it():
    """setup.py names torch as a requirement of the build only where none is installed."""
    code = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "pip install torch" in done.stderr


def test_import_needs_torch_alone():
    """No optional package is imported by `import stmae`, nor by using an op on a CPU."""
    code = """
import sys, torch
before = set(sys.modules)
import stmae
stmae.ops.random_masking(torch.rand(2, 8), 3)
import stmae.models
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(loaded & {"triton", "xformers", "flash_attn", "av", "safetensors", "numpy", "PIL", "tensorboard", "tqdm"}))
"""
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_show_config_says_what_a_bug_report_needs():
    text = run(sys.executable, "-m", "stmae", cwd=ROOT)
    for part in (stmae.__version__, torch.__version__, "cpu", "gpu", "attention", "flash-attn", "xformers", "triton"):
        assert part in text


def test_capability_can_be_forced_and_is_checked():
    code = "import stmae.ops.library as l; print(l.cpu_capability())"
    assert run(sys.executable, "-c", code, cwd=ROOT, env={"STMAE_CPU_CAPABILITY": "portable"}).strip() == "portable"
    with pytest.raises(RuntimeError, match="expected one of portable, avx2, avx512, avx512_bf16, got 'sse9'"):
        stmae.ops.library.set_cpu_capability("sse9")
    env = {**os.environ, "STMAE_CPU_CAPABILITY": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "got 'sse9'" in done.stderr
