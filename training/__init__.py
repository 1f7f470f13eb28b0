"""Training on real video, as functions and as the ``stmae`` command line.

    from stmae.training import PretrainConfig, from_preset, pretrain

    config = from_preset(PretrainConfig, "cpu-small", data="videos", output="run")
    state = pretrain(config)            # the same run as: stmae pretrain --preset cpu-small --data videos --output run

    from stmae.training import ClipConfig, PretrainClips, find_videos   # data sets without the command line

Imports go one way: commands -> tasks -> evaluation -> engine -> {data, planning, config} -> models -> ops. Importing this package
imports nothing else: a data worker must not pay for TensorBoard, nor ``stmae --help`` for a decoder. The names below are imported
when they are first asked for.
"""

import importlib

_MODULES = {  # name: the module it is in
    "AugmentationConfig": "config",
    "ClipConfig": "config",
    "DetectionConfig": "config",
    "EvaluationHook": "engine.loop",
    "FinetuneConfig": "config",
    "LabelledClips": "data.dataset",
    "PretrainClips": "data.dataset",
    "PretrainConfig": "config",
    "ResumableBatchSampler": "data.batch_sampler",
    "RunFolderError": "engine.run_folder",
    "Task": "engine.loop",
    "TrainState": "engine.train_state",
    "TrainingError": "engine.loop",
    "VideoError": "data.video",
    "ViewClips": "data.dataset",
    "as_video": "data.dataset",
    "encode": "evaluation.features",
    "find_labelled_videos": "data.video_list",
    "find_videos": "data.video_list",
    "finetune": "tasks.finetuning",
    "finetune_detector": "tasks.detection",
    "from_preset": "config",
    "pretrain": "tasks.pretraining",
    "training_loader": "data.loader",
    "write_reconstructions": "evaluation.pictures",
}

__all__ = list(_MODULES)


def __getattr__(name):
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_MODULES})
