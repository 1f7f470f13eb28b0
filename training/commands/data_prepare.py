"""``stmae data prepare``: a data set encoded once more, so that clips of it cost little to decode."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm

from ..config import DataLocationConfig
from ..config.checks import require, require_not_negative, require_positive, require_text
from ..config.sources import absolute, suffix_of
from ..config.wording import counted
from ..data.images import IMAGE_EXTENSIONS
from ..data.loader import LoaderError, results
from ..data.local_copy import is_elsewhere, local_copy
from ..data.prepare import PREPARED, prepare_video, target_names, tree_path
from ..data.video import VideoError
from ..data.video_list import find_videos, is_folder

SETTINGS, LEFT_OUT = "prepare.json", "left_out.txt"


@dataclass(kw_only=True)
class PrepareConfig(DataLocationConfig):
    """The preparation: of what, where to, how."""

    data: str
    """videos: a folder, searched recursively, a list file, or Something-Something's json"""
    output: str
    """folder for the prepared videos, laid out as those of data; of a list, also a list of its name"""
    short_side: int = PREPARED.short_side
    """pixels; smaller videos keep their size"""
    gop: int = PREPARED.gop
    """frames from one key frame to the next"""
    crf: float = PREPARED.crf
    """quality as x264 has it: 17 is hardly distinguished from the source, 23 is x264's own choice"""
    workers: int = 2
    """processes that encode; 0: none"""
    timeout: float = 3600.0
    """seconds that one video may take; 0: no limit"""

    def __post_init__(self):
        super().__post_init__()
        require_text(self, "data", "output")
        require_positive(self, "short_side", "gop")
        require_not_negative(self, "workers", "timeout")
        require(self, "crf", lambda value: 0 <= value <= 51, "0 to 51")


Config = PrepareConfig
ERRORS = (LoaderError,)


def run(config):
    """Encodes what is not there yet; prints a report and returns (entries prepared, VideoErrors)."""
    entries = find_videos(config.data, config.data_root, config.data_labels)
    source, output, in_folder = Path(config.data), Path(config.output), is_folder(config.data)
    if output.resolve() == source.resolve() or (source.is_dir() and source.resolve() in output.resolve().parents):
        raise ValueError(f"output: expected a folder outside of {source}, got {output}")
    entries = [entry._replace(path=absolute(entry.path)) for entry in entries]
    root = (
        absolute(config.data) if in_folder else os.path.commonpath([os.path.dirname(tree_path(entry.path)) for entry in entries])
    )
    names = target_names(entries, tree_path(root))
    output.mkdir(parents=True, exist_ok=True)
    keep_settings(output, {"short_side": config.short_side, "gop": config.gop, "crf": config.crf})

    work = VideoPreparation(entries, [str(output / name) for name in names], config)
    done, errors, before, after = [], [], 0, 0
    for number, result in enumerate(tqdm(results(work, config), total=len(entries), unit="video", disable=None)):
        if isinstance(result, VideoError):
            errors.append(result)
            tqdm.write(str(result))
        else:
            done.append(number)
            before, after = before + result[0], after + result[1]
    if not in_folder:
        list_of = output / f"{source.stem}.txt"
        lines = [line_of(names[i], entries[i]) for i in done]
        list_of.write_bytes(os.fsencode("".join(f"{line}\n" for line in lines)))
        print(f"list: {list_of}")
    (output / LEFT_OUT).write_bytes(os.fsencode("".join(f"# {error.reason}\n{error.path}\n" for error in errors)))
    print(
        f"{counted(len(entries), 'video')}: {len(done)} in {output}, {len(errors)} left out"
        + (f" ({output / LEFT_OUT})" if errors else "")
    )
    if before:
        print(f"  bytes: {before:,} -> {after:,} ({after / before:.2f}x)")
    return [entries[i] for i in done], errors


def exit_status(config, result):
    """Of the command: 1 where no video could be prepared."""
    return int(not result[0])


def keep_settings(output, settings):
    """Writes the settings to the output folder, or raises ValueError where it was prepared with others, or holds what this
    command did not write."""
    file = output / SETTINGS
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != settings:
            raise ValueError(f"output: {output} was prepared with {before}, not {settings}: choose another folder")
    elif any(output.iterdir()):
        raise ValueError(f"output: {output} is not empty, and this command did not write it: choose another folder")
    file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def is_newer(target, source):
    """Whether ``target`` is there, and no older than ``source``."""
    return os.path.exists(target) and os.path.getmtime(target) >= os.path.getmtime(source)


def line_of(name, entry):
    """The prepared video as a line of a list."""
    words = [entry.path if entry.frames else name]
    if entry.frames:
        words.append(str(entry.frames))
    if entry.frames or entry.label >= 0:
        words.append(str(entry.label))
    return " ".join(words)


class VideoPreparation(Dataset):
    """Item i: (bytes before, bytes after) of video i, which is then in its place; or the VideoError that it raises.

    What is in place already, and no older than its source, stays. Images are copied; a folder of frames stays where it is.
    """

    def __init__(self, entries, targets, config):
        self.entries, self.targets, self.config = entries, targets, config
        self.ended = {}  # number -> how it ended its data worker

    reading = staticmethod(lambda number: None)  # see loader.Reading

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, number):
        entry, target, config = self.entries[number], self.targets[number], self.config
        if number in self.ended:
            return VideoError(entry.path, self.ended[number])
        self.reading(number)
        try:
            if entry.frames:
                return 0, 0
            if is_elsewhere(entry) and os.path.exists(target):
                return 0, 0
            with local_copy(entry) as copy:
                size = os.path.getsize(copy.path)
                if is_elsewhere(entry) or not is_newer(target, entry.path):
                    if suffix_of(entry.path) in IMAGE_EXTENSIONS:
                        os.makedirs(os.path.dirname(target), exist_ok=True)
                        shutil.copyfile(copy.path, target + ".tmp")
                        os.replace(target + ".tmp", target)
                    else:
                        prepare_video(copy.path, target, short_side=config.short_side, gop=config.gop, crf=config.crf)
            return size, os.path.getsize(target)
        except VideoError as error:
            return VideoError(entry.path, error.reason, error.errno)
        except FileNotFoundError as error:
            return VideoError(entry.path, f"cannot be opened ({error.strerror})", error.errno)
        finally:
            self.reading(-1)
