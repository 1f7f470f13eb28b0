"""Data that are away for a while: a network's disk that restarts, a folder that is moved and put back, a disk that stutters.

A file that is broken, or not there beside others that are, is another matter: it is named and passed over at once. What decides
is the folder that the file lies in. Where this process has read from it before, and it now cannot be listed or is empty, the data
are away: reading waits, with growing pauses, and then gives what it would have given without the outage. An error of the disk
itself, in a folder that is there, is waited for as well, but not for long: one bad sector must not stop a run.

Of data behind a URL what decides is the server: where it does not answer for another file that was read from it before, the data
are away; where it does, the trouble is that of one file. What a server says is not there, or not for us, is passed over at once.
"""

import errno
import os
import time

from ..config.sources import is_url
from . import remote
from .shards import split_member
from .video import VideoError

PATIENCE = 60.0  # seconds, unless it is said otherwise
FILE_PATIENCE = 2.0  # for a single file whose folder is there; once in a process
FIRST_PAUSE = 0.1  # seconds; each is twice the one before

# What the system says of a file that is not there or not to be read: waiting alone does not mend it.
LASTING = frozenset(
    [errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL]
)


_read_from = set()  # folders that this process, or the one it was forked from, read videos from
_answered = {}  # protocol and host: a URL that was read from there


class DataAwayError(OSError):
    """The data did not come back in the time given; the message says which."""


class _Away(Exception):
    """A try that is worth repeating. ``path``: of the file, or of its folder or server where ``folder`` is true."""

    def __init__(self, path, folder, error):
        self.path, self.folder, self.error = path, folder, error


class PatientReader:
    """Repeats what fails because the data are away.

    patience: seconds to wait for a folder that is away, in all.
    """

    def __init__(self, patience=PATIENCE):
        self.patience = patience
        self._given_up = set()

    def __call__(self, read):
        """``read()``, again and again while it raises what ``raise_if_away`` raises. Raises DataAwayError at the end of the
        patience."""
        started, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                return read()
            except _Away as away:
                waited = time.monotonic() - started
                if not away.folder and waited >= min(FILE_PATIENCE, self.patience):
                    self._given_up.add(away.path)  # from now on it is as broken as any
                    continue
                if waited >= self.patience:
                    kind = "server" if is_url(away.path) else "folder"
                    what = f"the {kind} {away.path} is away" if away.folder else f"{away.path} cannot be read"
                    raise DataAwayError(f"{what} ({away.error.reason}); waited {waited:.0f} s for it") from away.error
                limit = self.patience if away.folder else FILE_PATIENCE
                time.sleep(min(pause, max(limit - waited, 0.01)))
                pause *= 2

    def raise_if_away(self, error):
        """Returns where ``error`` (a VideoError) says that the file is broken or missing; else the try is over."""
        if error.errno is None:
            return
        place = place_of(error.file)
        on_server = is_url(error.file)
        if (error.errno not in LASTING and not _answers(place)) if on_server else is_away(place):
            if on_server or place in _read_from:
                raise _Away(place, True, error)
        elif error.errno not in LASTING and error.file not in self._given_up:
            raise _Away(error.file, False, error)

    def raise_if_all_away(self, errors):
        """Where not one of many videos could be read: the same, of folders too that were never read from."""
        for error in errors:
            if error.errno is not None and not is_url(error.file) and is_away(place_of(error.file)):
                raise _Away(place_of(error.file), True, error)

    def read(self, entry, read):
        """``read()``, which opens ``entry`` alone, repeated while that is away."""

        def attempt():
            try:
                result = read()
            except VideoError as error:
                self.raise_if_away(error)
                raise
            was_read(entry)
            return result

        return self(attempt)


def was_read(entry):
    """To be called when ``entry`` was read: from now on its folder is known to be there."""
    place = place_of(entry.path)
    if is_url(entry.path):
        member = split_member(entry.path)
        _answered[place] = entry.path if member is None else member[0]
        return
    _read_from.add(place)
    if entry.frames:
        _read_from.add(entry.path)


def place_of(path):
    """The folder that a file lies in, its shard if it is in one; of a URL the protocol and host."""
    if is_url(path):
        return remote.host_of(path)
    member = split_member(path)
    return os.path.dirname(path if member is None else member[0])


def _answers(host):
    """Whether the server still gives a file that was read from it before."""
    try:
        return host in _answered and remote.version(_answered[host]) is not None
    except remote.RemoteError as error:
        return error.errno in LASTING


def is_away(folder):
    """Whether ``folder`` cannot be listed, or is empty, as the place is where a disk was mounted."""
    try:
        with os.scandir(folder or os.curdir) as scan:
            return next(scan, None) is None
    except OSError:
        return True
