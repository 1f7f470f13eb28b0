"""A configuration as plain values, for YAML and JSON."""

import dataclasses


def to_dict(config):
    """A configuration as plain values, for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return list(config) if isinstance(config, tuple) else config


def defaults(config_class):
    """Its defaults as plain values, nested; what has to be given is not among them."""
    values = {}
    for f in dataclasses.fields(config_class):
        if f.default_factory is not dataclasses.MISSING:
            values[f.name] = to_dict(f.default_factory())
        elif f.default is not dataclasses.MISSING:
            values[f.name] = to_dict(f.default)
    return values
