"""Fine-tuning: a classifier from a pre-trained encoder, or from random weights for comparison."""

import functools
import math

import torch

from stmae import checkpoint, ops
from stmae.models import VideoClassifier, VideoClassifierConfig

from ..config.wording import counted
from ..data.dataset import LabelledClips, as_video, require_readable
from ..data.mixup import mix, smooth_targets
from ..data.video_list import class_numbers, find_labelled_videos, find_mixture
from ..engine.launch import run_distributed
from ..engine.loop import EvaluationHook, Task, train
from ..engine.optimizer import layer_decay_groups, peak_learning_rate
from ..engine.run_folder import weights_file
from ..evaluation.classification import accuracy
from ..planning.flops import classifier_flops


def finetune(config):
    """Trains a classifier from a pre-trained encoder on labelled videos, or continues the run in ``config.output``.

    config: a FinetuneConfig. Under torchrun every process calls this with the same one.

    Returns the TrainState: ``done`` (false where a signal stopped the run), ``step``, and the accuracies ``before`` and
    ``after``. The classifier is in ``config.output``/model.safetensors; ``stmae.checkpoint.load`` reads it.

    Raises ValueError for data or settings that cannot be used, RunFolderError for an output folder that cannot, TrainingError
    where training cannot go on.
    """
    return run_distributed(_finetune, config)


def _finetune(config, processes, device, folder):
    locations = config.data_root, config.data_labels
    mixture = find_mixture(config.data, *locations, labelled=True)
    entries = mixture.entries
    numbers = class_numbers(config.data, config.data_labels)
    test_entries = find_labelled_videos(config.test_data, *locations, numbers) if config.test_data else []
    classes = config.model.num_classes or 1 + max(entry.label for entry in entries)
    for entry in (*entries, *test_entries):
        if entry.label >= classes:
            raise ValueError(f"{entry.path}: expected a label below {classes}, got {entry.label}")

    hooks = []
    if test_entries:
        test = functools.partial(accuracy, test_entries, config, processes, device)
        hooks.append(EvaluationHook(config.run.evaluate_every, test))
    task = finetuning_task(config, entries, classes, device, hooks)
    task.dataset.lists = mixture.weights
    for part in mixture.parts():
        require_readable(part, task.model.config.num_frames, config.clips)
    if processes.is_main:
        if numbers is not None:
            folder.save_classes(numbers)
        start = "random weights" if config.random_weights else config.checkpoint
        head = f"{counted(len(entries), 'video')} of {counted(classes, 'class')} in {config.data}, from {start}"
        print("\n".join([head, *mixture.describe()]))
    state = train(task, config, processes, device, folder)
    if state.done and test_entries and processes.is_main:
        views = f"{config.views.temporal} x {config.views.spatial} views"
        before, after = state.before["top1"], state.after["top1"]
        print(f"top-1 on {config.test_data}, {views}: {before:.1%} before, {after:.1%} after")
    return state


def finetuning_task(config, entries, classes, device, hooks=()):
    """The Task: the classifier on random, augmented clips of ``entries``, cross entropy with mixed and smoothed targets."""
    torch.manual_seed(config.seed)
    model = classifier(config, classes).to(device)
    model.backend = config.run.backend
    shape = model.config
    dataset = LabelledClips(
        entries,
        config.clips,
        frames=shape.num_frames,
        size=shape.image_size,
        seed=config.seed,
        augmentation=config.augmentation,
        patience=config.run.data_patience,
    )
    weight_decay, layer_decay = config.optimizer.weight_decay, config.layer_decay
    return Task(
        model=model,
        dataset=dataset,
        loss=functools.partial(classification_loss, config, shape),
        parameter_groups=functools.partial(layer_decay_groups, weight_decay=weight_decay, layer_decay=layer_decay),
        # A batch counts clips here: unlike in pre-training, the repeats of one video are counted.
        peak_lr=peak_learning_rate(config.optimizer, config.optimizer.batch * config.clips.repeats),
        repeats=config.clips.repeats,
        tokens=shape.num_tokens,
        flops=lambda epoch: classifier_flops(shape, kept_tokens(config, shape, epoch))[1],
        hooks=list(hooks),
        average_decay=config.average_decay,
    )


def classifier(config, classes):
    """The classifier to train: the checkpoint's encoder (positions interpolated and the kernel resampled where the clips differ)
    and a new head."""
    changes = {"num_classes": classes, "dropout": config.model.dropout, "drop_path": config.model.drop_path}
    for name in ("num_frames", "image_size", "tubelet_size"):
        if getattr(config.model, name) is not None:
            changes[name] = getattr(config.model, name)
    model = checkpoint.load_classifier(weights_file(config.checkpoint), **changes)
    if config.random_weights:
        model = VideoClassifier(VideoClassifierConfig.from_dict(model.config.to_dict()))
    return model


def kept_tokens(config, model_config, epoch):
    """Masked fine-tuning (paper, section 5.1): what is hidden falls from mask_ratio to nothing on a cosine."""
    ratio = config.mask_ratio * 0.5 * (1 + math.cos(math.pi * epoch / config.optimizer.epochs))
    return int(model_config.num_tokens * (1 - ratio))


def classification_loss(config, model_config, forward, batch, epoch):
    """Cross entropy [] with mixed, smoothed targets; clips masked by config.mask_ratio."""
    augmentation = config.augmentation
    targets = smooth_targets(batch["label"], model_config.num_classes, augmentation.label_smoothing)
    clips, targets = mix(batch["clips"], targets, augmentation.mixup, augmentation.cutmix)
    keep = None
    kept = kept_tokens(config, model_config, epoch)
    if kept < model_config.num_tokens:
        noise = torch.rand(len(clips), model_config.num_tokens, device=clips.device)
        keep, _ = ops.random_masking(noise, kept)
    logits = forward(as_video(clips), keep=keep)
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()
