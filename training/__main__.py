"""``python -m stmae.training`` is the ``stmae`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
