"""The node as a whole: O1-O3 of service.py, drain, stop, lease, idle eviction, and time that stood still."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fastim.bus.records import Mark, Nudge
from fastim.errors import BusUnavailable, PresenceUnavailable, StoreUnavailable
from fastim.node.limits import NodeLimits
from fastim.protocol import Changes, CloseCode, Goaway, Hello, Level, Msg, Ping, ReadMark
from fastim.store.sqlite import SqliteStore
from tests.system.node_world import NodeWorld, Peer, node_world, until

CONV = "p:alice:bob"


async def pair(w: NodeWorld) -> Peer:
    await w.known("alice")
    return await w.level("bob")


# ---------------------------------------------------------------------------------------------------- start


async def test_nothing_is_accepted_before_inbox_and_lease_exist(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path, synchronous="OFF")
    w = NodeWorld(store, NodeLimits(flush_interval_ms=0))
    try:
        assert (w.hub.accept, w.node.ready) == (None, False)
        w.presence.hold("open_lease")
        opening = asyncio.create_task(w.open(), name="test.open")
        await until(lambda: w.presence.waiting)
        assert w.node.inbox in w.real_bus.topics()
        assert (w.hub.accept, w.node.ready) == (None, False)
        w.presence.let_go("open_lease")
        await opening
        assert w.hub.accept is not None
        assert w.node.ready
        assert ("n1", 1) in await w.real_presence.nodes()
    finally:
        await w.close()
        await store.close()


@pytest.mark.parametrize(("port", "call"), [("bus", "ensure"), ("presence", "open_lease")])
async def test_a_start_without_a_backend_raises_and_accepts_nothing(
    tmp_path: Path, port: str, call: str
) -> None:
    store = await SqliteStore.open(tmp_path, synchronous="OFF")
    w = NodeWorld(store, NodeLimits())
    try:
        getattr(w, port).failing[call] = 1
        with pytest.raises((BusUnavailable, PresenceUnavailable)):
            await w.node.start()
        assert (w.hub.accept, w.node.ready) == (None, False)
        await w.node.start()
        assert w.node.ready
    finally:
        await w.close()
        await store.close()


# --------------------------------------------------------------------------------------------- drain and stop


async def test_a_draining_node_asks_clients_away_and_takes_no_new_ones(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        w.node.go_away(5_000, "restart")
        await w.quiet()
        assert bob.of(Goaway) == [Goaway(5_000, "restart")]
        assert (w.node.ready, bob.close_code) == (False, 0)
        await w.send(CONV, "alice", b"still served", to=("bob",))
        assert bob.seqs() == [1]
        late = w.dial()
        await w.quiet()
        assert late.close_code == CloseCode.RESTART
        bob.ack()


async def test_a_stop_flushes_acks_leaves_due_rows_and_ends_the_lease(tmp_path: Path) -> None:
    async with node_world(tmp_path, flush_interval_ms=60_000) as w:
        bob = await pair_without_waiting(w)
        messages = await w.append(CONV, "alice", b"1", b"2", b"3")
        await deliver_without_waiting(w, messages)
        bob.ack(bob.tags()[-2])
        await asyncio.sleep(0)
        await stop(w)
        assert bob.close_code == CloseCode.RESTART
        assert await w.cursor("bob", CONV) == 2
        assert await w.states(CONV, "bob") == ["acked", "acked", "due"]
        assert (await w.real_presence.nodes(), await w.online("bob")) == ([], [])
        assert w.committed == w.published


async def pair_without_waiting(w: NodeWorld) -> Peer:
    await w.known("alice")
    bob = w.dial()
    w.auth(bob, "bob")
    await until(lambda: bob.of(Level))
    return bob


async def deliver_without_waiting(w: NodeWorld, messages: list) -> None:  # type: ignore[type-arg]
    quiet, w.quiet = w.quiet, _nothing  # type: ignore[method-assign]
    await w.deliver(messages, "bob")
    w.quiet = quiet  # type: ignore[method-assign]
    peer = w.peers[-1]
    await until(lambda: len(peer.of(Msg)) == len(messages))


async def _nothing() -> None:
    pass


async def stop(w: NodeWorld) -> None:
    ticking = asyncio.create_task(w._tick(), name="test.tick")
    await w.node.stop()
    ticking.cancel()
    await asyncio.gather(ticking, return_exceptions=True)


async def test_what_waits_in_the_inbox_at_a_stop_becomes_due_rows(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        messages = await w.append(CONV, "alice", *[b"%d" % n for n in range(50)])
        quiet, w.quiet = w.quiet, _nothing  # type: ignore[method-assign]
        await w.deliver(messages, "bob")
        w.quiet = quiet  # type: ignore[method-assign]
        await stop(w)
        assert bob.close_code == CloseCode.RESTART
        assert w.committed == w.published == 50
        assert set(await w.states(CONV, "bob")) == {"due"}


async def test_a_stop_waits_for_the_flush_in_hand(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        w.store.hold("flush")
        bob.ack()
        await until(lambda: w.store.waiting, "a flush is in hand")
        bob.vanish()
        stopping = asyncio.create_task(stop(w), name="test.stop")
        await asyncio.sleep(0.02)
        assert not stopping.done()
        w.store.let_go("flush")
        await stopping
        assert await w.states(CONV, "bob") == ["acked"]
        assert w.committed == w.published


async def test_a_stop_while_the_store_is_away_gives_the_records_back(tmp_path: Path) -> None:
    async with node_world(tmp_path, retry_first_ms=1, retry_most_ms=1) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        w.unsettled_at_end = True
        w.store.failing["flush"] = 10**9
        bob.ack()
        import fastim.node.service as service

        patience, service._STOP_FLUSH_MS = service._STOP_FLUSH_MS, 20
        try:
            await stop(w)
        finally:
            service._STOP_FLUSH_MS = patience
        assert w.published - w.committed == 1
        assert await w.states(CONV, "bob") == ["unsettled"]


async def test_a_login_that_is_under_way_at_a_stop_ends_with_it(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        w.store.hold("register_device")
        peer = w.dial()
        w.auth(peer, "bob")
        await until(lambda: w.store.waiting, "the login is held")
        asyncio.get_running_loop().call_later(0.01, w.store.let_go, "register_device")
        await stop(w)
        await asyncio.sleep(0)
        assert w.node.connections == 0
        assert await w.online("bob") == []
        assert (not peer.of(Hello)) or peer.close_code == CloseCode.RESTART


async def test_a_second_stop_does_no_harm(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await pair(w)
        await stop(w)
        await stop(w)


# ---------------------------------------------------------------------------------------------------- lease


async def test_a_lease_that_is_missing_is_registered_again_and_every_session_synced(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice")
        bob, laptop = await w.level("bob"), await w.level("bob", "laptop")
        away = await w.level("dave")
        away.vanish()
        await w.quiet()
        await w.real_presence.end_lease("n1", 1)  # flushed
        await w.append(CONV, "alice", b"parked meanwhile")
        assert await w.online("bob") == []
        await w.node.renew_lease()
        await w.quiet()
        assert w.node.ready
        assert await w.online("bob") == ["laptop", "phone"]
        assert await w.online("dave") == []
        assert (bob.seqs(), laptop.seqs()) == ([1], [1])
        assert (len(bob.of(Level)), bob.close_code) == (2, 0)
        bob.ack()
        laptop.ack()


async def test_presence_that_is_away_keeps_sockets_and_is_registered_with_when_it_returns(
    tmp_path: Path,
) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        w.presence.failing["renew"] = 1
        await w.node.renew_lease()
        assert bob.close_code == 0
        await w.real_presence.end_lease("n1", 1)
        w.presence.failing.update(open_lease=1, attach=1)
        for _ in range(2):
            await w.node.renew_lease()
            assert not w.node.ready
        await w.node.renew_lease()
        await w.quiet()
        assert (w.node.ready, await w.online("bob"), bob.close_code) == (True, ["phone"], 0)
        bob.ack()


@pytest.mark.parametrize("late", [False, True])
async def test_a_session_that_ends_while_the_node_registers_again_holds_up_nobody(
    tmp_path: Path, late: bool
) -> None:
    async with node_world(tmp_path) as w:
        peers = [await w.level(user) for user in ("ann", "bea", "cleo")]
        await w.real_presence.end_lease("n1", 1)
        w.presence.late = late
        w.presence.hold("attach")
        renewing = asyncio.create_task(w.node.renew_lease(), name="test.renew")
        await until(lambda: w.presence.waiting, "the first attach is held")
        peers[0].vanish()
        await until(lambda: w.session_of(peers[0]).link is None)
        w.presence.let_go("attach")
        await renewing
        await w.quiet()
        assert w.node.ready
        assert [await w.online(user) for user in ("ann", "bea", "cleo")] == [[], ["phone"], ["phone"]]
        for peer in peers[1:]:
            peer.ack()


async def test_a_login_across_a_lost_lease_ends_up_registered(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        w.store.hold("unread")
        peer = w.dial()
        w.auth(peer, "bob")
        await until(lambda: w.store.waiting, "attached, not yet greeted")
        await w.real_presence.end_lease("n1", 1)
        await w.node.renew_lease()
        assert await w.online("bob") == ["phone"]
        w.store.let_go("unread")
        await w.quiet()
        assert isinstance(peer.frames[0], Hello)
        assert await w.online("bob") == ["phone"]
        session = w.session_of(peer)
        (located,) = (await w.real_presence.locate(["bob"])).values()
        assert located.attachments[0].generation == session.generation
        peer.ack()


async def test_without_a_lease_nobody_is_let_in(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.real_presence.end_lease("n1", 1)
        peer = await w.connect("bob")
        assert (peer.close_code, peer.of(Hello)) == (CloseCode.TRY_LATER, [])
        await w.node.renew_lease()
        assert (await w.level("bob")).close_code == 0


# ------------------------------------------------------------------------------------------------- eviction


async def test_a_silent_peer_is_evicted_between_30_and_31_seconds(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob, carol = await w.level("bob"), await w.level("carol")
        await w.pass_ms(29_750)
        carol.say(Ping())
        assert bob.close_code == 0
        await w.pass_ms(750)
        assert (bob.close_code, carol.close_code) == (CloseCode.IDLE, 0)
        assert await w.online("bob") == []


async def test_a_peer_that_never_authenticates_is_ended(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        peer = w.dial()
        await w.pass_ms(5_250)
        assert peer.close_code == CloseCode.AUTH


async def test_a_process_that_stood_still_evicts_nobody_and_reads_acks_first(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        await w.pass_ms(250)
        w.clock.passed_ms += 60_000
        w.node.sweep(w.clock.mono_ms())
        assert bob.close_code == 0
        bob.say(Ping())
        bob.ack()
        await w.quiet()
        await w.pass_ms(2_000)
        assert bob.close_code == 0
        assert await w.states(CONV, "bob") == ["acked"]
        assert w.node.flows()["late"] == 0


async def test_after_a_standstill_a_dead_peer_is_found_all_the_same(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        await w.pass_ms(250)
        bob.dead = True
        w.clock.passed_ms += 60_000
        await w.pass_ms(2_000)
        await w.inbox(Nudge("bob", CONV, 1))  # what dispatch makes of the record of the timeout
        await w.pass_ms(6_500)
        assert (await w.online("bob"), bob.link.told) == ([], 1)


@pytest.mark.parametrize("jump_ms", [-3_600_000, 3_600_000])
async def test_a_wall_clock_that_jumps_evicts_nobody(tmp_path: Path, jump_ms: int) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        wall = w.clock.wall_ms
        w.clock.wall_ms = lambda: wall() + jump_ms  # type: ignore[method-assign]
        await w.send(CONV, "alice", b"1", to=("bob",))
        await w.pass_ms(2_000)
        bob.ack()
        await w.quiet()
        assert (bob.close_code, await w.states(CONV, "bob")) == (0, ["acked"])


# --------------------------------------------------------------------------------------------------- fatal


async def test_a_task_that_dies_is_fatal_once_and_the_node_is_not_ready(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        w.store.error = lambda text: StoreUnavailable(text, temporary=False)
        w.store.failing["flush"] = 1
        bob.ack()
        await until(lambda: w.fatal, "on_fatal")
        assert [type(error) for error in w.fatal] == [StoreUnavailable]
        assert not w.node.ready
        w.fatal.clear()
        w.unsettled_at_end = True


@pytest.mark.parametrize("name", ["conversations", "stream"])
async def test_a_store_that_will_not_come_back_is_fatal(tmp_path: Path, name: str) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.append(CONV, "alice", b"1")
        w.store.error = lambda text: StoreUnavailable(text, temporary=False)
        w.store.failing[name] = 1
        w.dial()
        w.auth(w.peers[-1], "bob")
        await until(lambda: w.fatal, "on_fatal")
        w.fatal.clear()


async def test_a_bug_in_a_login_closes_that_link_and_is_fatal(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        w.store.error = lambda text: ZeroDivisionError(text)  # type: ignore[assignment, return-value]
        w.store.failing["register_device"] = 1
        peer = w.dial()
        w.auth(peer, "bob")
        await until(lambda: w.fatal, "on_fatal")
        await until(lambda: peer.close_code)
        assert peer.close_code == CloseCode.INTERNAL
        w.fatal.clear()


# --------------------------------------------------------------------------------------------- the counters


async def test_flows_only_grow_and_name_what_happened(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        before = w.node.flows()
        await w.send(CONV, "alice", b"1", b"2", to=("bob", "nobody"))
        bob.ack()
        await w.inbox(Nudge("bob", CONV, 1), Mark(CONV, "alice", 1, ["bob"], ""))
        after = w.node.flows()
        assert all(after[name] >= count for name, count in before.items())
        grown = {name: after[name] - before[name] for name in ("acked", "delivered", "moved", "syncs")}
        assert grown == {"acked": 2, "delivered": 2, "moved": 2, "syncs": 0}
        assert (w.node.sessions, w.node.connections) == (1, 1)
        assert bob.of(ReadMark)
        assert bob.of(Changes)


async def test_many_sessions_come_and_go_and_nothing_is_left(tmp_path: Path) -> None:
    async with node_world(tmp_path, resume_ttl_ms=1_000, retry_first_ms=1) as w:
        await w.known("alice")
        for round_ in range(4):
            users = [f"u{n}" for n in range(12)]
            peers = [await w.connect(user) for user in users]
            for user, peer in zip(users, peers, strict=True):
                await w.send(f"p:alice:{user}", "alice", b"%d" % round_, to=(user,))
                if round_ % 2:
                    peer.ack()
            for number, peer in enumerate(peers):
                (peer.vanish, peer.leave)[number % 2]()
            await w.pass_ms(1_500)
        node = w.node
        assert (node.sessions, w.unsettled, w.acks.count) == (0, 0, 0)
        assert node.pool._by_user == {}
        assert node.pool._detached == {}
        assert w.hub.links == {}
        assert w.wheel.count == 0
        assert not node._short
