"""The layout for Hugging Face's `kernels`: complete by itself, and loaded by that package where it is installed."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from stmae.integrations.hf_kernels import OPS, write_kernel

# Compared with the definition in plain PyTorch, both of the folder's own library.
USE = """
import sys, torch
stmae = sys.modules["stmae"]
assert str(stmae.__file__).startswith({folder!r}), stmae.__file__
q, k, v = (torch.randn(2, 37, 3, 32) for _ in range(3))
torch.testing.assert_close(module.attention(q, k, v), stmae.reference.attention(q, k, v))
video = torch.randint(0, 256, (1, 3, 2, 32, 32), dtype=torch.uint8)
arguments = video, torch.tensor([[0, 3]]), torch.randn(8, 3, 2, 16, 16), None, None
torch.testing.assert_close(module.masked_patchify(*arguments), stmae.reference.masked_patchify(*arguments), atol=1e-4, rtol=1e-4)
assert set(module.__all__) == {ops!r}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kernel(tmp_path_factory.mktemp("kernel")).parents[1]


def run(code, cwd, **settings):
    return subprocess.run([sys.executable, "-c", code.format(**settings)], cwd=cwd, capture_output=True, text=True)


def test_the_variant_is_complete(folder, tmp_path):
    (variant,) = (folder / "build").iterdir()
    assert variant.name.startswith("torch-stable-abi210-cpu-")
    about = json.loads((variant / "metadata.json").read_text())
    assert about["name"] == "stmae" and about["backend"] == {"type": "cpu"} and about["id"].isidentifier()
    assert not (variant / "stmae/training").exists() and (variant / "stmae/kernels/attention.py").exists()
    code = "import sys; sys.path.insert(0, {parent!r}); import importlib; module = importlib.import_module({name!r})\n" + USE
    done = run(code, tmp_path, parent=str(variant.parent), name=variant.name, folder=str(folder), ops=set(OPS))
    assert done.returncode == 0, done.stderr


def test_the_package_loads_it(folder, tmp_path):
    try:  # by its metadata: this project's own folder `kernels` would be imported in a checkout
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package kernels")
    code = "import pathlib, kernels; module = kernels.get_local_kernel(pathlib.Path({folder!r}), backend='cpu')\n" + USE
    done = run(code, tmp_path, folder=str(folder), ops=set(OPS))
    assert done.returncode == 0, done.stderr


def test_nothing_else_is_replaced(folder, tmp_path):
    (variant,) = (folder / "build").iterdir()
    assert write_kernel(folder) == variant  # its own is
    other = tmp_path / "build" / variant.name
    other.mkdir(parents=True)
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected no folder or an earlier kernel's"):
        write_kernel(tmp_path)
    assert (other / "thesis.txt").read_text() == "mine"


def test_another_version_is_refused(folder, tmp_path):
    (variant,) = (folder / "build").iterdir()
    code = (
        "import sys, types; sys.modules['stmae'] = types.ModuleType('stmae'); sys.modules['stmae'].__version__ = '9.9'\n"
        "sys.path.insert(0, {parent!r}); __import__({name!r})"
    )
    done = run(code, tmp_path, parent=str(variant.parent), name=variant.name)
    assert "ImportError: stmae" in done.stderr and "got 9.9, which is imported already" in done.stderr
