"""Fine-tuning of an action detector, from a pre-trained encoder or from random weights for comparison."""

import functools

import torch
import torch.nn.functional as F

from stmae import checkpoint
from stmae.models import ActionDetector, ActionDetectorConfig

from ..config.wording import counted
from ..data.ava import BoxClips, read_annotations
from ..data.dataset import as_video
from ..engine.launch import run_distributed
from ..engine.loop import EvaluationHook, Task, train
from ..engine.optimizer import layer_decay_groups, peak_learning_rate
from ..engine.run_folder import weights_file
from ..evaluation.detection import BoxTest, detection_map
from ..planning.flops import classifier_flops


def finetune_detector(config):
    """Trains an action detector from a pre-trained encoder on annotated boxes, or continues the run in ``config.output``.

    config: a DetectionConfig. Under torchrun every process calls this with the same one.

    Returns the TrainState: ``done`` (false where a signal stopped the run), ``step``, and the mean average precisions ``before``
    and ``after``. The detector is in ``config.output``/model.safetensors; ``stmae.checkpoint.load`` reads it.

    Raises ValueError for data or settings that cannot be used, RunFolderError for an output folder that cannot, TrainingError
    where training cannot go on.
    """
    return run_distributed(_finetune_detector, config)


def _finetune_detector(config, processes, device, folder):
    frames = read_annotations(config.data, config.data_root, config.model.num_classes)
    hooks = []
    if config.test_data:
        test = BoxTest(config, config.test_data, config.model.num_classes)
        evaluate = functools.partial(detection_map, test, config.clips, processes, device, config.run.data_patience)
        hooks.append(EvaluationHook(config.run.evaluate_every, evaluate))
    task = detection_task(config, frames, device, hooks)
    if processes.is_main:
        start = "random weights" if config.random_weights else config.checkpoint
        boxes = counted(sum(len(f.boxes) for f in frames), "box")
        print(f"{counted(len(frames), 'frame')} with {boxes} in {config.data}, from {start}")
    state = train(task, config, processes, device, folder)
    if state.done and hooks and processes.is_main:
        boxes = "detected boxes" if config.test_boxes else "the annotations' own boxes"
        before, after = state.before["mAP"], state.after["mAP"]
        print(f"mAP at IoU 0.5 on {config.test_data}, {boxes}: {before:.1%} before, {after:.1%} after")
    return state


def detection_task(config, frames, device, hooks=()):
    """The Task: the detector on random crops of the clips around ``frames``, binary cross entropy for each box and action."""
    torch.manual_seed(config.seed)
    model = detector(config).to(device)
    model.backend = config.run.backend
    shape = model.config
    dataset = BoxClips(
        frames,
        config.clips,
        frames=shape.num_frames,
        size=shape.image_size,
        seed=config.seed,
        num_classes=shape.num_classes,
        patience=config.run.data_patience,
    )
    groups = functools.partial(layer_decay_groups, weight_decay=config.optimizer.weight_decay, layer_decay=config.layer_decay)
    return Task(
        model=model,
        dataset=dataset,
        loss=detection_loss,
        parameter_groups=groups,
        peak_lr=peak_learning_rate(config.optimizer, config.optimizer.batch),
        repeats=1,
        tokens=shape.num_tokens,
        flops=lambda epoch: classifier_flops(shape)[1],
        hooks=list(hooks),
    )


def detector(config):
    """The detector to train: the checkpoint's encoder (positions interpolated where the clips differ) and a new head."""
    changes = {name: getattr(config.model, name) for name in ("num_classes", "dropout", "drop_path", "roi_size")}
    for name in ("num_frames", "image_size"):
        if getattr(config.model, name) is not None:
            changes[name] = getattr(config.model, name)
    model = checkpoint.load_detector(weights_file(config.checkpoint), **changes)
    if config.random_weights:
        model = ActionDetector(ActionDetectorConfig.from_dict(model.config.to_dict()))
    return model


def detection_loss(forward, batch, epoch):
    """Binary cross entropy [], the mean over the valid boxes and all actions; 0 where no box is valid."""
    valid = batch["valid"]
    clip = torch.arange(len(valid), device=valid.device)[:, None].expand_as(valid)[valid]
    logits = forward(as_video(batch["clips"]), batch["boxes"][valid], clip)
    loss = F.binary_cross_entropy_with_logits(logits.float(), batch["actions"][valid], reduction="sum")
    return loss / max(1, logits.numel())
