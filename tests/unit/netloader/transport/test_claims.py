"""Of the processes of a host, one at a time holds a claim."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable

import pytest

from support.child import Child
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport.claims import Claim, holder_of

HERE = Endpoint("127.0.0.1", 19000)


@pytest.fixture
def name() -> str:
    return f"netloader-test-{secrets.token_hex(16)}"


def taken(name: str) -> Claim:
    claim = Claim.take(name)
    assert claim is not None
    return claim


def claiming(name: str) -> Callable[[object], Claim]:
    """For a process: holds the name as long as it lives."""
    claim = taken(name)
    claim.tell(HERE)
    return lambda _: claim


def test_a_claim_is_held_by_one_at_a_time_and_then_by_the_next(name: str) -> None:
    first = taken(name)
    assert Claim.take(name) is None
    first.close()
    first.close()
    assert holder_of(name, 1) is None
    taken(name).close()


def test_whoever_asks_is_told_also_who_asked_before(name: str) -> None:
    claim, answers = taken(name), list[Endpoint | None]()
    early = threading.Thread(target=lambda: answers.append(holder_of(name, 30)))
    early.start()
    time.sleep(0.05)
    claim.tell(HERE)
    claim.tell(Endpoint("127.0.0.1", 1))
    early.join()
    assert answers == [HERE]
    assert holder_of(name, 30) == HERE
    claim.close()


def test_the_claim_of_a_process_that_is_killed_is_free(name: str) -> None:
    with Child(claiming, name, patience=60) as child:
        child.answer()
        assert holder_of(name, 30) == HERE
        assert Claim.take(name) is None
        child.kill()
        taken(name).close()


def test_who_holds_a_claim_and_says_nothing_costs_a_moment(name: str) -> None:
    claim = taken(name)
    with pytest.raises(TimeoutError):
        holder_of(name, 0.05)
    claim.close()


@pytest.mark.parametrize("answer", [b"nowhere", b"\xff\xfe", b"x" * 100_000, b"127.0.0.1:0"])
def test_an_answer_that_is_no_address_is_an_error(name: str, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.bind(f"\0{name}")
        stranger.listen()

        def reply() -> None:
            with stranger.accept()[0] as connection:
                connection.sendall(answer)

        threading.Thread(target=reply, daemon=True).start()
        with pytest.raises(OSError, match="no address"):
            holder_of(name, 5)


def test_a_claim_that_nobody_has_any_more_is_free(name: str) -> None:
    claim = taken(name)
    claim.tell(HERE)
    del claim
    wait_until(lambda: Claim.take(name) is not None)
