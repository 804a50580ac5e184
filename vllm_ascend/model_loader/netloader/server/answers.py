"""How a server answers: decisions that need neither sockets nor threads.

A client that joins says what it needs and which transports it can use. Either the server holds exactly that and the two
have a transport in common, or the client is refused with everything that it can do something about: the differences,
the server's manifest, or the addresses of other ranks that hold its part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import FileRefused, one_line
from vllm_ascend.model_loader.netloader.server.publications import Publication, Publications
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.weights.identity import Difference, RankCoordinates
from vllm_ascend.model_loader.netloader.wire.messages import (
    PART_LIMIT,
    RANKS_LIMIT,
    REFERRALS_LIMIT,
    Description,
    FilePart,
    Files,
    Holding,
    Join,
    Offer,
    RankPlace,
    Refuse,
    SmallFile,
    Status,
)

_NO_FILES: Final = "this server does not tell the files of a model"


class Peer(msgspec.Struct, frozen=True):
    """Another rank of the same instance, and where it serves its part. An empty host is that of this server."""

    coordinates: RankCoordinates
    host: str
    port: int


class ModelFiles(Protocol):
    """The small files of a model's directory, and what its engine has found out from the weight files beside them."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The sizes in bytes by name."""

    @property
    def resolved(self) -> Mapping[str, bool | str]:
        """Values of the configuration that are not those in the files."""

    def digest(self, name: str) -> bytes:
        """The SHA-256 of a file. Raises FileRefused."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """At most `length` bytes of the file `name` from `offset` on. Raises FileRefused."""


@dataclass(frozen=True)
class Acceptance:
    """What a client gets, and by which transport."""

    publication: Publication
    transport: Transport

    @property
    def needs_turn(self) -> bool:
        """Whether bytes will move, so that the client may have to wait until others have theirs."""
        return self.transport.traits.copies


def answer(
    join: Join, publications: Publications, transports: Sequence[Transport], peers: Iterable[Peer]
) -> Acceptance | Refuse:
    """The answer to `join` of a server that holds `publications` and can use `transports`; `peers` are its siblings."""
    offered = publications.offered(join.identity.role)
    answers = [_answer_with(publication, join, transports, peers) for publication in offered]
    accepted = (each for each in answers if isinstance(each, Acceptance))
    refusals = [each for each in answers if isinstance(each, Refuse)]
    nearest = min(refusals, key=lambda refusal: (not refusal.referrals, len(refusal.differences)), default=None)
    return next(accepted, nearest or _not_held(join.identity.role, publications))


def _answer_with(
    publication: Publication, join: Join, transports: Sequence[Transport], peers: Iterable[Peer]
) -> Acceptance | Refuse:
    differences = publication.identity.mismatch(join.identity)
    displaced = publication.coordinates.mismatch(join.coordinates)
    if displaced and not differences and (referrals := _holding(join.coordinates, peers)):
        return Refuse("another rank of this instance holds that part", displaced, referrals=referrals)
    if differences or displaced:
        return Refuse("the model or its partitioning differs", differences + displaced)

    manifest = publication.store.manifest
    if join.manifest_digest != manifest.digest:
        difference = Difference("manifest", manifest.digest, join.manifest_digest)
        return Refuse("the tensors differ", (difference,), manifest.encoded)

    offers = join.offers
    if publication.store.is_filling:  # what is not sealed yet can be mapped only by who waits for that
        copying = {transport.name for transport in transports if transport.traits.copies}
        offers = tuple(offer for offer in offers if offer.waits or offer.transport in copying)
    transport = _common_transport(offers, transports)
    if transport is None:
        return Refuse(f"no common transport: this server has {', '.join(_names(transports))}")
    return Acceptance(publication, transport)


def status(
    publications: Publications, transports: Sequence[Transport], sessions: int, waiting: int, peers: Iterable[Peer] = ()
) -> Status:
    """The answer to Inquire. `sessions` and `waiting` are how many clients take weights, and wait for a turn; `peers`
    are all ranks of the instance.
    """
    everything = (*publications.all_served(), *publications.all_filling())
    holdings = tuple(
        Holding(
            role=publication.role,
            identity=publication.identity,
            coordinates=publication.coordinates,
            tensors=len(publication.store.manifest.tensors),
            nbytes=publication.store.manifest.nbytes,
            generation=publication.store.generation,
            root=publication.store.root_if_known(),
            held=publication.store.nbytes_held,
            manifest=publication.store.manifest.digest,
        )
        for publication in everything
    )
    ranks = tuple(
        RankPlace(peer.coordinates, str(Endpoint(peer.host, peer.port)))
        for peer in itertools.islice(peers, RANKS_LIMIT)
    )
    return Status(holdings, sessions, _names(transports), publications.reasons(), waiting, ranks)


def description(digest: str, publications: Publications) -> Description | Refuse:
    """The answer to Describe: the manifest with this `digest`, if anything that is served or loaded has it."""
    everything = (*publications.all_served(), *publications.all_filling())
    manifests = (publication.store.manifest for publication in everything)
    found = next((manifest for manifest in manifests if manifest.digest == digest), None)
    if found is None:
        return Refuse("this server does not hold weights with that manifest, or not any more")
    return Description(found.encoded)


def files(publications: Publications, known: ModelFiles | None) -> Files | Refuse:
    """The answer to AskFiles, where `known` are the files of the target model. Reads them if nobody has asked yet."""
    target = publications.served("target")
    if target is None:
        return Refuse("this server holds no target weights now")
    if known is None:
        return Refuse(_NO_FILES)
    try:
        told = tuple(SmallFile(name, size, known.digest(name)) for name, size in known.sizes.items())
    except FileRefused as error:
        return Refuse(one_line(str(error)))
    return Files(told, target.identity, dict(known.resolved))


def part(known: ModelFiles | None, name: str, offset: int) -> FilePart | Refuse:
    """The answer to ReadFile."""
    if known is None:
        return Refuse(_NO_FILES)
    try:
        return FilePart(known.read(name, offset, PART_LIMIT))
    except FileRefused as error:
        return Refuse(one_line(str(error)))


def _not_held(role: str, publications: Publications) -> Refuse:
    reason = publications.reasons().get(role)
    if reason is not None:
        return Refuse(f"this instance cannot serve its {role} weights: {one_line(reason)}")
    roles = sorted(publication.role for publication in publications.all_served())
    held = f"it holds {', '.join(roles)}" if roles else "it holds no weights yet"
    return Refuse(f"this server does not hold {one_line(role)} weights: {held}")


def _holding(coordinates: RankCoordinates, peers: Iterable[Peer]) -> tuple[str, ...]:
    """The addresses of those peers that hold the part of `coordinates`."""
    holding = (peer for peer in peers if peer.coordinates == coordinates)
    return tuple(str(Endpoint(peer.host, peer.port)) for peer in itertools.islice(holding, REFERRALS_LIMIT))


def _common_transport(offers: Iterable[Offer], transports: Sequence[Transport]) -> Transport | None:
    """The first offer of the client that the server can use: the client's order decides."""
    by_name = {transport.name: transport for transport in transports}
    usable = (
        by_name[offer.transport]
        for offer in offers
        if offer.transport in by_name and by_name[offer.transport].accepts(offer)
    )
    return next(usable, None)


def _names(transports: Sequence[Transport]) -> tuple[str, ...]:
    return tuple(transport.name for transport in transports)
