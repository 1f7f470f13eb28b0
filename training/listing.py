"""Which videos a data set holds: a folder searched recursively, or a list file.

A list has one video a line, ``path label`` or ``path,label`` or the path alone, relative to the list. Paths may hold spaces and
commas, so a line is split at its **last** separator, and only where what follows is an integer label or where nothing else fits.
"""

import os
from pathlib import Path
from typing import NamedTuple

from .video import EXTENSIONS


class Entry(NamedTuple):
    path: str
    label: int  # -1: none


def find_videos(source):
    """The videos of ``source`` (folder or list file) as a list of Entry, in an order that depends on nothing but names.

    Raises ValueError when there is no such folder or list, when it lists nothing, or when a line of the list is not understood.
    """
    source = Path(source)
    if source.is_dir():
        entries = [
            Entry(os.path.join(folder, name), -1)
            for folder, _, names in os.walk(source, followlinks=True)
            for name in names
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        ]
        entries.sort()
        if not entries:
            raise ValueError(f"no videos in folder {source} (looked for {' '.join(sorted(EXTENSIONS))})")
        return entries
    if source.suffix.lower() in EXTENSIONS and source.is_file():
        return [Entry(str(source), -1)]
    if not source.is_file():
        raise ValueError(f"no such folder or list file: {source}")
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is neither a folder, a video nor a list of videos in UTF-8") from error
    entries = [
        _entry(line.strip(), source, number)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not entries:
        raise ValueError(f"the list {source} names no videos")
    return entries


def find_labelled_videos(source):
    """As ``find_videos``, every one with a label: a list's own, or, in a folder, the number of the class folder the video
    lies in.

    Class folders are numbered in the order of their names. Raises ValueError where a label is missing.
    """
    source, entries = Path(source), find_videos(source)
    if source.is_dir():
        classes = [Path(entry.path).relative_to(source).parts[0] for entry in entries]
        inside = [len(Path(entry.path).relative_to(source).parts) > 1 for entry in entries]
        if not all(inside):
            raise ValueError(f"{entries[inside.index(False)].path} lies in no class folder: expected {source}/CLASS/VIDEO")
        numbers = {name: number for number, name in enumerate(sorted(set(classes)))}
        return [entry._replace(label=numbers[name]) for entry, name in zip(entries, classes)]
    for entry in entries:
        if entry.label < 0:
            raise ValueError(
                f"{source}: expected a label of 0 or more for {entry.path}, got {entry.label if entry.label != -1 else 'none'}"
            )
    return entries


def _entry(line, source, number):
    comma = "," in line and line.rpartition(",")[2].strip().lstrip("-").isdigit()
    path, _, label = line.rpartition("," if comma else " ")
    label = label.strip()
    if not path or not label.lstrip("-").isdigit():
        # No label: the whole line is the path. A file name with an extension cannot be mistaken for a label.
        if os.path.splitext(line)[1].lower() not in EXTENSIONS:
            raise ValueError(f"{source}, line {number}: expected 'path label' or 'path,label' or a path, got {line!r}")
        path, label = line, "-1"
    path = path.strip().strip('"')
    return Entry(os.path.join(source.parent, path), int(label))
