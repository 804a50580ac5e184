"""Which chunks one session asks its source for: all that are missing, or those that a swarm leaves to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk, Inventory


class Requests(ABC):
    """The chunks that one session asks its source for. Thread-safe."""

    @property
    @abstractmethod
    def remaining(self) -> int:
        """The number of chunks that the session may still have to bring."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether every chunk has passed, whoever brought it."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether no chunk will be handed out any more."""

    @abstractmethod
    def next(self, *, wait: bool) -> Chunk | None:
        """The next chunk to fetch. Where there is none now, None, or with `wait` only when this is over."""

    @abstractmethod
    def begin(self, chunk: Chunk) -> bool:
        """Notes that `chunk` arrives. Whether it may do so in its own place, because nobody else can bring it."""

    @abstractmethod
    def claim(self, chunk: Chunk) -> bool:
        """Whether `chunk`, which has passed, is to be settled, because nobody else has brought it before."""

    @abstractmethod
    def arrived(self, chunk: Chunk, digest: bytes | None) -> None:
        """Notes that `chunk`, which was claimed, has settled. `digest` is the one by which it has passed."""

    @abstractmethod
    def damaged(self, chunk: Chunk) -> None:
        """Notes that `chunk` has arrived damaged, so that it has to be fetched again."""

    @abstractmethod
    def stop(self) -> None:
        """Hands out no further chunk. From any thread; idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Notes that nothing arrives any more. Idempotent."""

    @abstractmethod
    def listen(self, listener: Callable[[], None], *, only_the_end: bool = False) -> None:
        """Calls `listener`, which may not block, whenever there may be another chunk, and when this is over."""

    @abstractmethod
    def forget(self, listener: Callable[[], None]) -> None:
        """Does not call `listener` any more. Idempotent."""


class InOrder(Requests):
    """All chunks that are missing, one after another, for a session that brings them alone."""

    def __init__(self, inventory: Inventory, expected: Sequence[bytes] | None) -> None:
        """`expected` are the source's digests by chunk, None where nothing is verified."""
        self._inventory = inventory
        self._queue = deque(inventory.missing(expected))
        self._is_stopped = False

    @property
    def remaining(self) -> int:
        return len(self._queue)

    @property
    def is_complete(self) -> bool:
        return self._inventory.is_complete

    @property
    def is_over(self) -> bool:
        return self._is_stopped or not self._queue

    def next(self, *, wait: bool) -> Chunk | None:
        try:
            return None if self._is_stopped else self._queue.popleft()
        except IndexError:
            return None

    def begin(self, chunk: Chunk) -> bool:
        return True

    def claim(self, chunk: Chunk) -> bool:
        return True

    def arrived(self, chunk: Chunk, digest: bytes | None) -> None:
        self._inventory.add(chunk, digest)

    def damaged(self, chunk: Chunk) -> None:
        self._queue.append(chunk)

    def stop(self) -> None:
        self._is_stopped = True

    def close(self) -> None:
        self._is_stopped = True

    def listen(self, listener: Callable[[], None], *, only_the_end: bool = False) -> None:
        return

    def forget(self, listener: Callable[[], None]) -> None:
        return
