"""Adoption of a dead boot: the real store, bus and presence, time moved by hand (dispatch/adoption.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastim.bus.base import NODE_GROUP, Outgoing, inbox_topic
from fastim.bus.records import Nudge
from fastim.dispatch.adoption import Adopter
from fastim.store.base import DueRow
from fastim.store.sqlite import SqliteStore
from tests.system.dispatch_world import LIMITS, HandClock, World, client_id, item

CLUSTER = LIMITS.__class__(
    retry_first_ms=1, retry_most_ms=1, store_patience_ms=0, bus_patience_ms=0, mark_interval_ms=0,
    adopt_look_ms=1,
)  # fmt: skip
LOOK_MS = 500
DEAD = ("n1", 1)
INBOX = inbox_topic(*DEAD)


class Cluster(World):
    """n1 and n2 have registered their boots; n1 can die."""

    async def die(self, node: str = "n1") -> None:
        """kill -9, and its lease has ended since."""
        await self.inboxes.pop(node).close()
        await self.presence.end_lease(node, 1)

    def adopter(self, holder: str = "dispatch") -> Adopter:
        return self.build(self.presence, holder).adopter

    async def look(self, *adopters: Adopter, times: int) -> None:
        for _ in range(times):
            self.clock.passed_ms += LOOK_MS
            for adopter in adopters:
                await adopter.look()
            await asyncio.sleep(0.005)  # turns of the adoptions' own tasks; what is waited for is polled

    async def until(self, met: Callable[[], bool], *adopters: Adopter) -> None:
        """Looks until it is so, at most a minute of hand-moved time."""
        for _ in range(120):
            if met():
                return
            await self.look(*adopters, times=1)
        raise AssertionError("a minute has passed")

    async def due_rows(self) -> list[DueRow]:
        self.clock.passed_ms += 60_000
        return await self.store.claim_due("test", self.clock.wall_ms(), 1, 100)

    async def open_boots(self) -> list[tuple[str, int]]:
        return [(found.node, found.boot) for found in await self.store.open_boots()]


@asynccontextmanager
async def cluster(path: Path) -> AsyncIterator[Cluster]:
    store = await SqliteStore.open(path)
    found = Cluster(store, HandClock())
    await found.open(CLUSTER)
    for node in ("n1", "n2"):
        await store.open_boot(node, 1)
    try:
        yield found
        assert found.fatal == []
    finally:
        await store.close()


async def three_for_bob(w: Cluster) -> None:
    """bob is attached to n1, which will not write them to him any more."""
    await w.known("alice", "bob")
    await w.attach("alice", "n2")
    await w.attach("bob", "n1")
    for number in range(1, 4):
        await w.send("p:alice:bob", "alice", item(number))
    await w.work()


async def stopped(*adopters: Adopter) -> None:
    for adopter in adopters:
        adopter._patience.stop()
        await asyncio.gather(*adopter._under_way.values())


async def test_the_inbox_of_a_dead_node_becomes_due_rows_and_is_deleted(tmp_path: Path) -> None:
    async with cluster(tmp_path) as w:
        await three_for_bob(w)
        await w.die()
        adopter = w.adopter()
        await w.look(adopter, times=8)
        assert not await w.store.fenced(*DEAD)
        await w.look(adopter, times=1)
        assert await w.store.fenced(*DEAD)
        await w.until(lambda: adopter._flows.adopted == 1, adopter)
        assert INBOX not in w.bus.topics()
        assert await w.open_boots() == [("n2", 1)]
        (row,) = await w.due_rows()
        assert (row.user, row.conv, row.from_seq) == ("bob", "p:alice:bob", 1)
        await stopped(adopter)


async def test_due_rows_stand_long_before_the_inbox_is_deleted(tmp_path: Path) -> None:
    async with cluster(tmp_path) as w:
        await three_for_bob(w)
        await w.die()
        adopter = w.adopter()
        await w.until(lambda: adopter._flows.taken_over >= 3, adopter)
        assert INBOX in w.bus.topics()
        assert (await w.store.next_due_ms()) <= w.clock.wall_ms()
        await stopped(adopter)


async def test_a_record_that_was_still_on_its_way_is_taken_too(tmp_path: Path) -> None:
    async with cluster(tmp_path) as w:
        await three_for_bob(w)
        await w.die()
        adopter = w.adopter()
        await w.until(lambda: adopter._flows.taken_over >= 3, adopter)
        await w.look(adopter, times=5)
        before = adopter._flows.taken_over
        await w.bus.publish([Outgoing(INBOX, "bob", Nudge("bob", "p:alice:bob", 1))])
        await w.until(lambda: adopter._flows.adopted == 1, adopter)
        assert adopter._flows.taken_over == before + 1
        await stopped(adopter)


async def test_a_node_whose_lease_was_only_flushed_is_not_fenced(tmp_path: Path) -> None:
    async with cluster(tmp_path) as w:
        adopter = w.adopter()
        for _ in range(5):
            w.presence.flush()
            await w.look(adopter, times=4)
            for node in ("n1", "n2"):
                await w.presence.open_lease(node, 1, 10**12)
            await w.look(adopter, times=1)
        assert not await w.store.fenced(*DEAD)
        await stopped(adopter)


async def test_two_dispatchers_see_the_same_and_one_adopts(tmp_path: Path) -> None:
    async with cluster(tmp_path) as w:
        await three_for_bob(w)
        await w.die()
        first, second = w.adopter("d1"), w.adopter("d2")
        await w.until(lambda: first._flows.adopted + second._flows.adopted == 1, first, second)
        await w.look(first, second, times=20)
        assert (first._flows.adopted, second._flows.adopted) == (1, 0)
        assert second._flows.taken_over == 0
        await stopped(first, second)


async def test_another_dispatcher_finishes_what_a_dead_one_began(tmp_path: Path) -> None:
    async with cluster(tmp_path) as w:
        await three_for_bob(w)
        await w.die()
        first, second = w.adopter("d1"), w.adopter("d2")
        await w.until(lambda: first._flows.taken_over == 6, first)  # three are SENTs
        await stopped(first)
        assert w.bus.committed(INBOX, NODE_GROUP) == 0
        await w.until(lambda: second._flows.adopted == 1, second)
        assert second._flows.taken_over == 6
        assert await w.open_boots() == [("n2", 1)]
        await stopped(second)


async def test_an_inbox_that_is_gone_ends_its_boot(tmp_path: Path) -> None:
    async with cluster(tmp_path) as w:
        await w.die()
        await w.bus.delete(INBOX)
        adopter = w.adopter()
        await w.until(lambda: adopter._flows.adopted == 1, adopter)
        assert await w.open_boots() == [("n2", 1)]
        await stopped(adopter)


async def test_nothing_is_deleted_while_the_lease_of_a_fenced_node_lives(tmp_path: Path) -> None:
    """It woke up and opened its lease before it asked for a fence: routers still send to it."""
    async with cluster(tmp_path) as w:
        await w.store.fence(*DEAD, "d9", w.clock.wall_ms(), 1)
        await w.inboxes.pop("n1").close()
        adopter = w.adopter()
        await w.look(adopter, times=60)
        assert INBOX in w.bus.topics()
        await w.presence.end_lease(*DEAD)
        await w.until(lambda: adopter._flows.adopted == 1, adopter)
        await stopped(adopter)


async def test_who_publishes_too_late_asks_for_due_rows_himself(tmp_path: Path) -> None:
    """Between the question where bob is and the publish the dispatcher stood still."""
    async with cluster(tmp_path) as w:
        await w.known("alice", "bob")
        await w.attach("bob", "n1")

        def stand_still() -> None:
            w.clock.passed_ms += CLUSTER.publish_window_ms + 1

        w.at_next_lookup(stand_still)
        await w.send("p:alice:bob", "alice", item(1), reply=False)
        await w.work()
        assert len(await w.delivers("n1")) == 1
        assert [row.user for row in await w.due_rows()] == ["bob"]


async def test_a_message_for_a_deleted_inbox_is_a_message_for_somebody_who_moved(tmp_path: Path) -> None:
    async with cluster(tmp_path) as w:
        await w.known("alice", "bob")
        await w.attach("bob", "n1")
        await w.bus.delete(INBOX)
        await w.send("p:alice:bob", "alice", item(1), reply=False)
        await w.work()
        (row,) = await w.due_rows()
        assert (row.user, row.from_seq) == ("bob", 1)
        assert (await w.store.find(client_id=client_id(1))) is not None
