"""A node whose time stands still: real store, memory bus and presence, real core; links without sockets.

Everything that waits is waited for by `quiet`, everything that is late by `pass_ms`. Faults are planted with
`Faulty`: a call of the store, the presence or the bus fails, or is held until the test lets it go.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastim._core.acks import AckTable
from fastim._core.wheel import Wheel
from fastim.auth import Identity, Scope
from fastim.bus.base import NODE_GROUP, SUBMIT, UNDELIVERED, Outgoing
from fastim.bus.memory import MemoryBus
from fastim.bus.records import Deliver, InboxRecord, Submit, Undelivered, decode_submit, decode_undelivered
from fastim.bus.records import encode as encode_record
from fastim.errors import BusUnavailable, FastimError, PeerError, PresenceUnavailable, StoreUnavailable
from fastim.model import Kind, Message
from fastim.node.limits import NodeLimits
from fastim.node.service import Node
from fastim.node.session import Session
from fastim.presence.memory import MemoryPresence
from fastim.protocol import (
    Ack,
    Acks,
    Auth,
    Error,
    Frame,
    Head,
    Hello,
    Level,
    Msg,
    Ping,
    Probe,
    Sent,
    Skip,
    encode,
    encode_msg_tail,
)
from fastim.store.base import AppendFrame, AppendItem, MessageStore
from fastim.store.sqlite import SqliteStore
from tests.kill.raw import split as decode_packet
from tests.system.dispatch_world import HandClock, client_id
from tests.system.node_links import FakeHub

F = TypeVar("F", bound=Frame)
STEP_MS = 250
_DEADLINE_S = 5.0
_FOREVER_MS = 10**15


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Let the loop run until the condition holds; fail after five seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _DEADLINE_S
    turns = 0
    while not condition():
        assert loop.time() < end, f"never came true: {what or condition}"
        turns += 1
        await asyncio.sleep(0 if turns < 20 else 0.001)


class Faulty:
    """A port, with calls that fail or are held. Everything else goes straight through."""

    def __init__(self, inner: object, error: Callable[[str], FastimError]) -> None:
        self.inner = inner
        self.error = error
        self.failing: dict[str, int] = {}
        """How often the named call still fails before it works again."""
        self.calls: list[str] = []
        self._gates: dict[str, asyncio.Event] = {}
        self.late = False
        """Hold calls after they were carried out, not before."""
        self.held: Counter[str] = Counter()
        """How many calls of a name wait."""

    def hold(self, name: str) -> None:
        """Calls of this name wait from now on."""
        self._gates[name] = asyncio.Event()

    def let_go(self, name: str) -> None:
        self._gates.pop(name).set()

    @property
    def waiting(self) -> int:
        return self.held.total()

    def heal(self) -> None:
        self.failing.clear()
        for name in list(self._gates):
            self.let_go(name)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.inner, name)
        if not asyncio.iscoroutinefunction(call):
            return call

        async def watched(*args: object, **kwargs: object) -> object:
            self.calls.append(name)
            if self.failing.get(name, 0):
                self.failing[name] -= 1
                raise self.error("planted")
            if not self.late:
                await self._gate(name)
            result = await call(*args, **kwargs)
            if self.late:
                await self._gate(name)
            return result

        return watched

    async def _gate(self, name: str) -> None:
        gate = self._gates.get(name)
        if gate is not None:
            self.held[name] += 1
            try:
                await gate.wait()
            finally:
                self.held[name] -= 1


class Peer:
    """A client's end: keeps what it was sent, says what the test says, answers PROBE and nothing else."""

    def __init__(self, world: NodeWorld) -> None:
        self.world = world
        self.frames: list[Frame] = []
        self.dead = False
        """The network swallows everything, both ways."""
        self.polite = True
        self.close_code = 0
        self.close_reason = ""
        self.link = world.hub.open(self)

    def take(self, packet: bytes) -> None:
        if self.dead:
            return
        for frame in decode_packet(packet):
            self.frames.append(frame)
            if isinstance(frame, Probe) and self.polite:
                asyncio.get_running_loop().call_soon(self.say, Ping())

    def say(self, *frames: Frame) -> None:
        """One packet."""
        if not self.dead:
            self.link.receive(b"".join(encode(frame) for frame in frames))

    def leave(self) -> None:
        """A close frame of the client's."""
        self.link.end(1000, orderly=True)

    def vanish(self) -> None:
        """The socket is reset."""
        self.link.end(1006, orderly=False)

    # -- what it was sent

    def of(self, kind: type[F]) -> list[F]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    def seqs(self, conv: str = "") -> list[int]:
        """Of the MSG frames, in the order of arrival."""
        return [frame.seq for frame in self.of(Msg) if conv in ("", frame.conv)]

    def tags(self) -> list[int]:
        return [frame.tag for frame in self.frames if isinstance(frame, Msg | Sent | Skip | Level | Head)]

    @property
    def hello(self) -> Hello:
        (found,) = self.of(Hello)
        return found

    @property
    def codes(self) -> list[str]:
        return [error.code for error in self.of(Error)]

    def ack(self, tag: int = 0) -> None:
        """Up to `tag`, or everything."""
        if tag or self.tags():
            self.say(Ack(tag or max(self.tags())))

    def ack_ids(self, *msg_ids: int) -> None:
        self.say(Acks(list(msg_ids)))

    def forget(self) -> list[Frame]:
        """What has come until now; then as if nothing had."""
        found, self.frames = self.frames, []
        return found


