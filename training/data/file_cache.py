"""A folder of files that were fetched from elsewhere, of at most so many bytes: the least recently used go first.

The name of an entry says what it is (a hash of where it is from and of which version), its size and its checksum. It is written
under another name and renamed, so that what bears its name is whole, whenever a process is killed. A file in use is locked, for
reading, by its readers; who makes room passes over it. The system takes a lock back when its process ends, however it ends.

The folder is STMAE_CACHE, else stmae/files in the user's cache folder; STMAE_CACHE=off keeps nothing. STMAE_CACHE_GB is the
limit. Where nothing can be kept, a file is held in memory for as long as it is used.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import tempfile
import warnings
import zlib
from pathlib import Path

from .remote import RemoteError

DEFAULT_GB = 50.0
KEPT = 0.9  # of the limit, after room was made
IN_MEMORY = 2**29  # bytes: a larger file that is not kept is written to the folder for temporary files
CHUNK = 2**20


class CacheSettingError(ValueError):
    """A variable of the environment that is not understood."""


def cache():
    """The FileCache that the environment asks for; None: nothing is kept."""
    chosen, limit = os.environ.get("STMAE_CACHE"), os.environ.get("STMAE_CACHE_GB")
    if chosen == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    try:
        size = DEFAULT_GB if limit is None else float(limit)
        if not 0 < size < float("inf"):
            raise ValueError
    except ValueError:
        raise CacheSettingError(f"STMAE_CACHE_GB: expected a number above 0, got {limit!r}") from None
    return _cache(Path(chosen) if chosen else Path(base) / "stmae" / "files", int(size * 1e9))


@functools.cache
def _cache(folder, limit):
    return FileCache(folder, limit)


@contextlib.contextmanager
def kept_file(name, size, write):
    """Context: the path of a file with the contents that ``name`` stands for, for good. ``write(path)`` writes them where they
    are not in the cache; what it raises is passed on. size: in bytes; None: unknown."""
    with contextlib.ExitStack() as stack:
        path, kept = None, cache()
        if kept is not None:
            try:
                path = stack.enter_context(kept.file(name, size, write))
            except CacheError as error:
                kept.warn(error)
        if path is None:
            path = stack.enter_context(unnamed_file(size))
            write(path)
        yield path


@contextlib.contextmanager
def unnamed_file(size):
    """Context: the path of an empty file that is gone afterwards, in memory unless it is large."""
    if hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd") and (size or 0) <= IN_MEMORY:
        file = os.memfd_create("stmae-file")
        try:
            yield f"/proc/self/fd/{file}"
        finally:
            os.close(file)
    else:
        with tempfile.NamedTemporaryFile(prefix="stmae-") as file:
            yield file.name


class CacheError(Exception):
    """The cache cannot be used: the message says why."""


class FileCache:
    """The cache in ``folder``, of at most ``limit`` bytes."""

    def __init__(self, folder, limit):
        self.folder, self.limit = Path(folder), limit
        self._verified = set()  # names that this process has compared with their checksums
        self._warned = False

    @contextlib.contextmanager
    def file(self, name, size, write):
        """As ``kept_file``. Raises CacheError where the file cannot be kept."""
        key = hashlib.sha256(os.fsencode(name)).hexdigest()
        path, descriptor = self._find(key) or self._add(key, size, write)
        try:
            yield path_of(descriptor, path)
        finally:
            os.close(descriptor)  # and with it the lock

    def warn(self, error):
        """Once in a process."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a file is not kept in the cache {self.folder} ({error}): such files are read without it", stacklevel=2
            )

    def _find(self, key):
        """(path, descriptor that holds its lock), or None. A damaged entry is removed."""
        try:
            names = [entry.name for entry in os.scandir(self.folder / key[:2]) if entry.name.startswith(f"{key}.")]
        except OSError:
            return None
        for name in names:
            path = self.folder / key[:2] / name
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:  # gone meanwhile
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                status = os.fstat(descriptor)
                if status.st_nlink and self._is_whole(name, descriptor, status.st_size):
                    with contextlib.suppress(OSError):
                        os.utime(path)  # used now
                    return path, descriptor
                if status.st_nlink:
                    os.unlink(path)
            except OSError as error:  # a disk that gives nothing back, or has no locks
                os.close(descriptor)
                raise CacheError(error.strerror or str(error)) from error
            os.close(descriptor)
        return None

    def _is_whole(self, name, descriptor, size):
        """Whether size and, for the first time in this process, checksum are as the name says."""
        _, _, told = name.partition(".")
        if told != f"{size}.{told.rpartition('.')[2]}":
            return False
        if name in self._verified:
            return True
        if told != f"{size}.{checksum(descriptor):08x}":
            return False
        self._verified.add(name)
        return True

    def _add(self, key, size, write):
        temporary = None
        try:
            folder = self.folder / key[:2]
            folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size or 0)
            descriptor, temporary = _locked_temporary(folder)
            try:
                write(path_of(descriptor, temporary))
                length = os.fstat(descriptor).st_size
                if size is None:
                    self._make_room(length)
                path = folder / f"{key}.{length}.{checksum(descriptor):08x}"
                os.replace(temporary, path)
                self._verified.add(path.name)
                return path, descriptor
            except BaseException:
                os.close(descriptor)
                raise
        except RemoteError:  # of what was to be written
            raise
        except OSError as error:
            raise CacheError(error.strerror or str(error)) from error
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _make_room(self, size):
        """Counts ``size`` more bytes, and removes what was not used for longest where they are too many. The count is of all
        processes; it may be too high, since what is counted may not come, and is right whenever room is made."""
        if size > self.limit:
            raise CacheError(f"a file of {size:,} bytes is more than its limit of {self.limit:,}")
        descriptor = os.open(self.folder / ".bytes", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 100, 0)
            total = int(text) + size if text.isdigit() else None
            if total is None or total > self.limit:
                total = self._remove_oldest(self.limit if total is None else KEPT * self.limit, size) + size
                if total > self.limit:
                    raise CacheError(f"its files in use and {size:,} bytes more are over the limit of {self.limit:,}")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(total).encode(), 0)
        finally:
            os.close(descriptor)

    def _remove_oldest(self, most, size):
        """Removes files until those that are left and ``size`` bytes are at most ``most`` bytes. Returns the bytes left."""
        files = []
        for folder in self.folder.glob("??"):
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    stale = entry.name.endswith(".tmp")  # where nobody holds it: of a process that was killed
                    files.append((not stale, status.st_mtime_ns, status.st_size, entry.path))
        left = sum(length for _, _, length, _ in files)
        for complete, _, length, path in sorted(files):
            if complete and left + size <= most:
                break
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is in use
                    os.unlink(path)
                    left -= length
                finally:
                    os.close(descriptor)
        return left


def _locked_temporary(folder):
    """(descriptor, path) of a new file, locked. Before it is, another process may take it for one that was left."""
    while True:
        descriptor, path = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                return descriptor, path
        except OSError:
            os.close(descriptor)
            os.unlink(path)
            raise
        os.close(descriptor)


def path_of(descriptor, path):
    """The open file itself, where the system has names for these: so somebody may empty the folder at any moment."""
    return f"/proc/self/fd/{descriptor}" if os.path.exists("/proc/self/fd") else str(path)


def checksum(descriptor):
    """CRC-32 of an opened file, all of it."""
    value, start = 0, 0
    while chunk := os.pread(descriptor, CHUNK, start):
        value, start = zlib.crc32(chunk, value), start + len(chunk)
    return value
