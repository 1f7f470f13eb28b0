"""Presets and configuration files: YAML or JSON that holds what differs from the defaults, or from the preset it starts from.

A path in such a file is relative to the file. At its top it may name the preset that it starts from (``preset: NAME``), the
command it is for (``command``), the number of GPUs that its source ran it on (``gpus``), the data set that it is for
(``dataset``, and its training ``videos``) and, for fine-tuning, the preset that made the weights (``pretrained``).
"""

from pathlib import Path

import yaml

from .checks import nearest
from .sources import map_sources

PRESETS = Path(__file__).parents[1] / "presets"
# At the top of a preset or configuration file: not settings.
HEADER = ("command", "preset", "pretrained", "gpus", "dataset", "videos")
PATH_FIELDS = (  # in a file, relative to it
    "data",
    "data_root",
    "data_labels",
    "held_out",
    "checkpoint",
    "init",
    "video",
    "test_data",
    "test_boxes",
    "excluded",
    "classes",
    "probe.data",
    "probe.test_data",
)


class _Loader(yaml.SafeLoader):
    """YAML without aliases: ten lines of them stand for billions of values."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: expected the value itself, got an alias (*name)")
        return super().compose_node(parent, index)


def load_yaml(text):
    """The {name: value} of a YAML or JSON text. Raises ValueError where it is not that."""
    try:
        tree = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise ValueError(f"expected 'field: value' lines, got {type(tree).__name__}")
    return tree


def load_value(text):
    """A value as in a settings file: YAML where it is that, else text."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _preset_names():
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def presets(command=None):
    """Names of the presets, of one command or of all."""
    return [name for name in _preset_names() if command in (None, preset_header(name)["command"])]


def preset_path(name, command=None):
    """The file of a preset, which must be for ``command`` if one is given."""
    if not (PRESETS / f"{name}.yaml").is_file() or Path(name).name != name:
        raise ValueError(
            f"expected --preset to be one of {', '.join(presets(command))}, got {name!r}{nearest(name, presets(command))}"
        )
    own_command = preset_header(name)["command"]
    if command not in (None, own_command):
        raise ValueError(
            f"the preset {name} is for 'stmae {own_command}'; expected one for 'stmae {command}': {', '.join(presets(command))}"
        )
    return PRESETS / f"{name}.yaml"


def preset_header(name):
    """{"command": ..., "pretrained": ..., "gpus": ..., "dataset": ..., "videos": ...} of a preset, its own or its base's; None
    where neither has it."""
    header = dict.fromkeys(name for name in HEADER if name != "preset")
    for _, own, _ in with_bases(PRESETS / f"{name}.yaml"):
        header.update({key: value for key, value in own.items() if key in header})
    return header


def read_settings(file):
    """(header, settings) of a YAML or JSON file: ``header`` is {name: value} of the names in HEADER, ``settings`` is
    {"section.field": value}, its relative paths made absolute."""
    try:
        tree = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # among them UnicodeDecodeError
        raise ValueError(f"cannot read the settings in {file}: {error}") from error
    header = {name: tree.pop(name) for name in HEADER if name in tree}
    settings = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            settings.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            settings[name] = value
    named = {name: value for name, value in settings.items() if isinstance(value, str)}
    paths = {
        name: map_sources(named[name], lambda path: str(file.parent.joinpath(path).resolve()))
        for name in PATH_FIELDS
        if named.get(name)
    }
    return header, {**settings, **paths}


def with_bases(file):
    """[(file, header, settings)] of the presets that ``file`` starts from, the first base first, and of the file itself."""
    chain, seen = [], set()
    while file is not None:
        if file in seen:
            raise ValueError(f"{file}: the presets that it starts from lead back to it")
        seen.add(file)
        header, settings = read_settings(file)
        chain.insert(0, (file, header, settings))
        base = header.get("preset")
        if base is not None and base not in _preset_names():
            raise ValueError(f"{file}: expected preset to be the name of one, got {base!r}{nearest(str(base), _preset_names())}")
        file = None if base is None else PRESETS / f"{base}.yaml"
    return chain
