"""Whoever a source names can waste a client's time, and never change a byte or a word of what it gets."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from support.peers.impostor import Act, Impostor, answering, hanging_up, silent
from support.peers.strangers import Intruder, is_idle
from support.sources import IDENTITY, Tensors, client_for, fetch, fetching, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client import verification
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.inquiry import announce, inquire
from vllm_ascend.model_loader.netloader.client.search.order import TRIES
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import STRANGER_REPLY_LIMIT, Accept, Done, Fetch, Refuse, Wait

CHUNK = 4096
PATIENT = Timeouts(connect=60.0, stall=60.0)
TCP = transports(["tcp"])
SHARED = transports(["shared_memory"])
WEIGHTS = Tensors({"w": torch.arange(8 * CHUNK // 4, dtype=torch.int32)})
FORGED = Tensors({"w": torch.arange(8 * CHUNK // 4, dtype=torch.int32) * 3})

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK)


def take_everything(source: Endpoint) -> bytes:
    """A stranger's session, in which it has fetched every byte."""
    _, fetched = fetch(WEIGHTS, TCP, source)
    fetched.memory.close()
    return fetched.session


def referrals_of(server: WeightServer) -> tuple[str, ...]:
    return server.state().replicas["target"]


@contextlib.contextmanager
def trusted(kinds: Sequence[Transport] = TCP) -> Iterator[tuple[WeightServer, Endpoint]]:
    """A server with one turn."""
    with serving(WEIGHTS, kinds, timeouts=PATIENT, max_clients=1) as (server, source):
        yield server, source


@contextlib.contextmanager
def turn_taken(source: Endpoint) -> Iterator[Intruder]:
    """Somebody holds the only turn until the connection is closed."""
    with Intruder(source).greet() as line:
        line.accepted(tensors=WEIGHTS)
        yield line


def fetched_past(
    stranger: Endpoint, server: WeightServer, source: Endpoint, **options: object
) -> tuple[Client, Fetched]:
    """What a client gets that waits at `source`, which refers it to `stranger`; the turn comes when that was tried."""
    announce(source, take_everything(source), stranger.port, 5, Access())
    wait_until(lambda: referrals_of(server))
    client = client_for(WEIGHTS, [*SHARED, *TCP], timeouts=PATIENT, **options)
    with turn_taken(source) as held, fetching(client, source) as result:
        wait_until(lambda: client.attempts and inquire(source, 5).waiting)
        held.reset()
        fetched = result()
    WEIGHTS.assert_in(fetched.memory)
    assert (fetched.source, fetched.fingerprint) == (source, IDENTITY.fingerprint)
    return client, fetched


def test_a_stranger_that_took_everything_cannot_pass_other_contents_on() -> None:
    """Under its own digests, which fit to its own bytes."""
    with trusted() as (server, source), serving(FORGED, TCP) as (_, stranger):
        client, fetched = fetched_past(stranger, server, source)
    (attempt,) = client.attempts
    assert attempt.source == str(stranger)
    assert f"it holds other contents than those for which {source} named it: its root digest is " in attempt.reason
    assert attempt.received == 0
    assert fetched.evidence is not None
    assert fetched.evidence.root == WEIGHTS.store().root()


def test_a_stranger_cannot_change_an_attribute_of_the_model() -> None:
    store = replace(WEIGHTS.store(), attributes={"has_own_embed_tokens": True})
    settings = Settings(TCP, PATIENT)
    with trusted() as (server, source), WeightServer("127.0.0.1", 0, settings) as lying:
        lying.publish(Publication(IDENTITY, RankCoordinates(), store))
        client, fetched = fetched_past(Endpoint("127.0.0.1", lying.port), server, source)
    assert "it holds other contents" in client.attempts[0].reason
    assert fetched.attributes == {}


def test_a_stranger_cannot_sell_pages_that_are_not_those_of_its_digests() -> None:
    """By shared memory nothing is fetched that could be verified on its way."""
    forged, true = FORGED.store(), WEIGHTS.store()
    assert true.digests is not None
    forged = replace(forged, digests=StoreDigests(forged.memory.reader(), true.digests.all()))
    with trusted() as (server, source), WeightServer("127.0.0.1", 0, Settings(SHARED, PATIENT)) as lying:
        lying.publish(Publication(IDENTITY, RankCoordinates(), forged))
        client, _ = fetched_past(Endpoint("127.0.0.1", lying.port), server, source)
    (attempt,) = client.attempts
    assert attempt.reason == "chunk 0 of the memory that it shares is not the one of its digest"


