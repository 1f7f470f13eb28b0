"""One process on one run folder: a lock of the operating system for the run's life, which a kill ends too."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import weakref
from pathlib import Path

NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that has no locks

_held = weakref.WeakSet()


class Locked(RuntimeError):
    """Another process holds the lock; the message says which."""


class RunLock:
    """The lock of ``folder``, held from here to ``release`` or to the end of the process.

    Its file names the process that holds it. It is removed at the end; one left by a kill is nobody's, and taken again.

    Raises Locked where another process holds it, OSError where its file cannot be made.
    """

    def __init__(self, folder):
        self.path = Path(folder) / NAME
        self.descriptor = None
        while self.descriptor is None:
            descriptor = open_regular(self.path, os.O_RDWR | os.O_CREAT)
            try:
                self._lock(descriptor)
                # Whoever held it removed the file at the end, and a third may have made another: hold the one that is there.
                if _same_file(descriptor, self.path):
                    self._name_holder(descriptor)
                    self.descriptor = descriptor
            finally:
                if self.descriptor is None:
                    os.close(descriptor)
        _held.add(self)
        self._finalizer = weakref.finalize(self, _release, self.path, self.descriptor, os.getpid())

    def release(self):
        self._finalizer()

    def _lock(self, descriptor):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"another process trains in {self.path.parent}: {_holder(descriptor)}") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise

    def _name_holder(self, descriptor):
        if os.fstat(descriptor).st_nlink > 1:
            return  # a second name of somebody's file: locked, but not written to
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)

    def _close_in_child(self):
        """In a forked child, such as a data worker: the lock is the parent's, and must not outlive it."""
        if self._finalizer.detach():
            os.close(self.descriptor)


def open_regular(path, flags):
    """A descriptor of the regular file ``path``: not of what a symbolic link leads to, nor of a pipe or a device, which could
    wait for ever. Raises OSError for these."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return descriptor


def _release(path, descriptor, pid):
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            if _same_file(descriptor, path):
                os.unlink(path)
    os.close(descriptor)


def _same_file(descriptor, path):
    try:
        stored, opened = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (stored.st_dev, stored.st_ino) == (opened.st_dev, opened.st_ino)


def _holder(descriptor):
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]!r}"
    except (OSError, ValueError, TypeError, KeyError):
        return "it has not written its name yet"


def _close_in_children():
    for lock in list(_held):
        lock._close_in_child()


os.register_at_fork(after_in_child=_close_in_children)
