"""What the sections of a configuration check of themselves, in the same words whether a value comes from Python, a file or the
command line. Errors name the field; ``parse`` puts the section before it.
"""

import difflib
import math

import torch

from stmae.models.field_types import describe, field_types, match, show

MAX_SEED = 2**63 - 1  # torch's generators take no more


def check_types(section):
    """Raises ValueError where a field's value is not of the type that it is annotated with. Lists become tuples where tuples are
    meant, integers floats and paths text."""
    for name in field_types(type(section)):
        setattr(section, name, checked_type(type(section), name, getattr(section, name)))


def checked_type(section_class, name, value):
    """``value`` as the type of the field ``name``. Raises ValueError where it is none."""
    annotation = field_types(section_class)[name]
    matches, result = match(annotation, value)
    if not matches:
        raise ValueError(f"{name}: expected {describe(annotation)}, got {show(value)}")
    return result


def require(section, name, valid, expected):
    """Raises ValueError unless ``valid`` holds of the field's value; None passes."""
    value = getattr(section, name)
    if value is not None and not valid(value):
        raise ValueError(f"{name}: expected {expected}, got {show(value)}")


def require_positive(section, *names):
    """Raises ValueError unless every field of these ``names`` is more than 0, and finite; None passes."""
    for name in names:
        require(section, name, lambda value: 0 < value < math.inf, "more than 0")


def require_not_negative(section, *names):
    """Raises ValueError unless every field of these ``names`` is 0 or more, and finite; None passes."""
    for name in names:
        require(section, name, lambda value: 0 <= value < math.inf, "0 or more")


def require_fraction(section, *names, one=False):
    """Raises ValueError unless every field of these ``names`` is in [0, 1), or with ``one`` in [0, 1]; None passes."""
    for name in names:
        require(
            section, name, lambda value: 0 <= value < 1 or (one and value == 1), "0 to 1" if one else "0 or more, and less than 1"
        )


def require_seed(section, name="seed"):
    require(section, name, lambda value: 0 <= value <= MAX_SEED, f"0 or more, at most {MAX_SEED}")


def require_text(section, *names):
    """Raises ValueError where a field of these ``names`` is empty; None passes."""
    for name in names:
        require(section, name, lambda value: value.strip() != "", "text that is not empty")


def require_device(section, name="device"):
    require(section, name, is_device, "a device such as 'auto', 'cpu' or 'cuda:0'")


def is_device(name):
    """Whether a device could have this name; not whether it is there."""
    try:
        return name == "auto" or torch.device(name) is not None
    except RuntimeError:
        return False


def nearest(name, names):
    """For the end of an error message: the one of ``names`` that was probably meant, if any."""
    found = difflib.get_close_matches(name, names, 1) or difflib.get_close_matches(name.rpartition(".")[2], names, 1)
    found = found or [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"; did you mean {found[0]!r}?" if found else ""
