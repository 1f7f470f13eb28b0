"""What ``--data`` names, as text: one source (a folder, a list), or several, each with a weight; a path, or a URL."""

import math
import os
import re

WEIGHTED = re.compile(r"(.+?):(\d+\.?\d*|\.\d+)(?:,|$)")


def is_url(path):
    """Whether ``path`` is reached by a protocol, ``s3://bucket/video.mp4``, and not a path of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def absolute(path):
    """``path`` from the root on; a URL as it is."""
    return os.fspath(path) if is_url(path) else os.path.abspath(path)


def joined(folder, path):
    """``path`` as seen from ``folder``; either may be a URL."""
    if is_url(path) or not is_url(folder):
        return path if is_url(path) else os.path.join(folder, path)
    root = "/".join(folder.split("/")[:3])
    return root + path if path.startswith("/") else f"{folder.rstrip('/')}/{path}"


def suffix_of(path):
    """In lower case, with its point: what the file is by its name. A URL may have a query after it."""
    path = os.fspath(path)
    if is_url(path) and path.lower().startswith("http"):
        path = re.split(r"[?#]", path, maxsplit=1)[0]
    return os.path.splitext(path)[1].lower()


def split_mixture(text):
    """[(source, weight)] of ``SOURCE:WEIGHT,SOURCE:WEIGHT``, two or more; None where ``text`` names one source. A source may hold
    commas and colons. Raises ValueError where it begins as several and goes on otherwise, or for a weight of 0."""
    text = str(text)
    if not re.search(r":[\d.]+,", text) or os.path.exists(text):
        return None
    found, end = [], 0
    for match in WEIGHTED.finditer(text):
        found.append((match[1], float(match[2])))
        end += len(match[0])
    if end != len(text) or text.endswith(",") or len(found) < 2:
        raise ValueError(f"expected SOURCE:WEIGHT,SOURCE:WEIGHT or the name of one that exists, got {text!r}")
    for source, weight in found:
        if not 0 < weight < math.inf:
            raise ValueError(f"expected a weight above 0 for {source}, got {weight:g}")
    return found


def map_sources(text, function):
    """``text`` with every source that it names replaced by ``function`` of it, but for URLs."""

    def changed(source):
        return source if is_url(source) else function(source)

    alone = changed(text)
    if os.path.exists(alone):
        return alone
    try:
        mixture = split_mixture(text)
    except ValueError:  # reported where the data are looked for
        mixture = None
    return alone if mixture is None else ",".join(f"{changed(source)}:{weight:g}" for source, weight in mixture)
