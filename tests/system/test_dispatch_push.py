"""Vendor push over the real store: once per window, never dropped, never after an ack or a deadline."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fastim.errors import StoreUnavailable, Unavailable
from fastim.model import Flag, Kind
from fastim.push.base import Notification, PushOutcome, PushResult
from tests.faults.recording_vendor import RecordingVendor
from tests.leaks import MARK
from tests.system.dispatch_world import LIMITS, World, item, world

CONV = "p:alice:bob"
SECOND = 1_000
RETRY = PushResult(PushOutcome.RETRY)


async def absent_bob(w: World, *plan: PushResult) -> RecordingVendor:
    """alice is live, bob is known and nowhere; the vendor that will be called."""
    vendor = RecordingVendor(plan)
    w.vendors.append(vendor)
    await w.known("alice", "bob")
    await w.attach("alice")
    return vendor


async def push(w: World, after_ms: int = 0) -> None:
    """Let time pass, then everything that may be pushed."""
    w.clock.passed_ms += after_ms
    for _ in range(100):
        if not await w.dispatch.push.push():
            return
    raise AssertionError("push rows are claimed for ever in one instant")


# -------------------------------------------------------------------------------------------- what is sent


async def test_a_parked_message_is_pushed_once_with_what_waits(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        reply = await w.exchange(CONV, "alice", item(1, b"hello"), item(2, f"你好 {MARK}".encode()))
        await push(w)
        (sent,) = vendor.sent
        assert sent == Notification(
            sent.push_id,
            "bob",
            CONV,
            reply.sent[1].msg_id,
            "alice",
            f"你好 {MARK}",
            badge=2,
            pending=2,
            expires_ms=0,
        )
        await push(w, 3_600 * SECOND)
        assert len(vendor.sent) == 1
        assert await w.states() == {"parked": 2}
        assert w.dispatch.flows.push_ok == 1


async def test_each_absent_member_of_a_group_is_pushed_his_own_badge(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.known("carol")
        await w.store.create_group("team", "alice", ["alice", "bob", "carol"], w.clock.wall_ms())
        await w.exchange(CONV, "alice", item(1))
        await push(w)
        await w.exchange("g:team", "alice", item(2))
        await push(w)
        assert [(n.user, n.conv, n.badge) for n in vendor.sent[:1]] == [("bob", CONV, 1)]
        assert sorted((n.user, n.conv, n.badge) for n in vendor.sent[1:]) == [
            ("bob", "g:team", 2),
            ("carol", "g:team", 1),
        ]


async def test_a_silent_message_does_not_count_in_the_badge(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1), item(2, flags=Flag.SILENT))
        await push(w)
        assert [(n.pending, n.badge) for n in vendor.sent] == [(2, 1)]


@pytest.mark.parametrize(
    ("kind", "flags", "shown"),
    [(Kind.TEXT, 0, "secret"), (Kind.TEXT, Flag.SEALED, "[message]"), (Kind.IMAGE, 0, "[image]")],
)
async def test_the_preview_follows_kind_and_flags(tmp_path: Path, kind: int, flags: int, shown: str) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1, b"secret", kind=kind, flags=flags))
        await push(w)
        assert [n.preview for n in vendor.sent] == [shown]


async def test_every_vendor_gets_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        first = await absent_bob(w)
        second = RecordingVendor()
        w.vendors.append(second)
        await w.exchange(CONV, "alice", item(1))
        await push(w)
        assert [len(first.sent), len(second.sent)] == [1, 1]


async def test_without_a_vendor_a_push_is_counted_and_dropped(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.exchange(CONV, "alice", item(1))
        await push(w)
        assert w.dispatch.flows.push_no_vendor == 1
        assert await w.states() == {"parked": 1}


# ---------------------------------------------------------------------------------------- what is not sent


async def test_an_ack_before_the_push_stops_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1))
        await w.ack("bob", CONV, 1, 1)
        await push(w, SECOND)
        assert vendor.sent == []


async def test_an_expired_message_is_not_pushed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1, loss_time_ms=w.clock.wall_ms() + SECOND))
        await push(w, SECOND + 1)
        assert vendor.sent == []


async def test_the_vendors_time_to_live_is_the_deadline(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        deadline_ms = w.clock.wall_ms() + 60 * SECOND
        await w.exchange(CONV, "alice", item(1, loss_time_ms=deadline_ms))
        await push(w)
        assert [n.expires_ms for n in vendor.sent] == [deadline_ms]


async def test_a_message_that_may_not_ring_does_not(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1, flags=Flag.NO_PUSH), item(2, flags=Flag.NO_PUSH))
        await push(w, 60 * SECOND)
        assert vendor.sent == []
        assert await w.states() == {"parked": 2}


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_messages_that_may_not_ring_do_not_ring_after_their_due_row_either(
    tmp_path: Path, count: int
) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.attach("bob", "n2")
        items = [item(number, flags=Flag.NO_PUSH) for number in range(1, count + 1)]
        await w.exchange(CONV, "alice", *items)
        await w.undelivered("bob", CONV, 1)
        await w.fold()
        await w.leave("bob")
        await w.fire(w.limits.first_due_ms)
        assert await w.states() == {"parked": count}
        await push(w, 60 * SECOND)
        assert vendor.sent == []
        assert w.dispatch.flows.push_silent == 1


async def test_a_ringing_message_rings_though_a_newer_one_may_not(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1, b"loud"), item(2, b"hush", flags=Flag.NO_PUSH))
        await push(w)
        assert [(n.preview, n.pending) for n in vendor.sent] == [("loud", 2)]


async def test_a_users_own_message_never_rings_his_phone(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1, b"loud"))
        await w.exchange(CONV, "bob", item(2, b"own"), service=True)
        await w.exchange(CONV, "alice", item(3, b"hush", flags=Flag.NO_PUSH))
        await push(w)
        assert [(n.preview, n.sender, n.pending) for n in vendor.sent] == [("loud", "alice", 2)]


async def test_what_is_acknowledged_no_longer_makes_silent_ones_ring(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        hush = [item(number, flags=Flag.NO_PUSH) for number in (2, 3)]
        await w.exchange(CONV, "alice", item(1, b"loud"), *hush)
        await w.ack("bob", CONV, 1, 1)
        await push(w)
        assert vendor.sent == []
        assert w.dispatch.flows.push_silent == 1


async def test_a_message_that_expires_while_its_push_is_claimed_is_not_sent(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1, loss_time_ms=w.clock.wall_ms() + SECOND))

        async def time_passes() -> None:
            w.clock.passed_ms += SECOND + 1

        w.faults.before["claim_push"] = time_passes
        await push(w)
        assert vendor.sent == []
        assert w.dispatch.flows.push_expired == 1


async def test_while_nothing_is_to_be_pushed_the_store_is_only_asked_when(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await absent_bob(w)
        calls = len(w.faults.calls)
        await push(w)
        assert w.faults.calls[calls:] == ["next_push_ms"]


# ----------------------------------------------------------------------------------------- collapse window


async def test_a_second_message_inside_the_window_waits_for_its_end(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1, b"one"))
        await push(w)
        await w.exchange(CONV, "alice", item(2, b"two"))
        await w.exchange(CONV, "alice", item(3, b"three"))
        await push(w, w.limits.push_collapse_ms - 1)
        assert [n.preview for n in vendor.sent] == ["one"]
        await push(w, 1)
        assert [(n.preview, n.pending) for n in vendor.sent] == [("one", 1), ("three", 3)]
        assert len({n.push_id for n in vendor.sent}) == 2


async def test_a_push_that_waits_for_the_window_is_dropped_only_by_an_ack(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1))
        await push(w)
        await w.exchange(CONV, "alice", item(2))
        await w.ack("bob", CONV, 1, 2)
        await push(w, 60 * SECOND)
        assert len(vendor.sent) == 1


async def test_another_conversation_has_a_window_of_its_own(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.known("carol")
        await w.exchange(CONV, "alice", item(1))
        await push(w)
        await w.exchange("p:bob:carol", "carol", item(2))
        await push(w)
        assert [n.conv for n in vendor.sent] == [CONV, "p:bob:carol"]


async def test_a_message_parked_while_the_push_is_at_the_vendor_is_not_forgotten(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1, b"one"))

        async def another() -> None:
            await w.exchange(CONV, "alice", item(2, b"two"))

        w.faults.before["finish_push"] = another
        await push(w)
        assert [n.preview for n in vendor.sent] == ["one"]
        await push(w, w.limits.push_collapse_ms)
        assert [n.preview for n in vendor.sent] == ["one", "two"]


# ------------------------------------------------------------------------------------------------ outcomes


async def test_retry_is_tried_again_under_the_same_push_id(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w, RETRY, RETRY)
        await w.exchange(CONV, "alice", item(1))
        await push(w)
        await push(w, w.limits.push_backoff_first_ms)
        await push(w, 2 * w.limits.push_backoff_first_ms)
        await push(w, 60 * SECOND)
        assert len(vendor.sent) == 3
        assert len({n.push_id for n in vendor.sent}) == 1
        assert w.dispatch.flows.push_retry == 2


async def test_the_vendors_retry_after_is_kept(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w, PushResult(PushOutcome.RETRY, retry_after_ms=90 * SECOND))
        await w.exchange(CONV, "alice", item(1))
        await push(w)
        await push(w, 90 * SECOND - 1)
        assert len(vendor.sent) == 1
        await push(w, 1)
        assert len(vendor.sent) == 2


async def test_a_push_is_given_up_after_its_attempts_and_the_message_stays(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(LIMITS, push_attempts=3)
    async with world(tmp_path, limits) as w:
        vendor = await absent_bob(w, *[RETRY] * 10)
        await w.exchange(CONV, "alice", item(1))
        for _ in range(6):
            await push(w, 600 * SECOND)
        assert len(vendor.sent) == 3
        assert w.dispatch.flows.push_gave_up == 1
        assert await w.states() == {"parked": 1}


async def test_gone_is_not_tried_again(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w, PushResult(PushOutcome.GONE))
        await w.exchange(CONV, "alice", item(1))
        await push(w)
        await push(w, 600 * SECOND)
        assert len(vendor.sent) == 1
        assert w.dispatch.flows.push_gone == 1


async def test_of_two_vendors_the_one_that_must_be_tried_again_decides(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        first = await absent_bob(w, PushResult(PushOutcome.GONE))
        second = RecordingVendor([RETRY])
        w.vendors.append(second)
        await w.exchange(CONV, "alice", item(1))
        await push(w)
        await push(w, w.limits.push_backoff_first_ms)
        assert (len(first.sent), len(second.sent)) == (2, 2)
        assert w.dispatch.flows.push_ok == 1


@pytest.mark.parametrize("fault", ["unavailable", "hangs", "short answer", "any exception"])
async def test_a_vendor_that_fails_as_a_whole_is_tried_again(tmp_path: Path, fault: str) -> None:
    limits = msgspec.structs.replace(LIMITS, push_deadline_ms=20)
    async with world(tmp_path, limits) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1))
        if fault == "unavailable":
            vendor.error = Unavailable("vendor", "planted")
        elif fault == "any exception":
            vendor.error = RuntimeError("planted")
        elif fault == "hangs":
            vendor.hangs = True
        else:
            vendor.answers_too_few = True
        await push(w)
        assert (w.dispatch.flows.push_retry, w.dispatch.flows.push_ok) == (1, 0)
        vendor.error, vendor.hangs, vendor.answers_too_few = None, False, False
        await push(w, w.limits.push_backoff_first_ms)
        assert w.dispatch.flows.push_ok == 1


async def test_a_push_that_nobody_finished_is_sent_again_when_its_claim_has_ended(tmp_path: Path) -> None:
    """At least once: the vendor folds the two by push_id."""
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        await w.exchange(CONV, "alice", item(1))
        w.faults.failing["finish_push"] = 1
        with pytest.raises(StoreUnavailable):
            await w.dispatch.push.push()
        await push(w, w.limits.push_claim_ms - 1)
        assert len(vendor.sent) == 1
        await push(w, 1)
        assert len(vendor.sent) == 2
        assert len(vendor.accepted) == 1


async def test_two_dispatchers_push_it_once(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        vendor = await absent_bob(w)
        other = w.build(w.presence, holder="other")
        await w.exchange(CONV, "alice", item(1))

        async def the_other_one() -> None:
            await other.push.push()

        w.faults.before["finish_push"] = the_other_one
        await push(w)
        assert len(vendor.sent) == 1


async def test_many_rows_are_pushed_a_batch_at_a_time(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(LIMITS, push_batch=4)
    async with world(tmp_path, limits) as w:
        vendor = await absent_bob(w)
        users = [f"u{number:02}" for number in range(9)]
        await w.known(*users)
        await w.store.create_group("team", "alice", ["alice", *users], w.clock.wall_ms())
        await w.exchange("g:team", "alice", item(1))
        await push(w)
        assert sorted(n.user for n in vendor.sent) == users
