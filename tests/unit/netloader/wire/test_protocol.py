from __future__ import annotations

import contextlib
import copy
import hmac
import math
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError
from vllm_ascend.model_loader.netloader.weights.identity import Difference, ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.wire.conversation import Conversation, Role, State, frame
from vllm_ascend.model_loader.netloader.wire.messages import (
    ATTRIBUTES_LIMIT,
    DIFFERENCES_LIMIT,
    DIGESTS_LIMIT,
    FETCH_LIMIT,
    KEY_LIMIT,
    PUBLISH_LIMIT,
    REFERRALS_LIMIT,
    REPLY_LIMIT,
    REQUEST_LIMIT,
    Accept,
    Announce,
    AskDigests,
    Attach,
    Attached,
    AttributeValue,
    Challenge,
    Confirm,
    Digests,
    Done,
    End,
    Fetch,
    Gather,
    Gathered,
    Hello,
    Holding,
    Inquire,
    Join,
    Leave,
    Message,
    Offer,
    Prove,
    Publish,
    Refuse,
    Status,
    Wait,
    Welcome,
)

CLIENT, SERVER = Role.CLIENT, Role.SERVER

IDENTITY = ModelIdentity(
    name="org/model",
    architecture="LlamaForCausalLM",
    config_digest="c0ffee",
    dtype="bfloat16",
    revision="main",
    quantization="fp8",
    fingerprint="f00d",
    versions={"vllm": "0.32.0"},
)
RANK = RankCoordinates(tp_rank=1, tp_size=2)
SESSION = bytes(range(16))
CHALLENGE = bytes(range(32, 64))
PROOF = bytes(range(64, 96))
DIGEST = bytes(range(96, 112))
ROOT = "5eed" * 16
ATTRIBUTES = {"has_own_lm_head": True, "layers.0.rank": -7, "ratio": 0.5, "note": "draft", "window": None}

SAID_BY: dict[Role, tuple[Message, ...]] = {
    CLIENT: (
        Hello(challenge=CHALLENGE),
        Prove(PROOF),
        Join(IDENTITY, RANK, "d1835", (Offer("shared_memory", "boot/4/7"), Offer("tcp"))),
        AskDigests(300, DIGESTS_LIMIT),
        Gather(),
        Publish("group/0:1", bytes(range(256)) * 16),
        Gathered(),
        Done(),
        Leave("the transport failed"),
        Announce(SESSION, 19001),
        Attach(SESSION),
        Fetch(1 << 33, 4096),
        Inquire(),
    ),
    SERVER: (
        Challenge(CHALLENGE),
        Welcome(proof=PROOF),
        Wait(5, (":19001", "node-4:19001"), ROOT, "f00d"),
        Attached(),
        Accept(
            SESSION,
            3,
            "process_group",
            {"host": "10.0.0.1", "port": 40000},
            ATTRIBUTES,
            "f00d",
            "blake3",
        ),
        Digests((DIGEST, bytes(16))),
        Publish("0/1", DIGEST),
        Gathered(),
        Refuse(
            "the tensors differ",
            (Difference("tensor w", "int8 [2]", ""),),
            b"\x92\x90\x90",
            (":19001", "node-3:19001"),
        ),
        Confirm(3, ROOT),
        End("its weights were replaced by new ones"),
        Status(
            (Holding("target", IDENTITY, RANK, 291, 1 << 34, 3),),
            2,
            ("shared_memory", "tcp"),
            {"draft": "loading set table, which cannot be told to another process"},
            7,
        ),
    ),
}
EXAMPLES: dict[type[Message], Message] = {type(each): each for each in SAID_BY[CLIENT] + SAID_BY[SERVER]}

TABLE: dict[tuple[State, Role], dict[type[Message], State]] = {
    (State.START, CLIENT): {Hello: State.GREETED},
    (State.START, SERVER): {Refuse: State.ENDED},
    (State.GREETED, SERVER): {Welcome: State.READY, Challenge: State.CHALLENGED, Refuse: State.ENDED},
    (State.CHALLENGED, CLIENT): {Prove: State.PROVING},
    (State.PROVING, SERVER): {Welcome: State.READY, Refuse: State.ENDED},
    (State.READY, CLIENT): {
        Join: State.JOINING,
        Attach: State.ATTACHING,
        Inquire: State.INQUIRING,
        Announce: State.ENDED,
    },
    (State.JOINING, SERVER): {Wait: State.JOINING, Accept: State.TRANSFER, Refuse: State.ENDED},
    (State.TRANSFER, CLIENT): {
        AskDigests: State.DIGESTING,
        Gather: State.GATHERING,
        Fetch: State.TRANSFER,
        Done: State.CONFIRMING,
        Leave: State.ENDED,
    },
    (State.TRANSFER, SERVER): {End: State.ENDED},
    (State.DIGESTING, SERVER): {Digests: State.TRANSFER, End: State.ENDED},
    (State.GATHERING, CLIENT): {Publish: State.GATHERING, Gathered: State.GATHERED, Leave: State.ENDED},
    (State.GATHERING, SERVER): {Publish: State.GATHERING, End: State.ENDED},
    (State.GATHERED, CLIENT): {Leave: State.ENDED},
    (State.GATHERED, SERVER): {Publish: State.GATHERED, Gathered: State.TRANSFER, End: State.ENDED},
    (State.CONFIRMING, SERVER): {Confirm: State.ENDED, End: State.ENDED},
    (State.INQUIRING, SERVER): {Status: State.READY},
    (State.ATTACHING, SERVER): {Attached: State.DATA, Refuse: State.ENDED},
    (State.DATA, CLIENT): {Fetch: State.DATA},
}
"""Who may say what, and where it leads. In START and TRANSFER, either side may speak; in ENDED, nobody."""


def allowed(state: State, role: Role) -> dict[type[Message], State]:
    return TABLE.get((state, role), {})


class Pair:
    """A client and a server, wired together; whatever one says is checked to have reached the other."""

    def __init__(self, cut: Callable[[bytes], list[bytes]] = lambda data: [data]) -> None:
        self.ends = {role: Conversation(role) for role in Role}
        self._cut = cut

    def client(self, message: Message) -> None:
        self._say(CLIENT, message)

    def server(self, message: Message) -> None:
        self._say(SERVER, message)

    def say(self, *kinds: type[Message]) -> Pair:
        for kind in kinds:
            self._say(speaker(kind), EXAMPLES[kind])
        return self

    def authenticate(self, key: bytes) -> Pair:
        for end in self.ends.values():
            end.authenticate(key)
        return self

    def _say(self, role: Role, message: Message) -> None:
        listener = self.ends[other(role)]
        *pieces, last = self._cut(self.ends[role].send(message))
        for piece in pieces:
            listener.feed(piece)
            assert listener.next_message() is None
        listener.feed(last)
        assert listener.next_message() == message
        assert listener.next_message() is None

    @property
    def state(self) -> State:
        states = {end.state for end in self.ends.values()}
        assert len(states) == 1, states
        return states.pop()


def other(role: Role) -> Role:
    return SERVER if role is CLIENT else CLIENT


def speaker(kind: type[Message]) -> Role:
    return CLIENT if kind in map(type, SAID_BY[CLIENT]) else SERVER


