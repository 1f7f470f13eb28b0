"""``stmae test``: a classifier's accuracy on videos, each seen in several views."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from stmae import checkpoint
from stmae.models import VideoClassifier

from ..config import DataLocationConfig, ViewConfig
from ..config.checks import require_device, require_positive, require_text
from ..config.wording import counted
from ..data.video_list import find_labelled_videos, is_folder
from ..engine.device import choose_device, choose_precision
from ..engine.outputs import is_results, require_own, write_results
from ..engine.run_folder import clips_of, weights_file
from ..evaluation.classification import predict, topk_accuracy


@dataclass(kw_only=True)
class TestConfig(DataLocationConfig):
    """The test: of what, on what."""

    __test__ = False  # not pytest's

    checkpoint: str
    """a classifier: a run's folder, or a model.safetensors"""
    data: str
    """labelled videos: a list file with a line 'path label' each, Something-Something's json, or a folder
    with a folder for each class"""
    output: str | None = None
    """a JSON file for the results"""
    stride: int | None = None
    """every stride-th frame; null: as the classifier was trained, else 4"""
    views: ViewConfig = field(default_factory=lambda: ViewConfig(temporal=7, spatial=3))
    device: str = "auto"
    """'auto': cuda where there is one, else cpu"""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 autocast, or float32; 'auto': bf16, but float32 on a CPU without bf16 instructions"""

    def __post_init__(self):
        super().__post_init__()
        require_text(self, "checkpoint", "data", "output")
        require_positive(self, "stride")
        require_device(self)


Config = TestConfig


def run(config):
    """Prints top-1 and top-5 of the averaged views and of single ones; returns them as a dict."""
    if config.output:
        require_own(config.output, is_results("top1", "views"))
    device = choose_device(config.device)
    dtype, precision = choose_precision(config.precision, device)
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype else nullcontext
    file = weights_file(config.checkpoint)
    model = checkpoint.load(file)
    if not isinstance(model, VideoClassifier):
        raise ValueError(f"{file} holds a {type(model).__name__}, and a test needs a classifier: see 'stmae finetune'")
    model.to(device)
    entries = labelled_videos(config, file, model.config.num_classes)
    scores, labels, skipped = predict(model, entries, clips_of(file, config.stride), config.views, device, autocast)
    for error in skipped:
        print(f"left out of the test: {error}")
    if not len(labels):
        raise ValueError(f"none of the videos in {config.data} could be tested, {len(entries)} in all")
    single = torch.stack([view.argmax(-1) == labels for view in scores.unbind(1)]).float().mean().item()
    results = {
        "videos": len(labels),
        "left_out": len(skipped),
        "views": f"{config.views.temporal} x {config.views.spatial}",
        "top1": topk_accuracy(scores, labels, 1),
        "top5": topk_accuracy(scores, labels, 5),
        "top1_of_a_single_view": single,
    }
    print(
        f"{counted(results['videos'], 'video')} ({results['left_out']} left out), {precision}: top-1 {results['top1']:.2%}, "
        f"top-5 {results['top5']:.2%} with the scores of {results['views']} views averaged; top-1 of a single view {single:.2%}"
    )
    if config.output:
        write_results(config.output, results)
    return results


def labelled_videos(config, file, num_classes):
    """The entries of ``config.data``, labelled as the classifier was trained. Raises ValueError for a label that it lacks,
    and for class folders whose numbers are unknown."""
    labels, beside = config.data_labels, Path(file).parent / "classes.json"
    if labels is None and beside.is_file() and is_folder(config.data):
        labels = beside
    entries = find_labelled_videos(config.data, config.data_root, labels)
    if labels is None and is_folder(config.data):
        found = len({entry.label for entry in entries})
        if found != num_classes:
            raise ValueError(
                f"{config.data} has {counted(found, 'class folder')} and the classifier {counted(num_classes, 'class')}: name "
                f"their numbers with --data_labels (there is no {beside})"
            )
    for entry in entries:
        if entry.label >= num_classes:
            raise ValueError(f"{entry.path}: expected a label below {num_classes}, as the classifier has, got {entry.label}")
    return entries
