"""Import paths of version 0.1.0: they give what is there now, and warn."""

import importlib
import sys

import pytest

import stmae.training
from stmae import deprecated


@pytest.fixture
def imported_anew(monkeypatch):
    """The old modules as a new process finds them."""
    for name in deprecated.MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            monkeypatch.delattr(sys.modules[parent], child, raising=False)


@pytest.mark.parametrize("name", deprecated.MODULES)
def test_an_old_module_is_importable_and_warns(name, imported_anew):
    with pytest.warns(DeprecationWarning, match=rf"^{name} is deprecated: use {deprecated.MODULES[name][0]}") as caught:
        old = importlib.import_module(name)
    assert caught[0].filename == importlib.__file__  # of the import, not of the finder
    for module in map(importlib.import_module, deprecated.MODULES[name]):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        assert own and any(getattr(old, key) is getattr(module, key) for key in own)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nonsense'"):
        old.nonsense  # noqa: B018


@pytest.mark.filterwarnings("ignore:stmae.training.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name, old", [(name, old) for name, names in deprecated.NAMES.items() for old in names])
def test_an_old_name_warns(name, old):
    module = importlib.import_module(name)
    with pytest.warns(DeprecationWarning, match=rf"^{name}.{old} is deprecated: use ") as caught:
        value = getattr(module, old)
    assert caught[0].filename == __file__
    owner, _, current = str(caught[0].message).rpartition(" ")[2].rpartition(".")
    assert value is getattr(importlib.import_module(owner), current)


@pytest.mark.filterwarnings("ignore:stmae.training.* is deprecated:DeprecationWarning")
def test_statements_of_version_0_1_0(imported_anew):
    from stmae.training import order
    from stmae.training.dataset import PretrainClips
    from stmae.training.listing import find_videos
    from stmae.training.probe import KINDS, knn

    assert PretrainClips is stmae.training.PretrainClips and find_videos is stmae.training.find_videos
    assert KINDS == ("knn", "linear", "attentive") and callable(knn)
    assert order.Order is stmae.training.ResumableBatchSampler


def test_functions_are_not_hidden_by_old_modules():
    assert not {f"stmae.training.{name}" for name in stmae.training.__all__} & set(deprecated.MODULES)
