"""Benchmarks, each a program: `python -m benchmarks.NAME --help` from the root of a checkout says what it measures."""
