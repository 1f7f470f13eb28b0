"""``stmae test``: a classifier's accuracy on whole videos, each seen in several views."""

import functools
import json
from contextlib import nullcontext
from pathlib import Path

import torch

from stmae import checkpoint
from stmae.models import VideoClassifier

from ..config import TestConfig
from ..data.dataset import ViewClips, as_video
from ..data.video import VideoError
from ..data.video_list import find_labelled_videos
from ..engine.device import choose_device, choose_precision
from ..engine.run_folder import clips_of, weights_file

Config = TestConfig


def run(config):
    """Prints top-1 and top-5 of the averaged views and of single ones; returns them as a dict."""
    device = choose_device(config.device)
    dtype, precision = choose_precision(config.precision, device)
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype else nullcontext
    file = weights_file(config.checkpoint)
    model = checkpoint.load(file)
    if not isinstance(model, VideoClassifier):
        raise ValueError(f"{file} holds a {type(model).__name__}, and a test needs a classifier: see 'stmae finetune'")
    model.to(device)
    entries = find_labelled_videos(config.data, config.data_root, config.data_labels)
    scores, labels, skipped = scores_of(model, entries, clips_of(file, config.stride), config.views, device, autocast)
    for error in skipped:
        print(f"left out of the test: {error}")
    if not len(labels):
        raise ValueError(f"none of the {len(entries)} videos in {config.data} could be tested")
    single = torch.stack([scores_of_view.argmax(-1) == labels for scores_of_view in scores.unbind(1)]).float().mean().item()
    results = {
        "videos": len(labels),
        "left_out": len(skipped),
        "views": f"{config.views.temporal} x {config.views.spatial}",
        "top1": top(scores, labels, 1),
        "top5": top(scores, labels, 5),
        "top1_of_a_single_view": single,
    }
    print(
        f"{results['videos']} videos ({results['left_out']} left out), {precision}: top-1 {results['top1']:.2%}, "
        f"top-5 {results['top5']:.2%} with the scores of {results['views']} views averaged; top-1 of a single view {single:.2%}"
    )
    if config.output:
        Path(config.output).write_text(json.dumps(results, indent=1) + "\n")
    return results


@torch.no_grad()
def scores_of(model, entries, clips, views, device, autocast):
    """(scores [videos, views, classes] float32 after softmax, labels [videos], VideoErrors of the videos left out)."""
    dataset = ViewClips(
        entries,
        clips,
        frames=model.config.num_frames,
        size=model.config.image_size,
        temporal=views.temporal,
        spatial=views.spatial,
    )
    model.eval()
    scores, labels, skipped = [], [], []
    for number in range(len(dataset)):
        try:
            item = dataset[number]
        except VideoError as error:
            skipped.append(error)
            continue
        with autocast():
            logits = model(as_video(item["clips"].to(device)))
        scores.append(logits.float().softmax(-1).cpu())
        labels.append(item["label"])
    if not scores:
        return torch.zeros(0, views.temporal * views.spatial, model.config.num_classes), torch.zeros(0, dtype=torch.long), skipped
    return torch.stack(scores), torch.tensor(labels), skipped


def top(scores, labels, k):
    """Share of videos whose label is among the ``k`` highest of the scores [videos, views, classes] averaged over views."""
    best = scores.mean(1).topk(min(k, scores.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(-1).float().mean().item() if len(labels) else float("nan")
