"""What a client makes of what its source says while chunks are fetched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from vllm_ascend.model_loader.netloader.client.session.following import PEERS_NAMED, Following
from vllm_ascend.model_loader.netloader.errors import ProtocolError, Stalled
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.wire.messages import Follow, Message, News


class Source:
    """The other end of the control connection: it says its `news` once it is followed, and is silent after that."""

    def __init__(self, *news: News) -> None:
        self.news = list(news)
        self.heard: list[Message] = []

    def send(self, message: Message, _: float) -> None:
        self.heard.append(message)

    def receive_unless(self, _: object, __: object) -> Message:
        if not self.heard or not self.news:
            raise Stalled("the peer was silent")
        return self.news.pop(0)


class Share:
    """Takes down what the source has, and what it has sent."""

    def __init__(self) -> None:
        self.chunks: list[int] = []
        self.others: list[int] = []

    def has(self, chunks: Sequence[int]) -> None:
        self.chunks += chunks

    def sent(self, chunks: Sequence[int]) -> None:
        self.others += chunks


def following_of(source: Source, share: Share | None = None, named: list[str] | None = None) -> Following:
    heard = named if named is not None else []
    control: Any = source
    taken: Any = share or Share()
    return Following(
        control,
        Timeouts(1.0, 1.0),
        listener=taken,
        chunks=8,
        has_all=False,
        port=19001,
        named=heard.extend,
        received=lambda: 0,
    )


def test_what_is_told_is_handed_on() -> None:
    share, named = Share(), list[str]()
    following = following_of(Source(), share, named)
    following.take(News((3, 1), (2,), (":1", ":2"), whole=True))
    assert (share.chunks, share.others, named, following.is_whole) == ([3, 1], [2], [":1", ":2"], True)


def test_who_had_nothing_to_fetch_asks_whether_the_source_is_sure_by_now() -> None:
    source = Source(News((0,)), News(whole=True))
    following_of(source).await_whole()
    assert source.heard == [Follow(19001)]


@pytest.mark.parametrize(
    ("news", "reason"),
    {
        "a chunk twice": ([News((1, 1))], "it tells of a chunk twice"),
        "a chunk again": ([News((1,)), News((1,))], "it tells of a chunk twice"),
        "a chunk that does not exist": ([News((8,))], "it tells of chunk 8: there are 8"),
        "what was sent twice": ([News(sent=(1,)), News(sent=(1,))], "it tells of a chunk twice"),
        "a peer twice": ([News(peers=(":1",)), News(peers=(":1",))], "it names a peer twice"),
        "nothing without being asked": ([News()], "it says that there is nothing new without being asked"),
        "that it is whole again": ([News(whole=True)] * 2, "it says that there is nothing new without being asked"),
    }.values(),
)
def test_a_source_may_not_say(news: list[News], reason: str) -> None:
    following = following_of(Source())
    *before, last = news
    for each in before:
        following.take(each)
    with pytest.raises(ProtocolError, match=f"^{reason}$"):
        following.take(last)


def test_a_source_may_name_so_many_peers() -> None:
    following = following_of(Source())
    for begin in range(0, PEERS_NAMED, 64):
        following.take(News(peers=tuple(f":{port}" for port in range(begin + 1, begin + 65))))
    with pytest.raises(ProtocolError, match=f"it names more than {PEERS_NAMED} peers"):
        following.take(News(peers=("10.0.0.1:1",)))
