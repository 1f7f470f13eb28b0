"""Old import paths and names, which still work for one version, with a DeprecationWarning.

Version 0.1.0 had the modules of ``stmae.training`` side by side in one folder, and some of their contents under other names.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

# Old module -> the modules that have its contents now, in the order in which a name is searched.
MODULES = {
    "stmae.models.pictures": ("stmae.models.visualization",),
    "stmae.training.augment": ("stmae.training.data.transforms",),
    "stmae.training.data_check": ("stmae.training.commands.data_check",),
    "stmae.training.dataset": ("stmae.training.data.dataset",),
    "stmae.training.demo": ("stmae.training.commands.demo",),
    "stmae.training.device": ("stmae.training.engine.device",),
    "stmae.training.features": ("stmae.training.commands.features", "stmae.training.evaluation.features"),
    "stmae.training.flops": ("stmae.training.planning.flops",),
    "stmae.training.listing": ("stmae.training.data.video_list",),
    "stmae.training.log": ("stmae.training.engine.logger",),
    "stmae.training.loop": (
        "stmae.training.engine.loop",
        "stmae.training.engine.meters",
        "stmae.training.engine.train_state",
        "stmae.training.data.loader",
    ),
    "stmae.training.mixing": ("stmae.training.data.mixup",),
    "stmae.training.optimizer": ("stmae.training.engine.optimizer",),
    "stmae.training.order": ("stmae.training.data.batch_sampler",),
    "stmae.training.plan": ("stmae.training.commands.plan", "stmae.training.planning.memory"),
    "stmae.training.plots": ("stmae.training.engine.plots",),
    "stmae.training.probe": ("stmae.training.commands.probe", "stmae.training.evaluation.probes"),
    "stmae.training.processes": ("stmae.training.engine.distributed",),
    "stmae.training.randaugment": ("stmae.training.data.randaugment",),
    "stmae.training.reconstruct": ("stmae.training.commands.reconstruct", "stmae.training.evaluation.pictures"),
    "stmae.training.run_folder": ("stmae.training.engine.run_folder",),
    "stmae.training.sampling": ("stmae.training.data.clip_sampling",),
    "stmae.training.sharding": ("stmae.training.engine.fsdp",),
    "stmae.training.sources": ("stmae.training.data.decoders",),
    "stmae.training.stills": ("stmae.training.data.images",),
    "stmae.training.stopping": ("stmae.training.engine.signals", "stmae.training.data.loader"),
    "stmae.training.test": ("stmae.training.commands.test", "stmae.training.evaluation.classification"),
    "stmae.training.video": ("stmae.training.data.video",),
}

# Old module -> old name -> the name now, in one of the modules above or in the one named before the colon. What changed its
# arguments, too, has no old name.
NAMES = {
    "stmae.training.config": {
        "ABOUT": "stmae.training.config.preset_files:HEADER",
        "CheckConfig": "stmae.training.commands.data_check:CheckConfig",
        "FeaturesConfig": "stmae.training.commands.features:FeaturesConfig",
        "PlacesConfig": "stmae.training.config:DataLocationConfig",
        "ProbeConfig": "stmae.training.commands.probe:ProbeConfig",
        "TestConfig": "stmae.training.commands.test:TestConfig",
        "about_preset": "stmae.training.config:preset_header",
    },
    "stmae.training.data_check": {
        "Examination": "VideoCheck",
        "Facts": "VideoInfo",
        "spread": "value_range",
    },
    "stmae.training.flops": {"ceiling": "measured_peak_flops"},
    "stmae.training.loop": {"Watch": "EvaluationHook"},
    "stmae.training.order": {"Order": "ResumableBatchSampler"},
    "stmae.training.processes": {"ALONE": "SINGLE_PROCESS"},
    "stmae.training.reconstruct": {"load": "load_autoencoder"},
    "stmae.training.sharding": {
        "agree": "raise_in_all",
        "assemble": "gather_model",
        "like": "distribute_as",
        "read": "read_shards",
        "shard": "shard_model",
        "whole_tensor": "full_tensor",
        "write": "write_shards",
    },
    "stmae.training.test": {"scores_of": "predict", "top": "topk_accuracy"},
}


def find_name(module: str, name: str) -> object:
    """What ``name`` of the old ``module`` is now. Raises AttributeError where there is none."""
    current = NAMES.get(module, {}).get(name, name)
    owner, _, own_name = current.rpartition(":")
    if not name.startswith("__") and (owner or module in MODULES):
        for candidate in (owner,) if owner else MODULES[module]:
            found = vars(importlib.import_module(candidate))
            if own_name in found:
                if current != name:
                    warnings.warn(f"{module}.{name} is deprecated: use {candidate}.{own_name}", DeprecationWarning, stacklevel=3)
                return found[own_name]
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of MODULES, after all other finders: each a module that looks every name up where it is now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        warnings.warn(f"{name} is deprecated: use {' and '.join(MODULES[name])}", DeprecationWarning, stacklevel=2)
        module.__doc__ = f"Deprecated: see {' and '.join(MODULES[name])}."

        def __getattr__(attribute: str) -> object:
            return find_name(name, attribute)

        module.__dict__["__getattr__"] = __getattr__


def install() -> None:
    """Makes the old modules importable; called by ``stmae`` when it is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