WAYS: dict[State, tuple[type[Message], ...]] = {
    State.START: (),
    State.GREETED: (Hello,),
    State.CHALLENGED: (Hello, Challenge),
    State.PROVING: (Hello, Challenge, Prove),
    State.READY: (Hello, Welcome),
    State.JOINING: (Hello, Welcome, Join),
    State.TRANSFER: (Hello, Welcome, Join, Accept),
    State.DIGESTING: (Hello, Welcome, Join, Accept, AskDigests),
    State.GATHERING: (Hello, Welcome, Join, Accept, Gather),
    State.GATHERED: (Hello, Welcome, Join, Accept, Gather, Gathered),
    State.CONFIRMING: (Hello, Welcome, Join, Accept, Done),
    State.INQUIRING: (Hello, Welcome, Inquire),
    State.ATTACHING: (Hello, Welcome, Attach),
    State.DATA: (Hello, Welcome, Attach, Attached),
    State.ENDED: (Hello, Welcome, Join, Refuse),
}


def arrived(end: Conversation) -> Iterator[Message]:
    while (message := end.next_message()) is not None:
        yield message


def test_the_tables_of_this_module_cover_every_message_and_state() -> None:
    assert set(EXAMPLES) == set(Message.__subclasses__())
    assert {state for state, _ in TABLE} | {State.ENDED} == set(WAYS) == set(State)
    assert {kind for row in TABLE.values() for kind in row} == set(EXAMPLES)
    for state, way in WAYS.items():
        assert Pair().say(*way).state is state


def test_a_client_takes_weights() -> None:
    pair = Pair()
    pair.client(Hello())
    pair.server(Welcome())
    pair.client(Join(IDENTITY, RANK, "d1835", (Offer("tcp"),)))
    pair.server(Accept(SESSION, 1, "tcp", {}))
    pair.client(Done())
    pair.server(Confirm(1))
    assert pair.state is State.ENDED


def test_a_client_proves_that_it_knows_the_token() -> None:
    pair = Pair()
    pair.client(Hello(challenge=CHALLENGE))
    pair.server(Challenge(DIGEST))
    pair.client(Prove(PROOF))
    pair.server(Welcome(proof=PROOF))
    assert pair.state is State.READY


def test_a_server_refuses_a_proof() -> None:
    pair = Pair().say(Hello, Challenge, Prove)
    pair.server(Refuse("the token is not the one of this server"))
    assert pair.state is State.ENDED


def test_a_client_waits_for_its_turn_and_takes_verified_weights() -> None:
    pair = Pair().say(Hello, Welcome, Join, Wait, Wait, Accept, AskDigests, Digests, AskDigests, Digests, Done, Confirm)
    assert pair.state is State.ENDED


def test_a_client_that_waits_may_be_refused_after_all() -> None:
    assert Pair().say(Hello, Welcome, Join, Wait, Refuse).state is State.ENDED


def test_a_client_fetches_on_the_control_connection_of_a_session() -> None:
    assert Pair().say(Hello, Welcome, Join, Accept, AskDigests, Digests, Fetch, Fetch).state is State.TRANSFER


def test_both_publish_until_the_server_too_says_that_the_group_works() -> None:
    pair = Pair().say(Hello, Welcome, Join, Accept, Gather)
    pair.server(Publish("0/0", b"there"))
    pair.client(Publish("0/1", b"here"))
    pair.client(Gathered())
    pair.server(Publish("late", b"not asked for"))
    pair.server(Gathered())
    assert pair.say(Fetch, Fetch, Done, Confirm).state is State.ENDED


@pytest.mark.parametrize("before", [(Gather,), (Gather, Publish), (Gather, Gathered)])
def test_a_client_gives_up_a_group_at_any_point(before: tuple[type[Message], ...]) -> None:
    assert Pair().say(Hello, Welcome, Join, Accept, *before, Leave).state is State.ENDED


def test_a_value_or_key_that_no_library_publishes_is_refused() -> None:
    for message in (Publish("0/1", bytes(PUBLISH_LIMIT + 1)), Publish("k" * (KEY_LIMIT + 1), b"")):
        end = Pair().say(*WAYS[State.GATHERING]).ends[SERVER]
        end.feed(frame(message))
        with pytest.raises(ProtocolError, match="is no message"):
            end.next_message()


def test_an_end_knows_what_it_may_say() -> None:
    pair = Pair().say(*WAYS[State.GATHERING])
    assert pair.ends[CLIENT].may_send(Leave)
    assert not pair.ends[CLIENT].may_send(Done)
    assert not pair.say(Leave).ends[CLIENT].may_send(Leave)


@pytest.mark.parametrize(
    "before",
    [(), (Fetch,), (AskDigests,), (AskDigests, Digests), (Gather,), (Gather, Gathered), (Done,)],
    ids=[
        "after Accept",
        "after Fetch",
        "instead of Digests",
        "after Digests",
        "while gathering",
        "instead of Gathered",
        "instead of Confirm",
    ],
)
def test_a_server_ends_a_session_at_any_point_before_its_end(before: tuple[type[Message], ...]) -> None:
    assert Pair().say(Hello, Welcome, Join, Accept, *before, End).state is State.ENDED


@pytest.mark.parametrize("kind", [Done, AskDigests, Fetch], ids=lambda kind: kind.__name__)
def test_a_session_that_the_server_ends_while_the_client_speaks_is_ended_for_the_client(kind: type[Message]) -> None:
    pair = Pair().say(Hello, Welcome, Join, Accept)
    ended = pair.ends[SERVER].send(EXAMPLES[End])
    pair.ends[CLIENT].send(EXAMPLES[kind])
    pair.ends[CLIENT].feed(ended)
    assert pair.ends[CLIENT].next_message() == EXAMPLES[End]
    assert pair.ends[CLIENT].state is State.ENDED


def test_a_client_announces_that_it_serves_the_weights_too() -> None:
    assert Pair().say(Hello, Welcome, Announce).state is State.ENDED


def test_a_client_gives_up() -> None:
    pair = Pair().say(Hello, Welcome, Join, Accept)
    pair.client(Leave("no memory"))
    assert pair.state is State.ENDED


def test_a_server_refuses_a_join() -> None:
    pair = Pair().say(Hello, Welcome, Join)
    pair.server(Refuse("the model differs", (Difference("dtype", "float16", "bfloat16"),)))
    assert pair.state is State.ENDED


def test_a_server_refuses_another_version_of_the_protocol() -> None:
    pair = Pair()
    pair.client(Hello(protocol=99))
    pair.server(Refuse("the protocol versions differ"))
    assert pair.state is State.ENDED


def test_a_server_that_has_too_many_connections_refuses_before_the_greeting() -> None:
    pair = Pair()
    pair.server(Refuse("overloaded"))
    assert pair.state is State.ENDED


def test_a_visitor_inquires_as_often_as_it_likes_and_may_then_join() -> None:
    pair = Pair().say(Hello, Welcome, Inquire, Status, Inquire, Status, Join, Accept)
    assert pair.state is State.TRANSFER


def test_a_data_connection_fetches_without_end() -> None:
    pair = Pair().say(Hello, Welcome, Attach, Attached, Fetch, Fetch)
    pair.client(Fetch(0, FETCH_LIMIT))
    assert pair.state is State.DATA


def test_requests_may_be_sent_ahead() -> None:
    pair = Pair().say(Hello, Welcome, Attach, Attached)
    requests = [Fetch(offset, 10) for offset in range(0, 100, 10)]
    server = pair.ends[SERVER]
    server.feed(b"".join(pair.ends[CLIENT].send(request) for request in requests))
    assert list(arrived(server)) == requests


