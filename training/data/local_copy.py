"""A local file with the bytes of any entry of a data set: of one that lies elsewhere, or in a shard, a copy.

Which version a URL has is asked once in a process; from then on the process reads that version alone, or says that it changed.
"""

import contextlib
import errno
import os
from typing import NamedTuple

from ..config.sources import is_url
from . import remote, shards
from .file_cache import kept_file, unnamed_file
from .video import VideoError

_versions = {}  # URL: the Version that this process reads


class LocalCopy(NamedTuple):
    """``path``: of the local file. ``name``: stands for its bytes for good, where the path does not; else None."""

    path: str
    name: str | None


def is_elsewhere(entry):
    """Whether there is no file of the entry's own on this machine."""
    return entry.member is not None or is_url(entry.path)


@contextlib.contextmanager
def local_copy(entry):
    """Context: the LocalCopy of ``entry``, a video_list.Entry. Raises VideoError, with the errno EIO for what may come back."""
    with contextlib.ExitStack() as stack:
        try:
            copy = stack.enter_context(_local_copy(entry))
        except remote.RemoteError as error:
            raise VideoError(entry.path, f"cannot be fetched ({error.reason})", error.errno) from error
        except shards.ShardError as error:
            raise VideoError(entry.path, str(error)) from error
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error})"
            raise VideoError(entry.path, reason, error.errno) from error
        yield copy


@contextlib.contextmanager
def _local_copy(entry):
    member = entry.member
    if member is not None:
        if _version(member.shard, shards.shard_version) != member.version:
            raise shards.ShardError("the archive changed since it was listed")
        name = f"{member.shard}\0{member.offset}\0{member.size}\0{member.version}"
        if is_url(member.shard):
            with kept_file(name, member.size, lambda path: shards.read_member(member, path)) as path:
                yield LocalCopy(path, name)
        else:
            with unnamed_file(member.size) as path:
                shards.read_member(member, path)
                yield LocalCopy(path, name)
    elif is_url(entry.path):
        version = _version(entry.path, remote.version)
        name = f"{entry.path}\0{version}"

        def fetch(path):
            try:
                remote.fetch(entry.path, path, version)
            except remote.RemoteError as error:
                if error.errno == errno.EIO:
                    _versions.pop(entry.path, None)  # it may have changed: another try asks anew
                raise

        with kept_file(name, version.size, fetch) as path:
            yield LocalCopy(path, name)
    else:
        yield LocalCopy(os.fspath(entry.path), None)


def _version(url, ask):
    if url not in _versions:
        _versions[url] = ask(url)
    return _versions[url]
