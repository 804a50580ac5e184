"""What a vLLM process that does not load by Netloader has of it, and what one is told whose installation is broken.

vLLM is a stand-in here, with the little that registering touches; `tests/e2e/test_startup.py` has the real one.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ascend.model_loader.netloader.errors import BrokenInstallation
from vllm_ascend.model_loader.netloader.installation import what_is_broken

VLLM = {
    "vllm/__init__.py": "",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/model_loader/__init__.py": (
        "_LOAD_FORMAT_TO_MODEL_LOADER = {}\n"
        "def register_model_loader(name):\n"
        "    return lambda loader: _LOAD_FORMAT_TO_MODEL_LOADER.setdefault(name, loader)\n"
    ),
    "vllm/model_executor/model_loader/base_loader.py": (
        "import abc\nclass BaseModelLoader(abc.ABC):\n    @abc.abstractmethod\n    def load_weights(self): ...\n"
    ),
}
REGISTER = "import sys, vllm_ascend; vllm_ascend.register_netloader(); vllm_ascend.register_netloader()\n"
USE = "from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as all; all['netloader'](None)\n"


def run(directory: Path, program: str, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = f"import sys; sys.path.insert(0, {str(directory)!r})\n{program}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)


def test_registering_imports_nothing_of_netloader_but_what_is_registered(tmp_path: Path) -> None:
    done = run(tmp_path, REGISTER + "print(*(name for name in sys.modules if '.' in name or 'torch' in name))", VLLM)
    assert done.returncode == 0, done.stderr
    ours = {name for name in done.stdout.split() if name.startswith("vllm_ascend.")}
    netloader = "vllm_ascend.model_loader.netloader"
    assert ours == {"vllm_ascend.model_loader", netloader, f"{netloader}.registration"}
    assert not {"torch", "msgspec._core"} & set(done.stdout.split())


def test_a_vllm_that_has_no_such_loaders_starts_without_netloader(tmp_path: Path) -> None:
    done = run(tmp_path, REGISTER, {**VLLM, "vllm/model_executor/model_loader/__init__.py": ""})
    assert done.returncode == 0, done.stderr
    assert "there is no load format netloader: ImportError: cannot import name" in done.stderr


def test_whoever_asks_for_netloader_is_told_what_is_broken(tmp_path: Path) -> None:
    done = run(tmp_path, REGISTER + USE, {**VLLM, "torch/__init__.py": "raise OSError('libgomp.so.1: not found')"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "BrokenInstallation: Netloader cannot be used, because torch cannot be imported (OSError: libgomp.so.1: not "
        "found): repair or install torch. Other load formats do not need it."
    )


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for stand-ins of packages; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def importing(package: str, monkeypatch: pytest.MonkeyPatch) -> Exception:
    """What an import of `package` by a module of this package ends with."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    namespace = {"__name__": "vllm_ascend.model_loader.netloader.loader"}
    with contextlib.ExitStack() as failing:
        caught = failing.enter_context(pytest.raises(Exception))  # noqa: PT011
        exec(f"import {package}", namespace)
    assert isinstance(caught.value, Exception)
    return caught.value


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(ImportError) as caught:
        exec("import msgspec", {"__name__": "vllm_ascend.model_loader.netloader.loader"})
    broken = what_is_broken(caught.value)
    assert isinstance(broken, BrokenInstallation)
    assert "because msgspec cannot be imported (ModuleNotFoundError: import of msgspec halted" in str(broken)
    assert f"{sys.executable} -m pip install --force-reinstall 'msgspec>=0.19'. Other load formats" in str(broken)


BROKEN = {
    "lacks a library": "raise OSError('libssl.so.3: cannot open shared object file')",
    "lacks a package of its own": "import does_not_exist",
    "is of another processor": "raise SystemError('initialization failed')",
    "is half of one": "import importlib; importlib.import_module('tqdm.part')",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_package_is_named_and_not_what_it_lacks(
    packages: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (packages / "tqdm").mkdir()
    (packages / "tqdm" / "__init__.py").write_text(text)
    importlib.invalidate_caches()
    before = dict(sys.modules)
    error = importing("tqdm", monkeypatch)
    sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] == "tqdm"})
    assert "because tqdm cannot be imported" in str(what_is_broken(error))
    assert "--force-reinstall 'tqdm'" in str(what_is_broken(error))


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("from msgspec import what_later_versions_have", "pip install --force-reinstall 'msgspec>=0.19'"),
        ("from vllm_ascend.model_loader.netloader.errors import Absent", "pip install --force-reinstall 'vllm-ascend'"),
        ("undefined", "pip install --force-reinstall 'vllm-ascend'"),
        ("raise ModuleNotFoundError(name='vllm.of_later_versions')", "is made for vLLM 0.30, 0.31 and 0.32, not "),
    ],
)
def test_what_is_of_another_version_or_incomplete_is_named(statement: str, expected: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        exec(statement, {"__name__": "vllm_ascend.model_loader.netloader.loader"})
    assert isinstance(caught.value, Exception)
    assert expected in str(what_is_broken(caught.value))
