"""How the ranks of an instance meet after a load, and what they learn of each other.

Each of them hears where the others listen, so that a client needs the address of one rank only: that one refers it to
its own. And they compare their checkpoints, because files or sources may have changed between two ranks.
"""

from __future__ import annotations

import logging

import msgspec

from vllm_ascend.model_loader.netloader.instance.rank import Rank
from vllm_ascend.model_loader.netloader.server.answers import Peer
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates

logger = logging.getLogger(__name__)


class _Card(msgspec.Struct, frozen=True):
    """What a rank tells the others of itself.

    `port` is None if it serves nothing, `fingerprint` is that of the checkpoint its weights are from, or empty.
    """

    coordinates: RankCoordinates
    host: str
    port: int | None
    fingerprint: str


def meet_ranks(rank: Rank, host: str, server: WeightServer | None, fingerprint: str) -> None:
    """Makes the ranks of this instance known to each other. All of them must call it, once for each instance.

    `server` is this rank's, reached at `host`, or None if it serves nothing. `fingerprint` is that of the checkpoint
    its weights are from, empty if unknown. Logs an error if the ranks have weights of different checkpoints.
    """
    ours = _Card(rank.coordinates, host, server.port if server is not None else None, fingerprint)
    cards = [msgspec.msgpack.decode(payload, type=_Card) for payload in rank.gather(msgspec.msgpack.encode(ours))]

    if len({card.fingerprint for card in cards if card.fingerprint}) > 1:
        logger.error(
            "the ranks of this instance have weights of different checkpoints, this one of %s: its answers will be "
            "wrong. Start it again when nobody changes them",
            fingerprint or "an unknown one",
        )

    if server is not None:
        server.refer_to(
            Peer(card.coordinates, "" if card.host == host else card.host, card.port)
            for card in cards
            if card.port is not None
        )
