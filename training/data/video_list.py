"""Which videos a data set holds. A data set is one of

- a folder, searched recursively for videos and images (an image is a still clip); where labels are needed, FOLDER/CLASS/FILE.
  Hidden files and folders are passed over, and so is what a training run wrote below it. A file that is found more than once,
  through symbolic links, is listed once;
- a list file with one video a line: ``path label``, ``path,label`` or the path alone, as mae_st and VideoMAE write them, or
  VideoMAE's ``frame_folder total_frames label`` for videos that were taken apart into numbered images. A first line with the
  names of columns is passed over, and so is a line that begins with ``#``, but where it names a file;
- Something-Something's ``train.json`` or ``validation.json``;
- the split files of UCF101 and HMDB51, see ``split_files``;
- a tar shard of samples, ``shard-{000..122}.tar`` for several, see ``shards``.

A folder, a list, a shard and what a list names may be URLs (see ``remote``). A URL that ends with a slash is a folder.

Paths in a list are relative to the list, or to the ``root`` given. They may hold spaces and commas, so a line is split at its
**last** separators, and only where what follows is an integer or where nothing else fits. Of several data sets by weight see
``find_mixture``.
"""

import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from ..config.sources import is_url, joined, split_mixture, suffix_of
from ..config.wording import counted
from . import remote, shards
from .batch_sampler import samples_an_epoch
from .images import IMAGE_EXTENSIONS
from .shards import Member
from .split_files import is_split, read_class_index, read_split
from .video import EXTENSIONS

# Something-Something v2 as it is distributed, looked for beside its train.json and one folder up.
SOMETHING_FOLDERS = ("videos", "20bn-something-something-v2")
SOMETHING_LABELS = ("labels.json", "something-something-v2-labels.json")
SOMETHING_SUFFIXES = (".webm", ".mp4")


MAX_LABEL = 999_999  # a classifier has a row of weights for each: more is a mistake in a list

# The columns of a list, as its first line may name them.
PATH_COLUMNS = frozenset(["path", "file", "filename", "file_name", "filepath", "file_path", "video", "video_path", "clip"])
OTHER_COLUMNS = frozenset(
    ["label", "label_id", "class", "class_id", "category", "target", "frames", "num_frames", "total_frames"]
)


class Entry(NamedTuple):
    path: str
    label: int  # -1: none
    frames: int = 0  # of a folder of numbered images, which ``path`` then is; 0: path is a video or an image
    member: Member | None = None  # of a video in a shard: where it lies


class ListedVideos(NamedTuple):
    """A list of a Mixture: what it was named, the number of its videos, its weight."""

    source: str
    videos: int
    weight: float


class Mixture(NamedTuple):
    """The videos to train on, of one list or of several by weight: ``entries`` of all, in the order of ``lists``."""

    entries: list
    lists: list

    @property
    def weights(self):
        """[(videos, weight)] of the lists, as VideoOrder takes them."""
        return [(listed.videos, listed.weight) for listed in self.lists]

    def parts(self):
        """The entries of each list."""
        start = 0
        for listed in self.lists:
            yield self.entries[start : start + listed.videos]
            start += listed.videos

    def describe(self):
        """A line for each of several lists: how much of an epoch it is."""
        if len(self.lists) == 1:
            return []
        samples = samples_an_epoch(self.weights)
        return [
            f"  {listed.source}: {counted(listed.videos, 'video')}, {count / len(self.entries):.1%} of the samples, "
            f"{counted(count / listed.videos, 'pass', '.3g')} an epoch"
            for listed, count in zip(self.lists, samples)
        ]


