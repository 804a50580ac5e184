"""A cache as a process: it takes over from an earlier one, answers on its socket, and ends.

Starting and ending are made so that weights are never without a holder. A cache that starts takes everything from the
one that runs, puts its own socket in the place of the other's, and only then tells it to end. Engines find the one or
the other at any moment. One lock in the directory of the socket keeps two that start at once apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vllm_ascend.model_loader.netloader.cache.keeper import MESSAGE_SECONDS, Checker, Keeper, restore, take_over
from vllm_ascend.model_loader.netloader.cache.line import Line, connect
from vllm_ascend.model_loader.netloader.cache.messages import Taken
from vllm_ascend.model_loader.netloader.cache.outlet import Outlet
from vllm_ascend.model_loader.netloader.cache.place import LOCK_NAME, private_directory
from vllm_ascend.model_loader.netloader.cache.pulling import Chosen, Puller
from vllm_ascend.model_loader.netloader.cache.shelf import Shelf
from vllm_ascend.model_loader.netloader.cache.systemd import DescriptorStore, Notifier, stored
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError, ConnectionLost, PeerError
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.unix_sockets import require_own_user

logger = logging.getLogger(__name__)

_BACKLOG: Final = 64
_MOST_CONNECTIONS: Final = 256
"""Open connections, which bounds the threads. All are of one user."""
_LOCK_SECONDS: Final = 60.0
"""How long another cache that starts at the same moment is waited for."""
_END_SECONDS: Final = 5.0
"""How long a cache that ends waits to remove its socket, which nobody answers on by then."""


@dataclass(frozen=True)
class CacheOptions:
    """How a cache runs: its socket is at `path`, and it holds at most `max_bytes` bytes.

    It serves other hosts at `host` and `port` under `access`, unless `port` is None.
    """

    path: Path
    max_bytes: int
    host: str | None = None
    port: int | None = None
    access: Access = field(default_factory=Access)
    sources: tuple[Endpoint, ...] = ()
    """Whose weights it fetches ahead of engines, as far as they are `chosen`."""
    chosen: Chosen = field(default_factory=Chosen)


class Cache:
    """Holds weights from `start` to `close`; also a context manager, which starts it."""

    def __init__(self, options: CacheOptions) -> None:
        self._options = options
        self._ends, self._ended_by = socket.socketpair()
        """The one end can be read from once there is nothing left to do for this process."""
        self._ended_by.setblocking(False)
        self._is_replaced = False
        self.shelf = Shelf(options.max_bytes)
        self._checker = Checker(self.shelf)
        self._outlet: Outlet | None = None
        self._puller = Puller(self.shelf, options.sources, options.access, options.chosen, outlet=lambda: self._outlet)
        self._listener: socket.socket | None = None
        self._inode = 0
        self._lines: set[Line] = set()
        self._lock = threading.Lock()
        self._keeper = Keeper(
            self.shelf,
            self._checker,
            port=lambda: self.port,
            leave=self._close_server,
            stay=self._stay,
            succeeded=self._leave_to_another,
        )

    def __enter__(self) -> Cache:
        self.start({})
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Where other hosts are served, 0 if they are not."""
        outlet = self._outlet
        return 0 if outlet is None else outlet.server.port

    @property
    def server(self) -> WeightServer | None:
        """The server for other hosts, if there is one."""
        return None if self._outlet is None else self._outlet.server

    def start(self, environment: MutableMapping[str, str]) -> None:
        """Takes over what systemd (`environment` tells of it) and a running cache hold, and answers from then on.

        Raises ConfigError or OSError if it cannot have its socket or port, or another cache neither ends nor answers.
        """
        notifier = Notifier.of(environment)
        store = None if notifier is None else DescriptorStore(notifier)
        if store is not None:
            self.shelf.watch(store)
        for name, note, descriptor in stored(environment):
            came_back = functools.partial(store.came_back, name) if store is not None else lambda _: None
            if not restore(self._checker, note, descriptor, came_back) and store is not None:
                store.forget(name)

        with private_directory(self._options.path.parent) as directory, _locked(directory):
            earlier = self._take_over()
            with contextlib.ExitStack() as closing:
                if earlier is not None:
                    closing.enter_context(earlier)
                self._open_server()
                self._listen(directory)
                if earlier is not None:
                    _let_go(earlier)
        if self._options.sources:
            self._puller.start()
        if notifier is not None:
            notifier.tell("READY=1", "STATUS=holding weights")

    @property
    def is_to_end(self) -> bool:
        """Whether there is nothing left to do for this process."""
        return bool(select.select([self._ends], [], [], 0)[0])

    def end(self) -> None:
        """Lets `wait` return. It takes no lock."""
        with contextlib.suppress(OSError):
            self._ended_by.send(b"\0")

    @contextlib.contextmanager
    def ended_by(self, *signals: int) -> Iterator[None]:
        """Lets `wait` return when this process gets one of `signals`. For the main thread, within `start` and `close`.

        The system's own handler writes the byte, in whatever thread it interrupts and whatever the main thread does.
        """
        earlier = {number: signal.signal(number, lambda *_: None) for number in signals}
        signal.set_wakeup_fd(self._ended_by.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def wait(self) -> None:
        """Returns when the process is to end: a signal said so, or a new cache process has everything."""
        select.select([self._ends], [], [])

    def close(self) -> None:
        """Answers no more, and gives up all weights. Engines that use them keep theirs. Idempotent."""
        with self._lock:
            listener, self._listener = self._listener, None
            lines = list(self._lines)
        if listener is not None:
            self._remove_socket()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for line in lines:
            line.shut_down()
        self._puller.close()
        self.shelf.refuse("the cache ends")
        self._close_server()
        if not self._is_replaced:
            self.shelf.stop_watching()  # systemd goes on keeping what it has, for the next start
        self.shelf.drop("")
        self._checker.close()
        self._ends.close()
        self._ended_by.close()

    def _leave_to_another(self) -> None:
        self._is_replaced = True
        self.end()

    def _take_over(self) -> Line | None:
        """Takes what the cache holds that runs now. Returns the connection to it; None if there is none."""
        try:
            line = connect(self._options.path, MESSAGE_SECONDS)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except PeerError as error:
            raise ConfigError(f"something else than a cache has the socket {self._options.path}: {error}") from error
        try:
            count = take_over(line, self._checker)
        except (PeerError, OSError) as error:
            line.close()
            raise ConfigError(
                f"the cache that has the socket {self._options.path} does not hand over what it holds ({error}): "
                f"end it, or choose another --socket"
            ) from error
        except BaseException:
            line.close()
            raise
        logger.info("took over %d weights from the earlier cache process", count)
        return line

    def _listen(self, directory: Path) -> None:
        """Puts a new socket in the place of whatever is there, and begins to answer."""
        name = self._options.path.name
        scratch = f".{name}.{os.getpid()}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(listener.close)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(directory / scratch)
            listener.bind(str(directory / scratch))
            os.chmod(directory / scratch, 0o600)
            listener.listen(_BACKLOG)
            os.rename(directory / scratch, directory / name)
            on_failure.pop_all()
        self._listener = listener
        self._inode = os.stat(directory / name).st_ino
        threading.Thread(target=self._accept, args=(listener,), name="netloader-accept", daemon=True).start()

    def _remove_socket(self) -> None:
        """Removes the socket's file, unless it is that of a new cache process by now."""
        path = self._options.path
        with contextlib.suppress(OSError, ConfigError), private_directory(path.parent) as directory:
            with _locked(directory, _END_SECONDS):
                if self._has_socket():
                    os.unlink(directory / path.name)

    def _has_socket(self) -> bool:
        """Whether the socket's file is still that of this process."""
        with contextlib.suppress(OSError):
            return os.stat(self._options.path).st_ino == self._inode
        return False

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                sock, _ = listener.accept()
            except OSError:  # out of descriptors, or closed
                if self._listener is listener:
                    time.sleep(0.05)
                continue
            line = Line(sock)
            with self._lock:
                is_too_many = len(self._lines) >= _MOST_CONNECTIONS
                self._lines.add(line)
            if is_too_many:
                logger.warning("closes a connection at once: there are %d", _MOST_CONNECTIONS)
                self._forget(line)
                continue
            try:
                threading.Thread(target=self._attend, args=(line,), name="netloader-attend", daemon=True).start()
            except RuntimeError as error:
                logger.warning("closes a connection at once: %s", error)
                self._forget(line)

    def _attend(self, line: Line) -> None:
        try:
            require_own_user(line.socket)
            self._keeper.attend(line)
        except ConnectionLost as error:  # of those who only look whether there is a cache, too
            logger.debug("ended a connection: %s", error)
        except (PeerError, OSError) as error:
            logger.info("ended a connection: %s", error)
        except Exception:
            logger.exception("ended a connection: an error of the cache")
        finally:
            self._forget(line)

    def _forget(self, line: Line) -> None:
        with self._lock:
            self._lines.discard(line)
        line.close()

    def _open_server(self) -> None:
        options = self._options
        if options.port is None or self._outlet is not None:
            return
        settings = Settings(transports(("shared_memory", "tcp")), access=options.access)
        server = WeightServer(options.host, options.port, settings)
        server.start()
        self._outlet = Outlet(server)
        self.shelf.watch(self._outlet)

    def _stay(self) -> None:
        """Goes on after a new cache process has failed, unless it has the place of the socket already."""
        if not self._has_socket():
            self._leave_to_another()
            return
        try:
            self._open_server()
        except (OSError, ConfigError) as error:
            logger.error("other hosts are not served any more: %s", error)

    def _close_server(self) -> None:
        outlet, self._outlet = self._outlet, None
        if outlet is not None:
            self.shelf.unwatch(outlet)
            outlet.server.close()


def _let_go(earlier: Line) -> None:
    """Tells the earlier cache process that this one has everything. If it cannot be told, it notices by itself."""
    try:
        earlier.send(Taken(), MESSAGE_SECONDS)
    except (PeerError, OSError) as error:
        logger.warning("the earlier cache process cannot be told to end: %s", error)


@contextlib.contextmanager
def _locked(directory: Path, seconds: float = _LOCK_SECONDS) -> Iterator[None]:
    """Holds the lock of `directory`, so that one cache starts or ends at a time. Raises ConfigError after `seconds`."""
    descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise ConfigError(f"another cache starts or ends for {seconds:g} s already") from error
                time.sleep(0.02)
            else:
                break
        yield
    finally:
        os.close(descriptor)