def test_a_replica_cannot_give_weights_another_fingerprint() -> None:
    """It says one; what the client publishes is what its own source has said."""
    lie = replace_fingerprint("5ad")
    unknown = replace_fingerprint("")
    with trusted() as (server, source), serving(WEIGHTS, TCP, identity=lie) as (_, replica):
        announce(source, take_everything(source), replica.port, 5, Access())
        wait_until(lambda: referrals_of(server))
        with turn_taken(source):
            _, fetched = fetch(WEIGHTS.request(unknown), TCP, source)
    WEIGHTS.assert_in(fetched.memory)
    assert (fetched.source, fetched.fingerprint) == (replica, IDENTITY.fingerprint)


def replace_fingerprint(fingerprint: str) -> ModelIdentity:
    return msgspec.structs.replace(IDENTITY, fingerprint=fingerprint)


def test_who_fetches_nothing_is_no_replica() -> None:
    with trusted() as (server, source):
        with Intruder(source).greet() as line:
            session = line.accepted(tensors=WEIGHTS)
            line.say(Done()).hear()
        announce(source, session, 19001, 5, Access())
        wait_until(lambda: is_idle(server))
        assert referrals_of(server) == ()


def test_who_fetches_all_but_one_chunk_is_no_replica() -> None:
    with trusted() as (server, source):
        with Intruder(source).greet() as line, Intruder(source).greet() as data:
            session = line.accepted(tensors=WEIGHTS)
            data.attach(session)
            for number in range(7):
                data.say(Fetch(number * CHUNK, CHUNK)).read(CHUNK)
            data.say(Fetch(0, CHUNK), Fetch(0, CHUNK)).read(2 * CHUNK)
            line.say(Done()).hear()
        announce(source, session, 19001, 5, Access())
        wait_until(lambda: is_idle(server))
        assert referrals_of(server) == ()


def test_a_server_that_does_not_digest_names_nobody() -> None:
    with serving(WEIGHTS, TCP, timeouts=PATIENT, max_clients=1, verify=False) as (server, source):
        _, fetched = fetch(WEIGHTS, TCP, source, verify=False)
        announce(source, fetched.session, 19001, 5, Access())
        wait_until(lambda: referrals_of(server))
        with turn_taken(source), Intruder(source).greet() as line:
            heard = line.join(tensors=WEIGHTS).hear_kind(Wait)
    assert (heard["referrals"], heard["root"]) == ([], "")


def test_who_does_not_verify_follows_nobody() -> None:
    with trusted() as (server, source), serving(FORGED, TCP) as (lying, stranger):
        announce(source, take_everything(source), stranger.port, 5, Access())
        wait_until(lambda: referrals_of(server))
        client = client_for(WEIGHTS, TCP, timeouts=PATIENT, verify=False)
        with turn_taken(source) as held, fetching(client, source) as result:
            wait_until(lambda: inquire(source, 5).waiting)
            held.reset()
            fetched = result()
        assert (fetched.source, client.attempts) == (source, [])
        assert not lying.state().copies


def test_a_root_that_is_not_known_yet_is_waited_for_before_anybody_is_named() -> None:
    with serving(WEIGHTS, [*SHARED, *TCP], timeouts=PATIENT, max_clients=1) as (server, source):
        _, fetched = fetch(WEIGHTS, SHARED, source)  # which needs no digests
        fetched.memory.close()
        announce(source, fetched.session, 19001, 5, Access())
        wait_until(lambda: referrals_of(server))
        with turn_taken(source), Intruder(source).greet() as line:
            assert line.join(tensors=WEIGHTS).hear_kind(Wait)["referrals"] == []
        take_everything(source)
        with turn_taken(source), Intruder(source).greet() as line:
            assert line.join(tensors=WEIGHTS).hear_kind(Wait)["referrals"] == [":19001"]


SILENT_REPLICAS = 8
ROOT = "5eed" * 16


