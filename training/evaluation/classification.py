"""A classifier's scores and accuracy on videos, each seen in several views."""

import functools

import torch

from ..data.dataset import ViewClips, as_video
from ..data.outage import PATIENCE
from ..data.video import VideoError


@torch.no_grad()
def predict(model, entries, clips, views, device, autocast, *, patience=PATIENCE):
    """(scores [videos, views, classes] float32 after softmax, labels [videos], VideoErrors of the videos left out). ``patience``
    as for ViewClips."""
    dataset = ViewClips(
        entries,
        clips,
        frames=model.config.num_frames,
        size=model.config.image_size,
        temporal=views.temporal,
        spatial=views.spatial,
        crop_pct=views.crop_pct,
        patience=patience,
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


def topk_accuracy(scores, labels, k):
    """Fraction of videos whose label is among the ``k`` highest of the scores [videos, views, classes] averaged over views."""
    best = scores.mean(1).topk(min(k, scores.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(-1).float().mean().item() if len(labels) else float("nan")


def accuracy(entries, config, processes, device, model, autocast, logger, step):
    """{"top1", "top5"} on all of ``entries``, each process classifying a shard of them. An EvaluationHook's ``evaluate``, once
    the first four are given."""
    settings = config.clips, config.views, device, autocast
    own = functools.partial(predict, model, processes.shard(entries), *settings, patience=config.run.data_patience)
    scores, labels, skipped = zip(*processes.gather_results(own))
    for error in sum(skipped, []):
        logger.info(f"left out of the test: {error}")
    scores, labels = torch.cat(scores), torch.cat(labels)
    return {"top1": topk_accuracy(scores, labels, 1), "top5": topk_accuracy(scores, labels, 5)}
