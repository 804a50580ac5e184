from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ascend.model_loader.netloader.checkpoint.hub_cache import Snapshot, holds, snapshot_in


def test_a_snapshot_is_known_by_repository_and_commit() -> None:
    folder = "/cache/hub/models--org--some-model/snapshots/c0ffee"
    assert snapshot_in(folder) == snapshot_in(f"{folder}/") == Snapshot("org/some-model", "c0ffee")


@pytest.mark.parametrize("folder", ["", "/models/mine", "/models--org--model", "/models--org--model/snapshots/a/b"])
def test_any_other_folder_holds_none(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert snapshot_in(folder) is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/cache/models--org--model/snapshots/c0ffee/adapters/model.safetensors", True),
        ("/cache/models--org--model/blobs/f00d", True),
        ("/cache/models--org--model/refs/main", False),
        ("/models/mine/model.safetensors", False),
    ],
)
def test_a_file_is_in_the_cache_by_any_of_its_names(path: str, expected: bool) -> None:
    assert holds(path) == expected
