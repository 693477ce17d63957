"""Benchmarks; each is a script: `python -m benchmarks.NAME --help`."""
