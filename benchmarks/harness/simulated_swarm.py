"""A swarm that exists only as events: the first server, and clients whose decisions are those of the product's policy.

What the model takes for granted: a chunk is one transfer over the sender's link up and the receiver's link down
(`links`); every message takes the latency and nothing else; joining takes a few of them. Digests, processors, and what
TCP does in its first milliseconds are left out. A relay tells everybody who has joined it of each chunk as it passes.
Every node names those to whom it has sent a chunk, to all who have joined it. The first server gives
`max_clients` a turn each until they have everything; the others wait, and are told now and then of relays. Every node
sends up to `sending` chunks at once, and `connections` of them to each client; whoever has the fewest of them on the
way comes next.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from benchmarks.harness.links import Events, Link, Network, Transfer
from vllm_ascend.model_loader.netloader.client.swarm.peering import DEGREE, SESSIONS, Peering
from vllm_ascend.model_loader.netloader.client.swarm.policy import WINDOW, Swarm

MEBIBYTE: Final = 1 << 20
UNLIMITED: Final = 1 << 20
REFERRALS: Final = 8
"""Peers that are named to whom has to wait."""
IN_PARTS: Final = 2
"""So many times as many as a server have a turn at a relay, because they take only parts there."""
NOTICE_SECONDS: Final = 1.0
"""From one message to a client that waits for its turn to the next."""
POLL_SECONDS: Final = 0.1
"""After which a client looks whether a source is late."""
STALL_SECONDS: Final = 10.0
"""After which a client gives up a source that has fallen silent."""
LONGEST: Final = 2.0
"""How many times as long a run may take as it would if the clients were served one after another."""
JOIN_LATENCIES: Final = 5
"""Messages, one after another, until a server knows that a client wants to join."""
ACCEPT_LATENCIES: Final = 3
"""Messages from there until the client has the digests and can ask for chunks."""


@dataclass(frozen=True)
class Setting:
    """What happens. Rates are bytes per second, times seconds.

    The first `slow_nodes` clients have links of `slow_rate`. Clients arrive by chance within `arrivals`, all at once
    if it is 0. `kills` are numbers of clients, negative ones of servers, with the time at which each ends; `silent`
    ones are noticed only after STALL_SECONDS.
    """

    nodes: int = 16
    nbytes: int = 1024 * MEBIBYTE
    chunk: int = 4 * MEBIBYTE
    rate: float = 125e6
    server_rate: float = 125e6
    latency: float = 1e-3
    servers: int = 1
    max_clients: int = 8
    sending: int = UNLIMITED
    connections: int = 4
    degree: int = DEGREE
    sessions: int = SESSIONS
    window: int = WINDOW
    mutual: bool = True
    """Whether a relay joins those that have joined it."""
    relay: bool = True
    tells_sent: bool = True
    """Whether a server tells its clients which chunks it has sent to others."""
    slow_nodes: int = 0
    slow_rate: float = 12.5e6
    arrivals: float = 0.0
    kills: tuple[tuple[int, float], ...] = ()
    silent: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    `seconds` is from the first arrival to the last end. `longest` and `mean` are times of single loads, as multiples of
    what the client's own link needs. `copies` were sent by the servers together. `twice` is the fraction of all bytes
    wanted that came in vain.
    """

    seconds: float
    longest: float
    mean: float
    finished: int
    copies: float
    twice: float
    messages: float
    """To and from a client, beside the chunks, on average."""


