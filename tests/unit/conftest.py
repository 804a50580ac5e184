from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# No deadlines: the machine may be busy. Derandomized: the same commit passes or fails the same way everywhere.
settings.register_profile(
    "unit", deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="type of the devices that hold the weights in the examination of the transports")
