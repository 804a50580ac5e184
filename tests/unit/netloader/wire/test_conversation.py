"""Who may say what, and when: the conversations that are meant, and every message out of turn."""

from __future__ import annotations

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from support.peers.conversation import TABLE, WAYS, Pair, allowed, arrived
from support.peers.messages import (
    CHALLENGE,
    CLIENT,
    DIGEST,
    EXAMPLES,
    IDENTITY,
    PROOF,
    RANK,
    SAID_BY,
    SERVER,
    SESSION,
    framed,
    other,
    payload,
    speaker,
    tagged,
    with_length,
)
from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.weights.identity import Difference
from vllm_ascend.model_loader.netloader.wire.conversation import Conversation, Role, State, frame
from vllm_ascend.model_loader.netloader.wire.messages import (
    FETCH_LIMIT,
    Accept,
    Announce,
    AskDigests,
    Attach,
    Attached,
    Challenge,
    Confirm,
    Digests,
    Done,
    End,
    Fetch,
    Follow,
    Gather,
    Gathered,
    Hello,
    Inquire,
    Join,
    Leave,
    Message,
    News,
    Offer,
    Prove,
    Publish,
    Refuse,
    Status,
    Wait,
    Welcome,
)


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


def test_an_end_knows_what_it_may_say() -> None:
    pair = Pair().say(*WAYS[State.GATHERING])
    assert pair.ends[CLIENT].may_send(Leave)
    assert not pair.ends[CLIENT].may_send(Done)
    assert not pair.say(Leave).ends[CLIENT].may_send(Leave)


@pytest.mark.parametrize(
    "before",
    [(), (Fetch,), (AskDigests,), (AskDigests, Digests), (Gather,), (Gather, Gathered), (Follow,), (Done,)],
    ids=[
        "after Accept",
        "after Fetch",
        "instead of Digests",
        "after Digests",
        "while gathering",
        "instead of Gathered",
        "while following",
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


def test_a_client_that_follows_hears_news_at_any_point_until_the_end() -> None:
    pair = Pair().say(Hello, Welcome, Join, Accept, AskDigests, Digests, Follow, News, Fetch, News, Follow, News, Done)
    assert pair.say(News, Confirm).state is State.ENDED


def test_news_that_was_on_its_way_when_the_client_was_done_is_understood() -> None:
    pair = Pair().say(Hello, Welcome, Join, Accept, Follow)
    told = pair.ends[SERVER].send(EXAMPLES[News])
    done = pair.ends[CLIENT].send(EXAMPLES[Done])
    pair.ends[CLIENT].feed(told)
    pair.ends[SERVER].feed(done)
    assert pair.ends[CLIENT].next_message() == EXAMPLES[News]
    assert pair.ends[SERVER].next_message() == EXAMPLES[Done]
    assert pair.say(Confirm).state is State.ENDED


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
        """`content` as the next frame of `role`, or as another one by `number` or `key`."""
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

    @rule(role=st.sampled_from(Role), data=st.data())
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
