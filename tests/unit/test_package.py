from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_ascend

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
        f"import {NETLOADER}",
        f"import {NETLOADER}.config, {NETLOADER}.endpoint, {NETLOADER}.errors",
    ],
    ids=["the package", "registering the platform", "netloader", "the configuration"],
)
def test_importing_costs_nothing(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_the_command_line_needs_no_vllm() -> None:
    assert "vllm" not in loaded_by(f"import {NETLOADER}.cli")


def test_without_an_npu_the_platform_is_left_to_vllm() -> None:
    assert vllm_ascend.register() is None


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("vllm.platform_plugins", "ascend", "vllm_ascend:register"),
        ("vllm.general_plugins", "ascend_netloader", "vllm_ascend:register_netloader"),
        ("console_scripts", "netloader", "vllm_ascend.model_loader.netloader.cli:main"),
    ],
)
def test_an_entry_point_is_declared_and_leads_somewhere(group: str, name: str, value: str) -> None:
    declared = importlib.metadata.distribution("vllm-ascend").entry_points.select(group=group, name=name)
    assert [entry_point.value for entry_point in declared] == [value]
    assert all(callable(entry_point.load()) for entry_point in declared)


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


ROOMS = {"checkpoint", "client", "engine", "model", "server", "weights", "wire"}

LAYERS: list[set[str]] = [
    {
        "server.admission",
        "client.backoff",
        "server.descriptors",
        "endpoint",
        "errors",
        "weights.memory_limit",
        "checkpoint.opened",
        "wire.pacing",
        "report",
    },
    {
        "config",
        "files",
        "checkpoint.fingerprint",
        "wire.foreign",
        "weights.identity",
        "installation",
        "server.replicas",
        "wire.resolution",
        "client.route",
    }
    | {"server.peer_log"},
    {"wire.access", "model.attributes", "server.listening", "weights.manifest", "wire.protocol", "checkpoint.reading"},
    {"weights.memory"},
    {"weights.arena", "wire.channel", "transport.digests", "weights.live"},
    {"transport.delivery", "wire.greeting", "server.waiting", "model.tensors"},
    {"server.acceptor", "transport.base"},
    {"transport.in_process", "transport.process_group", "transport.shared_memory", "transport.tcp"}
    | {"server.session", "client.verification"},
    {"client.session"},
    {"client.places"},
    {"client.search"},
    {"client.client", "server.server", "transport"},
    {"engine.adapters"},
    {"cli", "engine.disk", "server.serving", "engine.takeover", "engine.vllm_identity"},
    {"engine.reloadable"},
    {"engine.rehearsal", "engine.reload", "engine.weight_changes"},
    {"load"},
    {"loader"},
    {"registration"},
    {NETLOADER, *ROOMS},
]
"""Each module imports only from the layers above it in this list."""

NETLOADER_MODULES = [
    module.removeprefix(f"{NETLOADER}.")
    for module in MODULES
    if module == NETLOADER or module.startswith(f"{NETLOADER}.")
]


def full_name(module: str) -> str:
    return module if module in MODULES else f"{NETLOADER}.{module}"


def test_every_module_of_netloader_has_its_layer() -> None:
    assert sorted(NETLOADER_MODULES) == sorted(module for layer in LAYERS for module in layer)


@pytest.mark.parametrize("module", NETLOADER_MODULES)
def test_a_module_imports_only_from_the_layers_below_its_own(module: str) -> None:
    depth = next(depth for depth, layer in enumerate(LAYERS) if module in layer)
    below = set().union(*LAYERS[:depth])
    siblings = {name for name in imported_siblings(full_name(module)) if not name.startswith("vllm_ascend.distributed")}
    assert siblings <= below


