from __future__ import annotations

import pytest

from support.certificates import Authority
from support.peers.access import Certified, certified_by


@pytest.fixture(scope="session")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    directory = tmp_path_factory.mktemp("authorities")
    return Authority(directory, "ours"), Authority(directory, "theirs")


@pytest.fixture(scope="session")
def certified(authorities: tuple[Authority, Authority]) -> Certified:
    return certified_by(*authorities)
