"""fastim.dispatch.checkpoints, turned look by look; dispatchers, nodes and adopters are this test."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastim.bus.base import DISPATCH_GROUP, NODE_GROUP, SUBMIT, Outgoing, Reader, inbox_topic
from fastim.bus.memory import MemoryBus
from fastim.dispatch.checkpoints import Checkpoints
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Patience
from fastim.dispatch.settled import ask_due_above
from fastim.model import Kind
from fastim.store.base import AppendFrame, AppendItem
from fastim.store.sqlite import SqliteStore

CONV = "p:alice:bob"
INBOX = inbox_topic("n1", 1)
NOW_MS = 1_800_000_000_000


class World:
    def __init__(self, store: SqliteStore, bus: MemoryBus) -> None:
        limits = DispatchLimits()
        self.store = store
        self.bus = bus
        self.checkpoints = Checkpoints(store, bus, limits, Patience(limits, random.Random(1)), Flows())
        self.submits = bus.reader(SUBMIT, DISPATCH_GROUP, max_unsettled=100)
        self.inbox = bus.reader(INBOX, NODE_GROUP, max_unsettled=100)
        self._count = 0

    async def store_one(self) -> int:
        """A record of `submit` and the message that a dispatcher stored of it. Returns its msg_id."""
        self._count += 1
        await self.bus.publish([Outgoing(SUBMIT, CONV, b"x")])
        item = AppendItem(self._count.to_bytes(16, "big"), int(Kind.TEXT), b"hello")
        (result,) = await self.store.append([AppendFrame(CONV, "alice", (item,), 0, False)], NOW_MS)
        return result.items[0].msg_id

    async def deliver(self) -> None:
        await self.bus.publish([Outgoing(INBOX, CONV, b"y")])

    async def mark(self) -> int:
        await self.checkpoints.look()
        return await self.store.settled_mark()


async def settle_all(reader: Reader) -> None:
    reader.settle_all(await reader.read(100))


@asynccontextmanager
async def world(directory: Path) -> AsyncIterator[World]:
    store = await SqliteStore.open(directory)
    bus = MemoryBus()
    await bus.ensure(SUBMIT, 3)
    await bus.ensure(INBOX)
    await store.open_boot("n1", 1)
    here = World(store, bus)
    try:
        yield here
    finally:
        await here.submits.close()
        await here.inbox.close()
        await store.close()


async def test_mark_waits_for_records_of_submit_and_then_for_delivers(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        msg_id = await here.store_one()
        assert await here.mark() == 0
        await here.deliver()
        await settle_all(here.submits)
        assert await here.mark() == 0
        await settle_all(here.inbox)
        assert await here.mark() == msg_id


async def test_mark_does_not_wait_for_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        first = await here.store_one()
        assert await here.mark() == 0
        await settle_all(here.submits)
        second = await here.store_one()
        await here.deliver()
        assert await here.mark() == 0
        await settle_all(here.inbox)
        await here.deliver()
        assert await here.mark() == first
        await settle_all(here.submits)
        await here.mark()
        assert await here.mark() == first
        await settle_all(here.inbox)
        assert await here.mark() == second


async def test_boot_that_ended_holds_nothing_up(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        msg_id = await here.store_one()
        await here.deliver()
        await settle_all(here.submits)
        assert await here.mark() == 0
        await here.bus.delete(INBOX)
        # Deleted, but its adopter has not said so yet.
        assert await here.mark() == 0
        await here.store.end_boot("n1", 1)
        assert await here.mark() == msg_id


async def test_idle_store_costs_two_questions(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        assert await here.mark() == 0
        msg_id = await here.store_one()
        await settle_all(here.submits)
        assert await here.mark() == msg_id
        assert await here.mark() == msg_id


async def test_everything_open_above_the_mark_gets_a_due_row(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.store_one()
        await settle_all(here.submits)
        settled = await here.mark()
        msg_id = await here.store_one()
        asked = await ask_due_above(here.store, msg_id, NOW_MS, NOW_MS, "d1.1", 10)
        assert asked == 1
        rows = await here.store.claim_due("d1.1", NOW_MS, 1_000, 10)
        assert [(row.user, row.conv, row.from_seq) for row in rows] == [("bob", CONV, 2)]
        assert settled < msg_id
