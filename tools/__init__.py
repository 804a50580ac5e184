"""Programs for people who work on this package, run as `python -m tools.NAME` from the root of a checkout."""
