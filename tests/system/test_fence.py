"""A node that was adopted while it slept, and one whose lease was only forgotten (node/fence.py)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fastim.bus.base import Outgoing, inbox_topic
from fastim.bus.records import Nudge
from fastim.errors import Fenced, PresenceUnavailable
from fastim.node.limits import NodeLimits
from fastim.node.service import Node
from fastim.protocol import CloseCode
from fastim.store.sqlite import SqliteStore
from tests.system.node_world import NodeWorld, _never, until

CONV = "p:alice:bob"


class Adoptable(NodeWorld):
    """The node n1 boot 1 of a cluster; time, renewals and questions are the test's."""

    def make_node(self, boot: int = 1) -> Node:
        self.fenced: list[Fenced] = []
        node = Node(
            "n1", boot, store=self.store, bus=self.bus, presence=self.presence,  # type: ignore[arg-type]
            hub=self.hub, acks=self.acks, wheel=self.wheel, verify=self.verify, clock=self.clock,
            rng=random.Random(7), limits=self.limits, adoptable=True, on_fatal=self.fatal.append,
            on_fenced=self.fenced.append,
        )  # fmt: skip
        node._sweep = node._hold_lease = node._watch_fence = _never  # type: ignore[method-assign]
        return node

    @property
    def unread(self) -> bool:
        return self._unread()

    async def adopt(self) -> None:
        assert await self.real_store.fence("n1", 1, "dispatch", self.clock.wall_ms(), 10_000)


@asynccontextmanager
async def adoptable(path: Path) -> AsyncIterator[Adoptable]:
    store = await SqliteStore.open(path, synchronous="OFF")
    try:
        world = Adoptable(store, NodeLimits(flush_interval_ms=0, lease_ms=10**15))
        await world.open()
        world.unsettled_at_end = True  # an adopted inbox is not this node's to settle
        try:
            yield world
        finally:
            await world.close()
    finally:
        await store.close()


async def test_a_start_is_listed_before_anything_can_be_sent_to_it(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        assert w.store.calls[0] == "open_boot"
        assert [(found.node, found.boot) for found in await w.real_store.open_boots()] == [("n1", 1)]


async def test_a_fenced_node_closes_its_sockets_though_its_lease_lives(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        bob = await w.level("bob")
        await w.adopt()
        await w.node.ask_fence()
        await until(lambda: bob.close_code)
        assert bob.close_code == CloseCode.DRAINING
        assert len(w.fenced) == 1
        assert not w.node.ready
        await w.node.ask_fence()
        assert len(w.fenced) == 1


async def test_a_fenced_node_reads_nothing_more_and_its_users_are_nowhere(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        await w.level("bob")
        await w.adopt()
        await w.node.ask_fence()
        await until(lambda: not w.node._short)
        await w.real_bus.publish([Outgoing(w.node.inbox, "bob", Nudge("bob", CONV, 1))])
        assert w.unread
        assert await w.online("bob") == []
        assert await w.real_presence.nodes() == []


async def test_what_was_acknowledged_before_the_fence_was_seen_still_counts(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        bob = await w.level("bob")
        await w.send(CONV, "alice", b"one", to=("bob",))
        await w.adopt()
        bob.ack()
        await w.quiet()
        await w.node.ask_fence()
        await until(lambda: bob.close_code)
        assert await w.cursor("bob", CONV) == 1


async def test_who_dials_a_fenced_node_is_sent_elsewhere(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        await w.adopt()
        await w.node.ask_fence()
        peer = w.dial()
        await until(lambda: peer.close_code)
        assert peer.close_code == CloseCode.DRAINING


async def test_the_same_process_comes_back_with_a_new_boot(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        bob = await w.level("bob")
        await w.send(CONV, "alice", b"one", to=("bob",))
        await w.adopt()
        await w.node.ask_fence()
        await until(lambda: bob.close_code)
        await w.node.stop()
        w.node = w.make_node(boot=2)
        await w.node.start()
        again = await w.connect("bob")
        assert again.seqs(CONV) == [1]
        assert await w.real_presence.nodes() == [("n1", 2)]


async def test_a_missing_lease_is_registered_again_and_keeps_the_sockets(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        bob = await w.level("bob")
        w.real_presence.flush()
        await w.node.renew_lease()
        await w.quiet()
        assert not bob.close_code
        assert await w.online("bob") == ["phone"]
        assert w.node.ready


async def test_a_lease_that_was_flushed_while_the_node_slept_is_not_opened_after_a_fence(
    tmp_path: Path,
) -> None:
    async with adoptable(tmp_path) as w:
        bob = await w.level("bob")
        w.real_presence.flush()
        await w.adopt()
        await w.node.renew_lease()
        await until(lambda: bob.close_code)
        assert "open_lease" not in w.presence.calls[1:]
        assert await w.real_presence.nodes() == []


async def test_nobody_is_attached_under_a_lease_that_was_not_cleared(tmp_path: Path) -> None:
    """Fenced between the question before open_lease and the one after it, while somebody logs in."""
    async with adoptable(tmp_path) as w:
        w.real_presence.flush()
        w.store.late = True
        w.presence.late = True
        w.presence.hold("open_lease")
        renewing = asyncio.create_task(w.node.renew_lease(), name="test.renew")
        await until(lambda: w.presence.held["open_lease"])
        await w.adopt()
        peer = w.dial()
        w.auth(peer, "bob")
        await until(lambda: peer.close_code)
        assert await w.online("bob") == []
        w.presence.let_go("open_lease")
        await renewing
        assert len(w.fenced) == 1
        await until(lambda: not w.node._short)
        assert await w.real_presence.nodes() == []


async def test_a_store_that_is_away_fences_nobody_and_ends_no_lease(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        bob = await w.level("bob")
        w.store.failing["fenced"] = 3
        await w.node.ask_fence()
        await w.node.renew_lease()
        assert w.fenced == []
        assert not bob.close_code
        assert await w.online("bob") == ["phone"]


async def test_an_inbox_that_is_gone_means_the_same_as_a_fence(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        bob = await w.level("bob")
        await w.real_bus.delete(w.node.inbox)
        await until(lambda: bob.close_code)
        assert bob.close_code == CloseCode.DRAINING
        assert len(w.fenced) == 1


async def test_a_start_that_was_adopted_on_the_way_leaves_nothing_behind(tmp_path: Path) -> None:
    async with adoptable(tmp_path) as w:
        await w.quiet()
        await w.node.stop()
        await w.real_store.fence("n1", 2, "dispatch", w.clock.wall_ms(), 10_000)
        w.node = w.make_node(boot=2)
        with pytest.raises(Fenced):
            await w.node.start()
        assert inbox_topic("n1", 2) not in w.real_bus.topics()
        assert await w.real_presence.nodes() == []
        with pytest.raises(PresenceUnavailable):
            await w.real_presence.attach("bob", "phone", "app", "n1", 2, "s")
