"""Installing and importing: what a newcomer meets first."""

import email
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

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
    root = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(root), cwd=root)
    site = Path(run(root / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=root).strip())
    for folder in (Path(x) for x in sys.path if Path(x).name in ("site-packages", "dist-packages")):
        for package in folder.iterdir():
            if "stmae" not in package.name and not package.name.endswith(".pth") and not (site / package.name).exists():
                (site / package.name).symlink_to(package)
    return root / "bin/python"


@pytest.fixture(scope="module")
def wheel(checkout, environment, tmp_path_factory):
    """Built in isolation, where setup.py borrows the installed torch. Without optimisation, which takes twice as long."""
    folder = tmp_path_factory.mktemp("wheel")
    flags = {"STMAE_CXXFLAGS": f"{os.environ.get('STMAE_CXXFLAGS', '')} -O0"}
    run(environment, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, checkout, cwd=folder, env=flags)
    return next(folder.glob("stmae-*.whl"))


def test_wheel(checkout, environment, wheel, tmp_path):
    assert "-cp{0}{1}-cp{0}{1}-".format(*sys.version_info) in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "stmae/_C.abi3.so" in names
    video = "stmae/_video" + sysconfig.get_config_var("EXT_SUFFIX")  # for this Python alone, which the wheel's name says
    assert video in names
    for module in ("ops/attention.py", "kernels/__init__.py", "training/cli.py", "models/__init__.py", "checkpoint/__init__.py"):
        assert f"stmae/{module}" in names
    assert {"stmae/py.typed", "stmae/_C.pyi", "stmae/_video.pyi"} <= set(names)
    if "-g" not in os.environ.get("STMAE_CXXFLAGS", "").split():
        with zipfile.ZipFile(wheel) as archive:
            assert b".debug_info" not in archive.read("stmae/_C.abi3.so")  # 13 MB in 14

    shutil.rmtree(checkout / "build", ignore_errors=True)
    run(environment, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert str(checkout) not in run(environment, "-c", USE, cwd=tmp_path)
    # From the checkout's root its folders shadow the installed ones, and borrow the installed extension.
    package, training = run(environment, "-c", USE, cwd=checkout).split()
    assert Path(package) == checkout / "stmae" and Path(training) == checkout / "training"


def test_editable_install(tmp_path):
    """Of these tests' own environment, which `make test` installs so: another would be compiled all over again."""
    installed = (x.read_text("direct_url.json") for x in importlib.metadata.distributions(name="stmae"))  # or built in place
    if not any(json.loads(origin).get("dir_info", {}).get("editable") for origin in installed if origin):
        pytest.skip("the installed stmae is no editable one")
    for folder in (tmp_path, ROOT):
        package, training = run(sys.executable, "-c", USE, cwd=folder, env={"PYTHONPATH": ""}).split()
        assert Path(package) == ROOT / "stmae" and Path(training) == ROOT / "training"


# torch's releases and the Triton that their builds for GPUs require, from their metadata.
TRITON_OF = {
    "2.10.0": "==3.6.0",
    "2.11.0": "==3.6.0",
    "2.12.1": "==3.7.1",
    "2.13.0": "==3.7.1",
    "2.14.1": "~=3.8.0",
    "2.15.0": "~=3.9.0",
}


def requirements(wheel, extra, system="Linux", python="3.12"):
    """What the built metadata asks for with an extra ("": with none), extras of our own followed."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    environment = {"platform_system": system, "sys_platform": system.lower(), "python_version": python, "extra": extra}
    result = []
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            own = requirement.extras if requirement.name == "stmae" else ()
            result += [requirement] if not own else [x for name in own for x in requirements(wheel, name, system, python)[1]]
    return metadata.get_all("Provides-Extra"), result


def test_the_package_page_has_nothing_that_leads_into_the_clone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        page = email.message_from_bytes(archive.read(name))
    assert page["Description-Content-Type"] == "text/markdown"
    text = page.get_payload()
    assert "# stmae" in text and "pip install torch" in text and "](https://arxiv.org/abs/2205.09113)" in text
    assert "Weights (`docs/weights.md`)" in text
    assert re.findall(r"\]\((?!https:)[^)]*\)", text) == [] and "held-out clips after" not in text  # the picture's caption


def test_no_extra_asks_for_another_torch_or_triton(wheel):
    """Beside each torch, with the Triton that it requires, whatever patch release of that pip has taken."""
    extras, _ = requirements(wheel, "")
    assert {"train", "gpu", "test", "bench", "compile-checks"} <= set(extras)
    for extra in ("", *extras):
        asked = requirements(wheel, extra)[1]
        assert any(x.name == "torch" for x in asked)
        for torch_version, triton in TRITON_OF.items():
            taken = {"torch": [torch_version, f"{torch_version}+cpu"], "triton": [triton.lstrip("=~")]}
            if triton.startswith("~="):
                taken["triton"] += [triton.removeprefix("~=").removesuffix("0") + "7"]
            for requirement in asked:
                for version in taken.get(requirement.name, []):
                    assert requirement.specifier.contains(version), f"[{extra}] asks for {requirement}, not {version}"
    for extra, asks in (("gpu", True), ("compile-checks", True), ("test", False), ("train", False), ("", False)):
        assert asks == any(x.name == "triton" for x in requirements(wheel, extra)[1]), extra


def test_no_extra_asks_for_triton_where_there_is_none(wheel):
    for extra in requirements(wheel, "")[0]:
        assert not any(x.name == "triton" for x in requirements(wheel, extra, system="Darwin")[1]), extra


@pytest.fixture
def isolated(tmp_path):
    """A function that runs code as an isolated build does: it sees setuptools, and no package of its own environment.

    Where that is to have a torch, it has it by a .pth file, as an environment that sees the system's packages does.
    """
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path), cwd=tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for module in ("setuptools", "_distutils_hack", "ninja", "pybind11"):
        (tools / module).symlink_to(Path(importlib.util.find_spec(module).origin).parent)

    def execute(code, cwd, torch_installed):
        if torch_installed:
            (site,) = tmp_path.glob("lib/python*/site-packages")
            (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
        env = os.environ | {"PYTHONPATH": str(tools), "PYTHONNOUSERSITE": "1"}
        return subprocess.run([tmp_path / "bin/python", "-S", "-c", code], cwd=cwd, env=env, capture_output=True, text=True)

    return execute


@pytest.mark.parametrize("torch_installed", [True, False], ids=["torch installed", "no torch"])
def test_an_isolated_build_fetches_no_second_torch(checkout, isolated, torch_installed):
    code = "import setuptools.build_meta as build; print(build.get_requires_for_build_wheel())"
    done = isolated(code, checkout, torch_installed)
    assert done.returncode == 0, done.stderr
    assert ("torch" in done.stdout.splitlines()[-1]) == (not torch_installed), done.stdout


def test_without_torch_the_build_asks_for_it(checkout, isolated):
    code = "import runpy, sys; sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py')"
    done = isolated(code, checkout, torch_installed=False)
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
    with pytest.raises(RuntimeError, match="expected one of portable, avx2, avx512, avx512_bf16, neon, got 'sse9'"):
        stmae.ops.library.set_cpu_capability("sse9")
    env = {**os.environ, "STMAE_CPU_CAPABILITY": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "got 'sse9'" in done.stderr
