"""An action detector's scores of boxes, and their mean average precision."""

import functools

import torch

from ..data.ava import BoxViews, read_annotations, read_classes, read_detections, read_excluded
from ..data.dataset import as_video
from ..data.outage import PATIENCE
from ..data.video import VideoError
from .average_precision import mean_average_precision


class BoxTest:
    """What a test compares: ``truth``, the annotated key frames, and ``frames``, those whose boxes are scored.

    config: a BoxDataConfig; file: the annotations. Raises ValueError.
    """

    def __init__(self, config, file, num_classes):
        excluded = read_excluded(config.excluded) if config.excluded else set()

        def kept(key_frames):
            return [frame for frame in key_frames if (frame.name, frame.second) not in excluded]

        self.truth = kept(read_annotations(file, config.data_root, num_classes))
        self.frames = self.truth
        if config.test_boxes:
            annotated = {(frame.name, frame.second) for frame in self.truth}
            detected = kept(read_detections(config.test_boxes, config.data_root, config.box_threshold))
            self.frames = [frame for frame in detected if (frame.name, frame.second) in annotated]
            if not self.frames:
                raise ValueError(f"{config.test_boxes}: none of its frames is one of {file}")
        if not self.truth:
            raise ValueError(f"{file}: every frame is excluded")
        labels = read_classes(config.classes) if config.classes else range(num_classes)
        self.labels = [label for label in labels if label < num_classes]


@torch.no_grad()
def score_boxes(model, frames, clips, device, autocast, *, patience=PATIENCE):
    """({(video, second): (boxes, scores [n, num_classes])}, VideoErrors of the frames left out). patience: as for BoxViews."""
    views = BoxViews(frames, clips, frames=model.config.num_frames, size=model.config.image_size, patience=patience)
    model.eval()
    scored, skipped = {}, []
    for number, frame in enumerate(frames):
        try:
            item = views[number]
        except VideoError as error:
            skipped.append(error)
            continue
        boxes = item["boxes"].to(device)
        with autocast():
            logits = model(as_video(item["clips"].to(device)), boxes, torch.zeros(len(boxes), dtype=torch.int64, device=device))
        scores = logits.float().sigmoid().cpu().numpy() * frame.scores[:, None]
        scored[frame.name, frame.second] = frame.boxes, scores
    return scored, skipped


def box_map(test, scored):
    """{"mAP", "classes"}: the mean of the average precisions of those of the test's classes that its annotations show, and how
    many these are; and {label: average precision}."""
    truth = {(frame.name, frame.second): (frame.boxes, frame.actions) for frame in test.truth}
    found = mean_average_precision(truth, scored, 1 + max(test.labels))
    found = {label: value for label, value in found.items() if label in set(test.labels)}
    mean = sum(found.values()) / len(found) if found else float("nan")
    return {"mAP": mean, "classes": len(found)}, found


def detection_map(test, clips, processes, device, patience, model, autocast, logger, step):
    """{"mAP", "classes"}, each process scoring a shard of the test's frames. An EvaluationHook's ``evaluate``, once the first
    five are given."""
    own = functools.partial(score_boxes, model, processes.shard(test.frames), clips, device, autocast, patience=patience)
    parts, skipped = zip(*processes.gather_results(own))
    for error in sum(skipped, []):
        logger.info(f"left out of the test: {error}")
    return box_map(test, {key: value for part in parts for key, value in part.items()})[0]