def find_mixture(source, root=None, labels=None, *, labelled=False):
    """The Mixture that ``source`` names: ``SOURCE:WEIGHT,SOURCE:WEIGHT``, a weight being the part of the samples that come from
    that list, or a single data set. root, labels: as of ``find_videos``, for all lists.

    labelled: every video gets a label, as by ``find_labelled_videos``; the same label must mean the same in all lists, and the
    class folders of all are numbered together. Raises ValueError as these, and where class folders are mixed with a list and no
    ``labels`` say their numbers, or where a weight is too small.
    """
    sources = split_mixture(source) or [(str(source), 1.0)]
    numbers = class_numbers(source, labels) if labelled and len(sources) > 1 else None
    found = []
    for name, _ in sources:
        found.append(find_labelled_videos(name, root, labels, numbers) if labelled else find_videos(name, root, labels))
    lists = [ListedVideos(name, len(entries), weight) for (name, weight), entries in zip(sources, found)]
    mixture = Mixture([entry for entries in found for entry in entries], lists)
    samples_an_epoch(mixture.weights)
    return mixture


def find_videos(source, root=None, labels=None):
    """The videos of ``source`` (folder, list file or Something-Something's json) as a list of Entry, in an order that depends
    on nothing but names.

    root: the folder that a list's relative paths start from, or where Something-Something's videos lie; None: the list's own,
        or a folder found beside the json.
    labels: the numbers of the classes, for class folders and Something-Something: a json object {class: number}, or a text
        file with a class a line; None: in the order of the folders' names, or the labels.json found beside the json.

    Raises ValueError when there is no such folder or list, when it lists nothing, or when a line of the list is not understood.
    """
    return _find(_place(source), root, labels, labelled=False)


def find_labelled_videos(source, root=None, labels=None, numbers=None):
    """As ``find_videos``, every one with a label: a list's own, Something-Something's, or, in a folder, the number of the
    class folder the video lies in.

    Class folders are numbered in the order of their names, unless ``labels`` (a file) or ``numbers`` ({class: number}, as
    ``class_numbers`` gives for another set) numbers them. Raises ValueError where a label is missing or above MAX_LABEL, or where
    a class has no number.
    """
    source = _place(source)
    entries = _find(source, root, labels, labelled=True)
    if not is_folder(source):
        return entries
    known = "the training set" if labels is None else labels
    if labels is not None:
        numbers = read_labels(labels)
    elif numbers is None:
        numbers = _number(_class_of(entry, source) for entry in entries)
    labelled = []
    for entry in entries:
        name = _class_of(entry, source)
        if name not in numbers:
            raise ValueError(f"{known} numbers {counted(len(numbers), 'class')}, and {joined(str(source), name)} is none of them")
        labelled.append(entry._replace(label=numbers[name]))
    return labelled


def class_numbers(source, labels=None):
    """{class: number} of the class folders of ``source``, of all of them in a mixture, by which those of a test set are numbered
    too. None: ``source`` is a list, whose labels are numbers."""
    sources = [_place(name) for name, _ in split_mixture(source) or [(source, 1.0)]]
    folders = [source for source in sources if is_folder(source)]
    if not folders:
        return None
    if labels is not None:
        return read_labels(labels)
    if len(folders) < len(sources):
        raise ValueError(
            f"{folders[0]}: its class folders cannot be numbered as the lists it is mixed with are: name the numbers with "
            "--data_labels"
        )
    return _number(_class_of(entry, source) for source in folders for entry in _in_folder(source))


def find_train_and_test(data, test_data, root=None, labels=None):
    """(training entries, test entries), labelled alike: the class folders of ``test_data`` get the numbers that those of ``data``
    have, so that a class which the test set lacks does not move the others.

    Raises ValueError where the test set holds a class, or a label, that the training set does not, or where class folders cannot
    be numbered by the training set since that is a list.
    """
    train = find_labelled_videos(data, root, labels)
    numbers = class_numbers(data, labels)
    test = find_labelled_videos(test_data, root, labels, numbers)
    known = {entry.label for entry in train}
    if numbers is None and labels is None and is_folder(test_data) and {entry.label for entry in test} != known:
        raise ValueError(
            f"{test_data}: its class folders cannot be numbered as {data} is, which is a list: "
            "name the numbers with --data_labels"
        )
    for entry in test:
        if entry.label not in known:
            raise ValueError(f"{entry.path}: its label is {entry.label}, and no video of {data} has that label")
    return train, test


