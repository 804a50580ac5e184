"""What instances hold, by their own word: every role of every rank, for whoever has no model to ask with.

One address is enough for an instance: its ranks know each other, and each says what it holds. Those that hold the same
weights are taken together, so that several sources, or the replicas of an instance, can all be asked for them.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vllm_ascend.model_loader.netloader.client.candidates import endpoints_in
from vllm_ascend.model_loader.netloader.client.inquiry import inquire_where
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError, TransportError
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import Holding, Status

AT_ONCE: Final = 16
"""Ranks that are asked beside each other."""


@dataclass(frozen=True)
class Offered:
    """The weights of one role of one rank, and who holds them: the addresses of all `endpoints` that have said so.

    `generation` is that of the first of them. `root` is the root digest of the contents, empty where none of them knows
    it yet. `manifest` is the digest of the manifest. `is_complete` says whether any of them has all of it, instead of
    still loading it.
    """

    identity: ModelIdentity
    coordinates: RankCoordinates
    tensors: int
    nbytes: int
    manifest: str
    root: str
    generation: int
    is_complete: bool
    endpoints: tuple[Endpoint, ...]

    @property
    def role(self) -> str:
        return self.identity.role


@dataclass(frozen=True)
class Survey:
    """What `survey` has found: what is `offered`, and why some of those that were named did not answer."""

    offered: tuple[Offered, ...]
    unreached: Mapping[Endpoint, SourceError | TransportError]
    declined: Mapping[Endpoint, Mapping[str, str]]
    """Why a role cannot be served, by rank and role."""


def survey(sources: Sequence[Endpoint], timeout: float, access: Access | None = None) -> Survey:
    """What the instances at `sources` hold, all of their ranks and roles; each step of asking may take `timeout`
    seconds.

    Raises nothing for what a source does: one that does not answer is in `Survey.unreached`.
    """
    access = access or Access()
    told: dict[Endpoint, Status] = {}
    failed: dict[Endpoint, SourceError | TransportError] = {}
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE, "netloader-survey") as pool:

        def ask(endpoints: Iterable[Endpoint]) -> None:
            new = [each for each in dict.fromkeys(endpoints) if each not in told and each not in failed]
            for endpoint, answer in zip(new, pool.map(lambda each: _asked(each, timeout, access), new), strict=True):
                if isinstance(answer, tuple):
                    status, address = answer
                    told[address] = status
                else:
                    failed[endpoint] = answer

        ask(sources)
        ask(rank for source, status in list(told.items()) for rank in _other_ranks(source, status))

    declined = {endpoint: status.declined for endpoint, status in told.items() if status.declined}
    return Survey(_merged(told), failed, declined)


def _asked(
    endpoint: Endpoint, timeout: float, access: Access
) -> tuple[Status, Endpoint] | SourceError | TransportError:
    try:
        return inquire_where(endpoint, timeout, access)
    except (SourceError, TransportError) as error:
        return error


def _other_ranks(source: Endpoint, status: Status) -> Iterator[Endpoint]:
    """The other ranks of the instance that has told `status`. Its own rank is the one on its own port of its host."""
    named = endpoints_in([rank.endpoint for rank in status.ranks], source)
    return (endpoint for endpoint in named if endpoint != source)


def _merged(told: Mapping[Endpoint, Status]) -> tuple[Offered, ...]:
    merged: list[Offered] = []
    for endpoint, status in told.items():
        for holding in status.holdings:
            new = _offered(endpoint, holding)
            at = next((number for number, each in enumerate(merged) if _are_same(each, new)), None)
            if at is None:
                merged.append(new)
            else:
                merged[at] = _both(merged[at], new)
    return tuple(merged)


def _offered(endpoint: Endpoint, holding: Holding) -> Offered:
    return Offered(
        identity=holding.identity,
        coordinates=holding.coordinates,
        tensors=holding.tensors,
        nbytes=holding.nbytes,
        manifest=holding.manifest,
        root=holding.root,
        generation=holding.generation,
        is_complete=holding.held >= holding.nbytes,
        endpoints=(endpoint,),
    )


def _are_same(one: Offered, other: Offered) -> bool:
    """Whether both are the same weights, as far as is known: a server decides by the same comparison."""
    if one.identity.mismatch(other.identity) or one.coordinates != other.coordinates or one.manifest != other.manifest:
        return False
    return not (one.root and other.root) or one.root == other.root


def _both(one: Offered, other: Offered) -> Offered:
    return replace(
        one,
        root=one.root or other.root,
        is_complete=one.is_complete or other.is_complete,
        endpoints=tuple(dict.fromkeys((*one.endpoints, *other.endpoints))),
    )