@contextlib.contextmanager
def silent_replicas(act: Act = silent) -> Iterator[list[Impostor]]:
    with contextlib.ExitStack() as scope:
        yield [scope.enter_context(Impostor({"Join": act}, WEIGHTS)) for _ in range(SILENT_REPLICAS)]


def naming(replicas: list[Impostor]) -> Wait:
    return Wait(1, tuple(str(each.endpoint) for each in replicas), ROOT)


def test_silent_replicas_delay_nobody_whose_turn_comes() -> None:
    """The place is kept: the source lets the client in while it listens to the first of them."""
    asked = threading.Event()

    def join(line: object, heard: dict[str, object]) -> None:
        line.say(naming(replicas))  # type: ignore[attr-defined]
        asked.wait()
        line.say(source.right_answer("Join"))  # type: ignore[attr-defined]

    def hear_nothing(_: object, __: object) -> None:
        asked.set()

    with silent_replicas(hear_nothing) as replicas, Impostor({"Join": join}, WEIGHTS) as source:
        client, fetched = fetch(WEIGHTS, TCP, source.endpoint, timeouts=PATIENT)
    WEIGHTS.assert_in(fetched.memory)
    assert fetched.source == source.endpoint
    assert all(each.heard.count("Join") <= 1 for each in replicas)
    assert client.attempts == []


def test_silent_replicas_of_a_source_that_is_gone_cost_no_more_than_one_stall() -> None:
    """Each is left after CONNECT_TIMEOUT, and all of them after STALL_TIMEOUT."""

    def join(line: object, _: object) -> None:
        line.say(naming(replicas))  # type: ignore[attr-defined]
        line.reset()  # type: ignore[attr-defined]

    with silent_replicas() as replicas, Impostor({"Join": join}, WEIGHTS) as source:
        with serving(WEIGHTS, TCP) as (_, healthy):
            _, fetched = fetch(WEIGHTS, TCP, source.endpoint, healthy, timeouts=Timeouts(connect=2.0, stall=2.0))
    assert fetched.source == healthy
    assert all(each.heard.count("Join") <= 1 for each in replicas)


def naming_and_gone(replicas: list[Impostor]) -> Callable[[Any, Any], None]:
    """What a source does that names replicas and dies."""

    def join(line: Any, _: Any) -> None:
        line.say(naming(replicas))
        line.reset()

    return join


def joins(replicas: list[Impostor]) -> int:
    return sum(each.heard.count("Join") for each in replicas)


def test_replicas_that_let_others_wait_end_with_wait_timeout() -> None:
    with silent_replicas(answering(Wait(7))) as replicas, Impostor({"Join": naming_and_gone(replicas)}) as source:
        client = client_for(WEIGHTS, TCP, timeouts=Timeouts(2.0, 2.0), wait_timeout=0.2)
        with pytest.raises(SourcesExhausted):
            client.fetch([source.endpoint])
        assert joins(replicas) <= TRIES * SILENT_REPLICAS


def test_a_replica_that_drips_is_left_for_good_even_where_nobody_else_is_left() -> None:
    def drip(line: Any, heard: Any) -> None:
        for _ in range(1000):
            line.send(b"?")
            time.sleep(0.02)

    with Impostor({"Fetch": drip}, WEIGHTS) as replica, Impostor({}, WEIGHTS) as source:
        source.acts["Join"] = lambda line, _: (
            line.say(Wait(1, (str(replica.endpoint),), replica.root)),
            line.reset(),
        )
        client = client_for(
            WEIGHTS, TCP, timeouts=Timeouts(2.0, 0.3), wait_timeout=0.2, min_bandwidth=64 << 10, disk_remains=False
        )
        with pytest.raises(SourcesExhausted, match=r"less than MIN_BANDWIDTH|no replica has brought a chunk"):
            client.fetch([source.endpoint])
        assert joins([replica]) == 1


