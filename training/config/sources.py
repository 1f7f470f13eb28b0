"""What ``--data`` names, as text: one source (a folder, a list), or several, each with a weight."""

import math
import os
import re

WEIGHTED = re.compile(r"(.+?):(\d+\.?\d*|\.\d+)(?:,|$)")


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
    """``text`` with every source that it names replaced by ``function`` of it."""
    alone = function(text)
    if os.path.exists(alone):
        return alone
    try:
        mixture = split_mixture(text)
    except ValueError:  # reported where the data are looked for
        mixture = None
    return alone if mixture is None else ",".join(f"{function(source)}:{weight:g}" for source, weight in mixture)
