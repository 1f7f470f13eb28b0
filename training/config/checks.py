"""What the sections of a configuration check of themselves. Errors name the field; ``parse`` puts the section before it."""

import difflib


def require_positive(section, *names):
    """Raises ValueError unless every field of these ``names`` is more than 0."""
    for name in names:
        value = getattr(section, name)
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value}")


def require_not_negative(section, *names):
    """Raises ValueError where a field of these ``names`` is less than 0; None passes."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")


def nearest(name, names):
    """For the end of an error message: the one of ``names`` that was probably meant, if any."""
    found = difflib.get_close_matches(name, names, 1) or difflib.get_close_matches(name.rpartition(".")[2], names, 1)
    found = found or [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"; did you mean {found[0]!r}?" if found else ""
