"""vLLM's own loader, and which files it and the models that it loads read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from vllm_ascend.model_loader.netloader.checkpoint.opened import files_opened
from vllm_ascend.model_loader.netloader.checkpoint.record import ReadRecord
from vllm_ascend.model_loader.netloader.engine.disk import DiskLoader, fingerprint_here

NAME = "model.safetensors"
ADAPTER = "adapters/task/adapter_model.safetensors"


class Model(torch.nn.Linear):
    """Takes one weight, and may do more meanwhile."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None, *, also: Iterable[Path] = ()) -> None:
        super().__init__(4, 1, bias=False)
        source = DefaultModelLoader.Source
        self.secondary_weights = [source(str(folder), revision=None, prefix="also.") for folder in also]
        self._meanwhile = meanwhile

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for number, (name, tensor) in enumerate(weights):
            if number == 0:
                self._meanwhile()
            if name == "weight":
                self.weight.data.copy_(tensor)


def checkpoint(folder: Path, value: float = 1) -> Path:
    """With other files beside."""
    (folder / ADAPTER).parent.mkdir(parents=True)
    for name in (NAME, ADAPTER):
        save_file({"weight": torch.full((1, 4), value)}, folder / name)
    torch.save(torch.zeros(4), folder / "mask_embedding.pt")
    numpy.save(folder / "filters.npy", numpy.zeros(4))
    (folder / "weights").write_bytes(b"in no known format")
    (folder / "config.json").write_text("{}")
    return folder


def configured(folder: Path) -> ModelConfig:
    absent = {"revision": None, "model_weights": None, "quantization": None, "multimodal_config": None}
    return cast(ModelConfig, SimpleNamespace(model=str(folder), is_moe=False, **absent))


def read(folder: Path, model: Model) -> ReadRecord:
    loader = DiskLoader(LoadConfig())
    load(loader, folder, model)
    return loader.record


def load(loader: DiskLoader, folder: Path, model: Model) -> None:
    with set_current_vllm_config(VllmConfig()):
        loader.load_weights(model, configured(folder))


def in_another_thread(read: Callable[[], object]) -> None:
    with ThreadPoolExecutor() as executor:
        executor.submit(read).result()


BY_MODELS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "as jina-embeddings-v5 does": (ADAPTER, lambda folder: get_hf_file_bytes(ADAPTER, folder)),
    "safetensors, by its function": (ADAPTER, lambda folder: load_file(folder / ADAPTER)),
    "safetensors, by its class": (ADAPTER, lambda folder: safetensors.safe_open(folder / ADAPTER, framework="pt")),
    "torch": ("mask_embedding.pt", lambda folder: torch.load(folder / "mask_embedding.pt")),
    "torch, mapped": ("mask_embedding.pt", lambda folder: torch.load(folder / "mask_embedding.pt", mmap=True)),
    "numpy": ("filters.npy", lambda folder: numpy.load(folder / "filters.npy")),
    "numpy, mapped": ("filters.npy", lambda folder: numpy.load(folder / "filters.npy", mmap_mode="r+")),
    "a descriptor": ("weights", lambda folder: os.close(os.open(folder / "weights", os.O_RDONLY))),
    "another thread": (ADAPTER, lambda folder: in_another_thread((folder / ADAPTER).read_bytes)),
}


@pytest.mark.parametrize(("name", "by_model"), BY_MODELS.values(), ids=BY_MODELS.keys())
def test_weights_that_a_model_reads_by_itself_are_told_by_name(
    name: str, by_model: Callable[[Path], object], tmp_path: Path
) -> None:
    """vLLM merges adapters into jina-embeddings-v5 and reads an embedding for DFlash while it loads them."""
    folder = checkpoint(tmp_path / "model")
    record = read(folder, Model(lambda: by_model(folder)))
    assert record.unknown_weights().startswith(f"loading read {name}, not among the weight files of its loader")


def test_weights_from_elsewhere_are_told_by_path(tmp_path: Path) -> None:
    folder, other = checkpoint(tmp_path / "model"), checkpoint(tmp_path / "other")
    record = read(folder, Model((other / NAME).read_bytes))
    assert record.unknown_weights().startswith(f"loading read {other / NAME}, not among")


def test_whatever_else_is_opened_while_a_model_is_loaded_does_not_count(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    (tmp_path / "model" / "link").symlink_to(NAME)

    def harmless() -> None:
        (folder / "config.json").read_text()
        (folder / NAME).read_bytes()
        (folder / "link").read_bytes()
        (folder / "written.bin").write_bytes(b"by somebody who downloads")
        (tmp_path / "cache").write_bytes(b"")
        (tmp_path / "cache").read_bytes()
        Path(torch.__file__).read_bytes()
        os.close(os.open(folder, os.O_RDONLY))

    assert read(folder, Model(harmless)).unknown_weights() == ""


def test_files_are_watched_only_while_a_model_is_loaded(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    original = safetensors.safe_open
    with files_opened() as opened:
        assert safetensors.safe_open is not original
    load_file(folder / ADAPTER)
    (folder / ADAPTER).read_bytes()
    assert not [file for file in opened if file.path.startswith(str(tmp_path))]
    assert safetensors.safe_open is original


@pytest.mark.parametrize("also", [(), ("model",), ("link",), ("other", "model", "other")])
def test_what_is_asked_for_is_what_is_served(also: tuple[str, ...], tmp_path: Path) -> None:
    """A model may read one folder for two of its parts, by whatever path."""
    folder = checkpoint(tmp_path / "model")
    checkpoint(tmp_path / "other", 2)
    (tmp_path / "link").symlink_to("model")
    model = Model(also=[tmp_path / name for name in also])
    asked = fingerprint_here(model, configured(folder), LoadConfig())
    assert read(folder, model).finish() == asked != ""


def test_a_link_that_leads_elsewhere_for_a_moment_changes_nothing(tmp_path: Path) -> None:
    """vLLM opens the files after it has looked for them, and the second part after the first is read."""
    checkpoint(tmp_path / "first", 1)
    checkpoint(tmp_path / "second", 2)
    current = tmp_path / "current"
    current.symlink_to("first")

    class Flipped(DiskLoader):
        def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
            prepared = super()._prepare_weights(*args, **kwargs)
            current.unlink()
            current.symlink_to("second")
            return prepared

    loader, model = Flipped(LoadConfig()), Model()
    load(loader, current, model)
    current.unlink()
    current.symlink_to("first")
    assert model.weight.tolist() == [[1, 1, 1, 1]]
    assert loader.record.finish() == fingerprint_here(model, configured(tmp_path / "first"), LoadConfig())
