"""The beginning of a session: a client joins, waits for its turn, and learns what it gets and how."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_ascend.model_loader.netloader.client.candidates import Candidate
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.verification import other_root
from vllm_ascend.model_loader.netloader.errors import ProtocolError, SourceRefused
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.messages import STRANGER_REPLY_LIMIT, Accept, Join, Message, Refuse, Wait
from vllm_ascend.model_loader.netloader.wire.refusal import refused


class Joining:
    """What a client says to `candidate` before it has a turn, and what it is answered."""

    def __init__(self, options: FetchOptions, candidate: Candidate, transports: Sequence[Transport]) -> None:
        """`transports` are offered in this order."""
        self.transport: Transport | None = None
        """The transport that the source has chosen, None before it has."""
        self._accept: Accept | None = None
        self._options = options
        self._candidate = candidate
        self._transports = tuple(transports)

    @property
    def is_accepted(self) -> bool:
        """Whether the source lets this client take the weights."""
        return self._accept is not None

    @property
    def accept(self) -> Accept:
        """What the client gets. Only once it is accepted."""
        assert self._accept is not None, "it is not this client's turn"
        return self._accept

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the contents: for a replica the one that was promised. Only once it is accepted."""
        contents = self._candidate.contents
        return self.accept.fingerprint if contents is None else contents.fingerprint

    @property
    def untried(self) -> tuple[str, ...]:
        """The names of the transports that were offered beside the chosen one; none where the source chose none."""
        if self.transport is None:
            return ()
        return tuple(each.name for each in self._transports if each is not self.transport)

    def ask(self, control: Channel, *, waits: bool = False) -> None:
        """Joins. `waits` says whether pages are wanted that the source still fills. Raises PeerError."""
        if self._candidate.is_replica:
            control.limit_frames(STRANGER_REPLY_LIMIT)
        request = self._options.request
        offers = tuple(
            msgspec.structs.replace(transport.offer(), waits=waits and not transport.traits.copies)
            for transport in self._transports
        )
        join = Join(request.identity, request.coordinates, request.manifest.digest, offers)
        control.send(join, self._options.timeouts.connect)

    def hear(self, control: Channel) -> Wait | None:
        """What the source says to those who have to wait; None where it has accepted, which is noted.

        Raises SourceRefused or PeerError.
        """
        timeouts = self._options.timeouts
        # A replica has to answer at once: it has nothing to do for a client before that.
        seconds = timeouts.connect if self._candidate.is_replica else max(timeouts.connect, timeouts.stall)
        answer = control.receive(Deadline(seconds))
        if isinstance(answer, Wait):
            return answer

        accept = _granted(answer, self._options.request.manifest)
        self.transport = next((each for each in self._transports if each.name == accept.transport), None)
        if self.transport is None:
            raise ProtocolError(f"the source chose the transport {accept.transport!r}, which was not offered")
        ours = self._options.request.identity.fingerprint
        if ours and accept.fingerprint not in ("", ours):
            raise ProtocolError(f"it accepted, but serves a checkpoint with the fingerprint {accept.fingerprint}")
        if self._options.root and accept.root not in ("", self._options.root):
            raise SourceRefused(other_root(accept.root, self._options.root))
        self._options.check_attributes(accept.attributes)

        self._accept = accept
        return None


def _granted(answer: Message, wanted: Manifest) -> Accept:
    """`answer`, unless it is a refusal. Raises SourceRefused, naming the fields or tensors that differ."""
    if isinstance(answer, Refuse):
        raise refused(answer, wanted)
    assert isinstance(answer, Accept)
    return answer
