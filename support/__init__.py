"""What tests, benchmarks, the soak and the demo share; no part of the distribution.

Whatever imports it runs from the root of a checkout: `pytest`, `python -m benchmarks.NAME`, `python -m tools.NAME`.
"""