GREETING: tuple[type[Message], ...] = (Hello, Challenge, Prove, Welcome)
ENDINGS: dict[str, tuple[type[Message], ...]] = {
    "taken": (Accept, AskDigests, Digests, Fetch, Done, Confirm),
    "refused": (Refuse,),
    "given up": (Accept, Leave),
    "ended": (Accept, AskDigests, End),
}
KEY = bytes(range(128, 160))
TAG_BYTES = 16


def converse(pair: Pair, key: bytes | None, ending: tuple[type[Message], ...]) -> Pair:
    pair.say(*GREETING)
    if key is not None:
        pair.authenticate(key)
    return pair.say(Inquire, Status, Join, Wait, *ending)


authentication = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "authenticated"])


@authentication
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_conversation_that_arrives_byte_by_byte_is_the_same(
    key: bytes | None, ending: tuple[type[Message], ...]
) -> None:
    pair = Pair(cut=lambda data: [data[n : n + 1] for n in range(len(data))])
    assert converse(pair, key, ending).state is State.ENDED


@authentication
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_conversation_that_is_cut_at_any_offset_is_the_same(
    key: bytes | None, ending: tuple[type[Message], ...]
) -> None:
    longest = TAG_BYTES + max(len(frame(each)) for each in EXAMPLES.values())
    for offset in range(1, longest):
        pair = Pair(cut=lambda data, at=offset: [data[:at], data[at:]] if at < len(data) else [data])
        assert converse(pair, key, ending).state is State.ENDED


@authentication
def test_requests_sent_ahead_may_be_cut_anywhere(key: bytes | None) -> None:
    requests = [Fetch(0, 1), Fetch(1 << 20, 70_000), Fetch(7, 300)]

    def attached() -> Pair:
        pair = Pair().say(*GREETING)
        return (pair.authenticate(key) if key is not None else pair).say(Attach, Attached)

    stream = b"".join(map(attached().ends[CLIENT].send, requests))
    for offset in range(len(stream) + 1):
        server = attached().ends[SERVER]
        server.feed(stream[:offset])
        heard = list(arrived(server))
        server.feed(memoryview(stream)[offset:])
        assert [*heard, *arrived(server)] == requests


@pytest.mark.parametrize(("role", "limit"), [(SERVER, 64 << 10), (CLIENT, 64 << 20)], ids=["server", "client"])
def test_a_frame_over_the_limit_is_refused_by_its_length_alone(role: Role, limit: int) -> None:
    assert limit == {SERVER: REQUEST_LIMIT, CLIENT: REPLY_LIMIT}[role]
    for length in (limit + 1, 0xFFFFFFFF):
        end = Conversation(role)
        end.feed(length.to_bytes(4, "big"))
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError) as caught:
                end.next_message()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert str(caught.value) == f"the {other(role).value} announces a frame of {length} bytes: at most {limit}"
        assert peak < 1 << 20


@pytest.mark.parametrize(("role", "limit"), [(SERVER, REQUEST_LIMIT), (CLIENT, REPLY_LIMIT)], ids=["server", "client"])
def test_a_frame_of_the_limit_is_waited_for(role: Role, limit: int) -> None:
    end = Conversation(role)
    end.feed(limit.to_bytes(4, "big"))
    assert end.next_message() is None


def test_the_manifest_of_a_large_model_fits_into_a_refusal() -> None:
    pair = Pair().say(Hello, Welcome, Join)
    pair.server(Refuse("the tensors differ", (), bytes(REPLY_LIMIT - 1000)))


def payload(message: Message) -> bytes:
    return frame(message)[4:-4]


def framed(content: bytes) -> bytes:
    """`content` as a peer without a token sends it."""
    return with_length(content + zlib.crc32(content).to_bytes(4, "big"))


