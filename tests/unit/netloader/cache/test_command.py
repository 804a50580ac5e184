"""``netloader cache`` as people and programs use it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.caches import await_held, handed, request_for, running, socket_of
from support.sources import SMALL
from support.wait import wait_until
from vllm_ascend.model_loader.netloader import cli
from vllm_ascend.model_loader.netloader.cache import command
from vllm_ascend.model_loader.netloader.cache.messages import HeldWeights, State

pytestmark = pytest.mark.timeout(60)
COMMAND = [sys.executable, "-m", "vllm_ascend.model_loader.netloader.cli", "cache"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["cache", *arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_it_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--socket", str(socket_of(tmp_path))]
    with running(tmp_path) as cache:
        assert handed(socket_of(tmp_path), request=request_for(name="org/\x1b[31mred"))
        await_held(cache)
        root = cache.shelf.items()[0].contents.root
        status, output, _ = said(capsys, "status", *at)
        assert status == 0
        assert f"1 held, 0.0 of at most {1 << 30 >> 20}" not in output
        assert "org/?[31mred (target)" in output
        assert root[:16] in output
        assert "\x1b" not in output

        status, output, _ = said(capsys, "status", "--json", *at)
        state = json.loads(output)
        assert (status, state["holdings"][0]["root"], state["port"]) == (0, root, 0)
        assert state["nbytes"] == SMALL.manifest.nbytes

        assert said(capsys, "drop", "org/nothing", *at)[:2] == (1, "gave up 0 weights, 0.0 MB\n")
        assert said(capsys, "drop", root[:8], *at)[:2] == (0, "gave up 1 weights, 0.0 MB\n")
        assert said(capsys, "drop", "--all", *at)[0] == 0


def test_without_a_cache_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = said(capsys, "status", "--socket", str(socket_of(tmp_path)))
    assert status == 1
    assert error.startswith(f"netloader: no cache of this user runs here: {socket_of(tmp_path)}: ")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--max-bytes", "much"], "'much' is no number of bytes"),
        (["--max-bytes", "0"], "'0' is no number of bytes"),
        (["--port", "65536"], "'65536' is no port"),
        (["--pull", "nowhere"], "nowhere"),
        (["--pull", "host:1", "--only", "speed=1"], "expected FIELD=VALUE, with one of role, name, tp_rank"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_wrong_arguments_are_refused(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["cache", *arguments])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["drop"], "drop needs a model"),
        (["drop", "x", "--all"], "drop needs a model"),
        (["--socket", "relative"], "expected an absolute path"),
        (["--token-file", "/nowhere"], "cannot be read"),
    ],
    ids=str,
)
def test_what_cannot_be_as_it_is_asked_for_is_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = said(capsys, *arguments)
    assert status == 2
    assert reason in error


@pytest.mark.parametrize(
    ("text", "expected"), [("1", 1), ("200G", 200 << 30), ("3M", 3 << 20), ("5KiB", 5 << 10), ("1TB", 1 << 40)]
)
def test_sizes_may_have_units(text: str, expected: int) -> None:
    assert command._size(text) == expected


def test_what_is_not_verified_yet_is_told_apart() -> None:
    request = request_for()
    held = HeldWeights(request.identity, request.coordinates, 2_000_000, 1_000_000, "", 3.0)
    text = command.describe(State((held,), 2_000_000, 9_000_000, 1, 19000))
    assert "1.0 of 2.0 MB verified" in text
    assert "not known yet" in text
    assert "serves other hosts on port 19000" in text


def test_a_second_cache_on_a_port_that_is_taken_leaves_the_first_alone(tmp_path: Path) -> None:
    with running(tmp_path, host="127.0.0.1", port=0) as cache:
        assert handed(socket_of(tmp_path))
        await_held(cache)
        other = [*COMMAND, "--socket", str(tmp_path / "other" / "s"), "--host", "127.0.0.1", "--port", str(cache.port)]
        done = subprocess.run(other, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == 1
        assert "is bound by another socket" in done.stderr
        assert not cache.is_to_end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    path = socket_of(tmp_path)
    with subprocess.Popen([*COMMAND, "--socket", str(path)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(path.is_socket, 40)
            process.send_signal(number)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert not path.exists()