def _place(source):
    """A Path, or a URL as text."""
    return str(source) if is_url(source) else Path(source)


def is_folder(source):
    """Whether ``source`` is a folder: of a URL, whether it says so by a slash at its end."""
    return str(source).endswith("/") if is_url(source) else Path(source).is_dir()


def _class_of(entry, source):
    parts = entry.path.removeprefix(source).split("/") if is_url(source) else Path(entry.path).relative_to(source).parts
    if len(parts) == 1:
        raise ValueError(f"{entry.path} lies in no class folder: expected {source}/CLASS/VIDEO")
    return parts[0]


def _number(names):
    return {name: number for number, name in enumerate(sorted(set(names)))}


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
    if not numbers or min(numbers.values()) < 0 or max(numbers.values()) > MAX_LABEL:
        got = numbers or "none"
        raise ValueError(f"data_labels: expected classes with numbers of 0 or more in {file}, at most {MAX_LABEL}, got {got}")
    return numbers


def _find(source, root, labels, labelled):
    if split_mixture(source):
        raise ValueError(f"expected one data set, got several with weights, which training alone takes: {source}")
    if root is not None and not is_url(root) and not Path(root).is_dir():
        raise ValueError(f"data_root: there is no folder {root}")
    if is_folder(source):
        return _in_remote_folder(source) if is_url(source) else _in_folder(source)
    if suffix_of(source) == shards.SUFFIX:
        return _expand([Entry(str(source), -1)], labelled)
    if is_url(source):
        return _find_remote(source, root, labelled)
    if is_split(source):
        numbers = None if labels is None else read_class_index(labels) or read_labels(labels)
        return [Entry(path, label) for path, label in read_split(source, root, numbers, labelled)]
    if suffix_of(source) in EXTENSIONS | IMAGE_EXTENSIONS and source.is_file():
        return _single(source, labelled)
    if not source.is_file():
        raise ValueError(f"no such folder or list file: {source}")
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ValueError(f"{source}: cannot be read ({error.strerror})") from error
    if suffix_of(source) == ".json":
        return _something(source, _text(source, data), root, labels, labelled)
    return _lines(_text(source, data), source, str(source.parent) if root is None else str(root), labelled)


def _single(source, labelled):
    if labelled:
        raise ValueError(f"{source} is a single video with no label: expected a folder of classes or a list")
    return [Entry(str(source), -1)]


def _text(source, data):
    """Bytes that are no UTF-8 as in the names of files. Raises ValueError for what is no text."""
    if re.search(rb"[\0-\x08\x0e-\x1a]", data):
        raise ValueError(f"{source} is neither a folder, a video, an image nor a list of them in UTF-8")
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _find_remote(source, root, labelled):
    """What a URL names that is neither a folder nor a shard."""
    suffix, folder, name = suffix_of(source), *source.rsplit("/", 1)
    if suffix in EXTENSIONS | IMAGE_EXTENSIONS:
        return _single(source, labelled)
    if suffix == ".json" or re.match(r"(train|test)list0[1-3]\.txt|.+_test_split[1-3]\.txt", name):
        raise ValueError(
            f"{source}: Something-Something's json and the split files of UCF101 and HMDB51 are read from this machine alone: "
            "expected a folder, which ends with '/', a list or a shard"
        )
    return _lines(_text(source, remote.read_bytes(source)), source, folder if root is None else str(root), labelled)


def _in_remote_folder(source):
    """As ``_in_folder``, of a URL."""
    wanted = EXTENSIONS | IMAGE_EXTENSIONS
    found = [url for url in remote.list_folder(source) if suffix_of(url) in wanted]
    found = [url for url in found if not any(part.startswith(".") for part in url.removeprefix(source).split("/"))]
    if not found:
        raise ValueError(f"no videos in folder {source} (looked for {' '.join(sorted(wanted))})")
    return [Entry(url, -1) for url in found]


