"""Files that a command writes for its user: only over its own, never over a list, an array or a picture that somebody else made.

What a command wrote is known by what is in it: the keys of its results, the last line of its list, the metadata of its features.
"""

import json
import os
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open

from stmae import checkpoint

SOFTWARE = "stmae"  # in the metadata of pictures


def require_own(path, is_own, option="output"):
    """Raises ValueError where there is something at ``path`` that ``is_own(path)`` does not know."""
    path = Path(path)
    if os.path.lexists(path):
        try:
            own = path.is_file() and is_own(path)
        except (OSError, ValueError, SafetensorError):
            own = False
        if not own:
            raise ValueError(f"{option}: {path} exists, and this command did not write it: choose another name, or move it away")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}")


def is_results(*keys):
    """Of a JSON file with results: whether it has these keys."""

    def is_own(path):
        results = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(results, dict) and set(keys) <= set(results)

    return is_own


def write_results(path, results):
    with checkpoint.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def mark_of(command):
    """The last line of a list that ``command`` wrote: a comment."""
    return f"# written by stmae {command}"


def is_list_of(command):
    """Of a list: whether ``command`` wrote it."""
    mark = mark_of(command).encode()

    def is_own(path):
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(mark) - 2))
            return file.read().strip().endswith(mark)

    return is_own


def write_list(path, lines, command):
    """``lines`` (str, names as the disk has them, be they UTF-8 or not), and the mark."""
    with checkpoint.atomic_write(path) as temporary:
        temporary.write_bytes(os.fsencode("".join(f"{line}\n" for line in [*lines, mark_of(command)])))


def is_features(path):
    """Of a safetensors file: whether it holds features with their paths."""
    with safe_open(path, framework="pt") as file:
        return {"paths", "checkpoint"} <= set(file.metadata() or {})


def is_picture(path):
    """Of a PNG or a GIF: whether its metadata name this software."""
    with Image.open(path, formats=("PNG", "GIF")) as image:
        return SOFTWARE in (image.info.get("Software"), bytes(image.info.get("comment", b"")).decode("ascii", "replace"))
