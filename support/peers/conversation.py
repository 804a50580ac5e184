"""Two ends of a connection, wired together, and the order of the messages as the documentation tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from support.peers.messages import CLIENT, EXAMPLES, SERVER, other, speaker
from vllm_ascend.model_loader.netloader.wire.conversation import Conversation, Role, State
from vllm_ascend.model_loader.netloader.wire.messages import (
    Accept,
    Announce,
    AskDigests,
    AskFiles,
    Attach,
    Attached,
    Challenge,
    Confirm,
    Describe,
    Description,
    Digests,
    Done,
    End,
    Fetch,
    FilePart,
    Files,
    Follow,
    Gather,
    Gathered,
    Hello,
    Inquire,
    Join,
    Leave,
    Message,
    News,
    Prove,
    Publish,
    ReadFile,
    Refuse,
    Status,
    Wait,
    Welcome,
)

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
        Describe: State.DESCRIBING,
        AskFiles: State.LISTING,
        ReadFile: State.READING,
        Announce: State.ENDED,
    },
    (State.JOINING, SERVER): {Wait: State.JOINING, Accept: State.TRANSFER, Refuse: State.ENDED},
    (State.TRANSFER, CLIENT): {
        AskDigests: State.DIGESTING,
        Gather: State.GATHERING,
        Follow: State.FOLLOWING,
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
    (State.FOLLOWING, CLIENT): {
        Follow: State.FOLLOWING,
        Fetch: State.FOLLOWING,
        Done: State.CONFIRMING,
        Leave: State.ENDED,
    },
    (State.FOLLOWING, SERVER): {News: State.FOLLOWING, End: State.ENDED},
    (State.CONFIRMING, SERVER): {News: State.CONFIRMING, Confirm: State.ENDED, End: State.ENDED},
    (State.INQUIRING, SERVER): {Status: State.READY},
    (State.DESCRIBING, SERVER): {Description: State.READY, Refuse: State.ENDED},
    (State.LISTING, SERVER): {Files: State.READY, Refuse: State.ENDED},
    (State.READING, SERVER): {FilePart: State.READY, Refuse: State.ENDED},
    (State.ATTACHING, SERVER): {Attached: State.DATA, Refuse: State.ENDED},
    (State.DATA, CLIENT): {Fetch: State.DATA},
}
"""Who may say what, and where it leads. In START, TRANSFER and FOLLOWING, either side may speak; in ENDED, nobody."""


def allowed(state: State, role: Role) -> dict[type[Message], State]:
    """What `role` may say in `state`, and where each leads."""
    return TABLE.get((state, role), {})


class Pair:
    """A client and a server, wired together. What one says has to reach the other, in the pieces that `cut` makes."""

    def __init__(self, cut: Callable[[bytes], list[bytes]] = lambda data: [data]) -> None:
        self.ends = {role: Conversation(role) for role in Role}
        self._cut = cut

    def client(self, message: Message) -> None:
        self._say(CLIENT, message)

    def server(self, message: Message) -> None:
        self._say(SERVER, message)

    def say(self, *kinds: type[Message]) -> Pair:
        """The example of each of these messages is said by whoever says such."""
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
    State.FOLLOWING: (Hello, Welcome, Join, Accept, Follow),
    State.CONFIRMING: (Hello, Welcome, Join, Accept, Done),
    State.INQUIRING: (Hello, Welcome, Inquire),
    State.DESCRIBING: (Hello, Welcome, Describe),
    State.LISTING: (Hello, Welcome, AskFiles),
    State.READING: (Hello, Welcome, ReadFile),
    State.ATTACHING: (Hello, Welcome, Attach),
    State.DATA: (Hello, Welcome, Attach, Attached),
    State.ENDED: (Hello, Welcome, Join, Refuse),
}
"""A conversation that leads to each state."""


def arrived(end: Conversation) -> Iterator[Message]:
    """The messages that `end` has received in full. Raises ProtocolError."""
    while (message := end.next_message()) is not None:
        yield message


GREETING: tuple[type[Message], ...] = (Hello, Challenge, Prove, Welcome)
KEY = bytes(range(128, 160))


def listener_for(kind: type[Message]) -> Conversation:
    """The end that hears a message of that kind, at the first point where it may be said."""
    state = next(state for state in State if kind in allowed(state, speaker(kind)))
    return Pair().say(*WAYS[state]).ends[other(speaker(kind))]
