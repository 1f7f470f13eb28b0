"""Which videos a data set holds. A data set is one of

- a folder, searched recursively for videos and images (an image is a still clip); where labels are needed, FOLDER/CLASS/FILE;
- a list file with one video a line: ``path label``, ``path,label`` or the path alone, as mae_st and VideoMAE write them, or
  VideoMAE's ``frame_folder total_frames label`` for videos that were taken apart into numbered images;
- Something-Something's ``train.json`` or ``validation.json``.

Paths in a list are relative to the list, or to the ``root`` given. They may hold spaces and commas, so a line is split at its
**last** separators, and only where what follows is an integer or where nothing else fits.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from .images import IMAGE_EXTENSIONS
from .video import EXTENSIONS

# Something-Something v2 as it is distributed, looked for beside its train.json and one folder up.
SOMETHING_FOLDERS = ("videos", "20bn-something-something-v2")
SOMETHING_LABELS = ("labels.json", "something-something-v2-labels.json")
SOMETHING_SUFFIXES = (".webm", ".mp4")


class Entry(NamedTuple):
    path: str
    label: int  # -1: none
    frames: int = 0  # of a folder of numbered images, which ``path`` then is; 0: path is a video or an image


def find_videos(source, root=None, labels=None):
    """The videos of ``source`` (folder, list file or Something-Something's json) as a list of Entry, in an order that depends
    on nothing but names.

    root: the folder that a list's relative paths start from, or where Something-Something's videos lie; None: the list's own,
        or a folder found beside the json.
    labels: the numbers of the classes, for class folders and Something-Something: a json object {class: number}, or a text
        file with a class a line; None: in the order of the folders' names, or the labels.json found beside the json.

    Raises ValueError when there is no such folder or list, when it lists nothing, or when a line of the list is not understood.
    """
    return _find(Path(source), root, labels, labelled=False)


def find_labelled_videos(source, root=None, labels=None):
    """As ``find_videos``, every one with a label: a list's own, Something-Something's, or, in a folder, the number of the
    class folder the video lies in.

    Class folders are numbered in the order of their names, unless ``labels`` numbers them. Raises ValueError where a label is
    missing.
    """
    source = Path(source)
    entries = _find(source, root, labels, labelled=True)
    if source.is_dir():
        parts = [Path(entry.path).relative_to(source).parts for entry in entries]
        for entry, part in zip(entries, parts):
            if len(part) == 1:
                raise ValueError(f"{entry.path} lies in no class folder: expected {source}/CLASS/VIDEO")
        names = sorted({part[0] for part in parts})
        numbers = {name: number for number, name in enumerate(names)} if labels is None else read_labels(labels)
        for name in names:
            if name not in numbers:
                raise ValueError(f"{labels} numbers {len(numbers)} classes, and {source / name} is none of them")
        return [entry._replace(label=numbers[part[0]]) for entry, part in zip(entries, parts)]
    for entry in entries:
        if entry.label < 0:
            raise ValueError(
                f"{source}: expected a label of 0 or more for {entry.path}, got {entry.label if entry.label != -1 else 'none'}"
            )
    return entries


def read_labels(file):
    """{class: number} of a json object, whose numbers may be strings, or of a text file with a class a line, from 0."""
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            numbers = {name: int(number) for name, number in json.loads(text).items()}
        else:
            numbers = {name: number for number, name in enumerate(line.strip() for line in text.splitlines() if line.strip())}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = getattr(error, "strerror", None) or "expected a json object {class: number} or a text file with a class a line"
        raise ValueError(f"data_labels: cannot read {file} ({why})") from error
    if not numbers or min(numbers.values()) < 0:
        raise ValueError(f"data_labels: expected classes with numbers of 0 or more in {file}, got {numbers or 'none'}")
    return numbers


def _find(source, root, labels, labelled):
    if root is not None and not Path(root).is_dir():
        raise ValueError(f"data_root: there is no folder {root}")
    if source.is_dir():
        return _in_folder(source)
    suffix = source.suffix.lower()
    if suffix in EXTENSIONS | IMAGE_EXTENSIONS and source.is_file():
        return [Entry(str(source), -1)]
    if not source.is_file():
        raise ValueError(f"no such folder or list file: {source}")
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is neither a folder, a video, an image nor a list of them in UTF-8") from error
    if suffix == ".json":
        return _something(source, text, root, labels, labelled)
    folder = source.parent if root is None else Path(root)
    entries = [
        _entry(line.strip(), source, folder, number)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not entries:
        raise ValueError(f"the list {source} names no videos")
    return entries


def _in_folder(source):
    wanted = EXTENSIONS | IMAGE_EXTENSIONS
    entries = [
        Entry(os.path.join(folder, name), -1)
        for folder, _, names in os.walk(source, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in wanted and not name.startswith(".")
    ]
    entries.sort()
    if not entries:
        raise ValueError(f"no videos in folder {source} (looked for {' '.join(sorted(wanted))})")
    return entries


def _entry(line, source, folder, number):
    path, label = _split(line, "," if "," in line and _is_integer(line.rpartition(",")[2]) else None)
    if not _is_integer(label) or not path:
        # No label: the whole line is the path. A file name with an extension cannot be mistaken for a label.
        if not _is_file_name(line):
            raise ValueError(
                f"{source}, line {number}: expected 'path label', 'path,label', a path or 'folder frames label', got {line!r}"
            )
        path, label = line, "-1"
    frames = 0
    if not _is_file_name(path):  # a folder of frames, where a number stands before the label; else a video with no extension
        before, count = _split(path, "," if "," in path and _is_integer(path.rpartition(",")[2]) else None)
        if before and _is_integer(count) and int(count) > 0:
            path, frames = before, int(count)
    return Entry(os.path.join(folder, path.strip().strip('"')), int(label), frames)


def _split(text, separator):
    """At the last separator; None: white space."""
    parts = text.rsplit(separator, 1)
    return (parts[0], parts[1].strip()) if len(parts) == 2 else ("", text)


def _is_integer(text):
    return text.strip().lstrip("-").isdigit()


def _is_file_name(text):
    return os.path.splitext(text.strip().strip('"'))[1].lower() in EXTENSIONS | IMAGE_EXTENSIONS


def _something(source, text, root, labels, labelled):
    """Something-Something's entries: {"id": "78687", "template": "Holding [something]", ...}; its test.json has ids alone."""
    try:
        items = json.loads(text)
        names = [str(item["id"]) for item in items]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{source}: expected Something-Something\'s json, a list of {{"id": ..., "template": ...}}') from error
    if not names:
        raise ValueError(f"the list {source} names no videos")
    beside = (source.parent, source.parent.parent)
    if root is None:
        places = [folder / name for folder in beside for name in SOMETHING_FOLDERS] + [source.parent]
        root = next((place for place in places if place.is_dir() and _has_one(place, names)), None)
        if root is None:
            raise ValueError(
                f"{source}: none of its videos ({names[0]}.webm, ...) lies in {', '.join(map(str, places))}: "
                "name their folder with --data_root"
            )
    # One listing instead of a question for each of 220,000 files, which takes minutes on a network's disk.
    files = {}
    for file in os.scandir(root):
        stem, suffix = os.path.splitext(file.name)
        if suffix.lower() in SOMETHING_SUFFIXES:
            files[stem] = file.path
    if not any(name in files for name in names):
        raise ValueError(f"data_root: none of the videos of {source} ({names[0]}.webm, ...) lies in {root}")
    if labels is None:
        found = [folder / name for folder in beside for name in SOMETHING_LABELS if (folder / name).is_file()]
        labels = found[0] if found else None
    if labels is None and labelled:
        places = " or ".join(str(folder / SOMETHING_LABELS[0]) for folder in beside)
        raise ValueError(f"{source}: there is no {places} with the numbers of its classes: name the file with --data_labels")
    numbers = None if labels is None else read_labels(labels)
    entries = []
    for name, item in zip(names, items):
        label = -1
        if numbers is not None and "template" in item:
            template = str(item["template"]).replace("[", "").replace("]", "")
            if template not in numbers:
                raise ValueError(f"{labels} has no number for {template!r}, the template of video {name} in {source}")
            label = numbers[template]
        # A video that is not there is an entry all the same: it is named, counted and replaced as any broken one.
        entries.append(Entry(files.get(name) or os.path.join(root, name + SOMETHING_SUFFIXES[0]), label))
    return entries


def _has_one(folder, names):
    return any((folder / f"{name}{suffix}").is_file() for name in names[:100] for suffix in SOMETHING_SUFFIXES)
