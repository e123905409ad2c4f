"""Benchmarks; run from the repository's root, as `python -m bench.NAME` or through `make bench`."""