class NodeWorld:
    """One node. `send` and `deliver` stand in for dispatch."""

    def __init__(self, store: MessageStore, limits: NodeLimits) -> None:
        self.clock = HandClock()
        self.clock.passed_ms = 100_000
        self.real_store = store
        self.store = Faulty(store, StoreUnavailable)
        self.real_bus = MemoryBus()
        self.bus = Faulty(self.real_bus, BusUnavailable)
        self.real_presence = MemoryPresence(self.clock)
        self.presence = Faulty(self.real_presence, PresenceUnavailable)
        self.limits = limits
        self.acks = AckTable()
        self.wheel = Wheel(stall_ms=limits.stall_ms)
        self.hub = FakeHub(self.clock, self.acks, self.wheel)
        self.fatal: list[BaseException] = []
        self.tokens: dict[str, Identity] = {}
        self.node = self.make_node()
        self.peers: list[Peer] = []
        self.unsettled_at_end = False
        """Some record may be left unsettled when the test ends."""
        self._client_ids = 0

    def make_node(self, boot: int = 1) -> Node:
        node = Node(
            "n1", boot, store=self.store, bus=self.bus, presence=self.presence,  # type: ignore[arg-type]
            hub=self.hub, acks=self.acks, wheel=self.wheel, verify=self.verify, clock=self.clock,
            rng=random.Random(7), limits=self.limits, on_fatal=self.fatal.append,
        )  # fmt: skip
        # Time is the test's: nothing is swept or renewed but by pass_ms.
        node._sweep = node._hold_lease = _never  # type: ignore[method-assign]
        return node

    def verify(self, token: str) -> Identity:
        if token in self.tokens:
            return self.tokens[token]
        if token == "bad":
            raise PeerError("unauthenticated", "the token is not valid")
        return Identity(token, frozenset({Scope.CLIENT}), _FOREVER_MS, "test", f"id-of-{token}")

    async def open(self) -> None:
        await self.real_bus.ensure(SUBMIT)
        await self.real_bus.ensure(UNDELIVERED)
        self.submits = self.real_bus.reader(SUBMIT, "test", max_unsettled=10_000)
        self.undelivered_reader = self.real_bus.reader(UNDELIVERED, "test", max_unsettled=10_000)
        await self.node.start()

    async def close(self) -> None:
        """Everything settles, nothing stays."""
        for port in (self.store, self.bus, self.presence):
            port.heal()
        for peer in self.peers:
            peer.link.abort()
        await asyncio.sleep(0)
        ticking = asyncio.create_task(self._tick(), name="test.tick")
        await self.node.stop()
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        assert self.fatal == []
        assert all(peer.link.told == 1 for peer in self.peers), "on_closed came once per link"
        assert self.acks.count == 0, "an ack slot is left open"
        node = self.node
        assert not node.delivery._by_slot
        assert not node.delivery._retrying
        assert not node.handshake._entering
        assert all(session.link is None for session in node.pool)
        if not self.unsettled_at_end:
            topic = self.real_bus._topics.get(node.inbox)
            assert topic is None or self.committed == self.published, "a record was never settled"

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.005)
            self.clock.passed_ms += 100

    # -- time

    async def quiet(self) -> None:
        """Until nothing moves any more but by time, a client or a fault that ends."""
        still = 0
        loop = asyncio.get_running_loop()
        end = loop.time() + _DEADLINE_S
        while still < 3:
            assert loop.time() < end, f"never quiet: {self._moving()}"
            await asyncio.sleep(0 if still else 0.0005)
            still = 0 if self._moving() else still + 1

    def _moving(self) -> str:
        node = self.node
        flusher, catchup = node.flusher, node.catchup
        held = self.store.held + self.presence.held + self.bus.held
        streams = held["conversations"] + held["stream"] + held["position"]
        busy = sum(session.busy for session in node.pool)
        # A login that is held has acknowledged a tag; the tick after HELLO drains it.
        if self.hub.scheduled or (self.acks.pending_drain and not held.total()):
            return "hub"
        if self._unread():
            return "inbox"
        if node.commands._sends and not held["publish"]:
            return "sends"
        if len(node._short) > held.total() - held["flush"] - min(busy, streams):
            return f"tasks {sorted(task.get_name() for task in node._short)}"
        flushing = flusher._committing.locked() or flusher._pending
        if flushing and not held["flush"] and not held["publish"] and not any(self.store.failing.values()):
            return "flush"
        if (busy or catchup._queue) and not streams:
            return "catchup"
        return ""

    def _unread(self) -> bool:
        topic = self.real_bus._topics.get(self.node.inbox)
        group = topic.groups.get(NODE_GROUP) if topic is not None else None
        if topic is None or group is None:
            return False
        return group.shares[0].window.next_offset < topic.partitions[0].next

    async def pass_ms(self, ms: int) -> None:
        """Let time pass, a sweep every 250 ms."""
        while ms > 0:
            step = min(ms, STEP_MS)
            ms -= step
            self.clock.passed_ms += step
            self.node.sweep(self.clock.mono_ms())
            await self.quiet()

    # -- clients

    def dial(self) -> Peer:
        peer = Peer(self)
        self.peers.append(peer)
        return peer

    def auth(self, peer: Peer, user: str, device: str = "phone", **more: Any) -> None:
        fields = {"version_min": 1, "version_max": 1, "token": user, "device": device} | more
        peer.say(Auth(**fields))

    async def connect(self, user: str, device: str = "phone", **more: Any) -> Peer:
        """A connection that has HELLO (or was refused), and everything that follows from it."""
        peer = self.dial()
        self.auth(peer, user, device, **more)
        await self.quiet()
        return peer

    async def level(self, user: str, device: str = "phone", **more: Any) -> Peer:
        """The same, and everything that came is acknowledged and forgotten."""
        peer = await self.connect(user, device, **more)
        while peer.of(Msg) or peer.of(Skip) or not peer.of(Level):
            assert peer.tags(), f"no LEVEL for {user}: {peer.frames}"
            peer.ack()
            last = peer.tags()
            await self.quiet()
            if peer.tags() == last:
                break
        peer.ack()
        await self.quiet()
        assert peer.of(Level)
        return peer

    async def resume(self, peer: Peer, tag: int = -1, **more: Any) -> Peer:
        """A new connection of the same session; tag -1: everything that came was stored."""
        session = self.session_of(peer)
        tags = peer.tags()
        wanted = (max(tags) if tags else session.tag) if tag < 0 else tag
        return await self.connect(
            session.user, session.device, session=session.id, tag=wanted,
            **({"user_cursor": session.level_version} | more),
        )  # fmt: skip

    def session_of(self, peer: Peer) -> Session:
        for hello in peer.of(Hello):
            peer.session_id = hello.session  # type: ignore[attr-defined]
        found = self.node.pool.find(getattr(peer, "session_id", "")) or self._by_link(peer)
        assert found is not None
        return found

    def _by_link(self, peer: Peer) -> Session | None:
        return next((one for one in self.node.pool if one.link is peer.link), None)

    # -- dispatch's part

    async def known(self, *users: str) -> None:
        for user in users:
            await self.real_store.register_device(user, "phone", "app", self.clock.wall_ms())

    async def append(
        self, conv: str, sender: str, *bodies: bytes, loss_time_ms: int = 0, kind: int = Kind.TEXT
    ) -> list[Message]:
        """Store messages, as dispatch would."""
        items = []
        for body in bodies:
            self._client_ids += 1
            items.append(AppendItem(client_id(self._client_ids), kind, body, loss_time_ms))
        frame = AppendFrame(conv, sender, tuple(items), 0, False)
        (result,) = await self.real_store.append([frame], self.clock.wall_ms())
        return [
            Message(
                conv, done.seq, done.msg_id, done.cseq, result.epoch, sender, item.client_id, item.kind,
                item.flags, done.ts_ms, done.loss_time_ms, item.body,
            )
            for item, done in zip(items, result.items, strict=True)
        ]  # fmt: skip

    async def inbox(self, *records: InboxRecord) -> None:
        """What dispatch or another node has for this one."""
        await self.real_bus.publish(
            [Outgoing(self.node.inbox, "k", encode_record(record)) for record in records]
        )
        await self.quiet()

    async def deliver(self, messages: Iterable[Message], *users: str, skip: str = "") -> None:
        await self.inbox(
            *[
                Deliver(
                    m.conv, m.seq, m.msg_id, m.loss_time_ms, m.sender, list(users), skip, encode_msg_tail(m)
                )
                for m in messages
            ]
        )

    async def send(self, conv: str, sender: str, *bodies: bytes, to: tuple[str, ...]) -> list[Message]:
        """Store and deliver."""
        messages = await self.append(conv, sender, *bodies)
        await self.deliver(messages, *to)
        return messages

    @property
    def published(self) -> int:
        return self.real_bus.published(self.node.inbox)

    @property
    def committed(self) -> int:
        return self.real_bus.committed(self.node.inbox, NODE_GROUP)

    @property
    def unsettled(self) -> int:
        """Records that the node has taken and not settled."""
        reader = self.node._reader
        assert reader is not None
        return reader.unsettled  # type: ignore[attr-defined, no-any-return]

    async def submitted(self) -> list[Submit]:
        """What the node has handed to dispatch since the last call."""
        return [decode_submit(value) for value in await self._read(self.submits)]  # type: ignore[misc]

    async def undelivered(self) -> list[Undelivered]:
        return [decode_undelivered(value) for value in await self._read(self.undelivered_reader)]

    async def _read(self, reader: Any) -> list[bytes]:
        try:
            async with asyncio.timeout(0):
                records = await reader.read(1_000)
        except TimeoutError:
            return []
        for record in records:
            reader.settle(record)
        return [record.value for record in records]

    # -- what the store knows

    async def cursor(self, user: str, conv: str, device: str = "phone") -> int:
        return (await self.real_store.position(user, device, conv)).cursor

    async def due(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(user, conv) -> (from_seq, in how many ms) of the due rows."""
        found: dict[tuple[str, str], tuple[int, int]] = {}
        after = 0
        while page := await self.real_store.scan(after, 1_000):
            for message in page:
                trace = await self.real_store.trace(message.msg_id, self.clock.wall_ms())
                assert trace is not None
                for row in trace.due:
                    found[row.user, row.conv] = (row.from_seq, row.due_at_ms - self.clock.wall_ms())
            after = page[-1].msg_id
        return found

    async def states(self, conv: str, user: str) -> list[str]:
        """The state of the user's obligations in a conversation, by seq."""
        found = []
        after = 0
        while True:
            page, after = await self.real_store.obligations(after, 1_000, self.clock.wall_ms())
            found += [one for one in page if (one.conv, one.user) == (conv, user)]
            if not after:
                return [one.state.name.lower() for one in sorted(found, key=lambda one: one.seq)]

    async def online(self, user: str) -> list[str]:
        """The devices that presence has for the user."""
        located = (await self.real_presence.locate([user])).get(user)
        return sorted(one.device for one in located.attachments) if located is not None else []


async def _never() -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def node_world(path: Path, **limits: Any) -> AsyncIterator[NodeWorld]:
    """limits: fields of NodeLimits. Flushes wait for nothing; the lease ends only if a test says so."""
    store = await SqliteStore.open(path, synchronous="OFF")
    try:
        world = NodeWorld(store, NodeLimits(**({"flush_interval_ms": 0, "lease_ms": _FOREVER_MS} | limits)))
        await world.open()
        try:
            yield world
            assert world.fatal == []
        except BaseException:
            world.unsettled_at_end = True
            raise
        finally:
            await world.close()
    finally:
        await store.close()
