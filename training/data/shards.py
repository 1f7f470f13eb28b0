"""Tar archives of samples in the WebDataset convention, as a list of videos: nothing is unpacked.

Files of an archive that share their name up to the first point of its last part are a sample: ``000/17.mp4`` and ``000/17.cls``.
Its videos and images count, and where it has a video its images do not; ``.cls`` (an integer) or ``label`` in ``.json`` is its
label. A video in a shard is named ``SHARD.tar/NAME``. An archive is read once from header to header for where its files lie; that
is kept in the folder of the index (see ``frame_index``) while the archive stays the same. Then a video is read by its offset.

Compressed archives have no offsets, and are refused.
"""

import contextlib
import json
import os
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..config.sources import is_url, suffix_of
from . import remote
from .frame_index import KeptIndex
from .images import IMAGE_EXTENSIONS
from .video import EXTENSIONS

SUFFIX = ".tar"
HEADER = 512  # bytes before a file's first
BLOCK = 2**16  # bytes read at a time, from header to header
LABEL_BYTES = 2**16  # of a file that may hold a label
AT_ONCE = 8  # shards that are read for their index


class Member(NamedTuple):
    """A file in a tar archive: where it lies, and of which version of the archive."""

    shard: str
    offset: int  # of its first byte
    size: int
    header: int  # CRC-32 of the 512 bytes before it, which hold its name, size and time
    version: remote.Version


class ShardError(ValueError):
    """An archive that cannot be used; the message says why."""


def expanded(path):
    """The shards that ``path`` names: ``shard-{000..122}.tar`` is 123."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if not braces:
        return [path]
    first, last = braces[1], braces[2]
    if int(last) < int(first) or int(last) - int(first) > 10**6:
        raise ShardError(f"expected {{FIRST..LAST}} with FIRST <= LAST, got {braces[0]} in {path}")
    names = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for middle in names for name in expanded(path[: braces.start()] + middle + path[braces.end() :])]


def split_member(path):
    """(shard, name) of ``SHARD.tar/NAME``; None where ``path`` is none, or names a folder that ends in .tar."""
    found = re.match(r"(.+?\.tar)/(.+)", path, re.IGNORECASE | re.DOTALL)
    if found is None or (not is_url(path) and os.path.isdir(found[1])):
        return None
    return found[1], found[2]


def members_of(shards):
    """For each of ``shards`` its videos: [(path, label or -1, Member)], in the archive's order. Raises ShardError or
    RemoteError."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(_members, shards))


def shard_version(shard):
    """The remote.Version of a shard, of a local one too."""
    if is_url(shard):
        return remote.version(shard)
    status = os.stat(shard)
    return remote.Version(status.st_size, f"mtime={status.st_mtime_ns}")


def read_member(member, target):
    """Writes the file's bytes to the path ``target``. Raises ShardError where the archive is not the one that was listed,
    RemoteError or OSError where it cannot be read."""
    start, end = member.offset - HEADER, member.offset + member.size
    if is_url(member.shard):
        data = memoryview(remote.read_bytes(member.shard, start, end))
        _require_header(member, data[:HEADER])
        with open(target, "wb") as file:
            file.write(data[HEADER:])
        return
    with open(member.shard, "rb") as shard, open(target, "wb") as file:
        shard.seek(start)
        _require_header(member, shard.read(HEADER))
        left = member.size
        while left:
            data = shard.read(min(left, 2**20))
            if not data:
                raise ShardError("the archive is shorter than when it was listed")
            file.write(data)
            left -= len(data)


def _require_header(member, data):
    if zlib.crc32(data) != member.header:
        raise ShardError("the archive changed since it was listed")


def _members(shard):
    try:
        version = shard_version(shard)
        index = KeptIndex(f"shard {shard}", {"size": version.size, "mark": version.mark})
        found = index.read()
        if found is None:
            with remote.opened(shard, BLOCK) if is_url(shard) else open(shard, "rb") as file:
                members = _scan(shard, file)
            if shard_version(shard) != version:
                raise ShardError(f"{shard}: it changed while it was read")
            index.write({"members": members})
        else:
            members = found[0]["members"]
    except remote.RemoteError:
        raise
    except OSError as error:
        raise ShardError(f"{shard}: cannot be read ({error.strerror})") from error
    return [
        (f"{shard}/{name}", label, Member(shard, offset, size, header, version)) for name, offset, size, header, label in members
    ]


def _scan(shard, file):
    """[[name, offset, size, header, label]] of the videos and images in a tar archive. Raises ShardError."""
    media, labels, moving = [], {}, set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                folder, _, base = info.name.rpartition("/")
                if not info.isreg() or info.sparse is not None or base.startswith("."):
                    continue
                sample, suffix = f"{folder}/{base.partition('.')[0]}", suffix_of(base)
                if suffix in EXTENSIONS | IMAGE_EXTENSIONS:
                    file.seek(info.offset_data - HEADER)
                    media.append([sample, suffix, info.name, info.offset_data, info.size, zlib.crc32(file.read(HEADER))])
                    if suffix in EXTENSIONS:
                        moving.add(sample)
                elif suffix in (".cls", ".json") and info.size <= LABEL_BYTES:
                    labels.setdefault(sample, _label(archive.extractfile(info).read(), suffix))
            file.seek(archive.offset)
            end = file.read(HEADER)
    except tarfile.TarError as error:
        what = str(error) or type(error).__name__
        raise ShardError(f"{shard}: expected an uncompressed tar archive that is whole ({what})") from error
    if end.strip(b"\0") or 0 < len(end) < HEADER:
        raise ShardError(f"{shard}: damaged at byte {archive.offset:,}")
    return [
        [name, offset, size, header, labels.get(sample, -1)]
        for sample, suffix, name, offset, size, header in media
        if suffix in EXTENSIONS or sample not in moving
    ]


def _label(data, suffix):
    """An integer of 0 or more, or -1."""
    with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
        label = json.loads(data).get("label") if suffix == ".json" else data.decode().strip()
        if re.fullmatch(r"[0-9]{1,18}", str(label)):
            return int(label)
    return -1
