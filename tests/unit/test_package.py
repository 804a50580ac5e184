from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_ascend
from vllm_ascend.utils import vllm_version_is

ROOT = Path(vllm_ascend.__file__).parent
NETLOADER = "vllm_ascend.model_loader.netloader"
HEAVY = {"torch", "torch_npu", "vllm", "msgspec", "numpy", "tqdm", "transformers", "blake3"}


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after `statement`."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    return HEAVY & set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import vllm_ascend",
        "import vllm_ascend; assert vllm_ascend.register() is None",
        "from vllm_ascend.utils import adapt_patch; adapt_patch(True); adapt_patch(is_global_patch=False)",
        "from vllm_ascend.ascend_config import clear_ascend_config; clear_ascend_config()",
        f"import {NETLOADER}",
        f"import {NETLOADER}.config, {NETLOADER}.endpoint, {NETLOADER}.errors, {NETLOADER}.traits",
    ],
    ids=["the package", "registering the platform", "no patches", "no settings", "netloader", "the configuration"],
)
def test_importing_costs_nothing(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_a_release_of_vllm_is_recognised_whatever_it_was_built_for() -> None:
    installed = importlib.metadata.version("vllm").partition("+")[0]
    assert vllm_version_is(installed)
    assert not vllm_version_is("0.27.1")


def test_the_command_line_needs_no_vllm() -> None:
    assert loaded_by(f"import {NETLOADER}.cli") <= {"msgspec", "blake3"}


def test_without_an_npu_the_platform_is_left_to_vllm() -> None:
    assert vllm_ascend.register() is None


DECLARED = {
    "vllm.platform_plugins": {"ascend": "vllm_ascend:register"},
    "vllm.general_plugins": {"ascend_model_loader": "vllm_ascend:register_netloader"},
}
"""With the names that upstream's vllm-ascend gives them, which stand in the VLLM_PLUGINS of its users."""


def test_vllm_finds_what_upstream_calls_so() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == DECLARED
    assert project["scripts"] == {"netloader": f"{NETLOADER}.cli:main"}


@pytest.mark.parametrize("value", [value for group in DECLARED.values() for value in group.values()])
def test_an_entry_point_leads_somewhere(value: str) -> None:
    assert callable(importlib.metadata.EntryPoint("name", value, "group").load())


def test_the_version_of_the_distribution_is_that_of_the_package() -> None:
    assert importlib.metadata.version("vllm-ascend") == vllm_ascend.__version__


MODULES = {
    ".".join(("vllm_ascend", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(module: str) -> Iterator[str]:
    """Every module that `module` imports anywhere in its text, in functions and for type checking too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else str(node.module)


def imported_packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(module)}


def imported_siblings(module: str) -> set[str]:
    """Modules of this package, those of Netloader without their prefix; the package itself has only its version."""
    names = {name for name in imports(module) if name.startswith("vllm_ascend.")}
    return {name.removeprefix(f"{NETLOADER}.") for name in names}


ROOMS: dict[str, set[str]] = {
    "shared words": set(),
    "weights": {"shared words"},
    "checkpoint": {"shared words"},
    "wire": {"shared words", "weights"},
    "model": {"shared words", "weights", "wire"},
    "transport": {"shared words", "weights", "wire"},
    "client": {"shared words", "weights", "wire", "transport"},
    "server": {"shared words", "weights", "wire", "transport"},
    "holding": {"shared words", "weights", "wire", "transport", "client", "server"},
    "cache": {"shared words", "weights", "wire", "transport", "client", "server", "holding"},
    "pull": {"shared words", "weights", "checkpoint", "wire", "transport", "client", "holding"},
    "instance": {
        "shared words",
        "weights",
        "checkpoint",
        "wire",
        "model",
        "transport",
        "client",
        "server",
        "holding",
        "cache",
    },
    "engine": {"shared words", "weights", "checkpoint", "model", "instance"},
}
"""What the folders of Netloader may import; whatever lies above them all may import everything."""

SHARED_WORDS = {"config", "endpoint", "errors", "files", "report", "traits"}
ENTRY_POINTS = {"", "cli", "installation", "loader", "registration"}
ON_DEVICES = {"transport.process_group": {"model"}}
"""Modules that know more than their room."""


def room_of(name: str) -> str:
    """The room of a module of Netloader, given without Netloader's own name."""
    return "shared words" if name in SHARED_WORDS else name.partition(".")[0]


NETLOADER_MODULES = [
    module.removeprefix(NETLOADER).removeprefix(".") for module in MODULES if f"{module}.".startswith(f"{NETLOADER}.")
]


def full_name(module: str) -> str:
    return f"{NETLOADER}.{module}".removesuffix(".")


def test_every_module_of_netloader_is_in_a_room_or_an_entry_point() -> None:
    assert {room_of(module) for module in NETLOADER_MODULES if module not in ENTRY_POINTS} == ROOMS.keys()
    assert {module for module in NETLOADER_MODULES if "." not in module} == SHARED_WORDS | ENTRY_POINTS | (
        ROOMS.keys() - {"shared words"}
    )


@pytest.mark.parametrize("module", sorted(set(NETLOADER_MODULES) - ENTRY_POINTS))
def test_a_room_imports_only_from_those_below_it(module: str) -> None:
    room = room_of(module)
    siblings = {name for name in imported_siblings(full_name(module)) if not name.startswith("vllm_ascend")}
    others = {room_of(name) for name in siblings} - {room}
    assert others <= ROOMS[room] | ON_DEVICES.get(module, set())


def test_no_modules_import_each_other() -> None:
    below = {
        name: {sibling for sibling in imported_siblings(full_name(name)) if sibling in NETLOADER_MODULES}
        for name in NETLOADER_MODULES
    }
    list(graphlib.TopologicalSorter(below).static_order())


WITHOUT_ENGINE = [
    full_name(module)
    for module in NETLOADER_MODULES
    if room_of(module)
    in {"shared words", "weights", "wire", "transport", "client", "server", "holding", "cache", "pull"}
    and module != "transport.process_group"
]


def test_a_process_without_an_engine_can_hold_and_serve_weights() -> None:
    """Neither torch nor vLLM is loaded, nor anything else that takes seconds and memory."""
    assert loaded_by(f"import {', '.join(WITHOUT_ENGINE)}") <= {"msgspec", "blake3"}


TORCH = ("model.", "instance.", "engine.", "transport.process_group", "loader", "vllm_ascend.distributed")
VLLM = ("engine.", "loader", "registration", "vllm_ascend.distributed")
DISTRIBUTED = {"engine.rank", "engine.reload", "transport.process_group"}
DIGESTING = {"transport.digests"}
PLATFORM = (
    "vllm_ascend.platform",
    "vllm_ascend.compatibility",
    "vllm_ascend.hardware",
    "vllm_ascend.graphs",
    "vllm_ascend.limits",
    "vllm_ascend.worker",
    "vllm_ascend.attention",
    "vllm_ascend.ops",
    "vllm_ascend.quantization",
    "vllm_ascend.distributed.communicator",
    "vllm_ascend.distributed.stateless_group",
)
"""What stands on vLLM and torch_npu, with all that is in these packages."""


@pytest.mark.parametrize("module", MODULES)
def test_a_package_is_imported_only_where_it_belongs(module: str) -> None:
    name = module.removeprefix(f"{NETLOADER}.")
    packages = imported_packages(module)
    is_platform = module.startswith(PLATFORM)
    assert "torch" not in packages or name.startswith(TORCH) or is_platform
    assert "vllm" not in packages or name.startswith(VLLM) or is_platform
    assert "torch_npu" not in packages or is_platform or module == "vllm_ascend"  # which asks whether there is an NPU
    assert "blake3" not in packages or name in DIGESTING
    if module.startswith("vllm_ascend.distributed"):
        assert imported_siblings(module) <= {"vllm_ascend.distributed"}, (
            "what Netloader uses knows nothing of Netloader"
        )
    elif any(sibling.startswith("vllm_ascend.distributed") for sibling in imported_siblings(module)):
        assert name in DISTRIBUTED or is_platform


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(PLATFORM)])
def test_the_platform_needs_nothing_of_netloader(module: str) -> None:
    """Netloader wraps what it must know of, where it is used."""
    assert not [name for name in imports(module) if name.startswith(NETLOADER)]


def test_the_configuration_and_what_is_below_use_the_standard_library_only() -> None:
    for module in ("errors", "endpoint", "traits", "config"):
        assert imported_packages(full_name(module)) - {"vllm_ascend"} <= sys.stdlib_module_names


UNPICKLING_PACKAGES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLING_CALLS = {
    "torch.load",
    "torch.serialization.load",
    "numpy.load",
    "torch.distributed.all_gather_object",
    "torch.distributed.broadcast_object_list",
    "torch.distributed.gather_object",
    "torch.distributed.recv_object_list",
    "torch.distributed.scatter_object_list",
}
"""Those that may run code out of the bytes that they are given."""


def unpickling(text: str) -> set[str]:
    """What in the program `text` turns bytes into objects of any class."""
    found = set[str]()
    names: dict[str, str] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                full = origin + alias.name
                names[alias.asname or alias.name] = full
                if full.partition(".")[0] in UNPICKLING_PACKAGES:
                    found.add(full)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, dot, rest = ast.unparse(node).partition(".")
            found |= {names.get(first, first) + dot + rest} & UNPICKLING_CALLS
        elif isinstance(node, ast.Constant) and node.value in UNPICKLING_PACKAGES:  # for importlib
            found.add(str(node.value))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_turns_bytes_into_objects_of_any_class(module: str) -> None:
    assert unpickling(MODULES[module].read_text()) == set()


@pytest.mark.parametrize(
    ("text", "found"),
    {
        "import pickle": {"pickle"},
        "def f():\n    from dill import loads as read": {"dill.loads"},
        "import os, shelve as storage": {"shelve"},
        "import importlib; importlib.import_module('marshal')": {"marshal"},
        "import cloudpickle.compat": {"cloudpickle.compat"},
        "import torch; torch.load(path, weights_only=True)": {"torch.load"},
        "import torch as t; read = t.load": {"torch.load"},
        "from torch import load; load(path)": {"torch.load"},
        "from torch import load as read; read(path)": {"torch.load"},
        "import torch; torch.distributed.all_gather_object(a, b)": {"torch.distributed.all_gather_object"},
        "import torch, json; json.load(f); weights.load(torch)": set(),
    }.items(),
    ids=str,
)
def test_the_search_for_such_modules_finds_them(text: str, found: set[str]) -> None:
    assert unpickling(text) == found
