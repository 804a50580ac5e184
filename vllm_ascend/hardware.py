"""Which NPUs and which CANN this platform has been written for.

What is done here follows the rules of Atlas A2 and A3. Other NPUs have other operators, or the same with other rules:
they would fail late or answer wrongly, so they are refused by name. An older CANN may do, and gets a warning.

torch-npu tells both without making a context on a device, which a process that only configures must not do.
"""

from __future__ import annotations

import re
from typing import Final

import torch_npu
from vllm.logger import init_logger

logger = init_logger(__name__)

SUPPORTED: Final = {"Atlas A2 (Ascend 910B)": range(220, 230), "Atlas A3 (Ascend 910_93)": range(250, 260)}
"""By torch-npu's numbers of SoCs, of which A2 has 220 to 225 today and A3 250 to 256."""
OTHERS: Final = {
    "Ascend 910A": range(100, 200),
    "Ascend 310P (Atlas inference products)": range(200, 220),
    "Ascend 310B": range(240, 250),
    "Ascend 950 (A5)": range(260, 270),
}
UNKNOWN: Final = -1
"""torch-npu's number of a SoC that CANN does not tell, as it may before a device is set."""
OLDEST_CANN: Final = (9, 1)


def refuse_other_npus() -> None:
    """Raises ValueError where the NPUs of this machine are neither A2 nor A3. To be asked again once a device is set.

    RuntimeError, where torch-npu does not know them.
    """
    number = int(torch_npu._C._npu_get_soc_version())
    if number == UNKNOWN or any(number in numbers for numbers in SUPPORTED.values()):
        return
    name = next((name for name, numbers in OTHERS.items() if number in numbers), "an unknown SoC")
    raise ValueError(
        f"this machine's NPUs are {name}, number {number} in torch-npu: supported are {' and '.join(SUPPORTED)}"
    )


def warn_of_old_cann() -> None:
    version = str(torch_npu._C._get_cann_version("CANN"))
    if is_too_old(version):
        logger.warning_once(
            "CANN %s is older than %d.%d, for which this platform has been written: operators may be missing, or take "
            "less",
            version,
            *OLDEST_CANN,
        )


def is_too_old(version: str) -> bool:
    """Of a version as CANN writes it, "8.5.0" or "9.0.RC1". What does not begin so is not judged."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_CANN
