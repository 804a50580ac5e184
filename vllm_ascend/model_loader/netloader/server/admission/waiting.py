"""Where connections are while their clients wait for a turn.

There may be hundreds of them, and all that they want is a notice now and then. So they have no threads of their own.
One thread, which exists as long as somebody waits, goes round: it sends the notices, notices who has left, and lets
clients go on whose turn has come or who have nothing to wait for any more. The work of a round is linear in the number
of clients, and rounds keep some distance from each other however much happens.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import time
from abc import ABC, abstractmethod
from typing import Final

from vllm_ascend.model_loader.netloader.errors import PeerError, Stalled
from vllm_ascend.model_loader.netloader.server.admission.turns import Turn, Turns
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.messages import Wait
from vllm_ascend.model_loader.netloader.wire.pacing import give_way

logger = logging.getLogger(__name__)

WAIT_NOTICE: Final = 1.0
"""Seconds between two notices to a client that waits for its turn."""
_ROUND_SECONDS: Final = 0.02
"""Seconds between the beginnings of two rounds."""
_MOST_FRAGMENTS: Final = 16
"""Incomplete messages that may arrive from a client that waits: it has nothing to say."""


class Guest(ABC):
    """A client at `address` that waits on `channel` for its turn, and what is to be done for it.

    No method may block, and a guest may not keep weights alive. Exactly one of `go_on`, `reconsider` and `leave` is
    called in the end; after that, the room does not use the channel any more.
    """

    def __init__(self, channel: Channel, address: str) -> None:
        self.channel = channel
        self.address = address
        self.has_notice = False
        """Whether it has been told that it waits."""
        self.fragments = 0
        """Incomplete messages that have arrived from it."""

    @abstractmethod
    def notice(self, ahead: int, served: int) -> Wait | None:
        """The next message to it, if `ahead` clients come first and `served` have a turn.

        None if there is nothing to wait for any more; `reconsider` follows.
        """

    @abstractmethod
    def go_on(self, turn: Turn) -> None:
        """Its turn has come; from now on `turn` is the guest's to leave."""

    @abstractmethod
    def reconsider(self) -> None:
        """What it waited for is gone."""

    @abstractmethod
    def leave(self, reason: PeerError | OSError) -> None:
        """Its connection is over."""


class WaitingRoom:
    """Keeps the clients that wait for one of `turns`. Thread-safe."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._lock = threading.RLock()
        self._guests: dict[Turn, Guest] = {}
        self._new: list[Turn] = []
        self._wakeup: int | None = None
        """An eventfd that interrupts the thread's sleep. It exists as long as the thread does."""
        turns.on_free = self._wake

    def admit(self, guest: Guest) -> None:
        """Takes over the guest's channel. Raises OSError or RuntimeError if the system has no thread for the room."""
        with self._lock:
            if self._wakeup is None:
                self._open()
            turn = self._turns.queue(guest.address)
            self._guests[turn] = guest
            self._new.append(turn)
            self._wake()

    def _open(self) -> None:
        wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            threading.Thread(target=self._run, args=(wakeup,), name="netloader-waiting", daemon=True).start()
        except BaseException:
            os.close(wakeup)
            raise
        self._wakeup = wakeup

    def _wake(self) -> None:
        """Makes the next round come soon."""
        with self._lock:
            if self._wakeup is not None:
                os.eventfd_write(self._wakeup, 1)

    def _run(self, wakeup: int) -> None:
        give_way()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(wakeup, selectors.EVENT_READ)
                self._serve(wakeup, selector)
        except Exception as error:
            logger.exception("an error of this server: those who wait for their turn are sent away")
            self._send_all_away(wakeup, OSError(f"an error of this server: {error}"))

    def _serve(self, wakeup: int, selector: selectors.BaseSelector) -> None:
        notices_at = 0.0
        while self._is_needed(wakeup):
            begun = time.monotonic()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(wakeup)

            with self._lock:
                new, self._new = self._new, []
                granted = [(turn, self._guests.pop(turn)) for turn in self._turns.grant()]
                waiting = [(turn, self._guests[turn]) for turn in self._turns.in_order()]
            self._register(selector, new)
            for turn, guest in granted:
                if turn not in new:
                    selector.unregister(guest.channel.socket)
                guest.go_on(turn)

            due = begun >= notices_at
            self._send_notices(selector, waiting, to_all=due)
            notices_at = begun + WAIT_NOTICE if due else notices_at

            time.sleep(max(0.0, begun + _ROUND_SECONDS - time.monotonic()))
            self._listen(selector, max(0.0, notices_at - time.monotonic()))

    def _register(self, selector: selectors.BaseSelector, new: list[Turn]) -> None:
        """Notices from now on when those of `new` leave or speak, unless their turn has come already."""
        for turn in new:
            if turn in self._guests:
                guest = self._guests[turn]
                selector.register(guest.channel.socket, selectors.EVENT_READ, (turn, guest))

    def _is_needed(self, wakeup: int) -> bool:
        with self._lock:
            if not self._guests:
                os.close(wakeup)
                self._wakeup = None
            return bool(self._guests)

    def _send_all_away(self, wakeup: int, reason: OSError) -> None:
        with self._lock:
            guests, self._guests, self._new = self._guests, {}, []
            self._wakeup = None
            os.close(wakeup)
        for turn, guest in guests.items():
            self._turns.leave(turn)
            guest.leave(reason)

    def _send_notices(
        self, selector: selectors.BaseSelector, waiting: list[tuple[Turn, Guest]], *, to_all: bool
    ) -> None:
        """To everybody of `waiting`, which is in order, or only to those who have had none yet."""
        served = self._turns.taken
        for ahead, (turn, guest) in enumerate(waiting):
            if guest.has_notice and not to_all:
                continue
            guest.has_notice = True
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
        """Returns when something happens, or after `timeout` seconds. Whoever waits has nothing to say but goodbye."""
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
