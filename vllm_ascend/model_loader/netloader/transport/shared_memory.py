"""On one host: the server hands over the descriptor of its arena, and the client maps the same pages.

The descriptor goes over a Unix socket in the abstract namespace, which leaves no file behind and can be reached from
within the server's network namespace only. So the scope of an offer names the machine's boot and the network
namespace. Both sides check that their peer has their own user id. The pages stay when the server exits, and the client
serves them in turn.

A server that still fills its arena hands the descriptor to clients that can wait for the end. They map the pages when
these are sealed; if the server ends before, they still have what has passed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vllm_ascend.model_loader.netloader.errors import ConnectionLost, Stalled, TransportError
from vllm_ascend.model_loader.netloader.traits import SHARED_MEMORY
from vllm_ascend.model_loader.netloader.transport.base import MappingTransport, Reception, Timeouts
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.unsealed import UnsealedArena
from vllm_ascend.model_loader.netloader.wire.channel import Deadline
from vllm_ascend.model_loader.netloader.wire.messages import Offer
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer
from vllm_ascend.model_loader.netloader.wire.unix_sockets import receive_with_descriptors, require_own_user

_ABORT_SECONDS: Final = 0.1
"""How soon a session that waits for its client notices that it has been ended."""


class SharedMemoryTransport(MappingTransport):
    """Hands the descriptor of the server's arena to a client on the same host, which maps its pages."""

    traits = SHARED_MEMORY

    def offer(self) -> Offer:
        return Offer(self.name, host_scope())

    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        return _DescriptorSender(store, timeouts)

    def adopt(self, reception: Reception) -> Arena:
        return Arena.adopt(self._obtain(reception), reception.nbytes)

    def wait_for(self, reception: Reception) -> UnsealedArena:
        return UnsealedArena(self._obtain(reception), reception.nbytes)

    def _obtain(self, reception: Reception) -> int:
        """The descriptor that the server hands over. Raises TransportError."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(reception.timeouts.connect)
            try:
                sock.connect("\0" + reception.text("socket"))
                require_own_user(sock)
                _, descriptors = receive_with_descriptors(sock, 1)
            except OSError as error:
                raise TransportError(f"the source's Unix socket gave no descriptor: {error}") from error

        if len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            raise TransportError("the source closed its Unix socket without a descriptor (another user id?)")
        return descriptors[0]


class _DescriptorSender(Sender):
    """Hands one descriptor to one client, over a socket whose random name only that client is told."""

    def __init__(self, store: WeightStore, timeouts: Timeouts) -> None:
        super().__init__(store)
        self._handed_over = False
        self._timeout = timeouts.connect
        self._aborted = threading.Event()
        self._name = f"netloader-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + self._name)
        self._listener.listen(1)
        assert isinstance(store.memory, Arena), "this transport is for host memory"
        try:
            self._descriptor = store.memory.descriptor_for_waiting()
        except OSError:
            self._listener.close()
            raise

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {"socket": self._name}

    def run(self) -> None:
        try:
            with self._accept() as connection:
                connection.settimeout(self._timeout)
                require_own_user(connection)
                socket.send_fds(connection, [b"\0"], [self._descriptor])
                self._handed_over = True
        except TimeoutError as error:
            raise Stalled(f"the client did not fetch the descriptor within {self._timeout:g} s") from error
        except OSError as error:
            raise ConnectionLost(f"the descriptor could not be handed over: {error}") from error

    def _accept(self) -> socket.socket:
        """The client's connection. Looks up now and then whether the session has ended, since nothing portable wakes a
        thread that waits for a connection.
        """
        deadline = Deadline(self._timeout)
        while not self._aborted.is_set():
            self._listener.settimeout(min(_ABORT_SECONDS, deadline.remaining() or 1e-6))
            try:
                return self._listener.accept()[0]
            except TimeoutError:
                if not deadline.remaining():
                    raise
        raise ConnectionLost("the session has ended")

    def abort(self) -> None:
        self._aborted.set()

    @property
    def delivered(self) -> int:
        return self._nbytes if self._handed_over else 0

    def close(self) -> None:
        self._listener.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def host_scope() -> str:
    """Names the set of processes that reach each other's abstract Unix sockets.

    Where this host does not tell, the name is random, so that no other process has the same one.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/net")
        return f"{boot}/{namespace.st_dev}/{namespace.st_ino}"
    return f"unknown/{secrets.token_hex(16)}"
