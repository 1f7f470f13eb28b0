"""``python -m stmae.training`` is the ``stmae`` command."""

from .cli import entry_point

if __name__ == "__main__":
    entry_point()
