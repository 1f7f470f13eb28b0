"""What a run is made of, as dataclasses whose sections check themselves; presets; and the parser of the command line."""

from stmae import deprecated as _deprecated

from .data import AugmentationConfig, ClipConfig, DataLocationConfig, FinetuneClipConfig, ViewConfig
from .detection import BoxClipConfig, BoxDataConfig, DetectionConfig, DetectorConfig
from .parser import from_preset, parse
from .preset_files import load_yaml, preset_header, preset_path, presets, read_settings
from .training import (
    ClassifierConfig,
    EncodingConfig,
    FinetuneConfig,
    FinetuneOptimizerConfig,
    OnlineProbeConfig,
    OptimizerConfig,
    PretrainConfig,
    PretrainRunConfig,
    RunConfig,
)
from .values import defaults, to_dict

__all__ = [
    "AugmentationConfig",
    "BoxClipConfig",
    "BoxDataConfig",
    "ClassifierConfig",
    "ClipConfig",
    "DataLocationConfig",
    "DetectionConfig",
    "DetectorConfig",
    "EncodingConfig",
    "FinetuneClipConfig",
    "FinetuneConfig",
    "FinetuneOptimizerConfig",
    "OnlineProbeConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "PretrainRunConfig",
    "RunConfig",
    "ViewConfig",
    "preset_header",
    "defaults",
    "from_preset",
    "load_yaml",
    "parse",
    "preset_path",
    "presets",
    "read_settings",
    "to_dict",
]


def __getattr__(name):
    return _deprecated.find_name(__name__, name)