def with_length(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def without(message: Message, field: str) -> bytes:
    fields = msgspec.msgpack.decode(payload(message))
    del fields[field]
    return msgspec.msgpack.encode(fields)


def having(message: Message, **fields: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.decode(payload(message)) | fields)


def cut_after(message: Message, text: bytes) -> bytes:
    """The payload up to and with `text`."""
    content = payload(message)
    return content[: content.index(text) + len(text)]


HUGE_ARRAY, HUGE_MAP, HUGE_BYTES = b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"
JOIN, ACCEPT, REFUSE, STATUS = EXAMPLES[Join], EXAMPLES[Accept], EXAMPLES[Refuse], EXAMPLES[Status]
WAIT, DIGESTS = EXAMPLES[Wait], EXAMPLES[Digests]

NO_MESSAGE: dict[str, tuple[Role, bytes]] = {
    "nothing": (CLIENT, b""),
    "no map": (CLIENT, b"\x93\x01\x02\x03"),
    "an unknown tag": (CLIENT, having(Hello(), type="Greetings")),
    "no tag": (CLIENT, without(Hello(), "type")),
    "a tag that is no text": (CLIENT, payload(Hello()).replace(b"Hello", b"H\xffllo")),
    "a server's message from a client": (CLIENT, payload(Welcome())),
    "a client's message from a server": (SERVER, payload(Hello())),
    "a message cut short": (CLIENT, payload(JOIN)[:-1]),
    "a message and more": (CLIENT, payload(JOIN) + b"\xc0"),
    "a field of another type": (CLIENT, having(Hello(), protocol="1")),
    "a missing field": (CLIENT, without(JOIN, "identity")),
    "an identity with an unknown field": (CLIENT, having(JOIN, identity=msgspec.to_builtins(IDENTITY) | {"x": 1})),
    "coordinates with an unknown field": (CLIENT, having(JOIN, coordinates={"dp_rank": 1})),
    "a negative number": (CLIENT, having(Hello(), protocol=-1)),
    "a number beyond all files": (CLIENT, having(Fetch(0, 1), offset=1 << 62)),
    "a fetch of nothing": (CLIENT, having(Fetch(0, 1), length=0)),
    "a fetch of too much": (CLIENT, having(Fetch(0, 1), length=FETCH_LIMIT + 1)),
    "a session too short": (CLIENT, having(EXAMPLES[Attach], session=bytes(15))),
    "a session too long": (CLIENT, having(EXAMPLES[Attach], session=bytes(17))),
    "a reason too long": (CLIENT, having(EXAMPLES[Leave], reason="x" * 4097)),
    "a challenge to the server too long": (CLIENT, having(Hello(), challenge=bytes(65))),
    "a challenge to the client too long": (SERVER, having(EXAMPLES[Challenge], challenge=bytes(65))),
    "a challenge that is text": (SERVER, having(EXAMPLES[Challenge], challenge="who are you")),
    "a proof too long": (CLIENT, having(EXAMPLES[Prove], proof=bytes(65))),
    "no proof": (CLIENT, without(EXAMPLES[Prove], "proof")),
    "a server's proof too long": (SERVER, having(Welcome(), proof=bytes(65))),
    "as many ahead as below none": (SERVER, having(WAIT, ahead=-1)),
    "another source too long": (SERVER, having(WAIT, referrals=["x" * 4097])),
    "too many other sources": (SERVER, having(WAIT, referrals=["a:1"] * (REFERRALS_LIMIT + 1))),
    "too many other ranks": (SERVER, having(REFUSE, referrals=["a:1"] * (REFERRALS_LIMIT + 1))),
    "digests before the first": (CLIENT, having(EXAMPLES[AskDigests], first=-1)),
    "no digests asked for": (CLIENT, having(EXAMPLES[AskDigests], count=0)),
    "too many digests told": (SERVER, having(DIGESTS, digests=[bytes(32)] * (DIGESTS_LIMIT + 1))),
    "too many differences": (SERVER, having(REFUSE, differences=[["dtype", "", ""]] * (DIFFERENCES_LIMIT + 1))),
    "too many attributes": (
        SERVER,
        having(ACCEPT, attributes={str(number): None for number in range(ATTRIBUTES_LIMIT + 1)}),
    ),
    "too many digests asked for": (CLIENT, having(EXAMPLES[AskDigests], count=DIGESTS_LIMIT + 1)),
    "digests that are text": (SERVER, having(DIGESTS, digests=["d1835"])),
    "a digest too long": (SERVER, having(DIGESTS, digests=[bytes(65)])),
    "a root too long": (SERVER, having(EXAMPLES[Confirm], root="x" * 4097)),
    "a root of bytes": (SERVER, having(EXAMPLES[Confirm], root=bytes(32))),
    "a promised root too long": (SERVER, having(WAIT, root="x" * 4097)),
    "a promised fingerprint too long": (SERVER, having(WAIT, fingerprint="x" * 4097)),
    "a kind of digest too long": (SERVER, having(ACCEPT, digest="x" * 4097)),
    "a kind of digest that is a number": (SERVER, having(ACCEPT, digest=3)),
    "an end without a reason": (SERVER, without(EXAMPLES[End], "reason")),
    "a reason to end too long": (SERVER, having(EXAMPLES[End], reason="x" * 4097)),
    "an announced session too short": (CLIENT, having(EXAMPLES[Announce], session=bytes(15))),
    "an announced port of none": (CLIENT, having(EXAMPLES[Announce], port=0)),
    "an announced port too high": (CLIENT, having(EXAMPLES[Announce], port=65536)),
    "an announced port that is text": (CLIENT, having(EXAMPLES[Announce], port="19001")),
    "waiting clients by name": (SERVER, having(STATUS, waiting=["node-4"])),
    "parameters that are lists": (SERVER, having(ACCEPT, parameters={"port": [1]})),
    "attributes that are lists": (SERVER, having(ACCEPT, attributes={"shapes": [1]})),
    "attributes that are maps": (SERVER, having(ACCEPT, attributes={"options": {"a": 1}})),
    "attributes that are bytes": (SERVER, having(ACCEPT, attributes={"note": b"draft"})),
    "attributes by number": (SERVER, having(ACCEPT, attributes={1: True})),
    "attributes without names": (SERVER, having(ACCEPT, attributes=[True])),
    "no attributes": (SERVER, having(ACCEPT, attributes=None)),
    "an attribute's text too long": (SERVER, having(ACCEPT, attributes={"note": "x" * 4097})),
    "an attribute's name too long": (SERVER, having(ACCEPT, attributes={"x" * 4097: True})),
    "an attribute's text that is no text": (SERVER, payload(ACCEPT).replace(b"draft", b"dr\xffft")),
    "an attribute's name that is no text": (SERVER, payload(ACCEPT).replace(b"note", b"n\xffte")),
    "a fingerprint that is a number": (SERVER, having(ACCEPT, fingerprint=1)),
    "a fingerprint that is nothing": (SERVER, having(ACCEPT, fingerprint=None)),
    "a fingerprint too long": (SERVER, having(ACCEPT, fingerprint="f" * 4097)),
    "reasons to decline that are numbers": (SERVER, having(STATUS, declined={"draft": 1})),
    "reasons to decline that are nothing": (SERVER, having(STATUS, declined={"draft": None})),
    "reasons to decline by number": (SERVER, having(STATUS, declined={1: "draft"})),
    "declined roles without reasons": (SERVER, having(STATUS, declined=["draft"])),
    "no declined roles": (SERVER, having(STATUS, declined=None)),
    "a difference of two fields": (SERVER, having(REFUSE, differences=[["dtype", "int8"]])),
    "offers without end": (CLIENT, cut_after(JOIN, b"offers") + HUGE_ARRAY),
    "versions without end": (CLIENT, cut_after(JOIN, b"versions") + HUGE_MAP),
    "differences without end": (SERVER, cut_after(REFUSE, b"differences") + HUGE_ARRAY),
    "a manifest without end": (SERVER, cut_after(REFUSE, b"manifest") + HUGE_BYTES),
    "digests without end": (SERVER, cut_after(DIGESTS, b"\xa7digests") + HUGE_ARRAY),
    "a root without end": (SERVER, cut_after(EXAMPLES[Confirm], b"root") + HUGE_BYTES),
    "a proof without end": (CLIENT, cut_after(EXAMPLES[Prove], b"proof") + HUGE_BYTES),
    "referrals without end": (SERVER, cut_after(WAIT, b"referrals") + HUGE_ARRAY),
    "parameters without end": (SERVER, cut_after(ACCEPT, b"parameters") + HUGE_MAP),
    "attributes without end": (SERVER, cut_after(ACCEPT, b"attributes") + HUGE_MAP),
    "declined roles without end": (SERVER, cut_after(STATUS, b"declined") + HUGE_MAP),
    "nested beyond measure": (CLIENT, b"\x83" + payload(Hello())[1:] + b"\xa1x" + b"\x91" * 50_000 + b"\xc0"),
}


@pytest.mark.parametrize(("role", "content"), NO_MESSAGE.values(), ids=NO_MESSAGE.keys())
def test_a_frame_that_is_no_message_is_a_protocol_error_and_costs_no_memory(role: Role, content: bytes) -> None:
    end = Conversation(other(role))
    end.feed(framed(content))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=f"the {role.value} sent a frame that is no message: "):
            end.next_message()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_a_field_that_a_later_release_adds_to_a_message_is_ignored(kind: type[Message]) -> None:
    state = next(state for state in State if kind in allowed(state, speaker(kind)))
    end = Pair().say(*WAYS[state]).ends[other(speaker(kind))]
    end.feed(framed(having(EXAMPLES[kind], added_later=[1, {"a": None}])))
    assert end.next_message() == EXAMPLES[kind]


OUT_OF_TURN = [
    pytest.param(state, kind, id=f"{kind.__name__} in {state.name}")
    for state in State
    for kind in EXAMPLES
    if kind not in allowed(state, speaker(kind))
]


@pytest.mark.parametrize(("state", "kind"), OUT_OF_TURN)
def test_a_message_out_of_turn_is_a_protocol_error_that_names_state_and_expectation(
    state: State, kind: type[Message]
) -> None:
    role = speaker(kind)
    end = Pair().say(*WAYS[state]).ends[other(role)]
    end.feed(frame(EXAMPLES[kind]))
    with pytest.raises(ProtocolError) as caught:
        end.next_message()
    expected = ", ".join(each.__name__ for each in allowed(state, role)) or "nothing"
    assert str(caught.value) == f"the {role.value} sent {kind.__name__} in state {state.name}: expected {expected}"


@pytest.mark.parametrize(("state", "kind"), OUT_OF_TURN)
def test_nobody_says_anything_out_of_turn_by_mistake(state: State, kind: type[Message]) -> None:
    end = Pair().say(*WAYS[state]).ends[speaker(kind)]
    with pytest.raises(AssertionError, match=f"{kind.__name__} may not be sent in state {state.name}"):
        end.send(EXAMPLES[kind])
    assert end.state is state


