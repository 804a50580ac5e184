from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from support.clock import Clock
from vllm_ascend.model_loader.netloader.server.admission.hosts import Guard, network_of

REMEMBERED = 1024


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_any_address_of_one_ipv6_network_is_the_same_host() -> None:
    generator = random.Random(0)
    neighbours = {network_of(f"2001:db8:1:2::{generator.randrange(1 << 16):x}") for _ in range(100)}
    assert neighbours == {"2001:db8:1:2::/64"}
    assert network_of("2001:db8:1:3::1") not in neighbours
    assert network_of("fe80::1%eth0") == network_of("fe80::2%eth0")


def test_an_ipv4_address_is_one_host_however_it_is_written() -> None:
    assert network_of("::ffff:10.0.0.2") == network_of("10.0.0.2") == "10.0.0.2"
    assert network_of("10.0.0.3") != network_of("10.0.0.2")


HOST, OTHER = "10.0.0.2", "10.0.0.3"


def blocked_for(guard: Guard, clock: Clock, host: str = HOST) -> float:
    """Seconds until `host` is listened to again, to within a quarter of a second."""
    begun = clock.now
    while not guard.admits(host):
        clock.now += 0.25
    return clock.now - begun


def test_who_has_not_failed_is_admitted(clock: Clock) -> None:
    assert Guard(clock).admits(HOST)


def test_the_first_failures_are_free_and_then_each_doubles_the_time_up_to_a_minute(clock: Clock) -> None:
    guard = Guard(clock)
    blocked = []
    for _ in range(12):
        guard.failed(HOST)
        blocked.append(blocked_for(guard, clock))
    assert blocked == [0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_however_often_an_address_fails_it_is_blocked_for_a_minute(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(5000):
        guard.failed(HOST)
    assert blocked_for(guard, clock) == 60


def test_failures_at_the_same_moment_count_too(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(6):
        guard.failed(HOST)
    assert blocked_for(guard, clock) == 4


def test_an_address_that_fails_blocks_no_other(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(10):
        guard.failed(HOST)
    assert not guard.admits(HOST)
    assert guard.admits(OTHER)
    guard.failed(OTHER)
    assert guard.admits(OTHER)


def test_a_network_fails_together(clock: Clock) -> None:
    guard = Guard(clock)
    for n in range(4):
        guard.failed(f"2001:db8:0:7::{n:x}")
    assert not guard.admits("2001:db8:0:7:ffff::1")
    assert guard.admits("2001:db8:0:8::1")


def test_time_alone_makes_nothing_good(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(5):
        guard.failed(HOST)
    clock.now += 3600
    guard.failed(HOST)
    assert blocked_for(guard, clock) == 4


def test_a_success_makes_all_failures_good(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(6):
        guard.failed(HOST)
    guard.succeeded(HOST)
    assert guard.admits(HOST)
    guard.failed(HOST)
    assert guard.admits(HOST)
    guard.succeeded(OTHER)
    assert guard.admits(OTHER)


def addresses() -> Iterator[str]:
    return (f"10.1.{n // 256}.{n % 256}" for n in range(REMEMBERED - 1))


def test_the_address_that_failed_least_recently_is_forgotten_first(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(4):
        guard.failed(HOST)
    for _ in range(4):
        guard.failed(OTHER)
    guard.failed(HOST)
    for address in addresses():
        guard.failed(address)
    assert guard.admits(OTHER)
    assert not guard.admits(HOST)
