"""Data that are away for a while: a network's disk that restarts, a folder that is moved and put back, a disk that stutters.

A file that is broken, or not there beside others that are, is another matter: it is named and passed over at once. What decides
is the folder that the file lies in. Where this process has read from it before, and it now cannot be listed or is empty, the data
are away: reading waits, with growing pauses, and then gives what it would have given without the outage. An error of the disk
itself, in a folder that is there, is waited for as well, but not for long: one bad sector must not stop a run.
"""

import errno
import os
import time

from .video import VideoError

PATIENCE = 60.0  # seconds, unless it is said otherwise
FILE_PATIENCE = 2.0  # for a single file whose folder is there; once in a process
FIRST_PAUSE = 0.1  # seconds; each is twice the one before

# What the system says of a file that is not there or not to be read: waiting alone does not mend it.
LASTING = frozenset(
    [errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL]
)


_read_from = set()  # folders that this process, or the one it was forked from, read videos from


class DataAwayError(OSError):
    """The data did not come back in the time given; the message says which."""


class _Away(Exception):
    """A try that is worth repeating. ``path``: of the file, or of its folder where ``folder`` is true."""

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
                    what = f"the folder {away.path} is away" if away.folder else f"{away.path} cannot be read"
                    raise DataAwayError(f"{what} ({away.error.reason}); waited {waited:.0f} s for it") from away.error
                limit = self.patience if away.folder else FILE_PATIENCE
                time.sleep(min(pause, max(limit - waited, 0.01)))
                pause *= 2

    def raise_if_away(self, error):
        """Returns where ``error`` (a VideoError) says that the file is broken or missing; else the try is over."""
        if error.errno is None:
            return
        folder = os.path.dirname(error.file)
        if is_away(folder):
            if folder in _read_from:
                raise _Away(folder, True, error)
        elif error.errno not in LASTING and error.file not in self._given_up:
            raise _Away(error.file, False, error)

    def raise_if_all_away(self, errors):
        """Where not one of many videos could be read: the same, of folders too that were never read from."""
        for error in errors:
            if error.errno is not None and is_away(os.path.dirname(error.file)):
                raise _Away(os.path.dirname(error.file), True, error)

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
    _read_from.add(os.path.dirname(entry.path))
    if entry.frames:
        _read_from.add(entry.path)


def is_away(folder):
    """Whether ``folder`` cannot be listed, or is empty, as the place is where a disk was mounted."""
    try:
        with os.scandir(folder or os.curdir) as scan:
            return next(scan, None) is None
    except OSError:
        return True
