"""Configurations from the command line: every field of a configuration is an option, and a line in a preset or file.

Order of precedence: the command line, then ``--config FILE``, then ``--preset NAME``, then the defaults (the paper's).
"""

import argparse
import contextlib
import dataclasses
import json
import re
from pathlib import Path

from stmae.models.field_types import show

from .checks import checked_type, nearest
from .detection import DetectionConfig
from .preset_files import load_value, preset_path, presets, read_settings, with_bases
from .training import FinetuneConfig, PretrainConfig


def parse(config_class, argv, *, prog, description):
    """The configuration that ``argv`` asks for. Prints what is wrong and exits, as argparse does, when it cannot be made."""
    import jsonargparse  # half a second: only where there is a command line

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    command = {PretrainConfig: "pretrain", FinetuneConfig: "finetune", DetectionConfig: "finetune detector"}.get(config_class)
    has_presets = command is not None
    required = [f"--{f.name} {f.name.upper()}" for f in dataclasses.fields(config_class) if _is_required(f)]
    usage = [prog, *["[--preset NAME]"] * has_presets, "[--config FILE]", *required, "[--SETTING VALUE ...]"]
    parser = jsonargparse.ArgumentParser(prog=prog, usage=" ".join(usage), description=description, exit_on_error=False)
    # Files become the parser's defaults, so that --help shows what would be used and the order of the options does not matter.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    if has_presets:
        parser.add_argument("--preset", metavar="NAME", help=f"settings to start from: {', '.join(presets(command))}")
        early.add_argument("--preset")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file of settings" + ", on top of the preset's" * has_presets
    )
    early.add_argument("--config")
    parser.add_class_arguments(config_class, None)
    try:
        files = vars(early.parse_known_args(argv)[0])
        preset, config_file = files.get("preset"), files.get("config")
        if preset is not None:
            _set_defaults(parser, config_class, preset_path(preset, command), command)
        if config_file is not None:
            if preset is not None and read_settings(Path(config_file))[0].get("preset") is not None:
                raise ValueError(f"expected one preset to start from, got --preset {preset} and another in {config_file}")
            _set_defaults(parser, config_class, Path(config_file), command)
        _refuse_typos(argv, [*setting_names(config_class), *files, "help", "print_shtab"])
        try:
            parsed = parser.parse_args(argv)
        except argparse.ArgumentError as error:
            raise ValueError(_reason(error, config_class, _values(argv))) from error
        for name in files:
            parsed.pop(name)
        return _build(config_class, parsed)
    except (ValueError, argparse.ArgumentError) as error:
        parser.exit_on_error = True
        parser.error(str(error))


def _reason(error, config_class, values):
    """What the parser has against one of ``values`` {name: value}, in the words of the configuration's own checks."""
    text = " ".join(str(error).split())
    missing = re.fullmatch(r"(the following arguments are required: )(.*)", text)
    if missing:
        return missing[1] + ", ".join(f"--{name}" for name in missing[2].split(", "))
    key = re.search(r'Parser key "([\w.]+)"', text)
    if key and key[1] in values:
        section, _, field = key[1].rpartition(".")
        value = values[key[1]]
        try:
            if section:
                owner = type(config_class.__dataclass_fields__[section].default_factory())
                with _section_named(section, owner):
                    owner(**{field: value})
            else:
                checked_type(config_class, field, value)
        except ValueError as refused:
            return str(refused)
    return text


def _values(argv):
    """{name: value} of the options of ``argv``."""
    values = {}
    for word, following in zip(argv, [*argv[1:], ""]):
        option = re.fullmatch(r"--([a-z_][\w.]*)(?:=(.*))?", word, re.DOTALL)
        if option:
            values[option[1]] = load_value(following if option[2] is None else option[2])
    return values


def _refuse_typos(argv, names):
    """Raises ValueError for an option of ``argv`` that there is not, where a setting's name is near: the parser alone would list
    what it did not understand."""
    for word in argv:
        option = re.match(r"--([a-z_][\w.]*)", word)
        if option and not any(name == option[1] or name.startswith(f"{option[1]}.") for name in names):
            hint = nearest(option[1], names)
            if hint:
                raise ValueError(f"there is no option --{option[1]}{hint}")


def from_preset(config_class, name, **settings):
    """The configuration of a preset, with the top-level ``settings`` given."""
    return parse(
        config_class, [f"--preset={name}", *(f"--{key}={value}" for key, value in settings.items())], prog="stmae", description=""
    )


def _build(config_class, values):
    """The dataclass from parsed values, its sections too."""
    made = {}
    for f in dataclasses.fields(config_class):
        value = getattr(values, f.name)
        if hasattr(value, "__dict__"):  # jsonargparse's Namespace: a section
            section = type(f.default_factory())
            with _section_named(f.name, section):
                value = _build(section, value)
        made[f.name] = tuple(value) if isinstance(value, list) else value
    return config_class(**made)


@contextlib.contextmanager
def _section_named(name, section_class):
    """Context: errors of the section's own fields get its name."""
    try:
        yield
    except ValueError as error:
        own = str(error).partition(":")[0] in {field.name for field in dataclasses.fields(section_class)}
        raise ValueError(f"{name}.{error}" if own else str(error)) from error


def _set_defaults(parser, config_class, file, command):
    """Makes the settings of ``file`` and of the presets under it the parser's defaults, each checked as on the command line."""
    import jsonargparse

    names = setting_names(config_class)
    checker = jsonargparse.ArgumentParser(exit_on_error=False)
    checker.add_class_arguments(config_class, None)
    required = [f"--{f.name}=x" for f in dataclasses.fields(config_class) if _is_required(f)]
    for source, header, settings in with_bases(file):
        if header.get("command", command) != command:
            raise ValueError(f"{source}: its settings are for 'stmae {header['command']}', not for '{parser.prog}'")
        for name, value in settings.items():
            if name not in names:
                raise ValueError(f"{source}: there is no setting {name!r}{nearest(name, names)}")
            if isinstance(value, dict):
                raise ValueError(f"{source}: {name}: expected a value, got further settings")
        try:
            parsed = checker.parse_args([*required, *(f"--{name}={_as_argument(value)}" for name, value in settings.items())])
        except (ValueError, argparse.ArgumentError) as error:
            raise ValueError(f"{source}: {_reason(error, config_class, settings)}") from error
        for name, value in settings.items():
            if isinstance(parsed[name], str) and isinstance(value, (list, bool)):
                raise ValueError(f"{source}: {name}: expected text, got {show(value)}")
        parser.set_defaults({name: parsed[name] for name in settings})


def setting_names(config_class):
    """Names of the settings of a configuration, ``section.field`` for those of a section."""
    names = []
    for f in dataclasses.fields(config_class):
        section = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        names += (
            [f"{f.name}.{inner.name}" for inner in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else [f.name]
        )
    return names


def _as_argument(value):
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _is_required(f):
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
