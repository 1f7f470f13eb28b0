"""Words for people to read."""


def counted(number, noun, spec=""):
    """A number with its noun: '1 video', '2 videos', '3 classes'; spec: how the number is formatted."""
    shown = f"{number:{spec}}"
    if shown == "1":
        return f"{shown} {noun}"
    return f"{shown} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
