"""What to repair if Netloader cannot be imported."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import traceback
from typing import Final

from vllm_ascend import versions
from vllm_ascend.model_loader.netloader.errors import BrokenInstallation

_OURS: Final = "vllm_ascend"


def what_is_broken(error: Exception) -> BrokenInstallation:
    """Says which package to repair after `error`, with which the import of a module of Netloader has ended."""
    package = _package_at_fault(error)
    reason = f"{type(error).__name__}: {error}"
    return BrokenInstallation(
        f"Netloader cannot be used, because {package} cannot be imported ({reason}): {_repair(package)}. Other load "
        f"formats do not need it."
    )


def _package_at_fault(error: Exception) -> str:
    """The package that a module of ours was importing. Whatever that one was importing in turn is its own affair."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [module.partition(".")[0] for module in modules if not module.startswith(("importlib", "_frozen"))]
    ours = max((position for position, package in enumerate(packages) if package == _OURS), default=-1)
    if packages[ours + 1 :]:
        return packages[ours + 1]
    missing = error.name if isinstance(error, ImportError) else None
    return (missing or _OURS).partition(".")[0]


def _repair(package: str) -> str:
    if package == "vllm":
        found = getattr(sys.modules.get("vllm"), "__version__", "one without a version")
        return f"this version of vllm-ascend is made for vLLM {versions.in_words(versions.NETLOADER)}, not {found}"
    requirement = _requirements().get(package)
    if requirement is None and package != _OURS:
        return f"repair or install {package}"
    return f"{sys.executable} -m pip install --force-reinstall '{requirement or 'vllm-ascend'}'"


def _requirements() -> dict[str, str]:
    """The requirements of this distribution, by the name of the package."""
    try:
        requirements = importlib.metadata.requires("vllm-ascend") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {re.split(r"[^\w.-]", requirement)[0]: requirement for requirement in requirements}
