"""Quantised copies of checkpoints, as ModelSlim and compressed-tensors write them, without either.

`python -m tools.quantised_model` is the command. Weights are rounded to the nearest, with one scale for each row, so
that the same source gives the same numbers in both formats, and answers that resemble those of the source.
"""
