from __future__ import annotations

import pytest

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.replicas import REFERRALS, Copy, Replicas

REMEMBERED_SESSIONS, REMEMBERED_REPLICAS = 256, 64


def session(number: int) -> bytes:
    return number.to_bytes(16, "big")


def take_and_serve(
    replicas: Replicas, number: int, endpoint: Endpoint, role: str = "target", generation: int = 1
) -> None:
    replicas.note_taken(session(number), Copy(endpoint.host, role, generation))
    assert replicas.note_serving(session(number), endpoint)


def test_whoever_took_the_weights_and_serves_them_is_referred_to() -> None:
    replicas = Replicas()
    assert replicas.referrals("target", 1) == ()
    replicas.note_taken(session(1), Copy("10.0.0.2", "target", 1))
    assert replicas.referrals("target", 1) == ()
    assert replicas.note_serving(session(1), Endpoint("10.0.0.2", 19000))
    assert replicas.referrals("target", 1) == ("10.0.0.2:19000",)


def test_an_unknown_session_is_not_believed() -> None:
    replicas = Replicas()
    assert not replicas.note_serving(session(1), Endpoint("10.0.0.2", 19000))
    assert replicas.referrals("target", 1) == ()


def test_another_address_than_the_one_that_took_the_weights_is_not_believed() -> None:
    replicas = Replicas()
    replicas.note_taken(session(1), Copy("10.0.0.2", "target", 1))
    assert not replicas.note_serving(session(1), Endpoint("10.0.0.3", 19000))
    assert replicas.referrals("target", 1) == ()


def test_a_session_is_announced_once() -> None:
    replicas = Replicas()
    take_and_serve(replicas, 1, Endpoint("10.0.0.2", 19000))
    assert not replicas.note_serving(session(1), Endpoint("10.0.0.2", 19001))
    assert replicas.referrals("target", 1) == ("10.0.0.2:19000",)


@pytest.mark.parametrize(("role", "generation"), [("draft", 1), ("target", 2), ("target", 0)])
def test_only_those_who_have_the_same_weights_are_named(role: str, generation: int) -> None:
    replicas = Replicas()
    take_and_serve(replicas, 1, Endpoint("10.0.0.2", 19000))
    assert replicas.referrals(role, generation) == ()


def test_whoever_took_newer_weights_no_longer_has_the_older_ones() -> None:
    replicas = Replicas()
    take_and_serve(replicas, 1, Endpoint("10.0.0.2", 19000))
    take_and_serve(replicas, 2, Endpoint("10.0.0.2", 19000), generation=2)
    assert replicas.referrals("target", 1) == ()
    assert replicas.referrals("target", 2) == ("10.0.0.2:19000",)


@pytest.mark.parametrize(
    ("host", "referral"),
    [
        ("127.0.0.1", ":19000"),
        ("127.3.2.1", ":19000"),
        ("::1", ":19000"),
        ("10.0.0.2", "10.0.0.2:19000"),
        ("fd00::1", "[fd00::1]:19000"),
        ("fe80::1%eth0", "[fe80::1%eth0]:19000"),
    ],
)
def test_a_replica_on_loopback_is_named_without_its_host(host: str, referral: str) -> None:
    replicas = Replicas()
    take_and_serve(replicas, 1, Endpoint(host, 19000))
    assert replicas.referrals("target", 1) == (referral,)


def test_a_few_of_many_are_named_and_others_each_time() -> None:
    replicas = Replicas()
    endpoints = [Endpoint(f"10.0.0.{n}", 19000) for n in range(20)]
    for number, endpoint in enumerate(endpoints):
        take_and_serve(replicas, number, endpoint)
    told = [replicas.referrals("target", 1) for _ in range(200)]
    assert all(len(set(referrals)) == REFERRALS for referrals in told)
    assert {referral for referrals in told for referral in referrals} == set(map(str, endpoints))
    assert {referrals[0] for referrals in told} == set(map(str, endpoints))


def test_a_session_is_forgotten_when_many_have_followed() -> None:
    replicas = Replicas()
    for number in range(REMEMBERED_SESSIONS + 1):
        replicas.note_taken(session(number), Copy("10.0.0.2", "target", 1))
    assert not replicas.note_serving(session(0), Endpoint("10.0.0.2", 19000))
    assert replicas.note_serving(session(1), Endpoint("10.0.0.2", 19001))


def test_the_replica_that_announced_itself_least_recently_is_forgotten_first() -> None:
    replicas = Replicas()
    for number in range(REMEMBERED_REPLICAS):
        take_and_serve(replicas, number, Endpoint(f"10.0.0.{number}", 19000))
    take_and_serve(replicas, 100, Endpoint("10.0.0.0", 19000))
    take_and_serve(replicas, 101, Endpoint("10.0.1.0", 19000))
    named = {referral for _ in range(500) for referral in replicas.referrals("target", 1)}
    assert named == {f"10.0.0.{n}:19000" for n in range(REMEMBERED_REPLICAS) if n != 1} | {"10.0.1.0:19000"}


@pytest.mark.parametrize("host", ["10.0.0.66", "2001:db8::1"])
def test_one_host_pushes_no_other_out(host: str) -> None:
    replicas = Replicas()
    replicas.note_taken(session(1), Copy("10.0.0.2", "target", 1))
    take_and_serve(replicas, 2, Endpoint("10.0.0.3", 19000))
    for number in range(2 * REMEMBERED_SESSIONS):
        address = host if "." in host else f"{host}:{number:x}"
        replicas.note_taken(session(1000 + number), Copy(address, "target", 1))
    for number in range(2 * REMEMBERED_REPLICAS):
        take_and_serve(replicas, 2000 + number, Endpoint(host, 1 + number))
    assert replicas.note_serving(session(1), Endpoint("10.0.0.2", 19000))
    for _ in range(20):
        named = replicas.referrals("target", 1)
        assert {"10.0.0.2:19000", "10.0.0.3:19000"} < set(named)
        assert len(named) == REFERRALS