def test_one_chunk_does_not_buy_a_replica_the_time_of_a_stall() -> None:
    first_only: dict[int, bool] = {}

    def one_chunk(line: Any, heard: Any) -> None:
        if heard["offset"] == 0 and not first_only.setdefault(id(line), False):
            line.send(bytes(WEIGHTS.store().bytes[:CHUNK]))

    with silent_replicas(answering(Accept(bytes(16), 1, "tcp", {}, digest="blake3"))) as replicas:
        for each in replicas:
            each.acts["Fetch"] = one_chunk
        root = replicas[0].root
        named = tuple(str(each.endpoint) for each in replicas)
        with Impostor({"Join": lambda line, _: (line.say(Wait(1, named, root)), line.reset())}) as source:
            client = client_for(WEIGHTS, TCP, timeouts=Timeouts(2.0, 0.4))
            with pytest.raises(SourcesExhausted):
                client.fetch([source.endpoint])
        assert all(each.heard.count("Join") <= 1 for each in replicas)
    assert client.received.total() >= CHUNK


def test_a_replica_has_made_its_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that has just loaded may need its time for them."""
    monkeypatch.setattr(verification, "LEAST_DIGEST_RATE", 1)
    with Impostor({"AskDigests": silent}, WEIGHTS) as replica, Impostor({}, WEIGHTS) as source:
        source.acts["Join"] = lambda line, _: (
            line.say(Wait(1, (str(replica.endpoint),), replica.root)),
            line.reset(),
        )
        client = client_for(WEIGHTS, TCP, timeouts=Timeouts(0.3, 0.3))
        with pytest.raises(SourcesExhausted, match=r"the peer was silent for 0\.3 s"):
            client.fetch([source.endpoint])


def test_a_replica_cannot_make_a_client_take_a_frame_as_large_as_a_manifest() -> None:
    large = Refuse("the tensors differ", (), bytes(STRANGER_REPLY_LIMIT))
    with Impostor({"Join": answering(large)}, WEIGHTS) as replica, Impostor({}, WEIGHTS) as source:
        source.acts["Join"] = lambda line, _: (
            line.say(Wait(1, (str(replica.endpoint),), replica.root)),
            line.reset(),
        )
        with pytest.raises(SourcesExhausted, match=f"announces a frame of .* bytes: at most {STRANGER_REPLY_LIMIT}"):
            fetch(WEIGHTS, TCP, source.endpoint)


def test_a_replica_names_nobody() -> None:
    """It could send clients to any third party."""
    with Impostor({}, WEIGHTS) as third, Impostor({}, WEIGHTS) as replica, trusted() as (server, source):
        replica.acts["Join"] = answering(Wait(1, (str(third.endpoint),), third.root))
        announce(source, take_everything(source), replica.endpoint.port, 5, Access())
        wait_until(lambda: referrals_of(server))
        client = client_for(WEIGHTS, TCP, timeouts=PATIENT)
        with turn_taken(source) as held, fetching(client, source) as result:
            wait_until(lambda: "Join" in replica.heard and inquire(source, 5).waiting)
            held.reset()
            fetched = result()
        assert (fetched.source, third.heard) == (source, [])


def test_a_replica_that_lets_others_wait_for_ever_is_left_for_the_source() -> None:
    waiting = answering(Wait(7))
    with silent_replicas(waiting) as replicas, trusted() as (server, source):
        announce(source, take_everything(source), replicas[0].endpoint.port, 5, Access())
        wait_until(lambda: referrals_of(server))
        client = client_for(WEIGHTS, TCP, timeouts=PATIENT)
        with turn_taken(source) as held, fetching(client, source) as result:
            wait_until(lambda: "Join" in replicas[0].heard and inquire(source, 5).waiting)
            held.reset()
            fetched = result()
    assert (fetched.source, client.attempts) == (source, [])


def test_a_turn_at_the_source_keeps_what_a_replica_has_brought() -> None:
    turn_came, brought = threading.Event(), threading.Event()

    def stop_at_the_fourth(chunk: Chunk, content: bytes) -> bytes:
        if chunk.number == 3 and not turn_came.is_set():
            brought.set()
            turn_came.wait()
        return content

    def count(nbytes: int) -> None:
        moved.append(nbytes)

    moved: list[int] = []
    kind = (InProcessTransport(stop_at_the_fourth),)
    with (
        serving(WEIGHTS, kind, timeouts=PATIENT, max_clients=1) as (server, source),
        serving(WEIGHTS, kind) as (_, replica),
    ):
        client = client_for(WEIGHTS, (InProcessTransport(),))
        session = client.fetch([source]).session
        announce(source, session, replica.port, 5, Access())
        wait_until(lambda: referrals_of(server))
        client = client_for(WEIGHTS, kind, timeouts=PATIENT, progress=count)
        with Intruder(source).greet() as held, fetching(client, source) as result:
            held.accepted("in_process", WEIGHTS)
            brought.wait()
            held.reset()
            wait_until(lambda: not inquire(source, 5).waiting)
            time.sleep(0.05)  # the turn is told to the client's thread
            turn_came.set()
            fetched = result()
    WEIGHTS.assert_in(fetched.memory)
    assert client.attempts == []
    # The chunk at which the replica stopped is asked for at the source too, since it is late.
    assert WEIGHTS.manifest.nbytes <= client.received.total() <= WEIGHTS.manifest.nbytes + CHUNK
    assert client.received[str(replica)] >= 3 * CHUNK
    assert sum(moved) == WEIGHTS.manifest.nbytes


def test_without_verification_a_turn_elsewhere_is_given_back_while_a_source_delivers() -> None:
    """Two that wrote into the same memory would mix what they have."""
    begun, turn_came = threading.Event(), threading.Event()

    def hold_the_first(chunk: Chunk, content: bytes) -> bytes:
        begun.set()
        turn_came.wait()
        return content

    kind = (InProcessTransport(hold_the_first),)
    with (
        serving(FORGED, kind, timeouts=PATIENT, max_clients=1) as (busy, first),
        serving(WEIGHTS, kind, timeouts=PATIENT) as (_, second),
        Intruder(first).greet() as held,
    ):
        held.accepted("in_process", FORGED)
        client = client_for(WEIGHTS, kind, timeouts=PATIENT, verify=False)
        with fetching(client, first, second) as result:
            begun.wait()
            held.reset()
            wait_until(lambda: is_idle(busy) or (not busy.state().sessions and not busy.state().waiting))
            turn_came.set()
            fetched = result()
    WEIGHTS.assert_in(fetched.memory)
    assert (fetched.source, client.attempts) == (second, [])
    assert client.received[str(first)] == 0


def test_a_stranger_that_hangs_up_is_tried_once() -> None:
    with silent_replicas(hanging_up) as replicas, trusted() as (server, source):
        announce(source, take_everything(source), replicas[0].endpoint.port, 5, Access())
        wait_until(lambda: referrals_of(server))
        client = client_for(WEIGHTS, TCP, timeouts=PATIENT)
        with turn_taken(source) as held, fetching(client, source) as result:
            wait_until(lambda: client.attempts)
            held.reset()
            fetched = result()
        assert replicas[0].heard.count("Join") == 1
    assert fetched.source == source


def test_the_memory_that_a_client_fills_is_its_own_whoever_it_is_referred_to() -> None:
    """Nobody can write into it later: what came is sealed like any other."""
    with trusted() as (server, source), serving(WEIGHTS, TCP) as (_, replica):
        announce(source, take_everything(source), replica.port, 5, Access())
        wait_until(lambda: referrals_of(server))
        with turn_taken(source):
            _, fetched = fetch(WEIGHTS, TCP, source)
    assert fetched.source == replica
    fetched.memory.seal()
    assert fetched.memory.descriptor is not None
    with pytest.raises(PermissionError):
        os.pwrite(fetched.memory.descriptor, b"?", 0)


def test_what_a_replica_shares_counts_only_if_the_source_has_not_got_other_weights_since() -> None:
    asked = threading.Event()

    def name_it_and_refuse(line: Any, _: Any) -> None:
        line.say(Wait(1, (f":{replica.port}",), source.root))
        asked.wait(60)
        line.say(Refuse("it has other weights now"))

    def accepted(_: object) -> None:
        asked.set()
        wait_until(lambda: len(client.attempts) == 1)

    with (
        serving(WEIGHTS, SHARED, timeouts=PATIENT) as (_, replica),
        Impostor({"Join": name_it_and_refuse}, WEIGHTS) as source,
    ):
        client = client_for(WEIGHTS, [*SHARED, *TCP], timeouts=PATIENT, check_attributes=accepted)
        with pytest.raises(SourcesExhausted, match="no source says any more that these weights are the right ones"):
            client.fetch([source.endpoint])
