"""AVA (Gu et al., 2018): what persons in boxes do, in one frame a second of long videos.

Annotations are lines ``video,second,x1,y1,x2,y2,action,person``; detected persons are lines ``video,second,x1,y1,x2,y2,,score``.
Boxes are relative to the frame's width and height, actions count from 1.
"""

import csv
import functools
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from .dataset import RandomClips
from .decoders import open_entry
from .outage import PATIENCE, PatientReader
from .transforms import Crop, view_box
from .video import EXTENSIONS, VideoError

COLUMNS = 8


class KeyFrame(NamedTuple):
    """The frame of a video that has boxes: ``second`` of ``name``, boxes float32 [n, 4] (x1, y1, x2, y2), and for each box its
    ``actions``, a tuple of labels from 0, or its ``score`` [n] as a person."""

    path: str
    name: str
    second: int
    boxes: np.ndarray
    actions: tuple
    scores: np.ndarray
    frames: int = 0  # as of an Entry: the path is a video
    member: None = None


def read_annotations(file, root, num_classes):
    """[KeyFrame] of an annotation file, in the order of their first lines; lines of the same box are one box with several
    actions. Raises ValueError with file and line."""
    frames = {}
    for place, (name, second, box, action, person) in _rows(file):
        label = _integer(action, 1, num_classes, place, "action") - 1 if action else None
        boxes = frames.setdefault((name, second), {})
        actions = boxes.setdefault((box, person), [])
        if label is not None and label not in actions:
            actions.append(label)
    return _key_frames(file, root, frames, lambda found: (tuple(map(tuple, found.values())), np.ones(len(found), np.float32)))


def count_key_frames(file):
    """How many frames an annotation file names, wherever their videos are. Raises ValueError with file and line."""
    return len({(name, second) for _, (name, second, *_) in _rows(file)})


def read_detections(file, root, threshold):
    """[KeyFrame] of a file of detected persons, of whom those below the score ``threshold`` are left out. Raises ValueError with
    file and line."""
    frames = {}
    for place, (name, second, box, _, score) in _rows(file):
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise ValueError(f"{place}: expected a score from 0 to 1 in the last column, got {score!r}")
        if value >= threshold:
            frames.setdefault((name, second), {})[box, len(frames.get((name, second), ()))] = value
    if not frames:
        raise ValueError(f"{file}: no box has a score of {threshold:g} or more")
    return _key_frames(file, root, frames, lambda found: (((),) * len(found), np.array(list(found.values()), np.float32)))


def read_excluded(file):
    """{(video, second)} of a file of excluded frames, lines ``video,second``."""
    found = set()
    for place, row in _csv(file):
        if len(row) != 2:
            raise ValueError(f"{place}: expected 'video,second', got {','.join(row)!r}")
        found.add((row[0], _integer(row[1], 0, 10**6, place, "second")))
    return found


def read_classes(file):
    """[label] from 0 of the actions of a label map (``ava_action_list_v2.2_for_activitynet_2019.pbtxt``: ``id: 1``), those that a
    test counts."""
    try:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"classes: cannot read {file} ({error.strerror})") from error
    labels = sorted({int(number) - 1 for number in re.findall(r"\b(?:label_)?id:\s*([0-9]{1,6})\b", text)})
    if not labels or labels[0] < 0:
        raise ValueError(f"classes: expected a label map with lines 'id: NUMBER' from 1 in {file}")
    return labels


