"""What a scan of a file found, kept for the next time: of a long or counted video time stamps, key frames and how many frames
there are; of a shard what it holds (see ``shards``).

An entry is a file in the cache folder, named after the video's path, size, time of change and codec, and it names the bytes that
the video begins and ends with: a video that is written anew has another entry. Entries are written under another name and
renamed, so that any number of processes may write the same one; one that is damaged, stale, or of another version counts as none
and is written anew; where nothing can be written, files are scanned as without.

The folder is STMAE_INDEX, else stmae/index in the user's cache folder; STMAE_INDEX=off keeps nothing.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np

MAGIC = b"stmae frame index 1\n"  # another number for what is understood otherwise
ENDS = 4096  # bytes at the start and at the end of a video that are compared
LONG = 1000  # packets: scanning fewer takes 3 ms or less, and a data set of short videos would fill the folder with small files


def folder():
    """The cache folder, or None."""
    chosen = os.environ.get("STMAE_INDEX")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "stmae" / "index"


class KeptIndex:
    """An entry in the cache folder.

    name: of what it is about. about: plain values that tell the version of that, and how it was read.
    """

    def __init__(self, name, about):
        cache = folder()
        self._file, self._about = None, about
        if cache is not None:
            name = hashlib.sha256(os.fsencode(name) + b"\0" + repr(about).encode()).hexdigest()
            self._file = cache / name[:2] / name[2:]

    def read(self):
        """(facts, arrays): plain values and int64 arrays by name, as ``write`` got them; None where there is no such entry."""
        if self._file is None:
            return None
        try:
            data = self._file.read_bytes()
        except OSError:
            return None
        try:
            if not data.startswith(MAGIC) or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
                return None
            head, _, body = data[len(MAGIC) : -4].partition(b"\n")
            head = json.loads(head)
            if head["about"] != self._about:
                return None
            arrays, start = {}, 0
            for name, count in head["arrays"]:
                arrays[name] = np.frombuffer(body, np.int64, count, start)
                start += 8 * count
            return head["facts"], arrays
        except (ValueError, KeyError, TypeError):
            return None

    def write(self, facts, **arrays):
        if self._file is None:
            return
        arrays = {name: np.ascontiguousarray(array, np.int64) for name, array in arrays.items()}
        head = {"about": self._about, "facts": facts, "arrays": [[name, len(array)] for name, array in arrays.items()]}
        data = MAGIC + json.dumps(head).encode() + b"\n" + b"".join(array.tobytes() for array in arrays.values())
        temporary = None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self._file.parent)
            with open(descriptor, "wb") as file:
                file.write(data + zlib.crc32(data).to_bytes(4, "little"))
            os.replace(temporary, self._file)
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)


class FrameIndex(KeptIndex):
    """The entry of one video.

    name: stands for its bytes for good; None: its path, size, time of change and ends do.
    what: names beyond the file what the entry was made from, such as the codec's.
    """

    def __init__(self, path, *what, name=None):
        if name is not None:
            super().__init__(name, {"what": list(what)})
            return
        self._file = None
        with contextlib.suppress(OSError):
            real = os.path.realpath(path)
            status = os.stat(real)
            with open(real, "rb") as file:
                ends = file.read(ENDS)
                file.seek(max(0, status.st_size - ENDS))
                ends += file.read(ENDS)
            about = {"size": status.st_size, "changed": status.st_mtime_ns, "what": list(what), "ends": zlib.crc32(ends)}
            super().__init__(real, about)
