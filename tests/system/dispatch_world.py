"""A dispatcher whose time stands still: real store, memory bus, memory presence, and every step by hand."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from fastim.bus.base import NODE_GROUP, SUBMIT, UNDELIVERED, Outgoing, Reader, Record, inbox_topic
from fastim.bus.memory import MemoryBus
from fastim.bus.records import (
    Deliver,
    InboxRecord,
    Mark,
    Nudge,
    ReadNotice,
    Reply,
    Submit,
    Undelivered,
    decode_inbox,
    encode,
)
from fastim.dispatch.ledger import AuditReport, audit
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Intake
from fastim.dispatch.service import Dispatch
from fastim.errors import BusUnavailable, PresenceUnavailable, StoreUnavailable
from fastim.model import Fate, Kind
from fastim.presence.base import Attachment, Location, PresenceStore
from fastim.presence.memory import MemoryPresence
from fastim.protocol import SendItem
from fastim.push.base import PushVendor
from fastim.store.base import Flush, MessageStore, Settled
from fastim.store.sqlite import SqliteStore

T = TypeVar("T", bound=InboxRecord)
START_WALL_MS = 1_790_000_000_000
LEASE_MS = 10**12
LIMITS = DispatchLimits(
    retry_first_ms=1, retry_most_ms=1, store_patience_ms=0, bus_patience_ms=0, recover_batch=2
)


class HandClock:
    """Moves when told to."""

    def __init__(self) -> None:
        self.passed_ms = 0

    def mono_ms(self) -> int:
        return 1_000 + self.passed_ms

    def wall_ms(self) -> int:
        return START_WALL_MS + self.passed_ms


def client_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def item(
    number: int, body: bytes = b"hi", kind: int = Kind.TEXT, loss_time_ms: int = 0, flags: int = 0
) -> SendItem:
    return SendItem(client_id(number), kind, body, loss_time_ms, flags)


class FaultyStore:
    """The store, with calls that fail. Everything else goes straight through."""

    def __init__(self, store: MessageStore) -> None:
        self.inner = store
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}
        """Run once, before the named call."""
        self.failing: dict[str, int] = {}
        """How often the named call still fails before it works again."""
        self.temporary = True
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        call = getattr(self.inner, name)

        async def watched(*args: object, **kwargs: object) -> object:
            self.calls.append(name)
            if name in self.before:
                await self.before.pop(name)()
            if self.failing.get(name, 0):
                self.failing[name] -= 1
                raise StoreUnavailable("planted", temporary=self.temporary)
            return await call(*args, **kwargs)

        return watched


class FaultyPresence(MemoryPresence):
    """Presence that goes away, and that tells when it was asked."""

    away = False
    lookups = 0

    async def locate(self, users: Sequence[str]) -> dict[str, Location]:
        self.lookups += 1
        if self.away:
            raise PresenceUnavailable("planted")
        found = await super().locate(users)
        self.after_lookup(self.lookups)
        return found

    def after_lookup(self, number: int) -> None:
        """Replaced by tests of races: runs between presence's answer and what dispatch makes of it."""


class FaultyBus(MemoryBus):
    """A bus that refuses what goes to one topic."""

    refuses = ""

    async def publish(self, records: Sequence[Outgoing]) -> None:
        if self.refuses and any(out.topic == self.refuses for out in records):
            raise BusUnavailable("planted")
        await super().publish(records)


