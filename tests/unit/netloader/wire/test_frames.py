"""How messages travel: cut anywhere, within limits, unaltered, and under a key each of them once and in its order."""

from __future__ import annotations

import contextlib
import functools
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.peers.conversation import GREETING, KEY, WAYS, Pair, arrived, listener_for
from support.peers.messages import (
    CLIENT,
    EXAMPLES,
    SERVER,
    TAG_BYTES,
    framed,
    having,
    other,
    payload,
    tagged,
    with_length,
)
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError
from vllm_ascend.model_loader.netloader.wire.conversation import Conversation, Role, State, frame
from vllm_ascend.model_loader.netloader.wire.messages import (
    REPLY_LIMIT,
    REQUEST_LIMIT,
    Accept,
    AskDigests,
    Attach,
    Attached,
    Confirm,
    Digests,
    Done,
    End,
    Fetch,
    Hello,
    Inquire,
    Join,
    Leave,
    Message,
    Refuse,
    Status,
    Wait,
    Welcome,
)

ENDINGS: dict[str, tuple[type[Message], ...]] = {
    "taken": (Accept, AskDigests, Digests, Fetch, Done, Confirm),
    "refused": (Refuse,),
    "given up": (Accept, Leave),
    "ended": (Accept, AskDigests, End),
}


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


def cut_at(offset: int, data: bytes) -> list[bytes]:
    return [data[:offset], data[offset:]] if offset < len(data) else [data]


@authentication
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_conversation_that_is_cut_at_any_offset_is_the_same(
    key: bytes | None, ending: tuple[type[Message], ...]
) -> None:
    longest = TAG_BYTES + max(len(frame(each)) for each in EXAMPLES.values())
    for offset in range(1, longest):
        pair = Pair(cut=functools.partial(cut_at, offset))
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


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_no_bit_of_a_message_changes_unnoticed(kind: type[Message]) -> None:
    genuine = frame(EXAMPLES[kind])
    for bit in range(32, 8 * len(genuine), 3):
        altered = bytearray(genuine)
        altered[bit // 8] ^= 1 << bit % 8
        end = listener_for(kind)
        end.feed(bytes(altered))
        with pytest.raises(ProtocolError, match="was altered on the way"):
            end.next_message()


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


REPEATABLE: dict[Role, tuple[State, type[Message]]] = {CLIENT: (State.DATA, Fetch), SERVER: (State.JOINING, Wait)}
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
    assert pair.ends[SERVER].send(EXAMPLES[Wait])[-TAG_BYTES:].hex() == "f988ec0bf3e44bdd2f51a301b52745e8"


def test_authenticated_frames_are_understood_in_their_order(overheard: Overheard) -> None:
    overheard.hears(b"".join(overheard.frames))


def test_the_frames_of_either_side_are_counted_for_themselves() -> None:
    pair = Pair().say(Hello, Welcome).authenticate(KEY)
    for number in range(3):
        asked = pair.ends[CLIENT].send(EXAMPLES[Inquire])
        assert asked == tagged(KEY, CLIENT, number, payload(EXAMPLES[Inquire]))
        pair.ends[SERVER].feed(asked)
        assert pair.ends[SERVER].next_message() == EXAMPLES[Inquire]
        answered = pair.ends[SERVER].send(EXAMPLES[Status])
        assert answered == tagged(KEY, SERVER, number, payload(EXAMPLES[Status]))
        pair.ends[CLIENT].feed(answered)
        assert pair.ends[CLIENT].next_message() == EXAMPLES[Status]


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
