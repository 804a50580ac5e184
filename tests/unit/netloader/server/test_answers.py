"""What a client that joins gets, and what a server says of itself, decided without sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest

from support.sources import IDENTITY, SMALL
from vllm_ascend.model_loader.netloader.server.answers import Acceptance, Peer, answer, status
from vllm_ascend.model_loader.netloader.server.publications import Publication, Publications
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.messages import REFERRALS_LIMIT, Join, Offer, Refuse

IN_PROCESS, TCP = InProcessTransport(), TcpTransport()
FIRST, SECOND = (RankCoordinates(tp_rank=rank, tp_size=2) for rank in (0, 1))
JOIN = Join(IDENTITY, FIRST, SMALL.manifest.digest, (TCP.offer(),))


@pytest.fixture
def held() -> Iterator[Publications]:
    """The first of two ranks."""
    store = SMALL.store()
    publications = Publications()
    publications.publish(Publication(IDENTITY, FIRST, store))
    yield publications
    store.close()


def refusal(join: Join, held: Publications, *peers: Peer, transports: tuple[Transport, ...] = (TCP,)) -> Refuse:
    refused = answer(join, held, transports, peers)
    assert isinstance(refused, Refuse)
    return refused


def test_whoever_wants_what_is_held_gets_it(held: Publications) -> None:
    assert answer(JOIN, held, (TCP,), ()) == Acceptance(held.all_served()[0], TCP)


@pytest.mark.parametrize(
    ("offers", "chosen"),
    [((TCP, IN_PROCESS), TCP), ((IN_PROCESS, TCP), IN_PROCESS)],
    ids=["tcp first", "tcp last"],
)
def test_the_order_of_the_client_decides_on_the_transport(
    offers: tuple[Transport, ...], chosen: Transport, held: Publications
) -> None:
    join = msgspec.structs.replace(JOIN, offers=tuple(transport.offer() for transport in offers))
    for transports in ((IN_PROCESS, TCP), (TCP, IN_PROCESS)):
        accepted = answer(join, held, transports, ())
        assert isinstance(accepted, Acceptance)
        assert accepted.transport is chosen


def test_an_offer_for_other_machines_is_passed_over(held: Publications) -> None:
    join = msgspec.structs.replace(JOIN, offers=(Offer("tcp", "elsewhere"), IN_PROCESS.offer()))
    accepted = answer(join, held, (TCP, IN_PROCESS), ())
    assert isinstance(accepted, Acceptance)
    assert accepted.transport is IN_PROCESS


def test_without_a_common_transport_there_is_no_way(held: Publications) -> None:
    refused = refusal(JOIN, held, transports=(IN_PROCESS,))
    assert refused.reason == "no common transport: this server has in_process"


def test_a_turn_is_for_bytes_that_move(held: Publications) -> None:
    copying = Acceptance(held.all_served()[0], TCP)
    assert copying.needs_turn
    assert not replace(copying, transport=Mapping()).needs_turn


class Mapping(InProcessTransport):
    """Has the traits of a transport that moves nothing."""

    traits = replace(InProcessTransport.traits, copies=False)


def test_another_model_is_refused_with_all_differences(held: Publications) -> None:
    wanted = msgspec.structs.replace(IDENTITY, dtype="float16")
    refused = refusal(msgspec.structs.replace(JOIN, identity=wanted, coordinates=SECOND), held, Peer(SECOND, "", 1))
    assert refused.reason == "the model or its partitioning differs"
    assert [difference.field for difference in refused.differences] == ["dtype", "tp_rank"]
    assert refused.referrals == ()


def test_another_rank_is_referred_to_those_that_hold_its_part(held: Publications) -> None:
    wanted = msgspec.structs.replace(JOIN, coordinates=SECOND)
    peers = [Peer(FIRST, "10.0.0.1", 19000), *(Peer(SECOND, "", port) for port in range(1, 100))]
    refused = refusal(wanted, held, *peers)
    assert refused.referrals == tuple(f":{port}" for port in range(1, REFERRALS_LIMIT + 1))
    assert [difference.field for difference in refused.differences] == ["tp_rank"]
    assert refusal(wanted, held).reason == "the model or its partitioning differs"


def test_other_tensors_are_answered_with_the_manifest(held: Publications) -> None:
    refused = refusal(msgspec.structs.replace(JOIN, manifest_digest="other"), held)
    assert refused.reason == "the tensors differ"
    assert refused.manifest == SMALL.manifest.encoded


def test_a_role_that_is_not_held_is_refused_with_what_is(held: Publications) -> None:
    draft = msgspec.structs.replace(JOIN, identity=msgspec.structs.replace(IDENTITY, role="draft"))
    assert refusal(draft, held).reason == "this server does not hold draft weights: it holds target"
    nothing = "this server does not hold draft weights: it holds no weights yet"
    assert refusal(draft, Publications()).reason == nothing


def test_why_a_role_is_not_served_is_told_in_one_line(held: Publications) -> None:
    held.suspend("it sleeps\nand dreams")
    assert refusal(JOIN, held).reason == "this instance cannot serve its target weights: it sleeps?and dreams"
    held.decline("target", "w is sparse")
    assert refusal(JOIN, held).reason == "this instance cannot serve its target weights: w is sparse"


def test_status_tells_what_is_served_and_why_the_rest_is_not(held: Publications) -> None:
    held.decline("draft", "w is sparse")
    told = status(held, (TCP, IN_PROCESS), sessions=3, waiting=4)
    assert (told.sessions, told.waiting, told.transports) == (3, 4, ("tcp", "in_process"))
    assert told.declined == {"draft": "w is sparse"}
    (holding,) = told.holdings
    assert (holding.role, holding.identity, holding.coordinates) == ("target", IDENTITY, FIRST)
    assert (holding.tensors, holding.nbytes, holding.generation) == (3, SMALL.manifest.nbytes, 1)


def test_status_makes_no_digests(held: Publications) -> None:
    assert status(held, (), sessions=0, waiting=0).holdings[0].root == ""
    root = held.all_served()[0].store.root()
    assert status(held, (), sessions=0, waiting=0).holdings[0].root == root
