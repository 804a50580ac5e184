"""A swarm of processes to measure: some hold weights, others load them together, each on a host of its own or not.

Hosts are network namespaces (`namespaces`). Without them, all processes are on the loopback interface, and each server
holds itself to the rate of a link by MAX_BANDWIDTH; then nothing limits what a client receives.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.harness import processors
from benchmarks.harness.namespaces import Switch
from benchmarks.harness.swarm_nodes import Hold, Holder, Load, Loaded, Loader, Place, Release
from support.child import Child, ChildFailed
from vllm_ascend.model_loader.netloader.endpoint import Endpoint

LOOPBACK = "127.0.0.1"
START_SECONDS = 0.5
"""From the order to load to the moment at which all begin."""
PATIENCE = 600.0


@dataclass(frozen=True)
class Run:
    """What came of one load by all.

    `seconds` is until the last one had everything, `mean` the average over all. `copies` is what the sources sent to
    those who finished, and `twice` what these received beyond what they needed, both as multiples of the weights; the
    latter is per loader. `relayed` is the number of loaders that others took something from. `busy` and `others` are
    shares of this machine's processors.
    """

    seconds: float
    mean: float
    finished: int
    copies: float
    twice: float
    relayed: int
    busy: float
    others: float
    failures: list[str]


class _Node:
    def __init__(self, child: Child, address: str) -> None:
        self.child = child
        self.address = address


class Testbed:
    """The processes, which are made when they are needed first and live as long as this. Use it with `with`."""

    def __init__(self, *, has_hosts: bool) -> None:
        """With `has_hosts`, this process must have called `namespaces.enter`."""
        self._switch = Switch() if has_hosts else None
        self._running = contextlib.ExitStack()
        self._holders: dict[str, _Node] = {}
        self._loaders: list[_Node] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def delays(self) -> bool:
        """Whether packets take a millisecond between hosts."""
        return self._switch is not None and self._switch.delays

    def hold(self, name: str, nbytes: int, rate: int) -> Endpoint:
        """Lets the holder of that name serve so many bytes of weights from now on, at the rate it was first given."""
        node = self._holders.get(name)
        if node is None:
            node = self._holders[name] = self._start(Holder, rate)
        endpoint = node.child.do(Hold(node.address, nbytes))
        assert isinstance(endpoint, Endpoint)
        return endpoint

    def release(self, name: str) -> None:
        """Lets a holder give up what it holds."""
        self._holders[name].child.do(Release())

    def load(
        self,
        count: int,
        nbytes: int,
        sources: Sequence[Endpoint],
        rate: int,
        *,
        relays: bool = True,
        killed_after: float | None = None,
    ) -> Run:
        """Lets so many processes load from `sources` at once. The one in the middle is killed after so many seconds.

        Raises ChildFailed if any other one does not get everything.
        """
        while len(self._loaders) < count:
            self._loaders.append(self._start(Loader, rate))
        loaders = self._loaders[:count]
        begins_at = time.monotonic() + START_SECONDS
        with processors.watched([node.child.pid for node in (*loaders, *self._holders.values())]) as use:
            for node in loaders:
                node.child.ask(Load(node.address, nbytes, sources, begins_at, relays))
            if killed_after is not None:
                time.sleep(max(0.0, begins_at + killed_after - time.monotonic()))
                victim = loaders.pop(count // 2)
                if victim.child.answers_within(0):
                    raise ChildFailed(f"{victim.child.name} was done before it could be killed")
                victim.child.kill()
                self._loaders.remove(victim)
            answers = [node.child.answer() for node in loaders]
        for node in loaders:
            node.child.do(Release())
        return _run(answers, begins_at, nbytes, sources, use)

    def _start(self, kind: type[Holder] | type[Loader], rate: int) -> _Node:
        place = Place(has_host=self._switch is not None, rate=rate if self._switch is None else None)
        child: Child = self._running.enter_context(Child(kind, place, name=f"a {kind.__name__}", patience=PATIENCE))
        child.answer()
        address = LOOPBACK if self._switch is None else self._switch.plug(child.pid, rate)
        return _Node(child, address)


def _run(
    answers: Sequence[Any], begins_at: float, nbytes: int, sources: Sequence[Endpoint], use: processors.Use
) -> Run:
    loaded = [each for each in answers if isinstance(each, Loaded)]
    seconds = [each.ended_at - begins_at for each in loaded]
    by_source = {str(source) for source in sources}
    sent = sum(each.received.get(source, 0) for each in loaded for source in by_source)
    relays = {source for each in loaded for source in each.received} - by_source
    return Run(
        seconds=max(seconds),
        mean=sum(seconds) / len(seconds),
        finished=len(loaded),
        copies=sent / nbytes,
        twice=sum(sum(each.received.values()) - nbytes for each in loaded) / nbytes / len(loaded),
        relayed=len(relays),
        busy=use.busy,
        others=use.others,
        failures=[reason for each in loaded for reason in each.failures],
    )