def _expand(entries, labelled):
    """``entries`` with the videos of each shard in its place, and where every video in a shard lies."""
    wanted = {}  # shard: its videos, by their paths
    for entry in entries:
        if suffix_of(entry.path) == shards.SUFFIX:
            wanted.update(dict.fromkeys(shards.expanded(entry.path)))
        elif (inner := shards.split_member(entry.path)) is not None:
            wanted[inner[0]] = None
    if not wanted:
        return entries
    found = {}
    for shard, members in zip(wanted, shards.members_of(wanted)):
        if not members:
            raise ValueError(f"{shard}: no videos in this shard")
        found[shard] = {path: Entry(path, label, 0, member) for path, label, member in members}
    made = []
    for entry in entries:
        inner = shards.split_member(entry.path)
        if suffix_of(entry.path) == shards.SUFFIX:
            for shard in shards.expanded(entry.path):
                made += [video._replace(label=entry.label) if entry.label >= 0 else video for video in found[shard].values()]
        elif inner is None:
            made.append(entry)
        elif entry.path in found[inner[0]]:
            video = found[inner[0]][entry.path]
            made.append(video._replace(label=entry.label) if entry.label >= 0 else video)
        else:
            raise ValueError(f"{inner[0]}: this shard has no video {inner[1]}")
    without = next((entry for entry in made if entry.label < 0), None) if labelled else None
    if without is not None:
        raise ValueError(f"{without.path}: expected a label of 0 or more, as NAME.cls in the shard or in the list, got none")
    return made


def _in_folder(source):
    """Every file is listed once, by its real path, and every folder searched once: links to a parent, or to each other, end. Of
    several names the one with the fewest links is taken, then the first in order."""
    wanted = EXTENSIONS | IMAGE_EXTENSIONS
    found, searched, links, file_links = {}, set(), [(str(source), os.path.realpath(source))], []
    while links:
        folders, links = sorted(links), []
        while folders:
            folder, real = folders.pop(0)
            if real in searched:
                continue
            searched.add(real)
            try:
                with os.scandir(folder) as scan:
                    items = sorted(scan, key=lambda item: item.name)
            except OSError as error:
                raise ValueError(f"cannot read the folder {folder} ({error.strerror})") from error
            is_run = {"run.jsonl", "config.yaml"} <= {item.name for item in items}  # see engine/run_folder.py
            if is_run and folder != str(source):
                continue
            for item in items:
                if item.name.startswith(".") or (is_run and item.name in ("pictures", "plots.png")):
                    continue
                is_wanted = os.path.splitext(item.name)[1].lower() in wanted
                if item.is_symlink():
                    target = os.path.realpath(item.path)
                    if os.path.isdir(target):
                        links.append((item.path, target))
                    elif is_wanted:
                        file_links.append((item.path, target))
                elif item.is_dir():
                    folders.append((item.path, os.path.join(real, item.name)))
                elif is_wanted:
                    found.setdefault(os.path.join(real, item.name), item.path)
    again = [path for path, target in sorted(file_links) if found.setdefault(target, path) != path]
    again = [path for path in again if _other_class(path, found[os.path.realpath(path)], source)]
    if again:
        first = found[os.path.realpath(again[0])]
        warnings.warn(
            f"{source}: {counted(len(again), 'symbolic link')} to videos that are listed already, {again[0]} the one at {first}: "
            "each is listed once, by that name and in that class",
            stacklevel=5,
        )
    if not found:
        raise ValueError(f"no videos in folder {source} (looked for {' '.join(sorted(wanted))})")
    return [Entry(path, -1) for path in sorted(found.values())]


def _other_class(path, first, source):
    """Whether two names of one file lie in different folders of the first level, which are classes where labels are needed."""
    one, other = (Path(os.path.relpath(name, source)).parts for name in (path, first))
    return len(one) > 1 and len(other) > 1 and one[0] != other[0]