def _csv(file):
    """("FILE, line N", columns) of the lines that are not blank; a first line with names of columns is passed over."""
    try:
        with open(file, encoding="utf-8-sig", errors="replace", newline="") as opened:
            reader = csv.reader(opened)
            for row in reader:
                if row and not (reader.line_num == 1 and row[0].strip().lower() in ("video", "video_id")):
                    yield f"{file}, line {reader.line_num}", [cell.strip() for cell in row]
    except (OSError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _rows(file):
    for place, row in _csv(file):
        if len(row) != COLUMNS:
            raise ValueError(
                f"{place}: expected {COLUMNS} columns 'video,second,x1,y1,x2,y2,action,person' (of detected persons: no action, "
                f"and a score), got {len(row)}"
            )
        second = row[1].partition(".")[0] if re.fullmatch(r"[0-9]+\.0*", row[1]) else row[1]
        try:
            box = tuple(map(float, row[2:6]))
        except ValueError:
            box = (math.nan,) * 4
        x1, y1, x2, y2 = box
        if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
            raise ValueError(f"{place}: expected a box x1,y1,x2,y2 from 0 to 1, x1 <= x2 and y1 <= y2, got {','.join(row[2:6])}")
        if not row[0]:
            raise ValueError(f"{place}: expected a video's name in the first column, got none")
        yield place, (row[0], _integer(second, 0, 10**6, place, "second"), box, row[6], row[7])


def _integer(text, low, high, place, name):
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ValueError(f"{place}: expected a whole number from {low} to {high} as {name}, got {text!r}")
    return int(text)


def _key_frames(file, root, frames, rest):
    if not frames:
        raise ValueError(f"the list {file} names no frames")
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise ValueError(f"data_root: cannot read the folder {root} ({error.strerror})") from error
    files = {os.path.splitext(name)[0]: name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS}
    if not any(name in files for name, _ in frames):
        raise ValueError(f"data_root: none of the videos of {file} ({next(iter(frames))[0]}, ...) lies in {root}")
    made = []
    for (name, second), found in frames.items():
        # A video that is not there is named where it is opened, as any other that cannot be read.
        path = os.path.join(root, files.get(name, f"{name}.mp4"))
        boxes = np.array([box for box, _ in found], np.float32).reshape(-1, 4)
        made.append(KeyFrame(path, name, second, boxes, *rest(found)))
    return made


def clip_times(second, frames, stride, fps):
    """Times [frames], in seconds, of the frames around ``second``: every ``stride``-th of ``fps`` frames a second, as SlowFast's
    (from half the span before it)."""
    return second + (np.arange(frames) - frames / 2) * stride / fps


def frames_around(video, second, frames, clips):
    """Indices int64 [frames] of those that are shown at the times of a clip around ``second`` of the video; before its start and
    after its end the first and the last. Raises VideoError where the video does not reach to ``second``."""
    times = video.times - video.times[0]
    if not 0 <= second <= times[-1] + 1:
        raise VideoError(video.path, f"its {times[-1]:.0f} seconds do not reach to the second {second:g} of its annotations")
    wanted = clip_times(second, frames, clips.stride, clips.fps)
    return np.searchsorted(times, wanted + 1e-6, side="right").clip(1, len(times)) - 1


def read_clip(frame, choose_crop, clips, out):
    """Writes the clip around the key frame ``frame`` to ``out`` uint8 [1, T, h, w, C]. Returns its boxes, relative to the crop;
    ``choose_crop`` is called with the height and width of the frames and gives the Crop. Raises VideoError."""
    chosen = []
    with open_entry(frame, clips.decoder, clips.pixels) as video:
        wanted = frames_around(video, frame.second - clips.start_second, out.shape[1], clips)

        def crops(height, width):
            crop = choose_crop(height, width)
            chosen[:] = [to_crop(frame.boxes, crop.box, height, width, crop.flip)]
            return [crop]

        video.clips([wanted], crops, out.numpy())
    return chosen[0]


def to_crop(boxes, box, height, width, mirrored=False):
    """``boxes`` float32 [n, 4], relative to the frame [height, width], as relative to the crop ``box`` (top, left, h, w), cut off
    at its edges."""
    top, left, h, w = box
    out = boxes * np.array([width, height, width, height], np.float32)
    out = (out - np.array([left, top, left, top], np.float32)) / np.array([w, h, w, h], np.float32)
    out = out.clip(0, 1)
    return np.stack([1 - out[:, 2], out[:, 1], 1 - out[:, 0], out[:, 3]], 1) if mirrored else out


class BoxClips(RandomClips):
    """Random crops of the clips around key frames, for training; indexed by (epoch, key frame's number).

    An item is as of RandomClips, with ``boxes`` float32 [1, P, 4], ``actions`` float32 [1, P, num_classes] and ``valid`` bool
    [1, P], P being the highest number of boxes in a frame: boxes of which the crop shows nothing are not valid.
    """

    def __init__(self, key_frames, clips, *, frames, size, seed, num_classes, patience=PATIENCE):
        super().__init__(key_frames, clips, frames=frames, size=size, seed=seed, patience=patience)
        self.num_classes, self.most = num_classes, max(len(frame.boxes) for frame in key_frames)

    @functools.cached_property
    def layout(self):
        return {
            "clips": ((1, self.frames, *self.size, 3), torch.uint8),
            "boxes": ((1, self.most, 4), torch.float32),
            "actions": ((1, self.most, self.num_classes), torch.float32),
            "valid": ((1, self.most), torch.bool),
        }

    def _read(self, epoch, number, out):
        frame = self.entries[number]
        self.raise_if_left_out(frame)

        def random_square(height, width):
            rng = np.random.default_rng([self.seed, epoch, number, 0])
            _, _, h, w = view_box(height, width, self.size, crop_pct=rng.uniform(*self.clips.crop_pct))
            box = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
            return Crop(box, self.size, bool(self.clips.flip and rng.random() < 0.5))

        cut = torch.from_numpy(read_clip(frame, random_square, self.clips, out["clips"]))
        boxes, actions = out["boxes"][0].zero_(), out["actions"][0].zero_()
        boxes[: len(cut)] = cut
        for row, labels in zip(actions, frame.actions):
            row[list(labels)] = 1
        out["valid"][0] = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return {"short": []}


class BoxViews(Dataset):
    """The middle of the clip around each key frame, for evaluation. Item i is a dict: ``clips`` uint8 [1, T, H, W, C] and
    ``boxes`` float32 [n, 4], relative to it; a box beyond it is cut off. Raises VideoError, and
    DataAwayError as ViewClips."""

    def __init__(self, key_frames, clips, *, frames, size, patience=PATIENCE):
        self.key_frames, self.clips, self.frames, self.size = key_frames, clips, frames, tuple(size)
        self.patient = PatientReader(patience)

    def __len__(self):
        return len(self.key_frames)

    def __getitem__(self, number):
        frame = self.key_frames[number]

        def middle(height, width):
            return Crop(view_box(height, width, self.size), self.size)

        clip = torch.empty((1, self.frames, *self.size, 3), dtype=torch.uint8)
        boxes = self.patient.read(frame, lambda: read_clip(frame, middle, self.clips, clip))
        return {"clips": clip, "boxes": torch.from_numpy(boxes)}