@pytest.mark.parametrize("role", Role)
def test_nobody_says_what_the_other_side_says(role: Role) -> None:
    for state, way in WAYS.items():
        end = Pair().say(*way).ends[role]
        for message in SAID_BY[other(role)]:
            if type(message) not in map(type, SAID_BY[role]):
                with pytest.raises(AssertionError, match="may not be sent"):
                    end.send(message)
        assert end.state is state


def listen(role: Role, state: State, data: bytes) -> None:
    """Lets an end in `state` hear `data` until it needs more or gives up with a ProtocolError."""
    end = Pair().say(*WAYS[state]).ends[role]
    end.feed(data)
    with contextlib.suppress(PeerError):
        for message in arrived(end):
            assert type(message) in EXAMPLES


states, roles = st.sampled_from(State), st.sampled_from(Role)


@given(role=roles, state=states, data=st.binary(max_size=64) | st.binary(max_size=64).map(framed))
@example(role=SERVER, state=State.START, data=b"GET / HTTP/1.1\r\nHost: node-3:19000\r\n\r\n")
@example(role=SERVER, state=State.START, data=b"SSH-2.0-OpenSSH_9.6\r\n")
@example(role=SERVER, state=State.START, data=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
def test_garbage_is_a_protocol_error(role: Role, state: State, data: bytes) -> None:
    listen(role, state, data)


@given(
    role=roles,
    state=states,
    kind=st.sampled_from([*EXAMPLES]),
    flips=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 255)), min_size=1, max_size=3),
)
@settings(max_examples=400)
def test_a_damaged_message_is_a_protocol_error_or_another_message(
    role: Role, state: State, kind: type[Message], flips: list[tuple[int, int]]
) -> None:
    content = bytearray(payload(EXAMPLES[kind]))
    for position, change in flips:
        content[position % len(content)] ^= change
    listen(role, state, framed(bytes(content)))


wire_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=16),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(role=roles, state=states, kind=st.sampled_from([*EXAMPLES]), data=st.data())
def test_a_message_with_strange_fields_is_a_protocol_error_or_a_message(
    role: Role, state: State, kind: type[Message], data: st.DataObject
) -> None:
    fields = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(kind.__struct_fields__, wire_values)))
    listen(role, state, framed(having(EXAMPLES[kind], **fields)))


def tagged(key: bytes, role: Role, number: int, content: bytes) -> bytes:
    """The frame number `number` of `role`, as the module's description of the tags has it."""
    tag = hmac.digest(key, role.value.encode() + number.to_bytes(8, "big") + content, "sha256")[:TAG_BYTES]
    return with_length(content + tag)


REPEATABLE = {CLIENT: (State.DATA, Fetch), SERVER: (State.JOINING, Wait)}
"""What each side may say again and again."""