class World:
    """One dispatcher and the nodes n1 and n2, which are only inboxes."""

    def __init__(self, store: MessageStore, clock: HandClock, boot: int = 1) -> None:
        self.clock = clock
        self.faults = FaultyStore(store)
        self.store = store
        self.boot = boot
        self.bus = FaultyBus()
        self.presence = FaultyPresence(clock, boot << 32)
        self.vendors: list[PushVendor] = []
        self.fatal: list[BaseException] = []
        self.rng = random.Random(7)
        self.limits = LIMITS
        self.attached: dict[tuple[str, str], Attachment] = {}
        self.inboxes: dict[str, Reader] = {}
        self.out: dict[str, list[Record]] = {}
        """Records that a node has taken and not settled."""

    async def open(self, limits: DispatchLimits | None = None) -> None:
        self.limits = limits or self.limits
        self.dispatch = self.build(self.presence)
        await self.bus.ensure(SUBMIT)
        await self.bus.ensure(UNDELIVERED)
        if self.inboxes:
            # A second Dispatch over the same nodes: the first one's readers would keep their partitions.
            await self.close_intakes()
        for node in {"n1", "n2"} - self.inboxes.keys():
            await self.open_node(node)
        self.submit_intake: Intake = self.dispatch.intake(SUBMIT)
        self.undelivered_intake: Intake = self.dispatch.intake(UNDELIVERED)

    async def close_intakes(self) -> None:
        """Leave `submit` and `undelivered` to a Dispatch that runs by itself."""
        await self.submit_intake.close()
        await self.undelivered_intake.close()

    def build(self, presence: PresenceStore, holder: str = "dispatch") -> Dispatch:
        return Dispatch(
            self.faults,  # type: ignore[arg-type]
            self.bus,
            presence,
            self.vendors,
            clock=self.clock,
            rng=self.rng,
            limits=self.limits,
            holder=holder,
            on_fatal=self.fatal.append,
        )

    async def open_node(self, node: str) -> None:
        topic = inbox_topic(node, self.boot)
        await self.bus.ensure(topic)
        await self.presence.open_lease(node, self.boot, LEASE_MS)
        self.inboxes[node] = self.bus.reader(topic, NODE_GROUP, max_unsettled=10_000)
        self.out[node] = []

    # -- clients and nodes

    async def known(self, *users: str) -> None:
        for user in users:
            await self.store.register_device(user, "phone", "app", self.clock.wall_ms())

    async def attach(self, user: str, node: str = "n1", device: str = "phone") -> Attachment:
        session = f"{user}-{device}"
        found, _ = await self.presence.attach(user, device, "app", node, self.boot, session)
        self.attached[user, device] = found
        return found

    def attach_now(self, user: str, node: str = "n1", device: str = "phone") -> None:
        """The same between two awaits of somebody else: the embedded presence never waits."""
        with contextlib.suppress(StopIteration):
            self.attach(user, node, device).send(None)

    async def leave(self, user: str, device: str = "phone", grace_ms: int = 0) -> None:
        until_ms = self.clock.wall_ms() + grace_ms if grace_ms else 0
        assert await self.presence.detach(user, device, self.attached[user, device].generation, until_ms)

    def at_next_lookup(self, happen: Callable[[], None]) -> None:
        """A race: between presence's next answer and what dispatch makes of it."""

        def once(_number: int) -> None:
            self.presence.after_lookup = lambda _number: None  # type: ignore[method-assign]
            happen()

        self.presence.after_lookup = once  # type: ignore[method-assign]

    async def send(
        self,
        conv: str,
        sender: str,
        *items: SendItem,
        device: str = "phone",
        service: bool = False,
        reply: bool = True,
    ) -> None:
        """Put one SEND into `submit`; the answer goes to n1."""
        reply_to = inbox_topic("n1", self.boot) if reply else ""
        session = f"{sender}-{device}"
        submit = Submit(conv, sender, device, session, reply_to, list(items), 0, service)
        await self.bus.publish([Outgoing(SUBMIT, conv, encode(submit))])

    async def read_notice(self, conv: str, user: str, seq: int, private: bool = False) -> None:
        notice = ReadNotice(conv, user, seq, f"{user}-phone", private)
        await self.bus.publish([Outgoing(SUBMIT, conv, encode(notice))])

    async def undelivered(self, user: str, conv: str, from_seq: int) -> None:
        record = Undelivered(user, "phone", conv, from_seq, 1, "timeout")
        await self.bus.publish([Outgoing(UNDELIVERED, user, encode(record))])

    async def ack(self, user: str, conv: str, from_seq: int, to_seq: int, device: str = "phone") -> None:
        settled = Settled(user, device, conv, from_seq, to_seq, Fate.ACKED)
        await self.store.flush(Flush((settled,), (), "n1", self.clock.wall_ms()))

    async def inbox(self, node: str, kind: type[T]) -> list[T]:
        """What has come for the node since the last call, of one kind. Everything stays unsettled."""
        found: list[InboxRecord] = []
        while True:
            try:
                async with asyncio.timeout(0):
                    records = await self.inboxes[node].read(1_000)
            except TimeoutError:
                break
            self.out[node] += records
            found += [decode_inbox(record.value) for record in records]
        self.seen.setdefault(node, []).extend(found)
        mine = [record for record in self.seen[node] if isinstance(record, kind)]
        self.seen[node] = [record for record in self.seen[node] if not isinstance(record, kind)]
        return mine

    @property
    def seen(self) -> dict[str, list[InboxRecord]]:
        return self.__dict__.setdefault("_seen", {})

    async def delivers(self, node: str = "n1") -> list[Deliver]:
        return await self.inbox(node, Deliver)

    async def nudges(self, node: str = "n1") -> list[Nudge]:
        return await self.inbox(node, Nudge)

    async def replies(self) -> list[Reply]:
        return await self.inbox("n1", Reply)

    async def marks(self, node: str = "n1") -> list[Mark]:
        return await self.inbox(node, Mark)

    async def settle_inbox(self, node: str = "n1") -> None:
        """The node settles everything it was given."""
        await self.inbox(node, Deliver)
        for record in self.out[node]:
            self.inboxes[node].settle(record)
        self.out[node].clear()

    # -- dispatch, step by step

    async def work(self) -> None:
        """One batch of `submit`."""
        batch = await self.submit_intake.next()
        await self.dispatch.worker.take(batch)
        self.submit_intake.settle(batch)

    async def exchange(self, conv: str, sender: str, *items: SendItem, **more: bool) -> Reply:
        """Send, work, and return the answer."""
        await self.send(conv, sender, *items, **more)  # type: ignore[arg-type]
        await self.work()
        (reply,) = await self.replies()
        return reply

    async def fold(self) -> None:
        """One batch of `undelivered`."""
        batch = await self.undelivered_intake.next()
        await self.dispatch.due.fold(batch)
        self.undelivered_intake.settle(batch)

    async def fire(self, after_ms: int = 0) -> None:
        """Let time pass, then everything that is due."""
        self.clock.passed_ms += after_ms
        for _ in range(100):
            await self.dispatch.due.fire()
            next_ms = await self.store.next_due_ms()
            if not next_ms or next_ms > self.clock.wall_ms():
                return
        raise AssertionError("due rows fire for ever in one instant")

    async def next_due_in_ms(self) -> int | None:
        next_ms = await self.store.next_due_ms()
        return next_ms - self.clock.wall_ms() if next_ms else None

    async def audit(self) -> AuditReport:
        report = await audit(self.store, self.clock.wall_ms())
        assert report.ok, report.violations
        return report

    async def states(self) -> dict[str, int]:
        """The audit's counts that are not zero."""
        return {name: count for name, count in (await self.audit()).states.items() if count}


@asynccontextmanager
async def world(path: Path, limits: DispatchLimits | None = None) -> AsyncIterator[World]:
    clock = HandClock()
    store = await SqliteStore.open(path)
    found = World(store, clock)
    await found.open(limits)
    try:
        yield found
        assert found.fatal == []
    finally:
        await store.close()
