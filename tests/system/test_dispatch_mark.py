"""The settled mark, recovery above it (M1-M3), and a Dispatch with all its tasks, over the real store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fastim.bus.base import SUBMIT, Outgoing, inbox_topic
from fastim.bus.records import Nudge, encode
from fastim.dispatch.service import Dispatch
from fastim.errors import StoreUnavailable, UsageError
from fastim.presence.memory import MemoryPresence
from tests.faults.recording_vendor import RecordingVendor
from tests.system.dispatch_world import LIMITS, World, item, world

CONV = "p:alice:bob"


async def pair(w: World) -> None:
    await w.known("alice", "bob", "carol")
    await w.attach("alice")
    await w.attach("bob", "n2")


async def advance(w: World) -> int:
    """Move the mark as far as it goes; where it is then."""
    await w.dispatch.mark.advance()
    return await w.store.settled_mark()


# ---------------------------------------------------------------------- M1: never past what is not settled


async def test_the_mark_waits_until_the_inbox_has_settled_the_deliver(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        reply = await w.exchange(CONV, "alice", item(1))
        assert await advance(w) == 0
        await w.ack("bob", CONV, 1, 1)
        await w.settle_inbox("n2")
        assert await advance(w) == reply.sent[0].msg_id
        assert await w.states() == {"acked": 1}


async def test_the_mark_waits_for_every_inbox_of_a_batch(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.attach("carol", "n1")
        await w.exchange(CONV, "alice", item(1))
        last = await w.exchange("p:alice:carol", "alice", item(2))
        await w.settle_inbox("n1")
        assert await advance(w) == 0
        await w.settle_inbox("n2")
        assert await advance(w) == last.sent[0].msg_id


async def test_a_later_batch_that_is_settled_first_moves_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.attach("carol", "n1")
        first = await w.exchange(CONV, "alice", item(1))
        assert await advance(w) == 0
        second = await w.exchange("p:alice:carol", "alice", item(2))
        await w.settle_inbox("n1")
        assert await advance(w) == 0
        await w.settle_inbox("n2")
        assert await advance(w) == second.sent[0].msg_id > first.sent[0].msg_id


async def test_what_is_parked_at_once_needs_no_inbox(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        reply = await w.exchange(CONV, "alice", item(1))
        assert await advance(w) == reply.sent[0].msg_id
        assert await w.states() == {"parked": 1}


async def test_a_batch_waits_only_for_the_inboxes_that_took_its_own_delivers(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.exchange(CONV, "alice", item(1))
        await w.ack("bob", CONV, 1, 1)
        await w.settle_inbox("n2")
        await advance(w)
        await w.bus.publish([Outgoing(inbox_topic("n2", 1), "k", encode(Nudge("bob", CONV, 1)))])
        reply = await w.exchange("p:alice:carol", "alice", item(2))
        assert await advance(w) == reply.sent[0].msg_id


async def test_what_is_unsettled_is_in_flight_and_not_lost(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.exchange(CONV, "alice", item(1), item(2))
        await advance(w)
        assert await w.states() == {"unsettled": 2}
        assert (await w.audit()).in_flight == 2


async def test_the_mark_does_not_move_while_the_store_is_away_and_catches_up(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        reply = await w.exchange(CONV, "alice", item(1))
        await w.settle_inbox("n1")
        w.faults.failing["settle"] = 1
        with pytest.raises(StoreUnavailable):
            await w.dispatch.mark.advance()
        assert await w.store.settled_mark() == 0
        assert await advance(w) == reply.sent[0].msg_id


async def test_refusals_alone_move_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.exchange(CONV, "alice", item(1, kind=99))
        calls = len(w.faults.calls)
        assert await advance(w) == 0
        assert "settle" not in w.faults.calls[calls:]


async def test_a_mark_that_stands_still_costs_no_transaction(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.exchange(CONV, "alice", item(1))
        await w.settle_inbox("n1")
        await advance(w)
        calls = len(w.faults.calls)
        await w.dispatch.mark.advance()
        assert w.faults.calls[calls:] == []


# ------------------------------------------------------------------------------ M2: an inbox that vanished


async def test_an_inbox_that_vanished_with_unsettled_records_leaves_due_rows(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        reply = await w.exchange(CONV, "alice", item(1), item(2))
        await w.ack("bob", CONV, 1, 1)
        assert await advance(w) == 0
        await w.bus.delete(inbox_topic("n2", 1))
        assert await advance(w) == reply.sent[1].msg_id
        assert await w.states() == {"acked": 1, "due": 1}
        assert await w.next_due_in_ms() == w.limits.first_due_ms


async def test_an_inbox_that_vanished_settled_holds_nothing_up_and_asks_for_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        reply = await w.exchange(CONV, "alice", item(1))
        await w.ack("bob", CONV, 1, 1)
        await w.settle_inbox("n2")
        await w.bus.delete(inbox_topic("n2", 1))
        assert await advance(w) == reply.sent[0].msg_id
        assert await w.next_due_in_ms() is None


# -------------------------------------------------------------------------------------------- M3: recovery


async def again(w: World) -> World:
    """The process died and started again: the store is what is left."""
    after = World(w.store, w.clock, boot=w.boot + 1)
    await after.open()
    return after


async def test_recovery_asks_for_a_due_row_per_user_and_conversation_above_the_mark(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.store.create_group("team", "alice", ["alice", "bob", "carol"], w.clock.wall_ms())
        await w.exchange(CONV, "alice", item(1), item(2))
        last = await w.exchange("g:team", "alice", item(3))
        w = await again(w)
        assert await w.dispatch.mark.recover() is True
        assert await w.store.settled_mark() >= last.sent[0].msg_id
        assert await w.next_due_in_ms() == w.limits.reconnect_window_ms
        states = await w.states()
        assert "unsettled" not in states
        rows = await w.store.claim_due("test", w.clock.wall_ms() + w.limits.reconnect_window_ms, 1_000, 10)
        assert sorted((row.user, row.conv, row.from_seq) for row in rows) == [
            ("bob", "g:team", 1), ("bob", CONV, 1), ("carol", "g:team", 1),
        ]  # fmt: skip


async def test_recovery_takes_up_nothing_below_the_mark_and_nothing_acknowledged(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.exchange(CONV, "alice", item(1))
        await w.ack("bob", CONV, 1, 1)
        await w.settle_inbox("n2")
        await advance(w)
        await w.exchange(CONV, "alice", item(2))
        await w.ack("bob", CONV, 2, 2)
        await w.exchange("p:alice:carol", "alice", item(3))
        await w.ack("carol", "p:alice:carol", 1, 1)
        w = await again(w)
        calls = len(w.faults.calls)
        await w.dispatch.mark.recover()
        assert await w.next_due_in_ms() is None
        assert await w.states() == {"acked": 3}
        assert w.faults.calls[calls:].count("unsettled") == 1


async def test_recovery_that_died_halfway_is_done_again(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        members = ["alice", "bob", "carol", "dave", "erin"]
        await w.known(*members)
        for member in members:
            await w.attach(member, "n2")
        await w.store.create_group("team", "alice", members, w.clock.wall_ms())
        await w.exchange("g:team", "alice", item(1))
        w = await again(w)
        w.faults.failing["settle"] = 1
        with pytest.raises(StoreUnavailable):
            await w.dispatch.mark.recover()
        assert await w.store.settled_mark() == 0
        w = await again(w)
        await w.dispatch.mark.recover()
        states = await w.states()
        assert set(states) == {"due"}
        rows = await w.store.claim_due("test", w.clock.wall_ms() + w.limits.reconnect_window_ms, 1_000, 10)
        assert [row.user for row in rows] == members[1:]


async def test_an_empty_store_has_nothing_to_recover_and_holds_no_push(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert await w.dispatch.mark.recover() is False


async def test_who_comes_back_in_the_reconnect_window_is_never_pushed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.exchange(CONV, "alice", item(1))
        w = await again(w)
        await w.dispatch.mark.recover()
        w.clock.passed_ms += 5_000
        await w.attach("bob", "n1")
        await w.ack("bob", CONV, 1, 1)
        await w.fire(60_000)
        assert await w.nudges("n1") == []
        assert await w.store.next_push_ms() == 0
        assert await w.states() == {"acked": 1}


async def test_who_does_not_come_back_is_parked_when_the_window_has_ended(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.exchange(CONV, "alice", item(1))
        w = await again(w)
        await w.dispatch.mark.recover()
        await w.fire(w.limits.reconnect_window_ms - 1)
        assert await w.states() == {"due": 1}
        await w.fire(1)
        assert await w.states() == {"parked": 1}
        assert await w.store.next_push_ms() != 0


# --------------------------------------------------------------------------- a Dispatch with all its tasks


class Running:
    """start() to stop() over a world's bus and store, on the real clock of the loop."""

    def __init__(self, w: World, vendor: RecordingVendor) -> None:
        limits = msgspec.structs.replace(LIMITS, mark_interval_ms=1, due_poll_ms=5)
        self.w = w
        self.dispatch = Dispatch(
            w.faults,  # type: ignore[arg-type]
            w.bus,
            w.presence,
            [vendor],
            clock=w.clock,
            rng=w.rng,
            limits=limits,
            on_fatal=w.fatal.append,
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - what it waits for happens in other tasks
                await asyncio.sleep(0.001)


async def test_a_started_dispatch_answers_parks_pushes_and_moves_the_mark(tmp_path: Path) -> None:
    vendor = RecordingVendor()
    async with world(tmp_path) as w:
        await w.close_intakes()
        await w.known("alice", "bob")
        running = Running(w, vendor)
        assert not running.dispatch.ready
        await running.dispatch.start()
        assert running.dispatch.ready
        await w.send(CONV, "alice", item(1))
        await running.until(lambda: bool(vendor.accepted))
        (reply,) = await w.replies()
        await w.settle_inbox("n1")
        await running.until(lambda: "settle" in w.faults.calls)
        await running.dispatch.stop()
        await running.dispatch.stop()
        assert not running.dispatch.ready
        assert await w.store.settled_mark() == reply.sent[0].msg_id
        assert [sent.user for sent in vendor.sent] == ["bob"]


async def test_a_dispatch_starts_once(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.close_intakes()
        running = Running(w, RecordingVendor())
        await running.dispatch.start()
        with pytest.raises(UsageError):
            await running.dispatch.start()
        await running.dispatch.stop()
        with pytest.raises(UsageError):
            await running.dispatch.start()


async def test_a_stop_ends_every_wait_and_settles_nothing_it_has_not_finished(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.close_intakes()
        await w.known("alice", "bob")
        running = Running(w, RecordingVendor())
        await running.dispatch.start()
        w.faults.failing["park"] = 10**9
        await w.send(CONV, "alice", item(1))
        await running.until(lambda: w.faults.calls.count("park") > 3)
        await running.dispatch.stop()
        assert await w.bus.lag(SUBMIT, "dispatch") == 1
        assert w.fatal == []


async def test_a_task_that_dies_is_told_once_and_ends_readiness(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.close_intakes()
        running = Running(w, RecordingVendor())
        await running.dispatch.start()
        w.faults.temporary = False
        w.faults.failing["next_due_ms"] = 1
        w.faults.failing["next_push_ms"] = 1
        await running.until(lambda: bool(w.fatal))
        assert not running.dispatch.ready
        await running.dispatch.stop()
        assert len(w.fatal) == 1
        w.fatal.clear()


async def test_a_task_that_ends_by_itself_is_a_fault(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.close_intakes()
        running = Running(w, RecordingVendor())
        await running.dispatch.start()
        await w.bus.delete(SUBMIT)
        await running.until(lambda: bool(w.fatal))
        assert not running.dispatch.ready
        await running.dispatch.stop()
        w.fatal.clear()


async def test_a_store_that_is_away_for_a_while_ends_no_task(tmp_path: Path) -> None:
    vendor = RecordingVendor()
    async with world(tmp_path) as w:
        await w.close_intakes()
        await w.known("alice", "bob")
        running = Running(w, vendor)
        await running.dispatch.start()
        for call in ("next_due_ms", "next_push_ms", "settle", "park"):
            w.faults.failing[call] = 2
        await w.send(CONV, "alice", item(1))
        await running.until(lambda: bool(vendor.accepted) and not any(w.faults.failing.values()))
        assert running.dispatch.ready
        assert running.dispatch.flows.store_failures >= 4
        await running.dispatch.stop()


async def test_after_a_crash_push_is_held_for_the_reconnect_window(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.exchange(CONV, "alice", item(1))
        after = World(w.store, w.clock, boot=2)
        await after.open()
        await after.close_intakes()
        running = Running(after, RecordingVendor())
        await running.dispatch.start()
        assert running.dispatch.router.hold_push_until_ms == w.clock.wall_ms() + LIMITS.reconnect_window_ms
        await running.dispatch.stop()


async def test_a_presence_that_forgot_everything_at_the_restart_parks_nobody_early(tmp_path: Path) -> None:
    """A message sent right after a start: nobody has reconnected yet, and nobody is pushed."""
    async with world(tmp_path) as w:
        await pair(w)
        await w.exchange(CONV, "alice", item(1))
        w = await again(w)
        assert isinstance(w.presence, MemoryPresence)
        await w.dispatch.mark.recover()
        w.dispatch.router.hold_push_until_ms = w.clock.wall_ms() + w.limits.reconnect_window_ms
        await w.exchange(CONV, "alice", item(2))
        assert await w.states() == {"due": 2}
        assert await w.store.next_push_ms() == 0
