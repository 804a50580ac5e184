"""A process that has no model learns from an instance what that holds, asks for it, and gets every byte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec
import pytest

from support.logs import LINE_LIMIT
from support.peers.corpus import Corpus
from support.peers.impostor import Impostor, answering, sending
from support.peers.messages import payload
from support.peers.strangers import Intruder
from support.relay import ServerRelay
from support.sources import IDENTITY, SHORT, SMALL, Tensors, reasons, serving
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ProtocolError, SourcesExhausted, SourceUnreachable
from vllm_ascend.model_loader.netloader.holding.request import request_for
from vllm_ascend.model_loader.netloader.holding.survey import Offered, survey
from vllm_ascend.model_loader.netloader.server.answers import Peer
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import MAX_INQUIRIES, Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.weights.manifest import NBYTES_LIMIT, TENSORS_LIMIT, Manifest, TensorSpec
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.conversation import Role
from vllm_ascend.model_loader.netloader.wire.messages import Describe, Description, Holding, Refuse, Status

TCP = transports(["tcp"])
RANKS = tuple(RankCoordinates(tp_rank=rank, tp_size=2) for rank in range(2))
PARTS = (SMALL, Tensors.of_shapes((7, 9), seed=1))
OTHERS = Tensors.of_shapes((16, 8), (5,), (33, 7), seed=2)
"""Other contents than SMALL, of the same shapes."""

pytestmark = pytest.mark.timeout(60)


@contextlib.contextmanager
def instance() -> Iterator[tuple[Endpoint, Endpoint]]:
    """The addresses of the two ranks of an instance, which have met."""
    with contextlib.ExitStack() as opened:
        served = [
            opened.enter_context(serving(part, TCP, coordinates=rank)) for part, rank in zip(PARTS, RANKS, strict=True)
        ]
        ranks = [Peer(rank, "", endpoint.port) for rank, (_, endpoint) in zip(RANKS, served, strict=True)]
        for server, _ in served:
            server.refer_to(ranks)
        yield served[0][1], served[1][1]


def take(offered: Offered, tensors: Tensors, **options: object) -> Client:
    client = Client(FetchOptions(request_for(offered, 5.0), SHORT, **options), TCP, sleep=lambda _: None)  # type: ignore[arg-type]
    fetched = client.fetch(offered.endpoints)
    tensors.assert_in(fetched.memory)
    fetched.memory.close()
    return client


@pytest.mark.parametrize("asked", [0, 1])
def test_who_has_no_model_gets_all_ranks_from_the_address_of_one(asked: int) -> None:
    with instance() as ranks:
        found = survey([ranks[asked]], 5.0)
        by_rank = {each.coordinates: each for each in found.offered}
        assert by_rank.keys() == set(RANKS)
        assert not found.unreached
        for rank, part in zip(RANKS, PARTS, strict=True):
            take(by_rank[rank], part)


def test_a_rank_that_does_not_answer_is_named() -> None:
    with instance() as (first, second), serving(SMALL, TCP, coordinates=RANKS[0]) as (server, lonely):
        with serving(SMALL, TCP) as (_, gone):
            pass
        server.refer_to([Peer(RANKS[0], "", lonely.port), Peer(RANKS[1], "", gone.port)])
        found = survey([lonely], 5.0)
        assert [each.coordinates for each in found.offered] == [RANKS[0]]
        assert isinstance(found.unreached[Endpoint("127.0.0.1", gone.port)], SourceUnreachable)
        assert len(survey([first, second, gone], 5.0).unreached) == 1


def test_those_that_hold_the_same_are_asked_together() -> None:
    with serving(SMALL, TCP) as (_, one), serving(SMALL, TCP) as (_, other), serving(OTHERS, TCP) as (_, third):
        for source in (one, other, third):
            take(survey([source], 5.0).offered[0], OTHERS if source == third else SMALL)  # so that the roots are known
        same, different = survey([one, other, third], 5.0).offered
        assert same.endpoints == (one, other)
        assert different.endpoints == (third,)
        assert same.root != different.root


def test_what_was_asked_for_and_nothing_else_is_taken() -> None:
    with serving(SMALL, TCP) as (server, source):
        take(survey([source], 5.0).offered[0], SMALL)
        (offered,) = survey([source], 5.0).offered
        assert offered.root
        take(offered, SMALL, root=offered.root)

        server.publish(Publication(IDENTITY, RankCoordinates(), OTHERS.store(2)))
        with pytest.raises(SourcesExhausted) as error:
            take(offered, SMALL, root=offered.root)
        assert "it holds other contents than those that were asked for" in reasons(error)
        take(offered, OTHERS)


@pytest.mark.parametrize("root_is_known", [False, True])
def test_other_contents_of_the_same_shape_are_not_mapped_either(root_is_known: bool) -> None:
    with serving(OTHERS, transports(["shared_memory", "tcp"])) as (_, source):
        if root_is_known:
            take(survey([source], 5.0).offered[0], OTHERS)
        (offered,) = survey([source], 5.0).offered
        assert bool(offered.root) == root_is_known
        options = FetchOptions(request_for(offered, 5.0), SHORT, root="5eed" * 16)
        with pytest.raises(SourcesExhausted) as error:
            Client(options, transports(["shared_memory"]), sleep=lambda _: None).fetch([source])
        assert "other contents" in reasons(error)


def test_a_root_cannot_be_had_from_who_has_no_digests() -> None:
    with serving(SMALL, TCP, verify=False) as (_, source):
        (offered,) = survey([source], 5.0).offered
        options = FetchOptions(request_for(offered, 5.0), SHORT, root="5eed" * 16, verify=False)
        with pytest.raises(SourcesExhausted) as error:
            Client(options, TCP, sleep=lambda _: None).fetch([source])
        assert "it cannot say which contents it has" in reasons(error)


def test_what_comes_is_passed_on_and_served_afterwards() -> None:
    with serving(SMALL, TCP) as (_, source), WeightServer("127.0.0.1", 0, Settings(TCP, SHORT)) as server:
        (offered,) = survey([source], 5.0).offered
        relay = ServerRelay(request_for(offered, 5.0), server)
        client = Client(FetchOptions(request_for(offered, 5.0), SHORT, relay=relay), TCP)
        client.fetch([source])
        (held,) = survey([Endpoint("127.0.0.1", server.port)], 5.0).offered
        assert held.identity == offered.identity
        relay.complete()
        take(held, SMALL, root=held.root)


def test_a_draft_is_asked_for_by_its_role() -> None:
    with serving(SMALL, TCP) as (server, source):
        draft = msgspec.structs.replace(IDENTITY, role="draft")
        server.publish(Publication(draft, RankCoordinates(), PARTS[1].store(1)))
        by_role = {each.role: each for each in survey([source], 5.0).offered}
        take(by_role["target"], SMALL)
        take(by_role["draft"], PARTS[1])


def test_without_the_token_nothing_is_told() -> None:
    with serving(SMALL, TCP, access=Access(token=b"one")) as (_, source):
        assert source in survey([source], 5.0).unreached
        (offered,) = survey([source], 5.0, Access(token=b"one")).offered
        with pytest.raises(SourcesExhausted):
            request_for(offered, 5.0)
        assert request_for(offered, 5.0, Access(token=b"one")).manifest.digest == SMALL.manifest.digest


def status_of(described: Manifest, **changes: object) -> Status:
    holding = Holding("target", IDENTITY, RankCoordinates(), len(described.tensors), described.nbytes, 1)
    holding = msgspec.structs.replace(holding, **{"held": described.nbytes, "manifest": described.digest, **changes})
    return Status((holding,), 0, ("tcp",))


HUGE = Manifest.layout([("w", "int8", (1 << 40,), (1,))])


@pytest.mark.parametrize(
    ("status", "described", "expected"),
    {
        "another manifest": (status_of(SMALL.manifest), Description(HUGE.encoded), "a number of tensors of 1"),
        "another size": (status_of(HUGE, nbytes=64), Description(HUGE.encoded), "a size of"),
        "another digest": (status_of(HUGE, manifest="0" * 64), Description(HUGE.encoded), "the digest"),
        "no manifest": (status_of(HUGE), Description(b"\x93"), "cannot be read"),
        "too many bytes": (status_of(HUGE, nbytes=NBYTES_LIMIT + 1), Description(HUGE.encoded), "at most"),
        "too many tensors": (status_of(HUGE, tensors=TENSORS_LIMIT + 1), Description(HUGE.encoded), "at most"),
        "a refusal": (status_of(HUGE), Refuse("not any more"), "it refused: not any more"),
    }.values(),
    ids=str,
)
def test_a_manifest_is_believed_only_if_it_is_the_one_that_was_named(
    status: Status, described: Description | Refuse, expected: str
) -> None:
    with Impostor({"Inquire": answering(status), "Describe": answering(described)}) as impostor:
        (offered,) = survey([impostor.endpoint], 5.0).offered
        with pytest.raises(SourcesExhausted) as error:
            request_for(offered, 5.0)
        assert expected in reasons(error)


def test_the_next_one_is_asked_where_the_first_lies() -> None:
    with (
        Impostor({"Inquire": answering(status_of(SMALL.manifest)), "Describe": answering(Description(b""))}) as liar,
        serving(SMALL, TCP) as (_, source),
    ):
        (offered,) = survey([liar.endpoint, source], 5.0).offered
        assert request_for(offered, 5.0).manifest.digest == SMALL.manifest.digest


def test_who_asks_for_a_manifest_outlives_whatever_is_answered() -> None:
    corpus, faults = Corpus(6, Role.SERVER), list[str]()
    for _ in range(80):
        strange = sending(corpus.stream(corpus.content(payload(Description(SMALL.manifest.encoded)))))
        with Impostor({"Inquire": answering(status_of(SMALL.manifest)), "Describe": strange}) as impostor:
            (offered,) = survey([impostor.endpoint], 5.0).offered
            try:
                assert request_for(offered, 20.0).manifest.digest == SMALL.manifest.digest
            except SourcesExhausted as error:
                faults += error.reasons
    assert len(faults) > 40
    assert not [fault[:200] for fault in faults if len(fault) > LINE_LIMIT or not fault.isprintable()]


def test_weights_beyond_all_reason_have_no_manifest() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        Manifest([TensorSpec("w", "int8", (NBYTES_LIMIT + 1,), (1,), 0)])
    assert Manifest([TensorSpec("w", "int8", (NBYTES_LIMIT,), (1,), 0)]).nbytes == NBYTES_LIMIT


def test_manifests_are_told_on_one_connection_as_often_as_anything_else() -> None:
    with serving(SMALL, TCP) as (server, source), Intruder(source).greet() as line:
        line.say(*[Describe(SMALL.manifest.digest)] * MAX_INQUIRIES)
        assert {line.hear()["type"] for _ in range(MAX_INQUIRIES)} == {"Description"}
        line.hear_out()
        with Intruder(source).greet() as other:
            assert "does not hold" in other.say(Describe("5eed")).hear()["reason"]
            other.hear_out()
        assert server.state().not_served == {}
