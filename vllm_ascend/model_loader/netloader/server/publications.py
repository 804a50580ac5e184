"""What a server holds in each slot: weights that it serves, weights that it must not serve now, or a reason for none.

An engine has one slot for each role ("target", "draft"), named as the role. A process that holds the weights of several
models has one for each of them. A slot is in at most one of three states, and every change of state is a method here.
Beside that, weights that are still being loaded may be offered in it: those of a first load, or those that will replace
the ones that are served. There are no sockets and no sessions in here: whoever changes something is told which weights
are no longer served, and has to end their sessions and close them.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.memory import Memory


@dataclass(frozen=True)
class Publication:
    """The weights of one model, or of one rank's part of it, as they are offered to clients."""

    identity: ModelIdentity
    coordinates: RankCoordinates
    store: WeightStore
    joined: Callable[[Endpoint], object] = field(default=lambda _: None, compare=False)
    """Is called with the address of each client that relays what it takes, by the thread of its session."""
    own_slot: str = ""
    """The slot, where it is not that of the role."""

    @property
    def role(self) -> str:
        return self.identity.role

    @property
    def slot(self) -> str:
        """Names the weights in whose place these are served."""
        return self.own_slot or self.role


@dataclass(frozen=True)
class Served:
    """Clients may take these weights."""

    publication: Publication


@dataclass(frozen=True)
class Suspended:
    """These weights are kept, but clients that ask for them are refused with `reason` for now."""

    publication: Publication
    reason: str


@dataclass(frozen=True)
class Declined:
    """There is nothing to serve, and clients are told `reason`."""

    reason: str


State = Served | Suspended | Declined


class Publications:
    """The state of each slot, and the latest generation of each role. Thread-safe.

    `lock` guards all of it. It is reentrant, because a finalizer may withdraw weights at any point, also in a thread
    that holds it. For the same reason, whatever else a withdrawal touches must be guarded by this very lock.
    """

    def __init__(self, lock: threading.RLock | None = None) -> None:
        self._lock = lock or threading.RLock()
        self._states: dict[str, State] = {}
        self._filling: dict[str, Publication] = {}
        self._generations = Counter[str]()

    def next_generation(self, role: str) -> int:
        """A generation above all earlier ones of `role`, for the weights that are to be published next."""
        with self._lock:
            self._generations[role] += 1
            return self._generations[role]

    def publish(self, publication: Publication) -> Publication | None:
        """Serves `publication`. Returns what was served or suspended in its slot before."""
        with self._lock:
            role, slot = publication.role, publication.slot
            replaced = self._held(slot)
            if self._filling.get(slot) is publication:
                del self._filling[slot]
            self._states[slot] = Served(publication)
            self._generations[role] = max(self._generations[role], publication.store.generation)
            return replaced

    def fill(self, publication: Publication) -> Publication | None:
        """Offers weights that are still being loaded. Returns those that were offered so in their slot before."""
        with self._lock:
            replaced = self._filling.get(publication.slot)
            self._filling[publication.slot] = publication
            return replaced

    def stop_filling(self, publication: Publication) -> bool:
        """Offers `publication` no more, if it is still being loaded. Whether it was."""
        with self._lock:
            if self._filling.get(publication.slot) is not publication:
                return False
            del self._filling[publication.slot]
            return True

    def offered(self, role: str) -> tuple[Publication, ...]:
        """What clients may take in `role` now: what is served, then what is being loaded."""
        with self._lock:
            offered = (*self.all_served(), *self._filling.values())
            return tuple(publication for publication in offered if publication.role == role)

    def all_filling(self) -> tuple[Publication, ...]:
        """What is being loaded now and offered all the same, at most one publication for each slot."""
        with self._lock:
            return tuple(self._filling.values())

    def decline(self, slot: str, reason: str) -> Publication | None:
        """Serves nothing in `slot`, for `reason`. Returns what was served or suspended in it before."""
        with self._lock:
            dropped = self._held(slot)
            self._states[slot] = Declined(reason)
            return dropped

    def suspend(self, reason: str) -> tuple[Publication, ...]:
        """Suspends all that is served, for `reason`, and returns it. Earlier suspensions keep their reasons."""
        with self._lock:
            served = self.all_served()
            for publication in served:
                self._states[publication.slot] = Suspended(publication, reason)
            return served

    def resume(self, slots: Container[str] | None = None) -> tuple[Publication, ...]:
        """Serves again what is suspended, in all slots or in those of `slots`, and returns it.

        It gets a new generation, so that nobody mixes bytes from before with bytes from after.
        """
        with self._lock:
            resumed = []
            for slot, state in list(self._states.items()):
                if isinstance(state, Suspended) and (slots is None or slot in slots):
                    generation = self.next_generation(state.publication.role)
                    store = replace(state.publication.store, generation=generation)
                    publication = replace(state.publication, store=store)
                    self._states[slot] = Served(publication)
                    resumed.append(publication)
            return tuple(resumed)

    def give_up(self, reason: str) -> tuple[Publication, ...]:
        """Declines every slot that is suspended, for `reason`. Returns what was suspended."""
        with self._lock:
            dropped = []
            for slot, state in list(self._states.items()):
                if isinstance(state, Suspended):
                    self._states[slot] = Declined(reason)
                    dropped.append(state.publication)
            return tuple(dropped)

    def withdraw(self, slot: str, memory: weakref.ref[Memory] | None = None) -> Publication | None:
        """Forgets what is served or suspended in `slot`, and returns it. With `memory`, only if it lies in there.

        Weights that were suspended leave the reason for that behind, as a reason to decline.
        """
        with self._lock:
            withdrawn = self._held(slot)
            if withdrawn is None or (memory is not None and memory() is not withdrawn.store.memory):
                return None

            state = self._states.pop(slot)
            if isinstance(state, Suspended):
                self._states[slot] = Declined(state.reason)
            return withdrawn

    def clear(self) -> tuple[Publication, ...]:
        """Withdraws every slot. Returns what was served or suspended."""
        with self._lock:
            self._filling.clear()
            withdrawn = (self.withdraw(slot) for slot in list(self._states))
            return tuple(publication for publication in withdrawn if publication is not None)

    def served(self, slot: str) -> Publication | None:
        """What is served in `slot` now."""
        state = self._states.get(slot)
        return state.publication if isinstance(state, Served) else None

    def all_served(self) -> tuple[Publication, ...]:
        """What is served now, at most one publication for each slot."""
        with self._lock:
            return tuple(state.publication for state in self._states.values() if isinstance(state, Served))

    def reasons(self) -> dict[str, str]:
        """Why nothing is served, for each slot that is suspended or declined."""
        with self._lock:
            return {slot: state.reason for slot, state in self._states.items() if not isinstance(state, Served)}

    def _held(self, slot: str) -> Publication | None:
        state = self._states.get(slot)
        return None if state is None or isinstance(state, Declined) else state.publication
