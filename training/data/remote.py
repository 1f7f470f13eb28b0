"""Files that are not on this machine, through fsspec: ``https://``, and ``s3://``, ``gs://`` and others with a package each.

Credentials, endpoints and the like are fsspec's own configuration: its files in ~/.config/fsspec, its variables FSSPEC_*, and
what the packages read by themselves.
"""

import contextlib
import errno
import os
import time
from typing import NamedTuple

TRIES = 3  # of a request that may succeed when it is repeated; data that are away for longer are waited for by ``outage``
FIRST_PAUSE = 0.1  # seconds; each is four times the one before
CONNECT_SECONDS, READ_SECONDS = 30, 60  # of http: for a connection, and between two pieces of an answer

# What a file system says of a file's version, whatever it calls it.
MARKS = frozenset(
    ["etag", "last-modified", "lastmodified", "last_modified", "updated", "mtime", "created", "generation", "version_id"]
    + ["content-md5", "content_md5", "md5hash", "digest", "crc32c", "checksum"]
)
LOCAL_DISK = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])  # while a file was written here
# Of http: what another try does not change. 404 and 410: not there; 401, 403, 407: not for us; other 4xx: not to be had so.
ABSENT, FORBIDDEN, REPEATED = (404, 410), (401, 403, 407), (408, 425, 429)


class RemoteError(OSError):
    """A file that cannot be had. ``reason``: why, in one line. errno: ENOENT or EACCES where it is missing or forbidden; EIO
    where it may come back; None where that is not the question, as without the package that it needs."""

    def __init__(self, url, reason, number):
        super().__init__(number, reason)
        self.url, self.reason = url, reason

    def __str__(self):
        return f"{self.url}: {self.reason}"

    def __reduce__(self):
        return type(self), (self.url, self.reason, self.errno)


class Version(NamedTuple):
    """Of a file: its size in bytes (None: unknown), and what else tells it from others of that name."""

    size: int | None
    mark: str


def version(url):
    """The Version that ``url`` has now. Raises RemoteError."""
    info = _tried(url, lambda system, path: system.info(path))
    if info.get("type") == "directory":
        raise RemoteError(url, "is a folder", errno.EISDIR)
    marks = sorted(f"{name.lower()}={value}" for name, value in info.items() if name.lower() in MARKS and value is not None)
    return Version(info.get("size"), " ".join(marks))


def fetch(url, target, expected):
    """Writes the file at ``url`` to the path ``target``. Raises RemoteError where it is not the Version ``expected``, whole, from
    the first byte to the last; OSError where it cannot be written."""

    def get(system, path):
        system.get_file(path, target)
        size = os.path.getsize(target)
        if expected.size not in (None, size):
            raise ConnectionError(f"{size:,} of {expected.size:,} bytes came")

    _tried(url, get)
    if version(url) != expected:
        raise RemoteError(url, "it changed while it was read", errno.EIO)


def read_bytes(url, start=None, end=None):
    """All of the file at ``url``, or its bytes from ``start`` to ``end``. Raises RemoteError."""

    def read(system, path):
        data = system.cat_file(path, start=start, end=end)
        if start is not None and len(data) != end - start:
            raise ConnectionError(f"{len(data):,} of {end - start:,} bytes came")
        return data

    return _tried(url, read)


@contextlib.contextmanager
def opened(url, block):
    """Context: a file object that can seek in ``url`` and reads ``block`` bytes at a time. Raises RemoteError."""
    with _explained(url):
        system, path = _system(url)
        with system.open(path, "rb", block_size=block, cache_type="readahead") as file:
            yield file


def list_folder(url):
    """The URLs of all files below the folder ``url``, sorted. Raises RemoteError."""
    scheme = url.partition("://")[0]
    found = _tried(url, lambda system, path: system.find(path))
    return sorted(name if "://" in name else f"{scheme}://{name.lstrip('/') if scheme != 'file' else name}" for name in found)


def host_of(url):
    """Protocol and host or bucket."""
    return "/".join(url.split("/")[:3])


def _system(url):
    try:
        import fsspec
    except ImportError as error:
        raise RemoteError(url, "needs the package fsspec: pip install 'stmae[remote]'", None) from error
    options = {"use_listings_cache": False}
    scheme = url.partition("://")[0].lower()
    try:
        if scheme in ("http", "https"):
            import aiohttp

            own = fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})
            limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            options["client_kwargs"] = {"timeout": limits, **own}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:  # fsspec's own words name the package
        raise RemoteError(url, f"needs a package: {error}", None) from error
    except ValueError as error:  # a protocol that there is not
        raise RemoteError(url, str(error), None) from error


def _tried(url, request):
    """``request(file system, path)``, repeated where that may help."""
    pause = FIRST_PAUSE
    for attempt in range(TRIES):
        try:
            with _explained(url):
                return request(*_system(url))
        except RemoteError as error:
            if error.errno != errno.EIO or attempt == TRIES - 1:
                raise
        time.sleep(pause)
        pause *= 4


@contextlib.contextmanager
def _explained(url):
    """Context: whatever a file system raises as a RemoteError, but for errors of the disk here."""
    try:
        yield
    except RemoteError:
        raise
    except Exception as error:  # of as many libraries as there are protocols
        if isinstance(error, OSError) and error.errno in LOCAL_DISK:
            raise
        raise RemoteError(url, *_reason(error)) from error


def _reason(error):
    """(why, errno) of what fsspec or a library below it raised."""
    causes = [error]
    while causes[-1].__cause__ is not None:  # fsspec's http says "not found" of whatever happened
        causes.append(causes[-1].__cause__)
    statuses = [status for cause in causes if isinstance(status := getattr(cause, "status", None), int)]
    if statuses:
        status = statuses[-1]
        number = errno.ENOENT if status in ABSENT else errno.EACCES if status in FORBIDDEN else errno.EIO
        if 400 <= status < 500 and number == errno.EIO and status not in REPEATED:
            number = errno.EINVAL
        return f"the server answers {status}", number
    last = next((cause for cause in causes if isinstance(cause, PermissionError)), causes[-1])  # s3fs says why below it
    words = f"{type(last).__name__}: {last}".partition("\n")[0].rstrip(": ")
    if isinstance(last, FileNotFoundError):
        return "there is no such file", errno.ENOENT
    if isinstance(last, PermissionError):
        return f"it may not be read ({words})", errno.EACCES
    if isinstance(last, IsADirectoryError):
        return "is a folder", errno.EISDIR
    return words, errno.EIO