class Overheard:
    """An authenticated connection on which `role` has said the same thing several times, and nobody heard it yet."""

    def __init__(self, role: Role) -> None:
        state, self.kind = REPEATABLE[role]
        pair = Pair().say(*WAYS[state]).authenticate(KEY)
        self.role = role
        self.speaker, self.listener = pair.ends[role], pair.ends[other(role)]
        self.frames = [self.speaker.send(EXAMPLES[self.kind]) for _ in range(3)]

    def hears(self, stream: bytes) -> None:
        self.listener.feed(stream)
        assert [*arrived(self.listener)] == [EXAMPLES[self.kind]] * (len(stream) // len(self.frames[0]))

    def refuses(self, stream: bytes, end: Conversation | None = None) -> None:
        end = end or self.listener
        end.feed(stream)
        with pytest.raises(ProtocolError, match="was altered on the way or is not its own"):
            end.next_message()


@pytest.fixture(params=Role, ids=lambda role: f"by the {role.value}")
def overheard(request: pytest.FixtureRequest) -> Overheard:
    return Overheard(request.param)


def test_an_authenticated_frame_ends_in_a_tag_over_the_speaker_the_number_and_the_payload(overheard: Overheard) -> None:
    content = payload(EXAMPLES[overheard.kind])
    assert overheard.frames == [tagged(KEY, overheard.role, number, content) for number in range(3)]


def test_the_tags_stay_the_same_within_a_version() -> None:
    pair = Pair().say(*GREETING).authenticate(KEY)
    assert pair.ends[CLIENT].send(EXAMPLES[Inquire])[-TAG_BYTES:].hex() == "8fcd9c0d8fde6b5088dd4f179ed1cefd"
    pair = Pair().say(*GREETING, Join).authenticate(KEY)
    assert pair.ends[SERVER].send(EXAMPLES[Wait])[-TAG_BYTES:].hex() == "4b04670c3e0146242be896db39a778f4"


def test_authenticated_frames_are_understood_in_their_order(overheard: Overheard) -> None:
    overheard.hears(b"".join(overheard.frames))


def test_the_frames_of_either_side_are_counted_for_themselves() -> None:
    pair = Pair().say(Hello, Welcome).authenticate(KEY)
    for number in range(3):
        asked = pair.ends[CLIENT].send(EXAMPLES[Inquire])
        assert asked == tagged(KEY, CLIENT, number, payload(EXAMPLES[Inquire]))
        pair.ends[SERVER].feed(asked)
        assert pair.ends[SERVER].next_message() == EXAMPLES[Inquire]
        answered = pair.ends[SERVER].send(STATUS)
        assert answered == tagged(KEY, SERVER, number, payload(STATUS))
        pair.ends[CLIENT].feed(answered)
        assert pair.ends[CLIENT].next_message() == STATUS


def test_frames_are_counted_from_the_authentication_on() -> None:
    pair = Pair().say(Hello, Welcome, Inquire, Status).authenticate(KEY)
    assert pair.ends[CLIENT].send(EXAMPLES[Inquire]) == tagged(KEY, CLIENT, 0, payload(EXAMPLES[Inquire]))


@pytest.mark.parametrize("role", Role, ids=lambda role: f"of the {role.value}")
def test_a_frame_with_any_bit_altered_is_refused(role: Role) -> None:
    genuine = Overheard(role).frames[0]
    for bit in range(8 * 4, 8 * len(genuine)):
        altered = bytearray(genuine)
        altered[bit // 8] ^= 1 << bit % 8
        overheard = Overheard(role)
        overheard.refuses(bytes(altered))


def test_a_frame_of_another_length_is_refused(overheard: Overheard) -> None:
    content = overheard.frames[0][4:]
    for length in range(len(content)):
        Overheard(overheard.role).refuses(with_length(content[:length]))
    Overheard(overheard.role).refuses(with_length(content + b"\0"))


def test_a_frame_that_begins_with_a_cut_length_takes_the_next_one_for_its_tag_and_is_refused(
    overheard: Overheard,
) -> None:
    first, second, _ = overheard.frames
    overheard.refuses(with_length(first[4:] + second))


def test_a_repeated_frame_is_refused(overheard: Overheard) -> None:
    overheard.hears(overheard.frames[0])
    overheard.refuses(overheard.frames[0])


def test_a_frame_that_comes_again_later_is_refused(overheard: Overheard) -> None:
    overheard.hears(overheard.frames[0] + overheard.frames[1])
    overheard.refuses(overheard.frames[0])


def test_a_frame_after_a_dropped_one_is_refused(overheard: Overheard) -> None:
    overheard.refuses(overheard.frames[1])


def test_a_frame_after_a_dropped_one_in_the_middle_is_refused(overheard: Overheard) -> None:
    overheard.hears(overheard.frames[0])
    overheard.refuses(overheard.frames[2])


def test_swapped_frames_are_refused(overheard: Overheard) -> None:
    overheard.hears(overheard.frames[0])
    overheard.refuses(overheard.frames[2] + overheard.frames[1])


def test_a_reflected_frame_is_refused(overheard: Overheard) -> None:
    overheard.refuses(overheard.frames[0], overheard.speaker)


def test_what_one_side_said_is_refused_as_said_by_the_other(overheard: Overheard) -> None:
    content = payload(EXAMPLES[overheard.kind])
    overheard.refuses(tagged(KEY, other(overheard.role), 0, content))


@pytest.mark.parametrize("key", [bytes(32), b"", KEY + b"\1", KEY[::-1]], ids=["zeros", "none", "longer", "reversed"])
def test_a_frame_of_another_key_is_refused(overheard: Overheard, key: bytes) -> None:
    overheard.refuses(tagged(key, overheard.role, 0, payload(EXAMPLES[overheard.kind])))


def test_a_frame_without_a_tag_is_refused(overheard: Overheard) -> None:
    overheard.refuses(frame(EXAMPLES[overheard.kind]))


def test_a_frame_of_another_connection_is_refused(overheard: Overheard) -> None:
    state, kind = REPEATABLE[overheard.role]
    elsewhere = Pair().say(*WAYS[state]).authenticate(bytes(reversed(KEY))).ends[overheard.role]
    overheard.refuses(elsewhere.send(EXAMPLES[kind]))


def test_a_frame_with_a_tag_is_no_message_on_a_connection_without(overheard: Overheard) -> None:
    state, _ = REPEATABLE[overheard.role]
    unaware = Pair().say(*WAYS[state]).ends[other(overheard.role)]
    unaware.feed(overheard.frames[0])
    with pytest.raises(ProtocolError, match="was altered on the way"):
        unaware.next_message()


def test_nothing_is_decoded_before_its_tag_is_checked(overheard: Overheard) -> None:
    overheard.refuses(with_length(b"\xc1" + bytes(TAG_BYTES)))


def test_a_genuine_tag_makes_no_message_of_what_is_none(overheard: Overheard) -> None:
    overheard.listener.feed(tagged(KEY, overheard.role, 0, b""))
    with pytest.raises(ProtocolError, match=f"the {overheard.role.value} sent a frame that is no message: "):
        overheard.listener.next_message()


def test_a_genuine_tag_does_not_allow_what_is_not_the_turn_of_its_speaker(overheard: Overheard) -> None:
    out_of_turn = EXAMPLES[Inquire if overheard.role is CLIENT else Status]
    overheard.listener.feed(tagged(KEY, overheard.role, 0, payload(out_of_turn)))
    with pytest.raises(ProtocolError, match=f"sent {type(out_of_turn).__name__} in state "):
        overheard.listener.next_message()


@pytest.mark.parametrize(("role", "limit"), [(SERVER, REQUEST_LIMIT), (CLIENT, REPLY_LIMIT)], ids=["server", "client"])
def test_the_limit_of_a_frame_holds_under_authentication_too(role: Role, limit: int) -> None:
    end = Pair().say(*GREETING).authenticate(KEY).ends[role]
    end.feed((limit + 1).to_bytes(4, "big"))
    with pytest.raises(ProtocolError, match=f"announces a frame of {limit + 1} bytes: at most {limit}"):
        end.next_message()


class TwoPeers(RuleBasedStateMachine):
    """Two ends that say whatever the table allows, in whatever pieces; and strangers that break in.

    At some point they may begin to authenticate what they say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends = {role: Conversation(role) for role in Role}
        self.expected = State.START
        self.key: bytes | None = None
        self.overheard: dict[Role, list[bytes]] = {role: [] for role in Role}

    def turns(self) -> list[tuple[Role, type[Message]]]:
        return [(role, kind) for role in Role for kind in allowed(self.expected, role)]

    def framed_by(self, role: Role, content: bytes, number: int | None = None, key: bytes | None = None) -> bytes:
        """As the next frame of `role`."""
        if self.key is None:
            return framed(content)
        return tagged(key or self.key, role, len(self.overheard[role]) if number is None else number, content)

    @rule(data=st.data())
    @precondition(lambda self: self.expected is not State.ENDED)
    def one_speaks(self, data: st.DataObject) -> None:
        role, kind = data.draw(st.sampled_from(self.turns()))
        stream = self.ends[role].send(EXAMPLES[kind])
        assert stream == self.framed_by(role, payload(EXAMPLES[kind]))
        cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=3).map(sorted))
        heard = []
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            self.ends[other(role)].feed(stream[begin:end])
            heard += list(arrived(self.ends[other(role)]))
        assert heard == [EXAMPLES[kind]]
        self.expected = allowed(self.expected, role)[kind]
        if self.key is not None:
            self.overheard[role].append(stream)

    @rule(key=st.binary(min_size=32, max_size=32))
    @precondition(lambda self: self.key is None)
    def they_authenticate_from_now_on(self, key: bytes) -> None:
        self.key = key
        for end in self.ends.values():
            end.authenticate(key)

    @rule(role=roles, data=st.data())
    def one_breaks_the_protocol(self, role: Role, data: st.DataObject) -> None:
        wrong = [message for message in SAID_BY[role] if type(message) not in allowed(self.expected, role)]
        victim = copy.deepcopy(self.ends[other(role)])
        victim.feed(self.framed_by(role, payload(data.draw(st.sampled_from(wrong)))))
        with pytest.raises(ProtocolError, match=f"in state {self.expected.name}: expected"):
            victim.next_message()

    @rule(data=st.data(), flip=st.tuples(st.integers(0), st.integers(1, 255)), skipped=st.integers(1, 1 << 63))
    @precondition(lambda self: self.key is not None and self.expected is not State.ENDED)
    def somebody_between_them_meddles(self, data: st.DataObject, flip: tuple[int, int], skipped: int) -> None:
        role, kind = data.draw(st.sampled_from(self.turns()))
        content, earlier = payload(EXAMPLES[kind]), self.overheard
        altered = bytearray(self.framed_by(role, content)[4:])
        altered[flip[0] % len(altered)] ^= flip[1]
        forged = [
            with_length(bytes(altered)),
            frame(EXAMPLES[kind]),
            self.framed_by(role, content, number=len(earlier[role]) + skipped),
            self.framed_by(role, content, key=bytes(reversed(self.key or b"")) + b"1"),
            *earlier[role],
            *earlier[other(role)],
        ]
        victim = copy.deepcopy(self.ends[other(role)])
        victim.feed(data.draw(st.sampled_from(forged)))
        with pytest.raises(ProtocolError, match="was altered on the way or is not its own"):
            victim.next_message()

    @rule()
    @precondition(lambda self: self.expected is State.ENDED)
    def they_meet_again(self) -> None:
        self.__init__()  # type: ignore[misc]

    @invariant()
    def both_know_where_they_are(self) -> None:
        assert {end.state for end in self.ends.values()} == {self.expected}
        assert all(end.next_message() is None for end in self.ends.values())


TwoPeers.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestTwoPeersNeverDisagreeOnTheState = TwoPeers.TestCase


GOLDEN: dict[type[Message], str] = {
    Hello: (
        "83a474797065a548656c6c6fa870726f746f636f6c01a96368616c6c656e6765c420202122232425262728292a2b2c2d2e2f"
        "303132333435363738393a3b3c3d3e3f"
    ),
    Prove: ("82a474797065a550726f7665a570726f6f66c420404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f"),
    Join: (
        "85a474797065a44a6f696ea86964656e746974798ba46e616d65a96f72672f6d6f64656cac617263686974656374757265b0"
        "4c6c616d61466f7243617573616c4c4dad636f6e6669675f646967657374a6633066666565a56474797065a862666c6f6174"
        "3136ac6e616d655f69735f70617468c2a87265766973696f6ea46d61696eac7175616e74697a6174696f6ea3667038ab6669"
        "6e6765727072696e74a466303064a4726f6c65a6746172676574ac6c6f61645f6f7074696f6e73a0a876657273696f6e7381"
        "a4766c6c6da6302e33322e30ab636f6f7264696e6174657389a774705f72616e6b01a774705f73697a6502a770705f72616e"
        "6b00a770705f73697a6501a87063705f72616e6b00a87063705f73697a6501a765705f72616e6b00a765705f73697a6501b0"
        "6578706572745f706c6163656d656e74a0af6d616e69666573745f646967657374a56431383335a66f66666572739282a974"
        "72616e73706f7274ad7368617265645f6d656d6f7279a573636f7065a8626f6f742f342f3782a97472616e73706f7274a374"
        "6370a573636f7065a0"
    ),
    AskDigests: ("83a474797065aa41736b44696765737473a56669727374cd012ca5636f756e7440"),
    Gather: ("81a474797065a6476174686572"),
    Publish: ("83a474797065a75075626c697368a36b6579a3302f31a576616c7565c410606162636465666768696a6b6c6d6e6f"),
    Gathered: ("81a474797065a84761746865726564"),
    Done: ("81a474797065a4446f6e65"),
    Leave: ("82a474797065a54c65617665a6726561736f6eb4746865207472616e73706f7274206661696c6564"),
    Announce: ("83a474797065a8416e6e6f756e6365a773657373696f6ec410000102030405060708090a0b0c0d0e0fa4706f7274cd4a39"),
    Attach: ("82a474797065a6417474616368a773657373696f6ec410000102030405060708090a0b0c0d0e0f"),
    Fetch: ("83a474797065a54665746368a66f6666736574cf0000000200000000a66c656e677468cd1000"),
    Inquire: ("81a474797065a7496e7175697265"),
    Challenge: (
        "83a474797065a94368616c6c656e6765a96368616c6c656e6765c420202122232425262728292a2b2c2d2e2f303132333435"
        "363738393a3b3c3d3e3fa870726f746f636f6c01"
    ),
    Welcome: (
        "83a474797065a757656c636f6d65a870726f746f636f6c01a570726f6f66c420404142434445464748494a4b4c4d4e4f5051"
        "52535455565758595a5b5c5d5e5f"
    ),
    Wait: (
        "86a474797065a457616974a5616865616405a9726566657272616c7392a63a3139303031ac6e6f64652d343a3139303031a4"
        "726f6f74d9403565656435656564356565643565656435656564356565643565656435656564356565643565656435656564"
        "3565656435656564356565643565656435656564ab66696e6765727072696e74a466303064a673657276656400"
    ),
    Attached: ("81a474797065a84174746163686564"),
    Accept: (
        "88a474797065a6416363657074a773657373696f6ec410000102030405060708090a0b0c0d0e0faa67656e65726174696f6e"
        "03a97472616e73706f7274ad70726f636573735f67726f7570aa706172616d657465727382a4686f7374a831302e302e302e"
        "31a4706f7274cd9c40aa6174747269627574657385af6861735f6f776e5f6c6d5f68656164c3ad6c61796572732e302e7261"
        "6e6bf9a5726174696fcb3fe0000000000000a46e6f7465a56472616674a677696e646f77c0ab66696e6765727072696e74a4"
        "66303064a6646967657374a6626c616b6533"
    ),
    Digests: (
        "82a474797065a744696765737473a76469676573747392c410606162636465666768696a6b6c6d6e6fc41000000000000000"
        "000000000000000000"
    ),
    Refuse: (
        "85a474797065a6526566757365a6726561736f6eb27468652074656e736f727320646966666572ab646966666572656e6365"
        "739193a874656e736f722077a8696e7438205b325da0a86d616e6966657374c403929090a9726566657272616c7392a63a31"
        "39303031ac6e6f64652d333a3139303031"
    ),
    Confirm: (
        "83a474797065a7436f6e6669726daa67656e65726174696f6e03a4726f6f74d9403565656435656564356565643565656435"
        "6565643565656435656564356565643565656435656564356565643565656435656564356565643565656435656564"
    ),
    End: (
        "82a474797065a3456e64a6726561736f6ed92569747320776569676874732077657265207265706c61636564206279206e65"
        "77206f6e6573"
    ),
    Status: (
        "86a474797065a6537461747573a8686f6c64696e67739187a4726f6c65a6746172676574a86964656e746974798ba46e616d"
        "65a96f72672f6d6f64656cac617263686974656374757265b04c6c616d61466f7243617573616c4c4dad636f6e6669675f64"
        "6967657374a6633066666565a56474797065a862666c6f61743136ac6e616d655f69735f70617468c2a87265766973696f6e"
        "a46d61696eac7175616e74697a6174696f6ea3667038ab66696e6765727072696e74a466303064a4726f6c65a67461726765"
        "74ac6c6f61645f6f7074696f6e73a0a876657273696f6e7381a4766c6c6da6302e33322e30ab636f6f7264696e6174657389"
        "a774705f72616e6b01a774705f73697a6502a770705f72616e6b00a770705f73697a6501a87063705f72616e6b00a8706370"
        "5f73697a6501a765705f72616e6b00a765705f73697a6501b06578706572745f706c6163656d656e74a0a774656e736f7273"
        "cd0123a66e6279746573cf0000000400000000aa67656e65726174696f6e03a4726f6f74a0a873657373696f6e7302aa7472"
        "616e73706f72747392ad7368617265645f6d656d6f7279a3746370a86465636c696e656481a56472616674d93a6c6f616469"
        "6e6720736574207461626c652c2077686963682063616e6e6f7420626520746f6c6420746f20616e6f746865722070726f63"
        "657373a777616974696e6707"
    ),
}


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_the_bytes_of_a_message_stay_the_same_within_a_version(kind: type[Message]) -> None:
    role = speaker(kind)
    assert payload(EXAMPLES[kind]) == bytes.fromhex(GOLDEN[kind])
    state = next(state for state in State if kind in allowed(state, role))
    end = Pair().say(*WAYS[state]).ends[other(role)]
    end.feed(framed(bytes.fromhex(GOLDEN[kind])))
    assert end.next_message() == EXAMPLES[kind]


def test_a_frame_is_its_length_its_message_and_a_checksum() -> None:
    assert frame(Done()).hex() == "0000000f" + GOLDEN[Done] + "c3a60e67"


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_no_bit_of_a_message_changes_unnoticed(kind: type[Message]) -> None:
    role = speaker(kind)
    state = next(state for state in State if kind in allowed(state, role))
    genuine = frame(EXAMPLES[kind])
    for bit in range(32, 8 * len(genuine), 3):
        altered = bytearray(genuine)
        altered[bit // 8] ^= 1 << bit % 8
        end = Pair().say(*WAYS[state]).ends[other(role)]
        end.feed(altered)
        with pytest.raises(ProtocolError, match="was altered on the way"):
            end.next_message()


OLDER: dict[str, tuple[str, Message]] = {
    "a Hello without a challenge": (
        "82a474797065a548656c6c6fa870726f746f636f6c01",
        msgspec.structs.replace(EXAMPLES[Hello], challenge=b""),
    ),
    "a Welcome without a proof": (
        "82a474797065a757656c636f6d65a870726f746f636f6c01",
        msgspec.structs.replace(EXAMPLES[Welcome], proof=b""),
    ),
    "an Accept without attributes and fingerprint": (
        (
            "85a474797065a6416363657074a773657373696f6ec410000102030405060708090a0b0c0d0e0faa67656e6572617469"
            "6f6e03a97472616e73706f7274ad70726f636573735f67726f7570aa706172616d657465727382a4686f7374a831302e302e302e"
            "31a4706f7274cd9c40"
        ),
        msgspec.structs.replace(ACCEPT, attributes={}, fingerprint="", digest=""),
    ),
    "an Accept without digests": (
        (
            "87a474797065a6416363657074a773657373696f6ec410000102030405060708090a0b0c0d0e0faa67656e6572617469"
            "6f6e03a97472616e73706f7274ad70726f636573735f67726f7570aa706172616d657465727382a4686f7374a831302e302e302e"
            "31a4706f7274cd9c40aa6174747269627574657385af6861735f6f776e5f6c6d5f68656164c3ad6c61796572732e302e72616e6b"
            "f9a5726174696fcb3fe0000000000000a46e6f7465a56472616674a677696e646f77c0ab66696e6765727072696e74a466303064"
        ),
        msgspec.structs.replace(ACCEPT, digest=""),
    ),
    "a Confirm without a root": (
        "82a474797065a7436f6e6669726daa67656e65726174696f6e03",
        msgspec.structs.replace(EXAMPLES[Confirm], root=""),
    ),
    "a Status without declined roles": (
        (
            "84a474797065a6537461747573a8686f6c64696e67739186a4726f6c65a6746172676574a86964656e746974798ba46e"
            "616d65a96f72672f6d6f64656cac617263686974656374757265b04c6c616d61466f7243617573616c4c4dad636f6e6669675f64"
            "6967657374a6633066666565a56474797065a862666c6f61743136ac6e616d655f69735f70617468c2a87265766973696f6ea46d"
            "61696eac7175616e74697a6174696f6ea3667038ab66696e6765727072696e74a466303064a4726f6c65a6746172676574ac6c6f"
            "61645f6f7074696f6e73a0a876657273696f6e7381a4766c6c6da6302e33322e30ab636f6f7264696e6174657389a774705f7261"
            "6e6b01a774705f73697a6502a770705f72616e6b00a770705f73697a6501a87063705f72616e6b00a87063705f73697a6501a765"
            "705f72616e6b00a765705f73697a6501b06578706572745f706c6163656d656e74a0a774656e736f7273cd0123a66e6279746573"
            "cf0000000400000000aa67656e65726174696f6e03a873657373696f6e7302aa7472616e73706f72747392ad7368617265645f6d"
            "656d6f7279a3746370"
        ),
        msgspec.structs.replace(STATUS, declined={}, waiting=0),
    ),
    "a Status without waiting clients": (
        (
            "85a474797065a6537461747573a8686f6c64696e67739186a4726f6c65a6746172676574a86964656e746974798ba46e"
            "616d65a96f72672f6d6f64656cac617263686974656374757265b04c6c616d61466f7243617573616c4c4dad636f6e6669675f64"
            "6967657374a6633066666565a56474797065a862666c6f61743136ac6e616d655f69735f70617468c2a87265766973696f6ea46d"
            "61696eac7175616e74697a6174696f6ea3667038ab66696e6765727072696e74a466303064a4726f6c65a6746172676574ac6c6f"
            "61645f6f7074696f6e73a0a876657273696f6e7381a4766c6c6da6302e33322e30ab636f6f7264696e6174657389a774705f7261"
            "6e6b01a774705f73697a6502a770705f72616e6b00a770705f73697a6501a87063705f72616e6b00a87063705f73697a6501a765"
            "705f72616e6b00a765705f73697a6501b06578706572745f706c6163656d656e74a0a774656e736f7273cd0123a66e6279746573"
            "cf0000000400000000aa67656e65726174696f6e03a873657373696f6e7302aa7472616e73706f72747392ad7368617265645f6d"
            "656d6f7279a3746370a86465636c696e656481a56472616674d93a6c6f6164696e6720736574207461626c652c20776869636820"
            "63616e6e6f7420626520746f6c6420746f20616e6f746865722070726f63657373"
        ),
        msgspec.structs.replace(STATUS, waiting=0),
    ),
}
"""What earlier releases of this version of the protocol send."""


@pytest.mark.parametrize(("older", "understood"), OLDER.values(), ids=OLDER.keys())
def test_a_message_of_an_earlier_release_of_the_same_version_is_understood(older: str, understood: Message) -> None:
    role = speaker(type(understood))
    state = next(state for state in State if type(understood) in allowed(state, role))
    end = Pair().say(*WAYS[state]).ends[other(role)]
    end.feed(framed(bytes.fromhex(older)))
    assert end.next_message() == understood


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        0,
        1,
        -1,
        (1 << 63) - 1,
        -(1 << 63),
        0.0,
        -0.0,
        1.0,
        0.1,
        5e-324,
        math.inf,
        math.nan,
        "",
        "draft",
        "\x1b[2J\n",
        "x" * 4096,
        None,
    ],
    ids=lambda value: repr(value)[:24],
)
def test_an_attribute_arrives_with_its_value_and_type(value: AttributeValue) -> None:
    pair = Pair().say(Hello, Welcome, Join)
    client = pair.ends[CLIENT]
    client.feed(pair.ends[SERVER].send(Accept(SESSION, 1, "tcp", {}, {"layers.0.rank": value})))
    accept = client.next_message()
    assert isinstance(accept, Accept)
    assert list(accept.attributes) == ["layers.0.rank"]
    assert repr(accept.attributes["layers.0.rank"]) == repr(value)


def test_messages_do_not_share_their_defaults() -> None:
    accepts = [Accept(SESSION, 1, "tcp", {}) for _ in range(2)]
    statuses = [Status((), 0, ()) for _ in range(2)]
    assert [each.attributes for each in accepts] == [each.declined for each in statuses] == [{}, {}]
    assert accepts[0].attributes is not accepts[1].attributes
    assert statuses[0].declined is not statuses[1].declined


def test_fields_left_at_their_defaults_travel_too() -> None:
    assert payload(Hello()) == b"\x83\xa4type\xa5Hello\xa8protocol\x01\xa9challenge\xc4\x00"
    assert set(msgspec.msgpack.decode(payload(Refuse("no")))) == {"type", *Refuse.__struct_fields__}


def test_the_largest_request_is_far_below_its_limit() -> None:
    long = ModelIdentity(
        "/" + "d" * 255 * 4, "A" * 200, "f" * 64, "bfloat16", True, "r" * 64, "q" * 64, "f" * 64, "target", "o" * 200
    )
    offers = tuple(Offer(name, "s" * 80) for name in ("shared_memory", "tcp", "process_group"))
    assert len(frame(Join(long, RANK, "f" * 64, offers))) < 4096
