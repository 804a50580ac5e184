"""What the benchmarks share: their command line, tables and plots, and the two ways to move synthetic weights."""
