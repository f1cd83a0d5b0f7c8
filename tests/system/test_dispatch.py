"""The worker over the real store: what a batch of `submit` turns into (W1-W3), own messages, faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastim.bus.base import DISPATCH_GROUP, SUBMIT, Outgoing
from fastim.bus.records import Mark, Refusal
from fastim.dispatch.patience import Stopped
from fastim.errors import StoreUnavailable
from fastim.model import Flag, Kind
from fastim.store.base import AppendFrame, AppendItem
from tests.leaks import MARK
from tests.system.dispatch_world import World, client_id, item, world

CONV = "p:alice:bob"


def codes(refused: list[Refusal]) -> list[tuple[str, bool]]:
    return [(refusal.code, refusal.retryable) for refusal in refused]


async def pair(w: World) -> None:
    await w.known("alice", "bob")
    await w.attach("alice")
    await w.attach("bob", "n2")


# ------------------------------------------------------------------------------------- the straight road


async def test_a_send_is_stored_answered_and_delivered(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        reply = await w.exchange(CONV, "alice", item(1, MARK.encode()))
        assert (reply.session, reply.user, reply.conv, reply.refused) == ("alice-phone", "alice", CONV, [])
        ((deliver,),) = (await w.delivers("n2"),)
        (sent,) = reply.sent
        assert (deliver.msg_id, deliver.seq) == (sent.msg_id, sent.seq) == (sent.msg_id, 1)
        assert (deliver.users, deliver.skip_session, deliver.sender) == (["bob"], "alice-phone", "alice")
        assert MARK.encode() in deliver.tail
        assert await w.delivers("n1") == []
        assert await w.states() == {"unsettled": 1}


async def test_a_batch_keeps_the_order_of_each_conversation(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob", "carol")
        await w.attach("bob", "n2")
        for number in range(1, 21):
            await w.send(
                CONV if number % 2 else "p:bob:carol", "alice" if number % 2 else "carol", item(number)
            )
        await w.work()
        delivers = await w.delivers("n2")
        for conv in (CONV, "p:bob:carol"):
            assert [d.seq for d in delivers if d.conv == conv] == list(range(1, 11))
        assert w.faults.calls.count("append") == 1


async def test_a_group_of_mixed_presence_gets_one_deliver_per_node_and_the_absent_are_parked(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        members = ["alice", "bob", "carol", "dave"]
        await w.known(*members)
        await w.store.create_group("team", "alice", members, w.clock.wall_ms())
        await w.attach("alice")
        await w.attach("bob", "n2")
        await w.attach("carol", "n2")
        await w.exchange("g:team", "alice", item(1))
        assert [d.users for d in await w.delivers("n2")] == [["bob", "carol"]]
        assert await w.delivers("n1") == []
        assert w.dispatch.flows.parked == 1
        assert (await w.states())["parked"] >= 1


async def test_the_senders_other_devices_get_the_message_and_owe_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.attach("alice", "n2", "pad")
        await w.exchange(CONV, "alice", item(1))
        (deliver,) = await w.delivers("n2")
        assert sorted(deliver.users) == ["alice", "bob"]
        assert deliver.skip_session == "alice-phone"
        assert (await w.audit()).obligations == 1


async def test_a_recipient_who_is_nowhere_is_parked_with_a_push(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.exchange(CONV, "alice", item(1), item(2))
        assert await w.states() == {"parked": 2}
        assert await w.store.next_push_ms() != 0
        assert await w.next_due_in_ms() is None


@pytest.mark.parametrize("flags", [Flag.NO_PUSH])
async def test_a_message_that_must_not_ring_is_parked_without_a_push(tmp_path: Path, flags: Flag) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.exchange(CONV, "alice", item(1, flags=flags))
        assert await w.states() == {"parked": 1}
        assert await w.store.next_push_ms() == 0


async def test_a_recipient_in_grace_gets_a_due_row_at_its_end(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        bob = await w.attach("bob", "n2")
        await w.presence.detach("bob", "phone", bob.generation, w.clock.wall_ms() + 4_000)
        await w.exchange(CONV, "alice", item(1))
        assert await w.states() == {"due": 1}
        assert await w.next_due_in_ms() == 4_000


async def test_a_service_reaches_a_user_nobody_has_ever_seen(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        reply = await w.exchange("s:zoe", "billing", item(1), service=True)
        assert len(reply.sent) == 1
        assert await w.states() == {"parked": 1}


# ----------------------------------------------------------------------------------------------- refusals


async def test_half_a_frame_is_stored_when_a_message_in_it_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        reply = await w.exchange(CONV, "alice", item(1), item(2, kind=99), item(3))
        assert [sent.client_id for sent in reply.sent] == [client_id(1)]
        assert codes(reply.refused) == [("unknown_kind", False), ("not_reached", True)]
        assert [refusal.client_id for refusal in reply.refused] == [client_id(2), client_id(3)]
        assert len(await w.delivers("n2")) == 1


async def test_a_conflict_in_the_middle_stores_the_prefix(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.exchange(CONV, "alice", item(2, b"first"))
        reply = await w.exchange(CONV, "alice", item(1), item(2, b"other"), item(3))
        assert [sent.client_id for sent in reply.sent] == [client_id(1)]
        assert codes(reply.refused) == [("conflict", False), ("not_reached", True)]


async def test_a_refused_frame_leaves_the_rest_of_its_batch_alone(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.send(CONV, "mallory", item(1))
        await w.send("g:nowhere", "alice", item(2))
        await w.send("p:alice:ghost", "alice", item(3))
        await w.send(CONV, "alice", item(4, loss_time_ms=w.clock.wall_ms() - 1))
        await w.send("p:bob:alice", "alice", item(5))
        await w.send("r:lobby", "alice", item(6))
        await w.send("s:bob", "alice", item(7))
        await w.send(CONV, "alice", item(8, b"x" * 61_441))
        await w.send(CONV, "alice", item(9))
        await w.work()
        replies = await w.replies()
        assert [[code for code, _ in codes(reply.refused)] for reply in replies] == [
            ["not_member"], ["unknown_group"], ["unknown_user"], ["expired"], ["bad_conv"], ["bad_conv"],
            ["forbidden"], ["too_big"], [],
        ]  # fmt: skip
        assert len(await w.delivers("n2")) == 1
        assert w.faults.calls.count("append") == 1
        assert w.dispatch.flows.refused == {
            "not_member": 1, "unknown_group": 1, "unknown_user": 1, "expired": 1, "bad_conv": 2,
            "forbidden": 1, "too_big": 1,
        }  # fmt: skip


async def test_a_record_that_nobody_can_read_is_counted_and_settled(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.bus.publish([Outgoing(SUBMIT, "k", b"\xc1garbage")])
        await w.work()
        assert w.dispatch.flows.malformed == 1
        assert await w.bus.lag(SUBMIT, DISPATCH_GROUP) == 0


# ------------------------------------------------------------------------------------- sent again, read again


async def test_a_resend_brings_the_first_result_and_no_second_deliver(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        first = await w.exchange(CONV, "alice", item(1))
        await w.delivers("n2")
        await w.ack("bob", CONV, 1, 1)
        again = await w.exchange(CONV, "alice", item(1))
        assert again.sent == first.sent
        assert await w.delivers("n2") == []
        assert await w.next_due_in_ms() is None
        assert await w.states() == {"acked": 1}


async def test_a_resend_of_a_parked_message_rings_no_second_time(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.exchange(CONV, "alice", item(1))
        (row,) = await w.store.claim_push("test", w.clock.wall_ms(), 1_000, 10)
        await w.store.finish_push("test", row, w.clock.wall_ms(), retry_at_ms=0)
        await w.exchange(CONV, "alice", item(1))
        await w.fire(w.limits.first_due_ms)
        w.clock.passed_ms += 60_000
        assert await w.store.claim_push("test", w.clock.wall_ms(), 1_000, 10) == []
        assert await w.states() == {"parked": 1}


async def test_a_batch_read_again_after_a_crash_between_append_and_settle_still_reaches_everybody(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        frame = AppendFrame(CONV, "alice", (AppendItem(client_id(1), Kind.TEXT, b"hi"),))
        ((first,),) = ([r.items[0]] for r in await w.store.append([frame], w.clock.wall_ms()))
        reply = await w.exchange(CONV, "alice", item(1))
        assert [sent.seq for sent in reply.sent] == [first.seq]
        assert await w.states() == {"due": 1}
        await w.fire(w.limits.first_due_ms)
        assert [(n.user, n.conv) for n in await w.nudges("n2")] == [("bob", CONV)]


async def test_a_batch_is_read_again_when_dispatch_stopped_before_its_routing_was_durable(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.send(CONV, "alice", item(1))
        w.faults.failing["park"] = 10**6
        batch = await w.submit_intake.next()
        w.dispatch.patience.stop()
        with pytest.raises(Stopped):
            await w.dispatch.worker.take(batch)
        assert await w.bus.lag(SUBMIT, DISPATCH_GROUP) == 1
        assert await w.states() == {"unsettled": 1}
        await w.submit_intake.close()
        await w.replies()
        w.faults.failing.clear()
        await w.open()
        await w.work()
        (reply,) = await w.replies()
        assert [sent.seq for sent in reply.sent] == [1]
        await w.fire(w.limits.first_due_ms)
        assert await w.states() == {"parked": 1}


# ------------------------------------------------------------------------------------------ backends away


async def test_a_store_that_comes_back_costs_only_time(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.open(type(w.limits)(retry_first_ms=1, retry_most_ms=1))
        w.faults.failing["append"] = 3
        reply = await w.exchange(CONV, "alice", item(1))
        assert len(reply.sent) == 1
        assert w.dispatch.flows.store_failures == 3


async def test_a_store_that_stays_away_refuses_retryably_and_the_same_send_works_later(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        w.faults.failing["append"] = 1
        reply = await w.exchange(CONV, "alice", item(1), item(2), item(3, kind=99))
        assert reply.sent == []
        assert codes(reply.refused) == [("unavailable", True), ("unavailable", True), ("unknown_kind", False)]
        assert reply.refused[0].retry_after_ms == w.limits.unavailable_retry_ms
        reply = await w.exchange(CONV, "alice", item(1), item(2))
        assert [sent.seq for sent in reply.sent] == [1, 2]


async def test_a_store_that_is_broken_ends_the_worker(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        w.faults.failing["append"] = 1
        w.faults.temporary = False
        await w.send(CONV, "alice", item(1))
        with pytest.raises(StoreUnavailable):
            await w.work()
        assert await w.bus.lag(SUBMIT, DISPATCH_GROUP) == 1


async def test_nothing_is_settled_before_parks_and_due_rows_are_committed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        w.faults.failing["park"] = 2
        await w.exchange(CONV, "alice", item(1))
        assert w.faults.calls.count("park") == 3
        assert await w.states() == {"parked": 1}


async def test_presence_away_is_not_offline(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.known("alice", "bob")
        w.presence.away = True
        await w.exchange(CONV, "alice", item(1))
        assert await w.states() == {"due": 1}
        assert await w.next_due_in_ms() == w.limits.first_due_ms
        assert await w.store.next_push_ms() == 0


async def test_an_inbox_that_is_gone_means_its_users_have_moved(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.attach("carol", "n1")
        await w.known("carol")
        await w.bus.delete("inbox.n2.1")
        await w.send(CONV, "alice", item(1))
        await w.send("p:alice:carol", "alice", item(2))
        await w.work()
        assert [d.conv for d in await w.delivers("n1")] == ["p:alice:carol"]
        assert await w.states() == {"due": 1, "unsettled": 1}
        assert w.dispatch.flows.moved == 1


async def test_a_bus_that_stays_away_leaves_due_rows(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        w.bus.refuses = "inbox.n2.1"
        await w.exchange(CONV, "alice", item(1))
        assert await w.states() == {"due": 1}


async def test_a_reply_that_no_inbox_takes_is_no_trouble(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.bus.delete("inbox.n1.1")
        await w.send(CONV, "alice", item(1))
        await w.work()
        assert len(await w.delivers("n2")) == 1


# --------------------------------------------------------------------------------------------- read marks


async def test_a_read_mark_goes_to_the_peer_and_to_the_users_other_devices(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.attach("alice", "n2", "pad")
        await w.read_notice(CONV, "alice", 5)
        await w.work()
        assert await w.marks("n2") == [Mark(CONV, "alice", 5, ["alice", "bob"], "alice-phone")]
        assert await w.marks("n1") == []


async def test_a_private_or_group_read_mark_stays_with_the_user(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await pair(w)
        await w.attach("alice", "n2", "pad")
        await w.read_notice(CONV, "alice", 5, private=True)
        await w.read_notice("g:team", "alice", 6)
        await w.work()
        assert [(m.conv, m.to_users) for m in await w.marks("n2")] == [
            (CONV, ["alice"]),
            ("g:team", ["alice"]),
        ]
