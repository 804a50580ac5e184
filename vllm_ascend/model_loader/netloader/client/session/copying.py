"""Fills the client's own memory from a source, beside other sessions that do the same.

Each chunk is verified as it arrives. Once all have passed, whoever brought them, a source that is trusted confirms that
it still has the same.
"""

from __future__ import annotations

import contextlib

from vllm_ascend.model_loader.netloader.client.candidates import Candidate, Contents
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.session.taking import Taking
from vllm_ascend.model_loader.netloader.client.swarm.pool import Share
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.errors import SourceFailed, SourceRefused
from vllm_ascend.model_loader.netloader.transport.base import CopyingTransport
from vllm_ascend.model_loader.netloader.transport.chunks.requests import InOrder
from vllm_ascend.model_loader.netloader.wire.messages import Done


def copy(taking: Taking, transport: CopyingTransport) -> Fetched | None:
    """All weights, once the source has confirmed them.

    None where all chunks are here and the source is not the one to confirm them, or where `taking.holder_nearby` is to
    be asked instead. Where it fails, what has passed stays in the memory for other sources. Raises SourceError,
    TransportError, PeerError or OSError.
    """
    accept, intake = taking.accept, taking.intake
    evidence: Evidence | None = None
    if taking.options.verify or taking.candidate.is_replica:
        with taking.stage("join"):
            evidence = taking.obtain_evidence()
            if _is_left_to_a_neighbour(taking, evidence):
                return None
    elif taking.options.root and not accept.root:
        raise SourceRefused('it cannot say which contents it has, and VERIFY is "off" here')
    elif accept.filling:
        raise SourceRefused('it still loads these weights itself, and VERIFY is "off" here')
    with taking.stage("allocate"):
        intake.make_memory()

    requests = _requests(taking, evidence)
    with contextlib.closing(taking.deliver(requests, evidence)) as delivery:
        following = taking.following(requests if isinstance(requests, Share) else None)
        with taking.stage("transfer"):
            transport.receive(taking.reception(following), delivery)
        if not delivery.is_complete:
            if taking.broken_off:
                raise SourceFailed("what it has comes from elsewhere")
            intake.inventory.require_complete()

        # A replica confirms nothing, because anybody could.
        if taking.candidate.is_replica:
            taking.connections.control.send(Done(), taking.options.timeouts.connect)
            return None

        # The delivery stays open: as long as it is, nobody replaces what is being confirmed.
        with taking.stage("verify"):
            if accept.filling:
                following.await_whole()
            following.confirm(accept, evidence)
            intake.settle(evidence)
    return taking.fetched(delivery.memory, evidence)


def _requests(taking: Taking, evidence: Evidence | None) -> Share | InOrder:
    if evidence is None:
        return taking.intake.alone()
    return taking.intake.share(evidence, taking.joining.fingerprint, has_all=not taking.accept.filling)


def _is_left_to_a_neighbour(taking: Taking, evidence: Evidence) -> bool:
    """Whether another process of this host has these weights, or brings them. Then the source is told so."""
    holder = taking.intake.holder_nearby(evidence.root)
    if holder is None:
        return False
    contents = Contents(evidence.root, taking.joining.fingerprint)
    taking.holder_nearby = Candidate(holder, taking.candidate.endpoint, contents, is_nearby=True)
    taking.connections.leave("another process of its host has these weights, or brings them")
    return True
