"""A cache that is replaced by another process, and one whose descriptors systemd keeps."""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.caches import await_held, await_name, given, handed, held, request_for, running, same_pages, socket_of
from support.ports import free_port
from support.sources import SMALL, fetch
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.cache import asking
from vllm_ascend.model_loader.netloader.cache.keeper import Checker, take_over
from vllm_ascend.model_loader.netloader.cache.line import Line, connect
from vllm_ascend.model_loader.netloader.cache.messages import Ask, State, Taken, TakeOver
from vllm_ascend.model_loader.netloader.cache.shelf import Shelf
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError
from vllm_ascend.model_loader.netloader.transport.registry import transports

pytestmark = pytest.mark.timeout(120)
COMMAND = [sys.executable, "-m", "vllm_ascend.model_loader.netloader.cli", "cache"]


@contextlib.contextmanager
def process(directory: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A cache in a process of its own, which is ready."""
    path = socket_of(directory)
    command = [*COMMAND, "--socket", str(path), *arguments]
    started = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (state := state_of(path)) is not None and state.pid == started.pid, 60)
        yield started
    finally:
        started.kill()
        started.wait(20)


def state_of(path: Path) -> State | None:
    try:
        with connect(path, 5) as line:
            line.send(Ask(), 5)
            with line.receive(5) as received:
                assert isinstance(received.message, State)
                return received.message
    except (PeerError, OSError):  # none yet, or one that ends just now
        return None


def verified_roots(path: Path) -> set[str]:
    state = state_of(path)
    return set() if state is None else {each.root for each in state.holdings} - {""}


def test_a_new_process_takes_everything_and_the_old_one_ends(tmp_path: Path) -> None:
    path = socket_of(tmp_path)
    with process(tmp_path) as old:
        for name in ("org/a", "org/b"):
            assert handed(path, request=request_for(name=name))
        wait_until(lambda: len(verified_roots(path)) == 1 and len(getattr(state_of(path), "holdings", ())) == 2)
        before = given(path, request_for(name="org/a"))
        assert before is not None
        with process(tmp_path) as new:
            assert old.wait(60) == 0
            wait_until(lambda: len(getattr(state_of(path), "holdings", ())) == 2 and verified_roots(path))
            after = given(path, request_for(name="org/a"))
            assert after is not None
            assert same_pages(before.pages, after.pages)
            SMALL.assert_in(after.pages)
            new.send_signal(signal.SIGTERM)
            assert new.wait(60) == 0
    assert not path.exists()


def test_the_order_of_use_outlives_the_process(tmp_path: Path) -> None:
    with running(tmp_path) as old:
        for name in ("org/a", "org/b", "org/c"):
            assert handed(socket_of(tmp_path), request=request_for(name=name))
            await_name(old, name)
        assert given(socket_of(tmp_path), request_for(name="org/a")) is not None
        with running(tmp_path) as new:
            await_held(new, 3)
            assert held(new) == ["org/b", "org/c", "org/a"]
            wait_until(lambda: old.is_to_end)
            old.close()
            assert socket_of(tmp_path).exists()


def test_the_port_for_other_hosts_goes_to_the_new_process(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, host="127.0.0.1", port=port) as old:
        assert handed(socket_of(tmp_path))
        await_held(old)
        with running(tmp_path, host="127.0.0.1", port=port) as new:
            await_held(new)
            _, fetched = fetch(SMALL, transports(["tcp"]), Endpoint("127.0.0.1", port))
            SMALL.assert_in(fetched.memory)
            fetched.memory.close()
            assert (old.port, new.port) == (0, port)


def test_a_cache_goes_on_where_the_new_process_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with running(tmp_path, host="127.0.0.1", port=port) as cache:
        assert handed(socket_of(tmp_path))
        await_held(cache)
        with connect(socket_of(tmp_path), 5) as line:
            line.send(TakeOver(), 5)
        wait_until(lambda: "a new cache process did not take over" in caplog.text)
        assert handed(socket_of(tmp_path), request=request_for(name="org/other"))
        await_held(cache, 2)
        wait_until(lambda: cache.port == port)
        assert not cache.is_to_end


def test_a_cache_ends_if_the_new_process_has_its_place_and_does_not_say_so(tmp_path: Path) -> None:
    shelf = Shelf(1 << 30)
    checker = Checker(shelf)
    with running(tmp_path) as cache:
        with connect(socket_of(tmp_path), 5) as line:
            assert take_over(line, checker) == 0
            socket_of(tmp_path).rename(tmp_path / "cache" / "earlier")
            with socket.socket(socket.AF_UNIX) as other:
                other.bind(str(socket_of(tmp_path)))
        wait_until(lambda: cache.is_to_end)
        cache.close()
        assert socket_of(tmp_path).is_socket()
    checker.close()


def test_while_everything_is_handed_over_nothing_is_taken_that_would_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(1 << 30)
    checker = Checker(shelf)
    with running(tmp_path) as cache, connect(socket_of(tmp_path), 5) as line:
        assert take_over(line, checker) == 0
        monkeypatch.setattr(asking, "HAND_PAUSE", 0.0)
        assert not handed(socket_of(tmp_path))
        line.send(Taken(), 5)
        wait_until(lambda: cache.is_to_end)
    checker.close()


def test_a_new_process_that_has_less_room_keeps_what_was_used_last(tmp_path: Path) -> None:
    with running(tmp_path) as old:
        for name in ("org/a", "org/b"):
            assert handed(socket_of(tmp_path), request=request_for(name=name))
            await_name(old, name)
        with running(tmp_path, SMALL.manifest.nbytes) as new:
            wait_until(lambda: held(new) == ["org/b"])


def test_an_engine_that_waits_when_the_process_is_replaced_asks_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first connection ends as that of a process that goes away."""
    connects = []

    def connecting(path: Path, seconds: float) -> Line:
        line = connect(path, seconds)
        connects.append(line)
        if len(connects) == 1:
            line.shut_down()
        return line

    with running(tmp_path) as cache:
        assert handed(socket_of(tmp_path))
        await_held(cache)
        monkeypatch.setattr(asking, "connect", connecting)
        assert given(socket_of(tmp_path)) is not None
    assert len(connects) == 2


class Systemd:
    """A stand-in for systemd's notification socket and its store of descriptors."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        self.socket.settimeout(0.02)
        self.store: dict[str, int] = {}
        self.told: list[str] = []

    def listen(self) -> None:
        """Takes in all that was said by now."""
        with contextlib.suppress(TimeoutError):
            while True:
                data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_LEN(64))
                said = dict(line.split("=", 1) for line in data.decode().splitlines())
                descriptors = array.array("i", b"".join(content for _, _, content in ancillary))
                if said.get("FDSTORE") == "1":
                    assert said["FDNAME"] not in self.store
                    (self.store[said["FDNAME"]],) = descriptors
                elif said.get("FDSTOREREMOVE") == "1":
                    os.close(self.store.pop(said["FDNAME"]))
                self.told += said

    @contextlib.contextmanager
    def service(self, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The cache as a service: what is in the store is passed to it from descriptor 3 on, as sd_listen_fds wants."""
        names, kept = list(self.store), [os.dup(descriptor) for descriptor in self.store.values()]
        program = (
            "import fcntl, os, sys\n"
            f"high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in {kept}]\n"
            "for number, fd in enumerate(high): os.dup2(fd, 3 + number, inheritable=True)\n"
            "os.environ['LISTEN_PID'] = str(os.getpid())\n"
            f"os.execv(sys.executable, {[*COMMAND, '--socket', str(socket_of(directory))]})\n"
        )
        environment = {**os.environ, "NOTIFY_SOCKET": self.address}
        if names:
            environment |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
        command = [sys.executable, "-c", program]
        service = subprocess.Popen(command, env=environment, pass_fds=kept, stderr=subprocess.DEVNULL)
        for descriptor in kept:
            os.close(descriptor)
        try:
            wait_until(lambda: self.listen() or "READY" in self.told, 60)
            self.told.clear()
            yield service
        finally:
            service.kill()
            service.wait(20)

    def close(self) -> None:
        self.socket.close()
        for descriptor in self.store.values():
            os.close(descriptor)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with contextlib.closing(Systemd(tmp_path)) as systemd:
        yield systemd


def test_what_systemd_keeps_comes_back_after_a_crash(tmp_path: Path, systemd: Systemd) -> None:
    path = socket_of(tmp_path)
    with systemd.service(tmp_path) as first:
        for name in ("org/a", "org/b"):
            assert handed(path, request=request_for(name=name), attributes={"flag": name == "org/a"})
        wait_until(lambda: systemd.listen() or len(systemd.store) == 4)
        before = given(path, request_for(name="org/a"))
        first.send_signal(signal.SIGKILL)
        first.wait(20)
    names = set(systemd.store)
    with systemd.service(tmp_path):
        wait_until(lambda: len(verified_roots(path)) == 2)
        after = given(path, request_for(name="org/a"))
        assert before is not None
        assert after is not None
        assert same_pages(before.pages, after.pages)
        assert after.evidence.attributes == {"flag": True}
        systemd.listen()
        assert set(systemd.store) == names
        drop = [*COMMAND, "drop", "org/a", "--socket", str(path)]
        assert subprocess.run(drop, timeout=60, check=False, capture_output=True).returncode == 0
        wait_until(lambda: systemd.listen() or len(systemd.store) == 2)


def test_of_what_is_damaged_in_the_store_nothing_is_served(tmp_path: Path, systemd: Systemd) -> None:
    path = socket_of(tmp_path)
    with systemd.service(tmp_path):
        assert handed(path)
        wait_until(lambda: systemd.listen() or len(systemd.store) == 2)
    pages = next(name for name in systemd.store if name.endswith("-pages"))
    os.close(systemd.store[pages])
    (tmp_path / "garbage").write_bytes(b"no pages")
    systemd.store[pages] = os.open(tmp_path / "garbage", os.O_RDONLY)
    with systemd.service(tmp_path):
        wait_until(lambda: systemd.listen() or not systemd.store)
        assert given(path) is None


def test_sigterm_ends_it_and_leaves_the_store_as_it_is(tmp_path: Path, systemd: Systemd) -> None:
    with systemd.service(tmp_path) as service:
        assert handed(socket_of(tmp_path))
        wait_until(lambda: systemd.listen() or len(systemd.store) == 2)
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
    systemd.listen()
    assert len(systemd.store) == 2
    assert not socket_of(tmp_path).exists()
