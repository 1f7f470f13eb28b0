"""Everything to measure on a GPU, in one command: see __main__.py."""
