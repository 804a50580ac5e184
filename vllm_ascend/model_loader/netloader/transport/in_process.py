"""Within one process: the server's bytes are copied by the client's half. The test double of all transports.

It is not in the registry; whoever wants it hands it to server and client. `tamper` sees every chunk on its way and may
change, cut or replace it, or raise what a failing source raises.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Final

from vllm_ascend.model_loader.netloader.errors import ConnectionLost
from vllm_ascend.model_loader.netloader.traits import ANY, Traits
from vllm_ascend.model_loader.netloader.transport.base import Reception, Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.delivery import Chunk
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.messages import Fetch
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

_senders: Final[dict[str, _InProcessSender]] = {}


class InProcessTransport(Transport):
    traits = Traits("in_process", ANY)

    def __init__(self, tamper: Callable[[Chunk, bytes], bytes] = lambda _, content: content) -> None:
        self._tamper = tamper

    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        return _InProcessSender(store)

    def receive(self, reception: Reception) -> Memory:
        source = _senders.get(reception.text("key"))
        if source is None:
            raise ConnectionLost("the sender is gone")
        delivery = reception.deliver()
        while chunk := delivery.take():
            with source.sending(Fetch(chunk.offset, chunk.length)):
                content = self._tamper(chunk, bytes(source.bytes[chunk.offset : chunk.offset + chunk.length]))
                arrival = delivery.begin(chunk)
                arrival.landing.host[: len(content)] = content
                arrival.advance(len(content))
            delivery.finish(arrival)
            source.note_progress(len(content))
        return delivery.memory


class _InProcessSender(Sender):
    def __init__(self, store: WeightStore) -> None:
        super().__init__(store.manifest.nbytes)
        self.bytes = store.bytes
        self._key = secrets.token_hex(8)
        _senders[self._key] = self

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {"key": self._key}

    def close(self) -> None:
        _senders.pop(self._key, None)
