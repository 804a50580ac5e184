"""The files that an instance writes for others: where a rank serves its weights, and how its load went.

A prefix in the configuration asks for each of them. Whether they can be written is found out before anything is loaded,
because that is when a wrong path is easily repaired. A failure afterwards is logged, and the load goes on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.files import require_writable
from vllm_ascend.model_loader.netloader.report import LoadReport, write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputFiles:
    """The paths of the address file and of the report, None if the configuration does not ask for the file."""

    address: Path | None
    report: Path | None

    @classmethod
    def of(cls, config: NetLoaderConfig, rank: int, role: str) -> OutputFiles:
        """Raises ConfigError, naming the key, if a file could not be written."""
        suffix = "" if role == "target" else f"-{role}"
        address = _writable("OUTPUT_PREFIX", config.output_prefix, f"{rank}.txt")
        return cls(address, _writable("REPORT_PREFIX", config.report_prefix, f"{rank}{suffix}.json"))

    def write_address(self, address: str) -> None:
        """Writes where this rank serves all its models. Logs a failure."""
        if self.address is None:
            return
        try:
            write_whole(self.address, f"{address}\n".encode())
        except OSError as error:
            logger.error("the address %s cannot be written to OUTPUT_PREFIX: %s", address, error)

    def write_report(self, report: LoadReport) -> None:
        """Writes how the load of one model went. Logs a failure."""
        if self.report is None:
            return
        try:
            report.write(self.report)
        except OSError as error:
            logger.error("the load report %s cannot be written: %s", self.report, error)


def _writable(key: str, prefix: str | None, suffix: str) -> Path | None:
    if prefix is None:
        return None
    path = Path(f"{prefix}{suffix}")
    require_writable(key, prefix, path)
    return path
