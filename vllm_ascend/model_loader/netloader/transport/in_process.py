"""Within one process: the client's half copies the server's bytes itself. It is the tests' double of all transports.

No configuration can name it: whoever wants it hands it to both the server and the client.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Final

from vllm_ascend.model_loader.netloader.errors import ConnectionLost
from vllm_ascend.model_loader.netloader.traits import ANY, Traits
from vllm_ascend.model_loader.netloader.transport.base import CopyingTransport, Reception, Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.wire.messages import Fetch
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

_senders: Final[dict[str, _InProcessSender]] = {}


class InProcessTransport(CopyingTransport):
    """Copies from a server in the same process.

    `tamper` sees every chunk on its way and returns what is to arrive: the same bytes, others or fewer. It may raise
    what a failing source raises.
    """

    traits = Traits("in_process", ANY)

    def __init__(self, tamper: Callable[[Chunk, bytes], bytes] = lambda _, content: content) -> None:
        self._tamper = tamper

    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        return _InProcessSender(store)

    def receive(self, reception: Reception, delivery: Delivery) -> None:
        source = _senders.get(reception.text("key"))
        if source is None:
            raise ConnectionLost("the sender is gone")
        reception.follow()
        while chunk := reception.next_chunk(delivery):
            with source.sending(Fetch(chunk.offset, chunk.length)):
                content = self._tamper(chunk, bytes(source.bytes[chunk.offset : chunk.offset + chunk.length]))
                arrival = delivery.begin(chunk)
                arrival.landing.host[: len(content)] = content
                arrival.advance(len(content))
            delivery.finish(arrival)
            source.note_progress(len(content))


class _InProcessSender(Sender):
    def __init__(self, store: WeightStore) -> None:
        super().__init__(store)
        self.bytes = store.bytes
        self._key = secrets.token_hex(8)
        _senders[self._key] = self

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {"key": self._key}

    def close(self) -> None:
        _senders.pop(self._key, None)
