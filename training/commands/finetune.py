"""``stmae finetune``: a classifier from a pre-trained encoder, or from random weights for comparison."""

import functools
import math

import torch

from stmae import checkpoint, ops
from stmae.models import VideoClassifier, VideoClassifierConfig

from ..config import FinetuneConfig, check_common
from ..data.dataset import LabelledClips, as_video, require_readable
from ..data.mixup import mix, smooth_targets
from ..data.video_list import find_labelled_videos
from ..engine import loop
from ..engine.device import choose_device
from ..engine.distributed import Processes
from ..engine.optimizer import layer_decay_groups, peak_learning_rate
from ..engine.run_folder import open_run
from ..planning.flops import classifier_flops
from .test import scores_of, top

Config = FinetuneConfig
ERRORS = (loop.TrainingError,)


def run(config):
    """Fine-tune as ``config`` (FinetuneConfig) says, or continue the run in its output folder. Returns the counters of
    the run."""
    check_common(config)
    processes = Processes()
    device = processes.own_device(choose_device(config.run.device))
    with processes.joined(device):
        return train(config, processes, device)


def train(config, processes, device):
    """``run`` inside the group. A function of its own, so that nothing of the model is alive when the group is left."""
    folder = open_run(config, processes)
    places = config.data_root, config.data_labels
    entries = find_labelled_videos(config.data, *places)
    test_entries = find_labelled_videos(config.test_data, *places) if config.test_data else []
    classes = config.model.num_classes or 1 + max(entry.label for entry in entries)
    for entry in (*entries, *test_entries):
        if entry.label >= classes:
            raise ValueError(f"{entry.path}: expected a label below {classes}, got {entry.label}")

    torch.manual_seed(config.seed)
    model = classifier(config, classes).to(device)
    model.backend = config.run.backend
    model_config = model.config
    frames, size = model_config.num_frames, model_config.image_size
    require_readable(entries, frames, config.clips)
    if processes.first:
        start = "random weights" if config.random_weights else config.checkpoint
        print(f"{len(entries)} videos of {classes} classes in {config.data}, from {start}")
    dataset = LabelledClips(entries, config.clips, frames=frames, size=size, seed=config.seed, augmentation=config.augmentation)
    counters = loop.train(
        config,
        processes,
        device,
        folder,
        model=model,
        groups=functools.partial(layer_decay_groups, weight_decay=config.optimizer.weight_decay, layer_decay=config.layer_decay),
        dataset=dataset,
        # A batch counts clips here: unlike in pre-training, the repeats of one video are counted.
        peak=peak_learning_rate(config.optimizer, config.optimizer.batch * config.clips.repeats),
        loss_of=functools.partial(loss_of, config, model_config),
        watches=[loop.Watch(config.run.evaluate_every, functools.partial(accuracy, test_entries, config, processes, device))]
        if test_entries
        else [],
        repeats=config.clips.repeats,
        tokens=model_config.num_tokens,
        flops=lambda epoch: classifier_flops(model_config, kept_tokens(config, model_config, epoch))[1],
        average_decay=config.average_decay,
    )
    if counters["done"] and test_entries and processes.first:
        before, after = counters["before"], counters["after"]
        print(
            f"top-1 on {config.test_data}, {config.views.temporal} x {config.views.spatial} views: "
            f"{before['top1']:.1%} before, {after['top1']:.1%} after"
        )
    return counters


def classifier(config, classes):
    """The classifier to train: the checkpoint's encoder (positions interpolated where the clips differ) and a new head."""
    changes = {"num_classes": classes, "dropout": config.model.dropout, "drop_path": config.model.drop_path}
    for name in ("num_frames", "image_size"):
        if getattr(config.model, name) is not None:
            changes[name] = getattr(config.model, name)
    model = checkpoint.load_classifier(config.checkpoint, **changes)
    if config.random_weights:
        model = VideoClassifier(VideoClassifierConfig.from_dict(model.config.to_dict()))
    return model


def kept_tokens(config, model_config, epoch):
    """Masked fine-tuning (paper, section 5.1): what is hidden falls from mask_ratio to nothing on a cosine."""
    ratio = config.mask_ratio * 0.5 * (1 + math.cos(math.pi * epoch / config.optimizer.epochs))
    return int(model_config.num_tokens * (1 - ratio))


def loss_of(config, model_config, forward, batch, epoch):
    """Cross entropy [] with mixed, smoothed targets; clips masked while config.mask_ratio says so."""
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


def accuracy(entries, config, processes, device, model, autocast, log, step):
    """Top-1 and top-5 on all of ``entries``, of which each process takes its share."""
    found = processes.gather(scores_of(model, processes.share(entries), config.clips, config.views, device, autocast))
    scores, labels, skipped = zip(*found)
    for error in sum(skipped, []):
        log.say(f"left out of the test: {error}")
    scores, labels = torch.cat(scores), torch.cat(labels)
    return {"top1": top(scores, labels, 1), "top5": top(scores, labels, 5)}
