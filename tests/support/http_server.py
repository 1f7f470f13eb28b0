"""A server of files on the loopback, with ranges and versions, that can be told to fail: for what reads over a network."""

import email.utils
import html
import os
import re
import threading
import urllib.parse
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves the files below ``folder`` at ``url`` while it is entered.

    requests: (method, path, status) of every request. ``fault``: called with (method, path) before each answer, gives None or one
    of 'drop' (no answer), 'cut' (half of the body), an integer (that status), or a callable, which is called before the file is
    read.
    """

    def __init__(self, folder):
        self.folder, self.requests, self.fault = os.fspath(folder), [], lambda method, path: None

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"server_of_files": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, method, path=None):
        """How many requests there were."""
        return sum(m == method and path in (None, p) for m, p, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds: no connection is kept for longer
    disable_nagle_algorithm = True
    server_of_files = None

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        owner, path = self.server_of_files, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        fault = owner.fault(self.command, path)
        if callable(fault):
            fault = fault()
        if fault == "drop":
            self.note(path, 0)
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.head(path, fault, 0)
            return
        file = owner.folder + path
        if os.path.isdir(file):
            names = (name + "/" * os.path.isdir(os.path.join(file, name)) for name in sorted(os.listdir(file)))
            links = (f'<a href="{urllib.parse.quote(name)}">{html.escape(name)}</a>' for name in names)
            data, extra, status, total = "\n".join(links).encode(), {"Content-Type": "text/html"}, 200, None
        else:
            try:
                with open(file, "rb") as opened:
                    data, changed = opened.read(), os.fstat(opened.fileno())
            except OSError:
                self.head(path, 404, 0)
                return
            extra = {
                "ETag": f'"{changed.st_mtime_ns:x}-{changed.st_size:x}"',
                "Last-Modified": email.utils.formatdate(changed.st_mtime, usegmt=True),
                "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
            }
            status, total = 200, len(data)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or total - 1), total - 1)
                if first >= total:
                    self.head(path, 416, 0)
                    return
                data, status = data[first : last + 1], 206
                extra["Content-Range"] = f"bytes {first}-{last}/{total}"
        self.head(path, status, len(data), extra)
        if body:
            with suppress(OSError):  # the reader has gone
                self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            self.close_connection = self.close_connection or fault == "cut"

    def head(self, path, status, length, extra=None):
        self.note(path, status)
        with suppress(OSError):
            self.send_response(status)
            for name, value in {"Content-Length": str(length), **(extra or {})}.items():
                self.send_header(name, value)
            self.end_headers()

    def note(self, path, status):
        self.server_of_files.requests.append((self.command, path, status))
