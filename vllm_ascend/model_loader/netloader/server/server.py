"""A server of weights: what this process holds, for whoever may have it.

The parts, each in a module of its own:

- `listener` brings connections, each in a thread of its own, and every wait has a deadline: a silent, slow or hostile
  peer ends or delays nobody but itself. Threads that serve give way to inference.
- `publications` is what is held in each role, and whether it is served; `answers` decides what a client gets of it.
- `requests` does what clients ask for, `sessions` are the clients that take weights now.
- `admission` lets about MAX_CLIENTS of them move bytes at a time. The others wait until their turn comes, and hear
  which earlier clients have the same weights now (`replicas`).

What is served does not change (an arena is sealed), so serving needs no lock against inference, and copying releases
the GIL. Weights that are about to move or change are suspended first: their sessions are ended, and told why.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.server.admission.turns import Turns
from vllm_ascend.model_loader.netloader.server.answers import ModelFiles, Peer
from vllm_ascend.model_loader.netloader.server.listener import Listener
from vllm_ascend.model_loader.netloader.server.peer_log import PeerLog
from vllm_ascend.model_loader.netloader.server.publications import Publication, Publications
from vllm_ascend.model_loader.netloader.server.replicas import Replicas
from vllm_ascend.model_loader.netloader.server.requests import RequestHandler, Settings
from vllm_ascend.model_loader.netloader.server.session import END_SECONDS, ServerSession
from vllm_ascend.model_loader.netloader.server.sessions import Sessions, SessionState
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

logger = logging.getLogger(__name__)

_NOT_ANY_MORE: Final = "it does not serve these weights any more"


@dataclass(frozen=True)
class ServerState:
    """What a server does at one moment. It keeps no weights alive."""

    served: Mapping[str, int]
    """The generation of what is served, by slot."""
    not_served: Mapping[str, str]
    """Why nothing is served, by slot, for slots that are suspended or declined."""
    sessions: tuple[SessionState, ...]
    connections: int
    """Open connections of all kinds, those that wait for a turn included."""
    turns: int
    """Clients that may move bytes now."""
    waiting: int
    """Clients that wait for a turn."""
    copies: int
    """Clients that took everything and have not announced yet that they serve it, as far as they are remembered."""
    replicas: Mapping[str, tuple[str, ...]]
    """Addresses of clients that serve what is served here, by slot: some of them, as clients that wait are told."""

    @property
    def is_idle(self) -> bool:
        """Whether no client is connected, and nothing is left of earlier ones."""
        return not (self.sessions or self.connections or self.turns or self.waiting)


class WeightServer:
    """Serves weights from `start` to `close`; also a context manager.

    `host` None means all addresses, `port` 0 any free one.
    """

    def __init__(self, host: str | None, port: int, settings: Settings) -> None:
        self._lock = threading.RLock()
        self._log = PeerLog(logger)
        self._pacer = Pacer(settings.max_bandwidth)
        self._replicas = Replicas()
        self._publications = Publications(self._lock)
        self.turns = Turns(settings.max_clients, settings.max_bandwidth)
        self.sessions = Sessions(self._publications, self._replicas, self._pacer, self._log, self._lock)
        self.listener = Listener(host, port, self._log)
        self._handler = RequestHandler(
            settings,
            listener=self.listener,
            publications=self._publications,
            sessions=self.sessions,
            replicas=self._replicas,
            turns=self.turns,
            log=self._log,
        )
        self.configure(settings)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Takes the port and begins to accept.

        Raises ConfigError if the address is none of this machine or not for this user, OSError if it is in use.
        """
        self.listener.start(self._handler.handle, self.settings.timeouts.connect)

    def close(self) -> None:
        """Ends all sessions, waits for their threads, and closes what is served. Idempotent."""
        self.listener.stop_accepting()
        sessions = self.sessions.all()
        self.sessions.end(sessions, "the server shuts down", denies=False)
        self.listener.close(self.settings.timeouts.stall, unless={session.channel for session in sessions})
        self._log.tell_left_out(at_once=True)
        for publication in self._publications.clear():
            self._retire(publication, _NOT_ANY_MORE)

    @property
    def port(self) -> int:
        """The port on which it listens, once it is started."""
        return self.listener.port

    @property
    def address(self) -> Endpoint:
        """Where processes of this host reach it, once it is started."""
        return self.listener.address

    @property
    def settings(self) -> Settings:
        return self._handler.settings

    def configure(self, settings: Settings) -> None:
        """Replaces the settings for all that begins from now on.

        A load may come with another configuration than the one with which the port was opened.
        """
        self._handler.settings = settings
        self._pacer.rate = settings.max_bandwidth
        self.turns.configure(settings.max_clients, settings.max_bandwidth)
        self.listener.greets_in_clear = settings.access.server_tls is None

    def require_access(self, access: Access, role: str) -> None:
        """Raises ConfigError if other roles are served under another token or other certificates than `access`."""
        others = sorted(publication.role for publication in self._publications.all_served() if publication.role != role)
        if others and access != self.settings.access:
            raise ConfigError(
                f"TOKEN_FILE or TLS_CERT, TLS_KEY, TLS_CA of the {role} model are not those under which the "
                f"{', '.join(others)} model is served, and both are behind one listener: configure them alike"
            )

    def refer_to(self, peers: Iterable[Peer]) -> None:
        """Tells clients from now on that want the part of one of `peers` where that is."""
        self._handler.peers = tuple(peers)

    def tell_files(self, files: ModelFiles | None) -> None:
        """Tells clients from now on `files` as those of the target model; None for no files."""
        self._handler.files = files

    def state(self) -> ServerState:
        """What it does at this moment, for tests and for people who look at a running server."""
        served = {publication.slot: publication for publication in self._publications.all_served()}
        return ServerState(
            served={slot: publication.store.generation for slot, publication in served.items()},
            not_served=self._publications.reasons(),
            sessions=self.sessions.states(),
            connections=len(self.listener.connections),
            turns=self.turns.taken,
            waiting=self.turns.waiting,
            copies=self._replicas.copies,
            replicas={
                slot: self._replicas.referrals(publication.role, publication.store.generation)
                for slot, publication in served.items()
            },
        )

    def next_generation(self, role: str) -> int:
        """A generation above all earlier ones of `role`, for the store that is to be published next."""
        return self._publications.next_generation(role)

    def publish(self, publication: Publication) -> None:
        """Serves a store in place of the earlier one of its slot. The server owns it from now on, and closes it."""
        replaced = self._publications.publish(publication)
        if replaced is not None:
            self._retire(replaced, "its weights were replaced by new ones")

    def fill(self, publication: Publication) -> None:
        """Offers a store that is still being filled, beside what is served in its slot, until `publish` of the same
        publication or `stop_filling`. Its memory stays that of the caller.
        """
        replaced = self._publications.fill(publication)
        if replaced is not None:
            self.sessions.end_those_of(replaced, "its weights were replaced by others while they were loaded")

    def stop_filling(self, publication: Publication, reason: str) -> None:
        """Offers `publication` no more, unless it was published. Clients are told `reason`.

        Nobody reads its memory any more when this returns, unless a session does not end by a fault of this process.
        """
        with self._lock:
            if not self._publications.stop_filling(publication):
                return
            sessions = self.sessions.of((publication,))
        self.sessions.end(sessions, reason, denies=False)
        self._are_over(sessions)

    def forget_filling(self, publication: Publication) -> None:
        """Offers `publication` no more and closes it, unless it was published: nobody is left who would publish it."""
        if self._publications.stop_filling(publication):
            self._retire(publication, _NOT_ANY_MORE)

    def decline(self, role: str, reason: str) -> None:
        """Refuses clients that want `role` with `reason`. What was served in that role is ended and closed."""
        dropped = self._publications.decline(role, reason)
        if dropped is not None:
            self._retire(dropped, _NOT_ANY_MORE)

    def withdraw(self, slot: str, memory: weakref.ref[Memory] | None = None) -> None:
        """Stops serving `slot`, and closes what was served. With `memory`, only if it is still served from there."""
        withdrawn = self._publications.withdraw(slot, memory)
        if withdrawn is not None:
            self._retire(withdrawn, _NOT_ANY_MORE)

    def suspend(self, reason: str) -> frozenset[str]:
        """Ends all sessions, and refuses clients with `reason` until `resume`, `publish` or `give_up`.

        When it returns, nothing reads the weights any more, and no client can prevent that. It returns the slots that
        were served until now. Raises TimeoutError, and serves them as before, if a session does not end all the same,
        by a fault of this process.
        """
        with self._lock:
            suspended = self._publications.suspend(reason)
            sessions = self.sessions.of(suspended)
        slots = frozenset(publication.slot for publication in suspended)

        self.sessions.end(sessions, reason)
        for publication in suspended:
            if publication.store.digests is not None:
                publication.store.digests.stop()

        if not self._are_over(sessions):
            left = ", ".join(str(session.peer) for session in self.sessions.of(suspended))
            self.resume(slots)
            raise TimeoutError(f"what is served to {left} is still being read, so it cannot be moved or changed now")
        return slots

    def resume(self, slots: Container[str] | None = None) -> None:
        """Serves again what is suspended, all of it or that of `slots`, as another generation."""
        with self._lock:  # so that nobody suspends it again before its digests are being made
            for publication in self._publications.resume(slots):
                if publication.store.digests is not None:
                    publication.store.digests.make_ahead()

    def give_up(self, reason: str) -> None:
        """Declines all roles that are served or suspended, for `reason`, and closes what was served.

        Raises TimeoutError, and serves as before, like `suspend`.
        """
        self.suspend(reason)
        for publication in self._publications.give_up(reason):
            self._retire(publication, _NOT_ANY_MORE)

    def _are_over(self, sessions: Iterable[ServerSession]) -> bool:
        """Waits for the end of sessions that were told to end. Whether it came."""
        return self.sessions.wait_until_over(sessions, END_SECONDS + self.settings.timeouts.stall)

    def _retire(self, publication: Publication, reason: str) -> None:
        """Ends the sessions of what is not served any more, and closes it. The clients are told `reason`."""
        self.sessions.end_those_of(publication, reason)
        publication.store.close()