BOTTOM: dict[str, set[str]] = {
    "errors": set(),
    "endpoint": set(),
    "report": set(),
    "weights.identity": set(),
    "checkpoint.fingerprint": set(),
    "checkpoint.opened": set(),
    "checkpoint.reading": {"errors", "checkpoint.fingerprint", "checkpoint.opened"},
    "weights.memory_limit": set(),
    "wire.pacing": set(),
    "server.admission": set(),
    "server.descriptors": set(),
    "server.peer_log": {"server.admission", "errors"},
    "client.backoff": set(),
    "server.replicas": {"server.admission", "endpoint"},
    "wire.resolution": {"endpoint"},
    "client.route": {"endpoint"},
    "config": {"endpoint", "errors"},
    "wire.foreign": {"errors"},
    "wire.protocol": {"errors", "wire.foreign", "weights.identity"},
    "weights.manifest": {"errors", "weights.identity"},
    "model.attributes": {"errors"},
    "files": {"errors"},
    "installation": {"errors"},
    "server.listening": {"endpoint", "errors", "wire.resolution"},
    "wire.access": {"config", "errors", "files"},
    "transport.digests": {"weights.manifest", "weights.memory", "wire.pacing"},
    "wire.channel": {
        "endpoint",
        "errors",
        "weights.manifest",
        "weights.memory",
        "wire.pacing",
        "wire.protocol",
        "wire.resolution",
    },
    "wire.greeting": {
        "wire.access",
        "wire.channel",
        "endpoint",
        "errors",
        "wire.foreign",
        "weights.identity",
        "wire.protocol",
    },
    "engine.vllm_identity": {"engine.adapters", "errors", "weights.identity", "checkpoint.reading"},
}


@pytest.mark.parametrize(("module", "allowed"), BOTTOM.items(), ids=BOTTOM.keys())
def test_a_module_at_the_bottom_imports_no_more_than_this(module: str, allowed: set[str]) -> None:
    assert imported_siblings(full_name(module)) <= allowed


TORCH = {
    "engine.disk",
    "model.attributes",
    "weights.manifest",
    "weights.memory",
    "weights.arena",
    "weights.live",
    "model.tensors",
    "transport",
    "transport.process_group",
    "server.serving",
    "load",
    "engine.adapters",
    "loader",
    "engine.rehearsal",
    "engine.reload",
    "engine.reloadable",
    "engine.takeover",
    "engine.vllm_identity",
    "vllm_ascend.distributed.gather",
    "vllm_ascend.distributed.process_group",
}
VLLM = {
    "engine.disk",
    "load",
    "engine.adapters",
    "loader",
    "engine.rehearsal",
    "engine.reload",
    "engine.reloadable",
    "engine.takeover",
    "registration",
    "engine.vllm_identity",
    "engine.weight_changes",
    "vllm_ascend.distributed.gather",
    "vllm_ascend.distributed.process_group",
}
DISTRIBUTED = {"load", "engine.reload", "transport.process_group"}
DIGESTING = {"transport.digests"}
PLATFORM = (
    "vllm_ascend.platform",
    "vllm_ascend.graphs",
    "vllm_ascend.worker",
    "vllm_ascend.attention",
    "vllm_ascend.ops",
    "vllm_ascend.distributed.communicator",
)
"""What stands on vLLM and torch_npu, with all that is in these packages."""


@pytest.mark.parametrize("module", MODULES)
def test_a_package_is_imported_only_where_it_belongs(module: str) -> None:
    name = module.removeprefix(f"{NETLOADER}.")
    packages = imported_packages(module)
    is_platform = module.startswith(PLATFORM)
    assert "torch" not in packages or name in TORCH or is_platform
    assert "vllm" not in packages or name in VLLM or is_platform
    assert "torch_npu" not in packages or is_platform or module == "vllm_ascend"  # which asks whether there is an NPU
    assert "blake3" not in packages or name in DIGESTING
    if module.startswith("vllm_ascend.distributed"):
        assert imported_siblings(module) <= {"vllm_ascend.distributed"}, (
            "what Netloader uses knows nothing of Netloader"
        )
    elif any(sibling.startswith("vllm_ascend.distributed") for sibling in imported_siblings(module)):
        assert name in DISTRIBUTED


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(PLATFORM)])
def test_the_platform_needs_nothing_of_netloader(module: str) -> None:
    """Netloader wraps what it must know of, where it is used."""
    assert not [name for name in imports(module) if name.startswith(NETLOADER)]


def test_the_configuration_and_what_is_below_use_the_standard_library_only() -> None:
    for module in ("errors", "endpoint", "config"):
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