class Node:
    """The half of a node that sends: who may ask it for chunks, and what it is sending."""

    def __init__(self, model: Model, rate: float) -> None:
        self.model = model
        self.up, self.down = Link(rate), Link(rate)
        self.is_alive = True
        self.clients: dict[Client, None] = {}
        self.named: dict[Client, None] = {}
        """Those to whom a chunk was sent, so that they can be named to others."""
        self._asked: deque[tuple[Client, int]] = deque()
        self._sending: dict[Transfer, tuple[Client, int]] = {}

    def later(self, latencies: int = 1) -> float:
        return latencies * self.model.setting.latency

    def ask(self, client: Client, chunk: int) -> None:
        if self.is_alive and client in self.clients:
            self._asked.append((client, chunk))
            self._send()

    def leave(self, client: Client) -> None:
        """The client is gone. What is on its way to it has come in vain, if it still counts."""
        self.clients.pop(client, None)
        self._asked = deque(each for each in self._asked if each[0] is not client)
        for transfer in [transfer for transfer, (to, _) in self._sending.items() if to is client]:
            self._abort(transfer)
        if self.is_alive:
            self._send()

    def die(self) -> None:
        if isinstance(self, Client):
            self.model.loading -= self.loads
        self.is_alive = False
        self._asked.clear()
        for transfer in list(self._sending):
            self._abort(transfer)
        setting, events = self.model.setting, self.model.events
        notice = STALL_SECONDS if setting.silent else setting.latency
        for client in self.clients:
            events.after(notice, client.hear_gone, self)
        for other in self.model.all_nodes:
            if other is not self and isinstance(self, Client):
                events.after(notice, other.leave, self)

    def tell_sent(self, chunk: int, to: Client) -> None:
        """What is told to others when a chunk is on its way `to` somebody."""

    def _abort(self, transfer: Transfer) -> None:
        client, _ = self._sending.pop(transfer)
        gone = self.model.network.abort(transfer)
        if client.is_alive:
            self.model.in_vain += gone

    def _send(self) -> None:
        setting = self.model.setting
        on_the_way = Counter(client for client, _ in self._sending.values())
        while self._asked and len(self._sending) < setting.sending:
            number = min(range(len(self._asked)), key=lambda n: (on_the_way[self._asked[n][0]], n))
            client, chunk = self._asked[number]
            if on_the_way[client] >= setting.connections:
                break
            on_the_way[client] += 1
            del self._asked[number]
            nbytes = self.model.lengths[chunk]
            self._sending[self.model.network.start(nbytes, self.up, client.down, self._sent)] = (client, chunk)
            self.tell_sent(chunk, client)

    def _sent(self, transfer: Transfer) -> None:
        client, chunk = self._sending.pop(transfer)
        self.model.events.after(self.later(), client.take_in, self, chunk)
        if self.model.setting.relay and client not in self.named:
            self.named[client] = None
            for other in self.clients:
                if other is not client:
                    self.model.events.after(self.later(), other.hear_named, self, [client])
        self._send()


class Server(Node):
    """A first server: it has everything, gives turns, and names relays."""

    def __init__(self, model: Model, rate: float) -> None:
        super().__init__(model, rate)
        self._waiting: deque[Client] = deque()

    def join(self, client: Client) -> None:
        if not self.is_alive:
            return
        if len(self.clients) < self.model.setting.max_clients:
            self._accept(client)
        else:
            self._waiting.append(client)
            self._notify(client)

    def leave(self, client: Client) -> None:
        if client in self._waiting:
            self._waiting.remove(client)
        super().leave(client)
        while self.is_alive and self._waiting and len(self.clients) < self.model.setting.max_clients:
            self._accept(self._waiting.popleft())

    def tell_sent(self, chunk: int, to: Client) -> None:
        if self.model.setting.tells_sent:
            for client in self.clients:
                if client is not to:
                    self.model.events.after(self.later(), client.hear_sent, chunk)

    def _accept(self, client: Client) -> None:
        self.clients[client] = None
        self.model.events.after(self.later(ACCEPT_LATENCIES), client.accepted, self, None, list(self.named))

    def _notify(self, client: Client) -> None:
        if self.is_alive and client in self._waiting:
            self.model.events.after(self.later(), client.hear_named, self, self._some_named())
            self.model.events.after(NOTICE_SECONDS, self._notify, client)

    def _some_named(self) -> list[Client]:
        return self.model.chance.sample(list(self.named), min(len(self.named), REFERRALS))


