"""Mean average precision of scored boxes, as AVA's challenge and PASCAL VOC (from 2010 on) count it.

COCO's differs: there a detection takes the best box that is still free, and precision is read at 101 recalls. So its libraries
give other numbers, and this is written here.
"""

import numpy as np

IOU = 0.5


def mean_average_precision(truth, detected, num_classes):
    """{label: average precision} of the classes that have a box in the ground truth.

    truth: {frame: (boxes [n, 4], labels: a tuple for each box)}; a frame is any key.
    detected: {frame: (boxes [m, 4], scores [m, num_classes])}; frames without ground truth count as well.

    A class's detections are taken by falling score. One is right where the box of its class in its frame that it overlaps most
    has an intersection over union of 0.5 or more and no detection before it had that box. Average precision is the area under
    precision over recall, precision being the highest at this recall or beyond.
    """
    frames = list(dict.fromkeys([*truth, *detected]))
    overlaps = {frame: iou(detected[frame][0], truth[frame][0]) for frame in frames if frame in truth and frame in detected}
    results = {}
    for label in range(num_classes):
        own = {frame: [i for i, labels in enumerate(truth[frame][1]) if label in labels] for frame in truth}
        count = sum(map(len, own.values()))
        if not count:
            continue
        scores, right = [], []
        for frame in frames:
            if frame not in detected:
                continue
            values = np.asarray(detected[frame][1])[:, label]
            order = np.argsort(-values, kind="stable")
            scores.append(values[order])
            columns = own.get(frame, [])
            overlap = overlaps[frame][:, columns] if columns else np.zeros((len(values), 0))
            right.append(_right(overlap[order]))
        results[label] = _area(np.concatenate(scores or [[]]), np.concatenate(right or [[]]), count)
    return results


def iou(a, b):
    """Intersection over union [n, m] of boxes a [n, 4] and b [m, 4]; 0 where both are empty."""
    a, b = np.asarray(a, np.float64).reshape(-1, 1, 4), np.asarray(b, np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inter = sides.clip(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def _right(overlap):
    """bool [n]: which detections, in the order of their scores, are right; overlap: [n, m] with the frame's boxes."""
    taken, right = set(), np.zeros(len(overlap), bool)
    for index, row in enumerate(overlap):
        best = int(row.argmax()) if len(row) else None
        if best is not None and row[best] >= IOU and best not in taken:
            taken.add(best)
            right[index] = True
    return right


def _area(scores, right, count):
    right = right[np.argsort(-scores, kind="stable")].astype(bool)
    hits = right.cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float(highest[right].sum() / count)  # recall grows by 1 / count at each that is right
