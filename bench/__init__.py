"""Benchmarks: `pytest bench --benchmark-only` on a CPU or a GPU, `python -m bench.gpu` for everything that a GPU can tell."""
