"""Within one process: the server's bytes are copied by the client's half. The test double of all transports.

It is not in the registry; whoever wants it hands it to server and client. `fail_after` makes the copy fail midway.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Final

from vllm_ascend.model_loader.netloader.arena import Arena
from vllm_ascend.model_loader.netloader.channel import ConnectionLost
from vllm_ascend.model_loader.netloader.manifest import chunks
from vllm_ascend.model_loader.netloader.transport.base import Reception, Sender, Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import WeightStore

_senders: Final[dict[str, _MemorySender]] = {}


class MemoryTransport(Transport):
    name = "memory"

    def __init__(self, *, chunk_bytes: int = 4096, fail_after: int | None = None) -> None:
        self._chunk_bytes = chunk_bytes
        self._fail_after = fail_after

    def sender(self, store: WeightStore, server_host: str, timeouts: Timeouts) -> Sender:
        return _MemorySender(store)

    def receive(self, reception: Reception) -> Arena:
        source = _senders.get(reception.text("key"))
        if source is None:
            raise ConnectionLost("the sender is gone")
        arena = reception.allocate(mapped=True)
        with arena.writable() as destination:
            for offset, length in chunks(reception.nbytes, self._chunk_bytes):
                if self._fail_after is not None and offset >= self._fail_after:
                    raise ConnectionLost(f"failing after {offset} bytes, as asked")
                destination[offset : offset + length] = source.bytes[offset : offset + length]
                reception.progress(length)
                source.note_progress()
        return arena


class _MemorySender(Sender):
    def __init__(self, store: WeightStore) -> None:
        super().__init__()
        self.bytes = store.bytes
        self._key = secrets.token_hex(8)
        _senders[self._key] = self

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {"key": self._key}

    def close(self) -> None:
        _senders.pop(self._key, None)
