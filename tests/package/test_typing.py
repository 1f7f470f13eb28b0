"""The public API is annotated, so that a user's type checker and editor know it (py.typed)."""

import inspect
import typing

import pytest

import stmae
from stmae import checkpoint, masking, models, ops, reference

MODULES = [stmae, checkpoint, masking, models, ops, reference]


def functions(module):
    """(name, function) of a module's public functions and of its public classes' own methods."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    for name in names:
        thing = getattr(module, name)
        if inspect.isclass(thing) and thing.__module__.startswith("stmae"):
            for method, value in vars(thing).items():
                value = getattr(value, "fget", None) or getattr(value, "__func__", value)  # property, classmethod
                if inspect.isfunction(value) and not method.startswith("_") and value.__module__.startswith("stmae"):
                    yield f"{name}.{method}", value
        elif inspect.isfunction(thing) and thing.__module__.startswith("stmae"):
            yield name, thing


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_functions_are_annotated(module):
    found = list(functions(module))
    assert found
    for name, function in found:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        missing = [p.name for p in parameters if p.annotation is p.empty]
        assert not missing, f"{module.__name__}.{name}: no type for {', '.join(missing)}"
        assert signature.return_annotation is not signature.empty, f"{module.__name__}.{name}: no type of what it returns"
        typing.get_type_hints(function)  # the names in them exist


def test_an_op_and_its_reference_agree():
    """Same parameters and types, but for what only the ops choose (`impl`)."""
    for name in reference.__all__:
        ours, plain = (inspect.signature(getattr(module, name)) for module in (ops, reference))
        parameters = [p for p in ours.parameters.values() if p.name != "impl"]
        assert parameters == list(plain.parameters.values()), name
        assert ours.return_annotation == plain.return_annotation, name
