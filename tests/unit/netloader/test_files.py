from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.files import require_writable


def test_what_can_be_written_is_not_written_yet(tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "directory" / "rank-"
    require_writable("OUTPUT_PREFIX", str(prefix), Path(f"{prefix}0.txt"))
    assert list(prefix.parent.iterdir()) == []


def test_what_exists_may_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.txt"
    path.write_text("before")
    require_writable("OUTPUT_PREFIX", str(tmp_path / "rank-"), path)
    assert path.read_text() == "before"


def test_a_directory_that_cannot_be_made_is_a_wrong_value(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    prefix = f"{tmp_path}/file/rank-"
    with pytest.raises(ConfigError) as caught:
        require_writable("REPORT_PREFIX", prefix, Path(f"{prefix}0.json"))
    expected = f"REPORT_PREFIX {prefix!r}: no file can be made in {str(tmp_path / 'file')!r}: File exists"
    assert str(caught.value) == expected


def test_a_directory_of_others_is_a_wrong_value(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory of another user's")
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=r"OUTPUT_PREFIX .* no file can be made in .*: Permission denied"):
            require_writable("OUTPUT_PREFIX", f"{tmp_path}/rank-", tmp_path / "rank-0.txt")
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("a\0b", "null byte"), ("directory", "is to be a file, and is a directory")],
    ids=["long", "with a zero byte", "a directory"],
)
def test_a_name_that_no_file_can_have_is_a_wrong_value(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError, match=reason):
        require_writable("OUTPUT_PREFIX", f"{tmp_path}/{name}", tmp_path / name)
