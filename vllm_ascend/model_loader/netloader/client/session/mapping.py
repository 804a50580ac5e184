"""Takes over the pages of a source on this host, so that nothing is copied.

The pages of a source that is trusted are taken as they are. Those of a replica, which is trusted with nothing but time,
are read and verified first.

A source that still fills its pages hands them over all the same. The client waits until they are complete and sealed,
as long as there is something new every now and then. If the source ends before, the client copies what has passed into
memory of its own, unless a third process of this host has begun to do that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.session.taking import Taking
from vllm_ascend.model_loader.netloader.client.verification import Evidence, verify
from vllm_ascend.model_loader.netloader.errors import PeerError
from vllm_ascend.model_loader.netloader.transport.base import MappingTransport
from vllm_ascend.model_loader.netloader.transport.chunks.arrival import Progress
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.weights.unsealed import UnsealedArena
from vllm_ascend.model_loader.netloader.wire.messages import Done


class _Passed:
    """The chunks of which a source has told that they have passed, shown as progress."""

    def __init__(self, chunks: tuple[Chunk, ...], progress: Progress) -> None:
        self.numbers: set[int] = set()
        self._chunks = chunks
        self._progress = progress

    def has(self, chunks: Iterable[int]) -> None:
        for number in chunks:
            self.numbers.add(number)
            self._progress.add(self._chunks[number].length)

    def sent(self, chunks: Iterable[int]) -> None:
        return


def map_pages(taking: Taking, transport: MappingTransport) -> Fetched | None:
    """All weights, once the source has confirmed them.

    None where all are here, and the source is not the one to confirm them. Raises SourceError, TransportError,
    PeerError or OSError.
    """
    if taking.accept.filling:
        return _wait_and_map(taking, transport)
    with taking.stage("transfer"):
        memory = transport.adopt(taking.reception(taking.following(None)))

    evidence: Evidence | None = None
    with taking.stage("verify"), _closed_on_failure(memory):
        taking.intake.progress.set(memory.nbytes)
        if taking.candidate.is_replica or (taking.options.root and not taking.accept.root):
            evidence = taking.obtain_evidence()
            verify(memory, taking.intake.inventory.chunks, evidence)
        if taking.candidate.is_nearby:
            assert evidence is not None
            _leave_to_sources(taking, memory, evidence)
            return None
        taking.following(None).confirm(taking.accept, evidence)
    taking.shared = memory.nbytes
    return taking.fetched(memory, evidence)


def _wait_and_map(taking: Taking, transport: MappingTransport) -> Fetched | None:
    intake = taking.intake
    passed = _Passed(intake.inventory.chunks, intake.progress)
    following = taking.following(passed)
    with taking.stage("join"):
        pages = transport.wait_for(taking.reception(following))
    with contextlib.closing(pages):
        with taking.stage("join"):
            evidence = taking.obtain_evidence()
        try:
            with taking.stage("transfer"):
                following.await_whole()
        except PeerError:
            intake.progress.set(intake.nbytes_held)
            if not taking.broken_off:
                _save(taking, pages, passed.numbers, evidence)
            raise
        memory = pages.adopt()

    with taking.stage("verify"), _closed_on_failure(memory):
        if taking.candidate.is_replica:
            verify(memory, intake.inventory.chunks, evidence)
            _leave_to_sources(taking, memory, evidence)
            return None
        following.confirm(taking.accept, evidence)
    taking.shared = memory.nbytes
    return taking.fetched(memory, None)


def _leave_to_sources(taking: Taking, memory: Memory, evidence: Evidence) -> None:
    """Leaves pages of a neighbour that have passed to the sources, one of which has to confirm them."""
    taking.intake.adopt(memory, evidence, taking.joining.fingerprint)
    taking.shared = memory.nbytes
    with contextlib.suppress(PeerError, OSError):  # nothing depends on the neighbour any more
        taking.connections.control.send(Done(), taking.options.timeouts.connect)


def _save(taking: Taking, pages: UnsealedArena, numbers: Iterable[int], evidence: Evidence) -> None:
    """Takes in the chunks of these `numbers` from `pages`, whose owner is gone, unless somebody nearby goes on."""
    intake = taking.intake
    intake.leave_nearby(taking.candidate.endpoint)
    if intake.holder_nearby(evidence.root) is not None:
        return
    with taking.stage("allocate"):
        intake.make_memory()
    requests = intake.share(evidence, taking.joining.fingerprint, has_all=False)
    with contextlib.closing(taking.deliver(requests, evidence)) as delivery, taking.stage("transfer"):
        requests.has(numbers)
        try:
            while (chunk := delivery.take()) is not None:
                _copy(pages, chunk, delivery)
        finally:
            taking.shared = delivery.brought


def _copy(pages: UnsealedArena, chunk: Chunk, delivery: Delivery) -> None:
    arrival = delivery.begin(chunk)
    while (done := arrival.nbytes) < chunk.length:
        arrival.advance(pages.read(chunk.offset + done, arrival.landing.host[done:]))
    delivery.finish(arrival)


@contextlib.contextmanager
def _closed_on_failure(memory: Memory) -> Iterator[None]:
    try:
        yield
    except BaseException:
        memory.close()
        raise
