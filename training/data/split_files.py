"""The split files that UCF101 and HMDB51 are distributed with, as they are.

- UCF101 (Soomro et al., 2012): ``trainlist01.txt`` with a line ``Class/video.avi label`` each, labels from 1, and
  ``testlist01.txt`` without labels, which ``classInd.txt`` (``1 ApplyEyeMakeup``) beside them gives; splits 01 to 03.
- HMDB51 (Kuehne et al., 2011): 51 files ``CLASS_test_split1.txt`` with a line ``video.avi 1`` each: 1 is a training video, 2 a
  test video, 0 neither; splits 1 to 3. All of them together are named with a star and the part: ``*_test_split1.txt:train``,
  ``*_test_split1.txt:test``. Classes are numbered in the order of their names.

Here labels count from 0, as everywhere else.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from ..config.wording import counted

UCF101_FOLDERS = ("UCF-101", "UCF101", "videos")  # looked for beside the split files and one folder up
HMDB51_FOLDERS = ("hmdb51_org", "hmdb51", "HMDB51", "videos")
HMDB51_CLASSES = 51
HMDB51_LINE = r"([^/\\\s]+\.avi)\s+([012])"
PARTS = {"train": "1", "test": "2"}


class SplitVideo(NamedTuple):
    """A video of a split file: its path below the videos' folder (CLASS/FILE), its class, its label there, from 1 (0: none)."""

    path: str
    class_name: str
    label: int
    place: str  # "FILE, line N", for messages


def is_split(source):
    """Whether ``source``, a Path, names split files of UCF101 or HMDB51."""
    return _is_ucf101(source) or _hmdb51_part(source) is not None


def read_split(source, root, numbers, labelled):
    """[(path, label)] of the videos that the split files ``source`` name, in their order.

    root: the folder of the videos; None: found beside the split files. numbers: {class: label}; None: the data set's own.
    labelled: whether a video without a label is an error; else its label is -1.

    Raises ValueError, with file and line, for what such a file does not hold.
    """
    if _is_ucf101(source):
        videos, folders = _ucf101_videos(source), UCF101_FOLDERS
        numbers = _ucf101_numbers(source, videos, labelled) if numbers is None else numbers
    else:
        videos, classes = _hmdb51_videos(source, numbers)
        folders = HMDB51_FOLDERS
        numbers = {name: number for number, name in enumerate(classes)} if numbers is None else numbers
    root = _root(source.parent, folders, videos) if root is None else Path(root)
    entries = []
    for video in videos:
        if labelled and video.class_name not in numbers:
            raise ValueError(
                f"{video.place}: the class {video.class_name!r} has no number among {counted(len(numbers), 'class')}"
            )
        entries.append((os.path.join(root, video.path), numbers.get(video.class_name, -1)))
    return entries


def read_class_index(file):
    """{class: label} of a ``classInd.txt``, whose numbers from 1 become labels from 0; None where the file is none."""
    lines = list(_lines(file))
    if not lines or not re.fullmatch(r"[0-9]+\s+\S+", lines[0][1]):
        return None
    numbers = {}
    for place, line in lines:
        found = re.fullmatch(r"([0-9]{1,6})\s+(\S+)", line)
        if not found or int(found[1]) < 1:
            raise ValueError(f"{place}: expected 'number class' with a number of 1 or more, got {line!r}")
        number, name = int(found[1]) - 1, found[2]
        if name in numbers or number in numbers.values():
            raise ValueError(f"{place}: expected every class and every number once, got {line!r} again")
        numbers[name] = number
    return numbers


def _lines(file):
    """("FILE, line N", line) of the lines that are not blank."""
    try:
        text = Path(file).read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip():
            yield f"{file}, line {number}", line.strip()


def _root(folder, names, videos):
    """The folder that holds the videos, as far as the first hundred tell."""
    places = [base / name for base in (folder, folder.parent) for name in names] + [folder]
    for place in places:
        if any((place / video.path).is_file() for video in videos[:100]):
            return place
    raise ValueError(
        f"{videos[0].place}: {videos[0].path} lies in none of {', '.join(map(str, places))}: name the videos' folder with "
        "--data_root"
    )


