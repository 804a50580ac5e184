"""The client's side of one session: from Join to Confirm with one source, by one transport.

`ask` joins and says whether it is this client's turn. If it is not, the session keeps its place in the source's queue
for as long as its connection is open, and `await_turn` returns when the turn has come. `take` then brings what the
source can bring of the weights, beside other sessions that do the same: by copying it (`copying`), or by taking over
the source's own pages (`mapping`). Another thread may break a session off at any time; chunks that have passed by then
are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from vllm_ascend.model_loader.netloader.client.candidates import Candidate
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.session.connections import Connections
from vllm_ascend.model_loader.netloader.client.session.copying import copy
from vllm_ascend.model_loader.netloader.client.session.joining import Joining
from vllm_ascend.model_loader.netloader.client.session.mapping import map_pages
from vllm_ascend.model_loader.netloader.client.session.taking import Taking
from vllm_ascend.model_loader.netloader.client.stages import Stages
from vllm_ascend.model_loader.netloader.client.swarm.peering import DEGREE
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport.base import CopyingTransport, MappingTransport, Transport
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.messages import Wait


class ClientSession:
    """One conversation with `candidate`. Whoever made it closes it."""

    def __init__(
        self,
        options: FetchOptions,
        candidate: Candidate,
        *,
        transports: Sequence[Transport],
        intake: Intake,
        may_leave: Callable[[], bool],
        stages: Stages,
        named: Callable[[ClientSession, Sequence[str]], object] = lambda _, __: None,
    ) -> None:
        """`transports` are offered in this order; `intake` takes in what they bring.

        `may_leave` says whether there is another way to the weights, so that a source that is too slow can be left.
        `named` hears, with this session, of endpoints that hold or load the same weights, as the source names them.
        """
        self.candidate = candidate
        self._options = options
        self._intake = intake
        self._stage = partial(stages, object())  # not by this object, whose cycles would keep the memory alive
        self._connections = Connections(candidate.endpoint, options.access, options.timeouts.connect)
        self._joining = Joining(options, candidate, transports)
        self._taking = Taking(
            options,
            candidate,
            connections=self._connections,
            joining=self._joining,
            intake=intake,
            stage=self._stage,
            may_leave=may_leave,
            named=lambda endpoints: named(self, endpoints),
        )
        self._begun = time.perf_counter()

    @property
    def address(self) -> Endpoint:
        """Where the source was reached, or is to be reached."""
        return self._connections.address

    @property
    def transport(self) -> Transport | None:
        """The transport that the source has chosen, None before it has."""
        return self._joining.transport

    @property
    def age(self) -> float:
        """Seconds since the session was made."""
        return time.perf_counter() - self._begun

    @property
    def accepted(self) -> bool:
        """Whether the source lets this client take the weights."""
        return self._joining.is_accepted

    @property
    def has_denied(self) -> bool:
        """Whether the source has said that it does not have the contents that are being loaded, or not any more."""
        return self._connections.was_denied

    @property
    def evidence(self) -> Evidence | None:
        """What the source has shown of its contents, None as long as it has not."""
        return self._taking.evidence

    @property
    def holder_nearby(self) -> Candidate | None:
        """Another process of this host that has the same or brings it, if the session was left for that."""
        return self._taking.holder_nearby

    @property
    def broken_off(self) -> bool:
        """Whether `break_off` was called."""
        return self._taking.broken_off

    @property
    def received(self) -> int:
        """Bytes that came over the network, those of damaged chunks included."""
        delivery, transport = self._taking.delivery, self.transport
        return delivery.received if delivery is not None and transport is not None and transport.traits.copies else 0

    @property
    def shared(self) -> int:
        """Bytes of the source's own pages that were taken over, or saved from there."""
        return self._taking.shared

    @property
    def brought(self) -> int:
        """Bytes of chunks that this session has brought and nobody else before."""
        return self._taking.delivery.brought if self._taking.delivery is not None else 0

    @property
    def owing_seconds(self) -> float:
        """For how many seconds the source has owed something that nobody else could do meanwhile.

        That is the time for which it has owed chunks. Before it could owe any, its age counts in part, because as many
        replicas are asked at once.
        """
        return self._taking.delivery.owing_seconds if self._taking.delivery is not None else self.age / DEGREE

    @property
    def useful_at(self) -> float:
        """When the source last had anything that is missing here, by the monotonic clock: now, if it has."""
        return self._taking.useful_at

    @property
    def fills(self) -> bool:
        """Whether the source has said that it still loads the weights itself."""
        return self.accepted and self._joining.accept.filling

    @property
    def vouches(self) -> bool:
        """Whether the source has told the root digest of `evidence`, or has said that it is sure of what it has.

        Digests alone say nothing: it may still find that they are not those of what it has loaded.
        """
        if self.evidence is None or self.fills:
            return False
        return self._taking.has_said_so or self._joining.accept.root == self.evidence.root

    @property
    def untried_transports(self) -> tuple[str, ...]:
        """The names of the transports that were offered beside the chosen one; none where the source chose none."""
        return self._joining.untried

    def ask(self) -> Wait | None:
        """Joins. Returns None where it is this client's turn, else what the source says to those who have to wait.

        Raises SourceUnreachable, SourceRefused, SourceFailed or TransportError.
        """
        with self._stage("connect"):
            control = self._connections.open()

        # Who has begun to fill memory of its own cannot wait for the pages of another process.
        is_free = self._options.verify and not self._intake.is_begun
        waits = is_free and (self.candidate.is_nearby or not self.candidate.is_replica)
        with self._stage("join"), self._connections.failures_translated():
            self._joining.ask(control, waits=waits)
            return self._joining.hear(control)

    def await_turn(self, told: Callable[[Wait], None]) -> None:
        """Returns when the turn has come; `told` hears what the source says until then. Raises as `ask`."""
        with self._stage("join"), self._connections.failures_translated():
            while (wait := self._joining.hear(self._connections.control)) is not None:
                told(wait)

    def take(self) -> Fetched | None:
        """Brings what the source can bring, once it is this client's turn.

        Returns all weights once the source has confirmed them; None where all chunks are here, and the source is not
        the one to confirm them, or where `holder_nearby` is to be asked instead. Raises SourceError or TransportError.
        """
        with self._connections.failures_translated():
            match self.transport:
                case CopyingTransport() as transport:
                    return copy(self._taking, transport)
                case MappingTransport() as transport:
                    return map_pages(self._taking, transport)
                case _:
                    raise AssertionError("a transport either copies or maps")

    def fetched(self, memory: Memory, evidence: Evidence | None) -> Fetched:
        """The weights that lie in `memory`, as those of this source."""
        return self._taking.fetched(memory, evidence)

    def break_off(self) -> None:
        """Ends the session from another thread: what is on its way may still arrive, and nothing else is asked for.

        Does not block. `shut_down` ends the session at once.
        """
        self._taking.break_off()

    def shut_down(self) -> None:
        """Ends whatever the session still waits for. From another thread than the session's own."""
        self._connections.shut_down()

    def close(self) -> None:
        """Gives up the turn, or the place in the queue. Idempotent."""
        self._taking.close()
        self._connections.close()
