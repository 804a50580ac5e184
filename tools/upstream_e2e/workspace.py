"""A copy of the checkout's tests without upstream's package, and the environment in which they run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tools.upstream_e2e.catalogue import GROUPS, MODELS, Group
from tools.upstream_e2e.models import make_cache

INSIDE = Path(__file__).with_name("inside")
"""What the tests' own processes import: these know nothing of this tool's other modules."""
ROOT = Path(__file__).resolve().parents[2]
COPIED = ("tests", "tools", "examples", "pyproject.toml")


def copy_tests(checkout: Path, scratch: Path) -> None:
    """Raises FileNotFoundError where `checkout` is not one of vllm-ascend."""
    if not (checkout / "tests" / "e2e").is_dir():
        raise FileNotFoundError(f"{checkout} has no tests/e2e: --checkout takes the root of a checkout of vllm-ascend")
    for name in COPIED:
        source = checkout / name
        if source.is_dir():
            shutil.copytree(source, scratch / name, ignore=shutil.ignore_patterns("__pycache__", "ut"))
        elif source.is_file():
            shutil.copyfile(source, scratch / name)


def commit_of(checkout: Path) -> str:
    """The commit that is checked out; empty if `checkout` is not a repository of git."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    if not (checkout / ".git").exists():
        return ""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def group_of(test: str) -> Group:
    """The group that `test`, a file or a test in one, belongs to."""
    path = test.partition("::")[0]
    for group in GROUPS:
        if path == group.folder or path.startswith(f"{group.folder}/"):
            return group
    return Group("")


def environment(cache: Path, group: Group, scratch: Path, outer: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Makes the models that the tests in `scratch` name. No other can be reached with this environment.

    On the simulator, this run has a machine of its own, so that nobody else takes memory of its devices.
    """
    home = cache / (group.folder.replace("/", "-") if group.models else "models")
    programs = "\n".join(path.read_text(errors="replace") for path in (scratch / "tests").rglob("*.py"))
    models = group.models or MODELS
    make_cache(home, {name: recipe for name, recipe in models.items() if name in programs})
    inner = {name: value for name, value in outer.items() if name not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")}
    paths = [str(INSIDE), *filter(None, [str(ROOT), outer.get("PYTHONPATH", "")])]
    return {
        "CANN_SIM_MEMORY": group.device_memory,
        "CANN_SIM_MACHINE": scratch.name,
        **inner,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "UPSTREAM_E2E_EVENTS": str(scratch / "events"),
        "UPSTREAM_E2E_OVER": str(scratch / "over"),
    }
