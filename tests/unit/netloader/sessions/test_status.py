"""What a server tells about itself, and how the command `netloader status` shows it."""

from __future__ import annotations

import pytest

from support.peers.impostor import CONTROL, source_that_says
from support.sources import IN_PROCESS, SHORT, SMALL, serving
from vllm_ascend.model_loader.netloader import cli
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.wire.messages import (
    Status,
    Welcome,
)


def test_status_tells_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SMALL, IN_PROCESS) as (_, source):
        (holding,) = inquire(source, 5).holdings
        assert cli.main(["status", str(source)]) == 0
        assert cli.main(["status", "--json", str(source)]) == 0
    assert (holding.role, holding.tensors, holding.nbytes) == ("target", 3, SMALL.manifest.nbytes)
    output = capsys.readouterr().out
    assert "org/model" in output
    assert '"generation":1' in output
    assert "holds no weights" not in output
    assert "cannot be served" not in output


def test_status_tells_what_is_declined_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        assert inquire(source, 5).declined == {}
        server.decline("draft", "loading set table,\nwhich cannot be told")
        status = inquire(source, 5)
        assert cli.main(["status", str(source)]) == 0
        assert cli.main(["status", "--json", str(source)]) == 0
    assert status.declined == {"draft": "loading set table,\nwhich cannot be told"}
    assert [holding.role for holding in status.holdings] == ["target"]
    output = capsys.readouterr().out
    assert "\n  draft: cannot be served: loading set table,?which cannot be told\n" in output
    assert "\n  target\n" in output
    assert '"declined":{"draft":"loading set table,\\nwhich cannot be told"}' in output


def test_status_of_a_source_that_declines_all_it_has_does_not_say_that_it_has_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with WeightServer("127.0.0.1", 0, Settings(IN_PROCESS, SHORT)) as server:
        source = Endpoint("127.0.0.1", server.port)
        assert cli.main(["status", str(source)]) == 0
        nothing = capsys.readouterr().out
        server.decline("target", "w is sparse")
        assert cli.main(["status", str(source)]) == 0
        declined = capsys.readouterr().out
    head = f"{source}: 0 sessions now, transports in_process\n"
    assert nothing == head + "  holds no weights\n"
    assert declined == head + "  target: cannot be served: w is sparse\n"


def test_status_shows_no_control_characters_of_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with source_that_says(Welcome(), Status((), 0, ("in_process",), {"target": CONTROL})) as stranger:
        assert cli.main(["status", str(stranger)]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "status", [Status((), 0, ("in_process",), {CONTROL: "w is sparse"}), Status((), 0, (CONTROL,))]
)
def test_status_shows_no_control_characters_of_names(status: Status, capsys: pytest.CaptureFixture[str]) -> None:
    with source_that_says(Welcome(), status) as stranger:
        assert cli.main(["status", str(stranger)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_status_of_a_dead_source_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SMALL, IN_PROCESS) as (_, source):
        pass
    assert cli.main(["status", str(source)]) == 1
    assert f"{source}: no connection" in capsys.readouterr().err
