"""Benchmarks: `pytest bench --benchmark-only` on a CPU or a GPU, `python -m bench.gpu` for everything to measure on a GPU."""
