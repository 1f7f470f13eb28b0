"""Whether values are of the types that a dataclass's fields are annotated with, and words for an error where they are not."""

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from typing import Any


@functools.cache
def field_types(config_class: type) -> dict[str, Any]:
    """{field: annotation} of a dataclass."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def match(annotation: Any, value: Any) -> tuple[bool, Any]:
    """(whether ``value`` is one of ``annotation``, the value as that): an integer as a float, a list as a tuple, a path as
    text."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        results = [match(option, value) for option in arguments]
        return next((result for result in results if result[0]), (False, value))
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments, value
    if origin in (tuple, list):
        if not isinstance(value, (tuple, list)):
            return False, value
        item_types = arguments[:1] * len(value) if origin is list or Ellipsis in arguments else arguments
        items = [match(item_type, item) for item_type, item in zip(item_types, value)]
        return len(value) == len(item_types) and all(matches for matches, _ in items), origin(item for _, item in items)
    if annotation is float:
        matches = isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
        return matches, float(value) if matches else value
    if annotation is int:
        matches = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return matches, int(value) if matches else value
    if annotation is str and isinstance(value, os.PathLike):
        return True, os.fspath(value)
    return isinstance(value, annotation), value


def describe(annotation: Any) -> str:
    """``annotation`` in words: "an integer or null"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is list:
        return "a list"
    if origin is tuple:
        items = "integers" if arguments[0] is int else "numbers"
        return items if Ellipsis in arguments else f"{len(arguments)} {items}"
    known = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return known.get(annotation) or f"a {annotation.__name__}"


def show(value: Any) -> str:
    """A value for an error message, as a settings file has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return repr(value) if isinstance(value, (str, int, float, list, dict)) else str(value)