def _is_ucf101(source):
    return re.fullmatch(r"(train|test)list0[1-3]\.txt", source.name) is not None and source.is_file()


def _ucf101_videos(source):
    videos, labels = [], {}
    for place, line in _lines(source):
        found = re.fullmatch(r"([^/\\\s]+)/([^/\\\s]+\.avi)(?:\s+([0-9]{1,6}))?", line)
        if not found or found[3] == "0":
            raise ValueError(
                f"{place}: expected UCF101's 'Class/video.avi' or 'Class/video.avi label' with a label of 1 or more, got "
                f"{line!r} (give a list of your own another name)"
            )
        name, label = found[1], int(found[3] or 0)
        if label and labels.setdefault(name, label) != label:
            raise ValueError(f"{place}: expected label {labels[name]} for the class {name}, as in the lines before, got {label}")
        videos.append(SplitVideo(f"{name}/{found[2]}", name, label, place))
    if not videos:
        raise ValueError(f"the list {source} names no videos")
    return videos


def _ucf101_numbers(source, videos, labelled):
    """{class: label} of classInd.txt beside the split file or one folder up, else of the labels in the file itself."""
    places = [folder / "classInd.txt" for folder in (source.parent, source.parent.parent)]
    index = next((place for place in places if place.is_file()), None)
    if index is None:
        without = next((video for video in videos if not video.label), None)
        if labelled and without is not None:
            raise ValueError(
                f"{without.place}: expected a label, got none, and there is no {' or '.join(map(str, places))} with the numbers "
                "of the classes: name the file with --data_labels"
            )
        numbers = {video.class_name: video.label - 1 for video in videos if video.label}
        if len(set(numbers.values())) < len(numbers):
            raise ValueError(f"{source}: expected a label for each class, got one label for two classes")
        return numbers
    numbers = read_class_index(index)
    if numbers is None:
        raise ValueError(f"{index}: expected a line 'number class' for each class")
    for video in videos:
        if video.class_name not in numbers:
            raise ValueError(f"{video.place}: {index} has no number for the class {video.class_name}")
        if video.label and video.label != numbers[video.class_name] + 1:
            raise ValueError(f"{video.place}: expected label {numbers[video.class_name] + 1}, as {index} says, got {video.label}")
    return numbers


def _hmdb51_part(source):
    """(what stands for the class, split, part) of '*_test_split1.txt:train'; "" for a part that is not named; None where
    ``source`` is something else, such as a list of somebody's own with such a name."""
    found = re.fullmatch(r"(.+)_test_split([1-3])\.txt(?::(.*))?", source.name)
    if found is None or (found[1] != "*" and found[3] is None and not _is_hmdb51_file(source)):
        return None
    return found[1], found[2], found[3] or ""


def _is_hmdb51_file(file):
    return file.is_file() and all(re.fullmatch(HMDB51_LINE, line) for _, line in _lines(file))


def _hmdb51_videos(source, numbers):
    """(videos of the part, names of all classes)."""
    name, split, part = _hmdb51_part(source)
    pattern = f"*_test_split{split}.txt"
    if name != "*" or part not in PARTS:
        raise ValueError(
            f"{source}: expected all of HMDB51's classes and a part, '{source.parent / pattern}:train' or ':test'"
            + ("" if name == "*" else "; this is the file of one class")
        )
    files = sorted(source.parent.glob(pattern))
    if numbers is None and len(files) != HMDB51_CLASSES:
        raise ValueError(
            f"{source.parent / pattern}: expected {HMDB51_CLASSES} files, a class each, got {len(files)} (to number the classes "
            "of a part of HMDB51, name them with --data_labels)"
        )
    videos, classes = [], []
    for file in files:
        classes.append(file.name.removesuffix(pattern[1:]))
        for place, line in _lines(file):
            found = re.fullmatch(HMDB51_LINE, line)
            if not found:
                raise ValueError(f"{place}: expected HMDB51's 'video.avi 0', 1 (training) or 2 (test), got {line!r}")
            if found[2] == PARTS[part]:
                videos.append(SplitVideo(f"{classes[-1]}/{found[1]}", classes[-1], 0, place))
    if not videos:
        raise ValueError(f"{source}: no video in {counted(len(files), 'file')} is of the part {part!r}")
    return videos, classes
