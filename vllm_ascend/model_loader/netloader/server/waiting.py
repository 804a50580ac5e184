"""Where connections are while their clients wait for a turn.

There may be hundreds of them, and all that they want is a notice now and then. So none has a thread: one thread sends
the notices, sees who has gone, and lets those go on whose turn has come, or for whom there is nothing to wait for any
more. It exists as long as somebody waits. What it does in a round grows with the number of the waiting and no faster;
rounds follow one another at some distance, however much happens.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vllm_ascend.model_loader.netloader.errors import PeerError, Stalled
from vllm_ascend.model_loader.netloader.server.admission import Turn, Turns
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.messages import Wait
from vllm_ascend.model_loader.netloader.wire.pacing import give_way

logger = logging.getLogger(__name__)

WAIT_NOTICE: Final = 1.0
"""Seconds between two messages to a client that waits for its turn."""
_ROUND_SECONDS: Final = 0.02
"""Between the beginnings of two rounds."""
_MOST_FRAGMENTS: Final = 16
"""Pieces of a message that somebody who waits may send: it has nothing to say."""


@dataclass(eq=False)
class Guest:
    """One who waits at `address`. None of the calls may block; after the last three the channel is not used here.

    `notice` is told how many come first and how many are served; where it returns None there is nothing to wait for any
    more, and `reconsider` follows. `go_on` is told the turn, which the called then has to leave, and `leave` why the
    connection is over. They may hold nothing that has to go while somebody waits.
    """

    channel: Channel
    address: str
    notice: Callable[[int, int], Wait | None]
    go_on: Callable[[Turn], None]
    reconsider: Callable[[], None]
    leave: Callable[[PeerError | OSError], None]
    fragments: int = 0
    knows: bool = False
    """Whether it has been told that it waits."""


class WaitingRoom:
    """For those who wait for one of `turns`. Thread-safe."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._lock = threading.RLock()
        self._guests: dict[Turn, Guest] = {}
        self._new: list[Turn] = []
        self._bell: int | None = None
        turns.on_free = self._ring

    def admit(self, guest: Guest) -> None:
        """Takes over the guest's channel. Raises OSError or RuntimeError where there is no thread for it."""
        with self._lock:
            if self._bell is None:
                self._open()
            turn = self._turns.queue(guest.address)
            self._guests[turn] = guest
            self._new.append(turn)
            self._ring()

    def _open(self) -> None:
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            threading.Thread(target=self._run, args=(bell,), name="netloader-waiting", daemon=True).start()
        except BaseException:
            os.close(bell)
            raise
        self._bell = bell

    def _ring(self) -> None:
        """Asks for a round soon."""
        with self._lock:
            if self._bell is not None:
                os.eventfd_write(self._bell, 1)

    def _run(self, bell: int) -> None:
        give_way()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(bell, selectors.EVENT_READ)
                self._serve(bell, selector)
        except Exception as error:
            logger.exception("an error of this server: those who wait for their turn are sent away")
            self._send_all_away(bell, OSError(f"an error of this server: {error}"))

    def _serve(self, bell: int, selector: selectors.BaseSelector) -> None:
        notices_at = 0.0
        while self._is_needed(bell):
            begun = time.monotonic()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bell)
            with self._lock:
                new, self._new = self._new, []
                granted = [(turn, self._guests.pop(turn)) for turn in self._turns.grant()]
                waiting = [(turn, self._guests[turn]) for turn in self._turns.in_order()]
            for turn in new:
                if turn in self._guests:
                    guest = self._guests[turn]
                    selector.register(guest.channel.socket, selectors.EVENT_READ, (turn, guest))
            for turn, guest in granted:
                if turn not in new:
                    selector.unregister(guest.channel.socket)
                guest.go_on(turn)
            due = begun >= notices_at
            self._send_notices(selector, waiting, to_all=due)
            notices_at = begun + WAIT_NOTICE if due else notices_at
            time.sleep(max(0.0, begun + _ROUND_SECONDS - time.monotonic()))
            self._listen(selector, max(0.0, notices_at - time.monotonic()))

    def _is_needed(self, bell: int) -> bool:
        with self._lock:
            if not self._guests:
                os.close(bell)
                self._bell = None
            return bool(self._guests)

    def _send_all_away(self, bell: int, reason: OSError) -> None:
        with self._lock:
            guests, self._guests, self._new = self._guests, {}, []
            self._bell = None
            os.close(bell)
        for turn, guest in guests.items():
            self._turns.leave(turn)
            guest.leave(reason)

    def _send_notices(
        self, selector: selectors.BaseSelector, waiting: list[tuple[Turn, Guest]], *, to_all: bool
    ) -> None:
        served = self._turns.taken
        for ahead, (turn, guest) in enumerate(waiting):
            if to_all or not guest.knows:
                guest.knows = True
                notice = guest.notice(ahead, served)
                if notice is None:
                    self._forget(selector, turn, guest)
                    guest.reconsider()
                    continue
                try:
                    guest.channel.send(notice, 0)
                except Stalled:
                    self._see_off(selector, turn, guest, Stalled("it does not read that it has to wait"))
                except (PeerError, OSError) as error:
                    self._see_off(selector, turn, guest, error)

    def _listen(self, selector: selectors.BaseSelector, timeout: float) -> None:
        """Returns when something happens, or after `timeout` seconds. Nobody here has anything to say but goodbye."""
        for key, _ in selector.select(timeout):
            if key.data is None:
                continue
            turn, guest = key.data
            try:
                guest.channel.receive(Deadline(0))
            except Stalled as error:  # a part of a message
                guest.fragments += 1
                if guest.fragments > _MOST_FRAGMENTS:
                    self._see_off(selector, turn, guest, error)
            except (PeerError, OSError) as error:
                self._see_off(selector, turn, guest, error)

    def _see_off(self, selector: selectors.BaseSelector, turn: Turn, guest: Guest, reason: PeerError | OSError) -> None:
        self._forget(selector, turn, guest)
        guest.leave(reason)

    def _forget(self, selector: selectors.BaseSelector, turn: Turn, guest: Guest) -> None:
        selector.unregister(guest.channel.socket)
        with self._lock:
            del self._guests[turn]
        self._turns.leave(turn)
