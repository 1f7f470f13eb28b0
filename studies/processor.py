"""The processor's name, for results that say where they were measured."""

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
ZEN = {"25": "Zen 3 or 4", "26": "Zen 5"}  # AMD's families; a virtual machine's model name may say "AMD EPYC" alone


def processor():
    """Such as "AMD EPYC (Zen 5)"; "unknown" where the system does not say."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return "unknown"
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", "unknown")
    return f"{name} ({ZEN[fields['cpu family']]})" if "AMD" in name and fields.get("cpu family") in ZEN else name