def _lines(text, source, folder, labelled):
    entries, hints = [], {}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        line = line.strip()
        if not line or (number == 1 and _is_header(line)):
            continue
        try:
            entry, hint = _entry(line, folder)
        except ValueError as error:
            if line.startswith("#"):
                continue
            raise ValueError(f"{source}, line {number}: {error}, got {line!r}") from None
        if line.startswith("#") and not os.path.exists(entry.path):
            continue
        if labelled and entry.label < 0 and not _is_in_shard(entry.path):  # else it may have one there
            raise ValueError(f"{source}, line {number}: expected a label of 0 or more for {entry.path}, got none in {line!r}")
        if hint:
            hints.setdefault(hint, number)
        entries.append(entry)
    for hint, number in hints.items():
        warnings.warn(f"{source}, from line {number} on: {hint}", stacklevel=5)
    if not entries:
        raise ValueError(f"the list {source} names no videos")
    return _expand(entries, labelled)


def _is_in_shard(path):
    return suffix_of(path) == shards.SUFFIX or shards.split_member(path) is not None


def _is_header(line):
    columns = [word.strip().strip('"').lower() for word in re.split(r"[,\t ]", line)]
    return len(columns) > 1 and columns[0] in PATH_COLUMNS and set(columns[1:]) <= OTHER_COLUMNS | PATH_COLUMNS


def _entry(line, folder):
    """(Entry, hint or None) of a line. Raises ValueError with what was expected."""
    hint = None
    path, label = _split(line)
    if not _is_integer(label) or not path:
        # No label: the line is the path. A file name with an extension cannot be mistaken for a label.
        if not _is_file_name(line):
            if _is_file_name(path):
                raise ValueError(f"expected an integer from 0 to {MAX_LABEL} as label, {label!r} is none")
            raise ValueError("expected 'path label', 'path,label', a path or 'folder frames label'")
        path, label = line, "-1"
    label, frames = int(label), 0
    if not -1 <= label <= MAX_LABEL:
        raise ValueError(f"expected an integer from 0 to {MAX_LABEL} as label")
    if not _is_file_name(path):  # a folder of frames, where a number stands before the label; else a video with no extension
        before, count = _split(path)
        if before and _is_integer(count):
            if label == -1 and int(count) == 0:
                path, hint = before, "'path 0 -1', as VideoMAE V2 writes it to pre-train, is read as the path of a video"
            elif _is_file_name(before) and not os.path.isdir(joined(folder, _unquoted(before))):
                path, hint = before, "'video frames label' is read as 'video label': a video's own frames are counted"
            elif int(count) > 0:
                path, frames = before, int(count)
    path = joined(folder, _unquoted(path))
    if frames and is_url(path):
        raise ValueError("expected a folder of frames on this machine (or its images as a video, or in a shard)")
    return Entry(path, label, frames), hint


def _split(text):
    """At the last comma where an integer follows it, else at the last white space."""
    separator = "," if "," in text and _is_integer(text.rpartition(",")[2]) else None
    parts = text.rsplit(separator, 1)
    return (parts[0], parts[1].strip()) if len(parts) == 2 else ("", text)


def _is_integer(text):
    return re.fullmatch(r"-?[0-9]+", text.strip()) is not None and len(text) < 20


def _unquoted(text):
    return text.strip().strip('"')


def _is_file_name(text):
    return suffix_of(_unquoted(text)) in EXTENSIONS | IMAGE_EXTENSIONS | {shards.SUFFIX}


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
        if labelled and label < 0:
            raise ValueError(f"{source}: expected a label of 0 or more for video {files.get(name) or name}, got none")
        # A video that is not there is an entry all the same: it is named, counted and replaced as any broken one.
        entries.append(Entry(files.get(name) or os.path.join(root, name + SOMETHING_SUFFIXES[0]), label))
    return entries


def _has_one(folder, names):
    return any((folder / f"{name}{suffix}").is_file() for name in names[:100] for suffix in SOMETHING_SUFFIXES)
