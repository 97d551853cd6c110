"""Measurements: `python -m benchmarks --help`, run from the repository's root."""
