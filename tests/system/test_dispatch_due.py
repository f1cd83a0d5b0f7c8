"""Due rows over the real store: D1-D3, back-off, expiry, claims, and what clears a row."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fastim.bus.base import UNDELIVERED, Outgoing
from fastim.bus.records import Nudge
from fastim.errors import StoreUnavailable
from fastim.store.base import DueRequest, Flush
from tests.system.dispatch_world import LIMITS, World, item, world

CONV = "p:alice:bob"
SECOND = 1_000


async def undelivered_to_bob(w: World, *numbers: int, node: str = "n2") -> None:
    """bob is live on n2, gets what alice sends, and acknowledges nothing."""
    await w.known("alice", "bob")
    await w.attach("alice")
    await w.attach("bob", node)
    await w.exchange(CONV, "alice", *(item(number) for number in numbers or (1,)))
    await w.delivers(node)
    await w.undelivered("bob", CONV, 1)
    await w.fold()


async def nudged(w: World, node: str = "n2") -> list[int]:
    """The attempts of the nudges that have come for the node."""
    return [nudge.attempt for nudge in await w.nudges(node)]


# -------------------------------------------------------------------------------- D1: 是否离线, both branches


async def test_a_user_who_is_live_is_nudged_where_he_is_now(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.fire(w.limits.first_due_ms - 1)
        assert await w.nudges("n2") == []
        await w.fire(1)
        assert await w.nudges("n2") == [Nudge("bob", CONV, 1)]
        assert await w.states() == {"due": 1}


async def test_a_user_who_is_nowhere_is_parked_with_a_push_and_the_row_is_gone(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w, 1, 2, 3)
        await w.leave("bob")
        await w.fire(w.limits.first_due_ms)
        assert await w.states() == {"parked": 3}
        assert await w.next_due_in_ms() is None
        assert await w.store.next_push_ms() == w.clock.wall_ms()
        assert await w.nudges("n2") == []


async def test_a_user_who_moved_between_two_attempts_is_nudged_on_his_new_node(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.fire(w.limits.first_due_ms)
        assert await nudged(w, "n2") == [1]
        await w.leave("bob")
        await w.attach("bob", "n1")
        await w.fire(2 * SECOND)
        assert await nudged(w, "n1") == [2]
        assert await nudged(w, "n2") == []


async def test_a_user_who_went_offline_between_two_attempts_is_parked(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.fire(w.limits.first_due_ms)
        assert await nudged(w) == [1]
        await w.leave("bob")
        await w.fire(2 * SECOND)
        assert await nudged(w) == []
        assert await w.states() == {"parked": 1}


async def test_a_user_who_came_online_between_two_attempts_is_nudged_not_parked(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.leave("bob", grace_ms=3 * SECOND)
        await w.fire(w.limits.first_due_ms)
        assert await w.states() == {"due": 1}
        await w.attach("bob", "n1", "pad")
        await w.fire(3 * SECOND)
        assert await nudged(w, "n1") == [1]
        assert await w.states() == {"due": 1}


async def test_every_node_that_holds_a_session_is_nudged_once(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.attach("bob", "n1", "pad")
        await w.attach("bob", "n1", "web")
        await w.fire(w.limits.first_due_ms)
        assert (await nudged(w, "n1"), await nudged(w, "n2")) == ([1], [1])


# -------------------------------------------------------------------------------------- attempts, back-off


async def test_six_nudges_with_growing_pauses_then_parked_then_quiet(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.fire(w.limits.first_due_ms)
        pauses = []
        for attempt in range(1, 7):
            assert await nudged(w) == [attempt]
            pause = await w.next_due_in_ms()
            assert pause is not None
            pauses.append(pause)
            await w.fire(pause)
        for pause, meant_s in zip(pauses, (1, 2, 4, 8, 16, 30), strict=True):
            assert 0.8 * meant_s * SECOND <= pause <= 1.2 * meant_s * SECOND
        assert await nudged(w) == []
        assert await w.states() == {"parked": 1}
        calls = len(w.faults.calls)
        await w.fire(3_600 * SECOND)
        assert await nudged(w) == []
        # Looking whether something is due, and nothing else.
        assert set(w.faults.calls[calls:]) == {"next_due_ms"}


async def test_attempts_survive_the_users_reconnects_and_the_dispatcher(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.fire(w.limits.first_due_ms)
        await w.fire(2 * SECOND)
        assert await nudged(w) == [1, 2]
        await w.leave("bob")
        await w.attach("bob", "n2")
        w.dispatch = w.build(w.presence)
        await w.fire(3 * SECOND)
        assert await nudged(w) == [3]


async def test_attempts_start_again_when_the_cursor_moves(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w, 1, 2, 3)
        for after_ms in (1 * SECOND, 2 * SECOND, 3 * SECOND):
            await w.fire(after_ms)
        assert await nudged(w) == [1, 2, 3]
        await w.ack("bob", CONV, 1, 1)
        await w.fire(6 * SECOND)
        assert await nudged(w) == [1]
        assert await w.states() == {"acked": 1, "due": 2}


async def test_a_second_undelivered_folds_into_the_row_and_keeps_its_attempts(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w, 1, 2, 3)
        await w.fire(w.limits.first_due_ms)
        await w.fire(2 * SECOND)
        assert await nudged(w) == [1, 2]
        due_in_ms = await w.next_due_in_ms()
        await w.undelivered("bob", CONV, 3)
        await w.undelivered("bob", CONV, 2)
        await w.fold()
        assert await w.next_due_in_ms() == due_in_ms
        await w.fire(3 * SECOND)
        assert await nudged(w) == [3]


async def test_undelivered_records_of_one_batch_make_one_row_from_the_lowest_seq(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.attach("bob", "n2")
        await w.exchange(CONV, "alice", item(1), item(2), item(3))
        await w.undelivered("bob", CONV, 1)
        await w.undelivered("bob", CONV, 3)
        await w.fold()
        await w.leave("bob")
        await w.fire(w.limits.first_due_ms)
        assert await w.states() == {"parked": 3}


async def test_conversations_of_one_user_fire_on_their_own(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.known("carol")
        await w.exchange("p:bob:carol", "carol", item(9))
        await w.undelivered("bob", "p:bob:carol", 1)
        await w.fold()
        await w.fire(w.limits.first_due_ms)
        assert sorted(nudge.conv for nudge in await w.nudges("n2")) == [CONV, "p:bob:carol"]


# --------------------------------------------------------------------------------- D2: who comes meanwhile


async def test_who_comes_while_he_is_parked_is_nudged(tmp_path: Path) -> None:
    """Race A: presence says nowhere, he connects and syncs, dispatch parks."""
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.leave("bob")
        w.at_next_lookup(lambda: w.attach_now("bob", "n1"))
        await w.fire(w.limits.first_due_ms)
        assert await w.states() == {"parked": 1}
        assert await w.nudges("n1") == [Nudge("bob", CONV, 0)]


async def test_who_comes_while_a_fresh_message_is_parked_is_nudged(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        w.at_next_lookup(lambda: w.attach_now("bob", "n2"))
        await w.exchange(CONV, "alice", item(1))
        assert await w.states() == {"parked": 1}
        assert await w.nudges("n2") == [Nudge("bob", CONV, 0)]


async def test_the_session_that_used_up_the_attempts_is_not_nudged_again_but_a_newer_one_is(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        for after_ms in (1, 2, 3, 6, 11, 21):
            await w.fire(after_ms * SECOND)
        assert await nudged(w) == [1, 2, 3, 4, 5, 6]
        w.at_next_lookup(lambda: w.attach_now("bob", "n1", "pad"))
        await w.fire(37 * SECOND)
        assert await w.states() == {"parked": 1}
        assert await nudged(w, "n2") == []
        assert len(await nudged(w, "n1")) == 1


# ---------------------------------------------------------------------- D3: away is not offline, and holds


async def test_presence_away_waits_and_counts_no_attempt(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        w.presence.away = True
        for _ in range(20):
            await w.fire(w.limits.first_due_ms)
            assert await w.next_due_in_ms() == w.limits.first_due_ms
        assert await w.states() == {"due": 1}
        assert await nudged(w) == []
        w.presence.away = False
        await w.fire(w.limits.first_due_ms)
        assert await nudged(w) == [1]


async def test_a_grace_is_waited_out_and_then_he_is_parked(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.leave("bob", grace_ms=4 * SECOND)
        await w.fire(w.limits.first_due_ms)
        assert await w.next_due_in_ms() == 3 * SECOND
        assert await w.states() == {"due": 1}
        await w.fire(3 * SECOND)
        assert await w.states() == {"parked": 1}


async def test_after_a_start_nobody_is_parked_before_the_reconnect_window_ends(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.leave("bob")
        w.dispatch.router.hold_push_until_ms = w.clock.wall_ms() + 20 * SECOND
        await w.fire(w.limits.first_due_ms)
        assert await w.next_due_in_ms() == 19 * SECOND
        await w.fire(19 * SECOND)
        assert await w.states() == {"parked": 1}


# ------------------------------------------------------------------------------------------ clearing a row


async def test_an_ack_before_the_firing_clears_the_row(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.ack("bob", CONV, 1, 1)
        await w.fire(60 * SECOND)
        assert await nudged(w) == []
        assert await w.next_due_in_ms() is None
        assert await w.states() == {"acked": 1}


async def test_an_ack_by_another_device_clears_the_row(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.store.register_device("bob", "pad", "pad", w.clock.wall_ms())
        await w.ack("bob", CONV, 1, 1, device="pad")
        await w.fire(60 * SECOND)
        assert await nudged(w) == []
        assert await w.states() == {"acked": 1}


async def test_an_expired_message_is_neither_nudged_nor_parked_and_is_in_the_ledger(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.attach("alice")
        await w.attach("bob", "n2")
        deadline_ms = w.clock.wall_ms() + 3 * SECOND
        await w.exchange(CONV, "alice", item(1, loss_time_ms=deadline_ms))
        await w.undelivered("bob", CONV, 1)
        await w.fold()
        await w.fire(w.limits.first_due_ms)
        assert await nudged(w) == [1]
        await w.fire(10 * SECOND)
        assert await nudged(w) == []
        assert await w.next_due_in_ms() is None
        assert await w.states() == {"expired": 1}


async def test_a_message_that_must_never_be_lost_is_parked_however_long_it_takes(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.leave("bob")
        await w.fire(10 * 365 * 86_400 * SECOND)
        assert await w.states() == {"parked": 1}


async def test_of_two_messages_only_the_one_that_expired_is_given_up(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.attach("bob", "n2")
        soon_ms = w.clock.wall_ms() + 2 * SECOND
        await w.exchange(CONV, "alice", item(1, loss_time_ms=soon_ms), item(2))
        await w.undelivered("bob", CONV, 1)
        await w.fold()
        await w.leave("bob", grace_ms=3 * SECOND)
        await w.fire(4 * SECOND)
        assert await w.states() == {"expired": 1, "parked": 1}


async def test_the_senders_own_message_never_gets_a_row(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        await w.undelivered("alice", CONV, 1)
        await w.fold()
        await w.ack("bob", CONV, 1, 1)
        assert await w.next_due_in_ms() is None


# ------------------------------------------------------------------------------------------- backends away


async def test_a_nudge_that_no_inbox_takes_is_not_repeated_and_the_row_fires_again(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        w.bus.refuses = "inbox.n2.1"
        await w.fire(w.limits.first_due_ms)
        w.bus.refuses = ""
        assert await nudged(w) == []
        await w.fire(2 * SECOND)
        assert await nudged(w) == [2]


async def test_rows_that_were_claimed_when_the_store_went_away_fire_when_the_claim_has_ended(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        w.clock.passed_ms += w.limits.first_due_ms
        w.faults.failing["fire_due"] = 1
        with pytest.raises(StoreUnavailable):
            await w.dispatch.due.fire()
        await w.fire()
        assert await nudged(w) == []
        await w.fire(w.limits.due_claim_ms)
        assert await nudged(w) == [1]


async def test_a_row_is_fired_by_one_of_two_dispatchers(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        other = w.build(w.presence, holder="other")
        w.clock.passed_ms += w.limits.first_due_ms
        await w.dispatch.due.fire()
        await other.due.fire()
        assert await nudged(w) == [1]


async def test_a_firing_that_another_dispatcher_has_taken_over_nudges_nobody(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await undelivered_to_bob(w)
        other = w.build(w.presence, holder="other")

        async def claim_ends_and_the_other_fires() -> None:
            w.clock.passed_ms += w.limits.due_claim_ms + 1
            await other.due.fire()

        w.clock.passed_ms += w.limits.first_due_ms
        w.faults.before["fire_due"] = claim_ends_and_the_other_fires
        await w.dispatch.due.fire()
        assert await nudged(w) == [1]


async def test_a_record_of_undelivered_that_nobody_can_read_is_counted_and_settled(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.bus.publish([Outgoing(UNDELIVERED, "k", data) for data in (b"\xc1", b"\x94\x03\xa1\xff")])
        await w.fold()
        assert w.dispatch.flows.malformed == 2
        assert await w.bus.lag(UNDELIVERED, "dispatch") == 0


async def test_many_rows_are_fired_a_batch_at_a_time(tmp_path: Path) -> None:
    async with world(tmp_path, msgspec.structs.replace(LIMITS, due_batch=7)) as w:
        users = [f"u{number}" for number in range(40)]
        await w.known("alice", *users)
        await w.store.create_group("team", "alice", ["alice", *users], w.clock.wall_ms())
        for user in users:
            await w.attach(user, "n2")
        await w.exchange("g:team", "alice", item(1))
        due = tuple(DueRequest(user, "g:team", 1, w.clock.wall_ms()) for user in users)
        await w.store.flush(Flush((), due, "n2", w.clock.wall_ms()))
        await w.fire()
        assert sorted(nudge.user for nudge in await w.nudges("n2")) == sorted(users)