class Client(Node):
    """A node that loads and relays, by the policy."""

    def __init__(self, model: Model, number: int, rate: float) -> None:
        super().__init__(model, rate)
        setting = model.setting
        chance = random.Random(f"{setting.seed} {number}")
        self._held: set[int] = set()
        self._swarm: Swarm[Node] = Swarm(model.lengths, chance, window=setting.window)
        self._peering: Peering[Node] = Peering(chance, itself=[self], degree=setting.degree, sessions=setting.sessions)
        self._leaving: set[Node] = set()
        """Sources that are to make room for others once they have brought what they were asked for."""
        self._rate = rate
        self._begun = 0.0
        self.stretch: float | None = None
        """The time of its load, once it is complete, as a multiple of what its link needs."""
        self.messages = 0

    @property
    def loads(self) -> bool:
        return self.is_alive and self.stretch is None

    def begin(self) -> None:
        self._begun = self.model.events.now
        for server in self.model.servers:
            self.model.events.after(self.later(JOIN_LATENCIES), server.join, self)
        self._poll()

    def join(self, client: Client) -> None:
        """Somebody wants to take from this node."""
        if not self.is_alive:
            self.model.events.after(self.later(), client.hear_gone, self)
        elif len(self.clients) >= IN_PARTS * self.model.setting.max_clients:
            self.model.events.after(self.later(), client.hear_busy, self)
        else:
            self.clients[client] = None
            self.model.events.after(
                self.later(ACCEPT_LATENCIES), client.accepted, self, set(self._held), list(self.named)
            )
            if self.loads and self.model.setting.mutual:
                self._peering.joined_here(client)
                self._connect()

    def accepted(self, source: Node, held: set[int] | None, named: Iterable[Client]) -> None:
        if not self.loads:
            source.leave(self)
        elif source.is_alive:
            self._swarm.joined(source, held)
            self.hear_named(source, named)
            self._ask(source)
        else:
            self.hear_gone(source)

    def hear_named(self, by: Node, named: Iterable[Client]) -> None:
        self.messages += 1
        if self.loads:
            self._peering.named(by, named)
            self._make_room()
            self._connect()

    def hear_busy(self, peer: Node) -> None:
        if self.loads:
            self._peering.lost(peer, was_busy=True)
            self._connect()

    def hear_sent(self, chunk: int) -> None:
        self.messages += 1
        if self.loads:
            self._swarm.sent([chunk])

    def hear_has(self, source: Node, chunk: int) -> None:
        self.messages += 1
        if self.loads and source in self._swarm and self._swarm.has(source, [chunk]):
            self._ask(source)

    def hear_gone(self, source: Node) -> None:
        self._leaving.discard(source)
        if self.loads:
            self._peering.lost(source)
            if source in self._swarm:
                self._swarm.gone(source)
            self._connect()
            self._ask_all()

    def take_in(self, source: Node, chunk: int) -> None:
        """A chunk has arrived, and passes."""
        model = self.model
        if not self.loads or not self._swarm.arrived(source, chunk, model.events.now):
            model.in_vain += model.lengths[chunk] if self.is_alive else 0
            return
        self._held.add(chunk)
        for client in self.clients:
            model.events.after(self.later(), client.hear_has, self, chunk)

        if self._swarm.is_complete:
            self.stretch = (model.events.now - self._begun) * self._rate / model.setting.nbytes
            model.loading -= 1
            for other in (*self._swarm.sources, *model.servers):
                model.events.after(self.later(), other.leave, self)
        elif source in self._leaving:
            self._leave_if_idle(source)
        elif source in self._swarm:
            self._ask(source)

    def _make_room(self) -> None:
        """Leaves sources for others that were named later."""
        if (source := self._peering.to_leave({})) is not None and source in self._swarm:
            self._leaving.add(source)
            self._leave_if_idle(source)

    def _leave_if_idle(self, source: Node) -> None:
        if not self._swarm.is_asked(source):
            self.model.events.after(self.later(), source.leave, self)
            self.hear_gone(source)

    def _connect(self) -> None:
        if self.model.setting.relay:
            while (peer := self._peering.choose()) is not None:
                assert isinstance(peer, Client)
                self.model.events.after(self.later(JOIN_LATENCIES), peer.join, self)

    def _ask(self, source: Node) -> None:
        if source in self._leaving or source not in self._swarm:
            return
        while (chunk := self._swarm.next_for(source, self.model.events.now)) is not None:
            self.messages += 1
            self.model.events.after(self.later(), source.ask, self, chunk)

    def _ask_all(self) -> None:
        for source in self._swarm.sources:
            self._ask(source)

    def _poll(self) -> None:
        if self.loads:
            self._ask_all()
            self.model.events.after(POLL_SECONDS, self._poll)


class Model:
    """One run of a setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.events = Events()
        self.network = Network(self.events)
        self.chance = random.Random(setting.seed)
        self.lengths = [
            min(setting.chunk, setting.nbytes - offset) for offset in range(0, setting.nbytes, setting.chunk)
        ]
        self.in_vain = 0.0
        """Bytes that clients received and could not use."""
        self.servers = [Server(self, setting.server_rate) for _ in range(setting.servers)]
        rates = [setting.slow_rate if number < setting.slow_nodes else setting.rate for number in range(setting.nodes)]
        self.clients = [Client(self, number, rate) for number, rate in enumerate(rates)]
        self.loading = setting.nodes
        """Clients that live and lack something."""
        self.all_nodes: list[Node] = [*self.servers, *self.clients]

    def run(self) -> Outcome:
        """Until every client that lives has everything. Raises RuntimeError where that does not happen."""
        setting, events = self.setting, self.events
        for client in self.chance.sample(self.clients, len(self.clients)):
            events.after(self.chance.random() * max(setting.arrivals, 0.01), client.begin)
        for number, at in setting.kills:
            events.after(at, (self.clients[number] if number >= 0 else self.servers[~number]).die)
        limit = LONGEST * (setting.nodes + 1) * setting.nbytes / min(node.up.rate for node in self.all_nodes)
        events.run(lambda: not self.loading or events.now > limit)

        stretches = [client.stretch for client in self.clients if client.stretch is not None]
        if self.loading:
            raise RuntimeError(f"only {len(stretches)} of {setting.nodes} clients have everything in the end")
        return Outcome(
            seconds=events.now,
            longest=max(stretches),
            mean=statistics.fmean(stretches),
            finished=len(stretches),
            copies=sum(server.up.carried for server in self.servers) / setting.nbytes,
            twice=self.in_vain / setting.nbytes / setting.nodes,
            messages=statistics.fmean(client.messages for client in self.clients),
        )
