"""Imports go one way, and importing the library is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"stmae": "stmae", "stmae.kernels": "kernels", "stmae.training": "training"}  # package: its folder
LAYERS = {  # package: what it may import of stmae, besides itself
    "stmae.reference": (),
    "stmae.kernels": ("stmae.reference",),
    "stmae.ops": ("stmae.reference", "stmae.kernels", "stmae._C"),
    "stmae.masking": ("stmae.reference", "stmae.ops"),
    # The models' from_pretrained and save_pretrained are a mixin of hub, whose methods import checkpoint when they are called.
    "stmae.models": ("stmae.masking", "stmae.reference", "stmae.ops", "stmae.kernels", "stmae.hub"),
    "stmae.checkpoint": ("stmae.models", "stmae.masking"),
    "stmae.hub": ("stmae.checkpoint", "stmae.models"),
    "stmae.integrations": ("stmae.checkpoint", "stmae.models", "stmae.ops"),
    "stmae.training.config": ("stmae.models", "stmae.masking"),
    "stmae.training.data": ("stmae.training.config", "stmae.masking", "stmae._video"),
    "stmae.training.planning": ("stmae.models", "stmae.masking", "stmae.ops"),
    "stmae.training.engine": (
        "stmae.training.config",
        "stmae.training.data",
        "stmae.training.planning",
        "stmae.models",
        "stmae.masking",
        "stmae.checkpoint",
        "stmae.hub",
        "stmae.ops",
    ),
}
LAYERS["stmae.training.evaluation"] = (*LAYERS["stmae.training.engine"], "stmae.training.engine")
LAYERS["stmae.training.tasks"] = (*LAYERS["stmae.training.evaluation"], "stmae.training.evaluation")
LAYERS["stmae.training.commands"] = (*LAYERS["stmae.training.tasks"], "stmae.training.tasks")


def modules():
    """{module name: file} of everything that is installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


def imports_of(name, file):
    """The modules that a module imports, anywhere in it, by their full names."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


MODULES = modules()
LAYER_OF = {name: layer for name in MODULES for layer in LAYERS if name == layer or name.startswith(layer + ".")}


def inside(name, package):
    return name == package or name.startswith(package + ".")


def test_every_layer_has_modules():
    assert set(LAYER_OF.values()) == set(LAYERS)
    parts = {name.split(".")[2] for name in MODULES if name.startswith("stmae.training.")}
    assert parts - {"cli", "__main__"} == {layer.split(".")[2] for layer in LAYERS if layer.startswith("stmae.training.")}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer):
    for name, of in LAYER_OF.items():
        if of != layer:
            continue
        for imported in imports_of(name, MODULES[name]):
            if inside(imported, "stmae") and imported != "stmae.__version__":
                known = imported if any(inside(imported, package) for package in LAYERS) else imported.rpartition(".")[0]
                allowed = any(inside(known, package) for package in (layer, *LAYERS[layer])) or known == "stmae"
                assert allowed, f"{name} imports {imported}"


def test_the_reference_imports_torch_alone():
    for name in (name for name, layer in LAYER_OF.items() if layer == "stmae.reference"):
        others = {imported.partition(".")[0] for imported in imports_of(name, MODULES[name])} - {"torch", "stmae"}
        assert others <= set(sys.stdlib_module_names), f"{name} imports {others}"


def test_a_command_never_imports_a_command():
    commands = [name for name, layer in LAYER_OF.items() if layer == "stmae.training.commands" and name != layer]
    assert len(commands) >= 9
    for name in commands:
        found = [imported for imported in imports_of(name, MODULES[name]) if inside(imported, "stmae.training.commands")]
        assert not found, f"{name} imports {found}"


def test_there_is_no_drawer_for_odds_and_ends():
    assert not [name for name in MODULES if name.rpartition(".")[2] in ("utils", "util", "common", "misc", "helpers")]


@pytest.mark.parametrize(
    "module, absent",
    [
        (
            "stmae",
            ("triton", "stmae.training", "stmae.models", "numpy.testing", "yaml", "av", "PIL", "tensorboard", "matplotlib"),
        ),
        ("stmae.training", ("av", "yaml", "jsonargparse", "PIL", "tensorboard", "matplotlib", "stmae.models")),
        ("stmae.training.data.dataset", ("jsonargparse", "tensorboard", "matplotlib")),
    ],
)
def test_importing_is_light(module, absent):
    code = f"import sys, {module}; print(*(name for name in {absent!r} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.split() == []
