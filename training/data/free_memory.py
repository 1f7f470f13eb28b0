"""How much memory there is to take, of the machine and of the container: beyond it, the system ends a process by a signal."""

from contextlib import suppress
from pathlib import Path

MEMORY_FILES = {  # of a control group of version 2, and of version 1: its folder, its limit, what it uses
    2: ("sys/fs/cgroup", "memory.max", "memory.current"),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def free_memory(root="/"):
    """Bytes that this process can take without swapping, what caches hold among them; None where the system does not say."""
    root, free = Path(root), []
    with suppress(OSError, KeyError):
        free.append(1024 * _numbers(root / "proc/meminfo")["MemAvailable:"])
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                free += _free_in_groups(root, group.strip("/"), *MEMORY_FILES[1 if controllers else 2])
    return max(0, min(free)) if free else None


def _free_in_groups(root, group, folder, limit, used):
    """Of a control group and of those that it is in, which limit it too. A container sees its own in the place of the root."""
    for own in (Path(group), *Path(group).parents):
        here = root / folder / own
        with suppress(OSError, ValueError):  # "max"
            most, now, counts = int((here / limit).read_text()), int((here / used).read_text()), _numbers(here / "memory.stat")
            names = [prefix + name for prefix in ("", "total_") for name in ("inactive_file", "active_file")]
            yield most - now + max(sum(counts.get(name, 0) for name in part) for part in (names[:2], names[2:]))


def _numbers(file):
    """{first word: second word} of each line that has a number there."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
