from __future__ import annotations

import logging

import pytest

from support.clock import Clock
from vllm_ascend.model_loader.netloader.server.peer_log import INTERVAL, LINES_OF_A_HOST, LINES_OF_ALL, WORDS, PeerLog

ONE, OTHER = "10.0.0.2", "10.0.0.3"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock, caplog: pytest.LogCaptureFixture) -> PeerLog:
    caplog.set_level(logging.INFO)
    return PeerLog(logging.getLogger(__name__), clock)


def gave_up(log: PeerLog, host: str, times: int = 1, why: str = "no memory") -> None:
    for _ in range(times):
        log.say(logging.WARNING, host, "%s gave up: %s", host, why)


def test_few_lines_of_a_kind_are_written_of_each_host(log: PeerLog, caplog: pytest.LogCaptureFixture) -> None:
    gave_up(log, ONE, 1000)
    gave_up(log, OTHER, 1000)
    log.say(logging.INFO, ONE, "%s took the weights", ONE)
    assert caplog.messages == [
        *[f"{ONE} gave up: no memory"] * LINES_OF_A_HOST,
        f"{OTHER} gave up: no memory (... and {1000 - LINES_OF_A_HOST} more like it)",
        *[f"{OTHER} gave up: no memory"] * (LINES_OF_A_HOST - 1),
        f"{ONE} took the weights",
    ]


def test_of_many_hosts_only_so_many_are_written(log: PeerLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5000):
        gave_up(log, f"10.1.{number // 250}.{number % 250}")
    assert len(caplog.messages) == LINES_OF_ALL


def test_addresses_of_one_network_are_one_host(log: PeerLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(100):
        gave_up(log, f"2001:db8::{number:x}")
    assert len(caplog.messages) == LINES_OF_A_HOST


def test_what_was_left_out_is_counted_to_the_last_line(
    log: PeerLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    gave_up(log, ONE, LINES_OF_A_HOST)
    gave_up(log, ONE, 689, why="the last reason")
    log.tell_left_out()
    assert len(caplog.messages) == LINES_OF_A_HOST
    clock.now += INTERVAL
    log.tell_left_out()
    log.tell_left_out()
    assert caplog.messages[LINES_OF_A_HOST:] == [f"{ONE} gave up: the last reason (... and 688 more like it)"]
    assert caplog.records[-1].levelno == logging.WARNING
    gave_up(log, ONE)
    assert caplog.messages[-1] == f"{ONE} gave up: no memory"


def test_at_the_end_all_is_told(log: PeerLog, caplog: pytest.LogCaptureFixture) -> None:
    gave_up(log, ONE, LINES_OF_A_HOST + 1)
    log.tell_left_out(at_once=True)
    assert caplog.messages == [f"{ONE} gave up: no memory"] * (LINES_OF_A_HOST + 1)


def test_words_of_a_peer_are_cut_short_and_harmless(log: PeerLog, caplog: pytest.LogCaptureFixture) -> None:
    gave_up(log, ONE, why="\r\n\x1b[2J %s %d" * 1000)
    (line,) = caplog.messages
    assert line.isprintable()
    assert len(line) < WORDS + 50


def test_lines_below_the_level_cost_nothing_and_count_nothing(log: PeerLog, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        log.say(logging.DEBUG, ONE, "%s went away", ONE)
    log.tell_left_out(at_once=True)
    assert caplog.messages == []


def test_hosts_without_end_are_not_all_remembered(log: PeerLog, clock: Clock) -> None:
    for number in range(5000):
        clock.now += INTERVAL
        gave_up(log, f"10.1.{number // 250}.{number % 250}")
    assert len(log._of_host) <= 1024


def test_an_error_of_ours_comes_with_its_traceback(log: PeerLog, caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise RuntimeError("a fault")
    except RuntimeError:
        log.say(logging.ERROR, ONE, "ended the connection with %s", ONE, error=True)
    assert "RuntimeError: a fault" in caplog.text
