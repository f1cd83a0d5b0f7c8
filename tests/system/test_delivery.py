"""Live delivery and the flush: I1-I3 of delivery.py, F1 and F2 of flush.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fastim.bus.base import Outgoing
from fastim.bus.records import Deliver, Kick, Mark, Nudge, Refusal, Reply
from fastim.bus.records import encode as encode_record
from fastim.model import Message
from fastim.protocol import (
    CloseCode,
    Error,
    Kicked,
    Level,
    Msg,
    Ping,
    Probe,
    ReadMark,
    Sent,
    SentItem,
    Skip,
    encode_msg_tail,
)
from tests.leaks import MARK
from tests.system.dispatch_world import client_id
from tests.system.node_world import NodeWorld, Peer, node_world, until

HELLO = MARK.encode()

CONV = "p:alice:bob"
GROUP = "g:team"


async def pair(w: NodeWorld) -> Peer:
    """bob, connected and level; alice is known."""
    await w.known("alice")
    return await w.level("bob")


def reply_to(w: NodeWorld, peer: Peer, *sent: SentItem, refused: tuple[Refusal, ...] = ()) -> Reply:
    session = w.session_of(peer)
    return Reply(session.id, session.user, CONV, 1, list(sent), list(refused))


async def own(w: NodeWorld, peer: Peer, user: str, *bodies: bytes) -> list[Message]:
    """Messages of the peer himself: stored, and answered with SENT."""
    messages = await w.append(CONV, user, *bodies)
    items = [SentItem(m.client_id, m.msg_id, m.seq, m.ts_ms) for m in messages]
    await w.inbox(reply_to(w, peer, *items))
    return messages


# ------------------------------------------------------------------------------------- the straight road


async def test_a_message_is_written_and_its_ack_moves_cursor_fate_and_settle(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        (sent,) = await w.send(CONV, "alice", HELLO, to=("bob",))
        (message,) = bob.of(Msg)
        assert (message.seq, message.body, message.dup, message.msg_id) == (1, HELLO, False, sent.msg_id)
        assert w.unsettled == 1
        bob.ack()
        await w.quiet()
        assert w.unsettled == 0
        assert await w.cursor("bob", CONV) == 1
        assert await w.states(CONV, "bob") == ["acked"]


async def test_messages_are_acknowledged_one_by_one_in_any_order(tmp_path: Path) -> None:
    async with node_world(tmp_path, flush_interval_ms=20) as w:
        bob = await pair(w)
        ids = [m.msg_id for m in await w.send(CONV, "alice", b"1", b"2", b"3", to=("bob",))]
        bob.ack_ids(ids[2], ids[0])
        bob.ack_ids(ids[1], ids[1], 999_999)
        await w.quiet()
        assert await w.cursor("bob", CONV) == 3
        assert bob.seqs() == [1, 2, 3]
        assert w.node.flows()["acked"] == 3


async def test_a_record_is_settled_only_after_the_flush_has_committed(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", HELLO, to=("bob",))
        w.store.hold("flush")
        bob.ack()
        await until(lambda: w.store.waiting, "the flush is under way")
        await w.quiet()
        assert w.unsettled == 1
        w.store.let_go("flush")
        await w.quiet()
        assert w.unsettled == 0


async def test_a_failed_flush_loses_nothing_and_settles_once(tmp_path: Path) -> None:
    async with node_world(tmp_path, retry_first_ms=1, retry_most_ms=2) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        w.store.failing["flush"] = 4
        bob.ack()
        await until(lambda: not w.unsettled)
        assert await w.cursor("bob", CONV) == 2
        assert w.node.flusher.store_failures == 4


async def test_a_group_message_is_one_record_that_waits_for_every_user(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.real_store.create_group("team", "alice", ["bob", "carol", "dave"], w.clock.wall_ms())
        bob, carol = await w.level("bob"), await w.level("carol")
        await w.send(GROUP, "alice", b"hi", to=("bob", "carol", "dave"))
        assert (bob.seqs(GROUP), carol.seqs(GROUP)) == ([1, 2], [1, 2])  # seq 1 is the group's birth
        bob.ack()
        await w.quiet()
        assert w.unsettled == 1
        assert w.node.flows()["moved"] == 1
        carol.ack()
        await w.quiet()
        assert w.unsettled == 0
        states = [(await w.states(GROUP, user))[-1] for user in ("bob", "carol", "dave")]
        assert states == ["acked", "acked", "due"]


async def test_two_devices_get_it_and_the_first_ack_settles_the_obligation(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        phone = await pair(w)
        laptop = await w.level("bob", "laptop", device_class="desktop")
        await w.send(CONV, "alice", HELLO, to=("bob",))
        assert (phone.seqs(), laptop.seqs()) == ([1], [1])
        laptop.ack()
        await w.quiet()
        assert await w.states(CONV, "bob") == ["acked"]
        assert (await w.cursor("bob", CONV), await w.cursor("bob", CONV, "laptop")) == (0, 1)
        assert w.unsettled == 1
        phone.ack()
        await w.quiet()
        assert (w.unsettled, await w.cursor("bob", CONV)) == (0, 1)


async def test_the_senders_other_device_gets_it_and_owes_nothing(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        phone = await w.level("alice")
        laptop = await w.level("alice", "laptop")
        await w.known("bob")
        messages = await w.append(CONV, "alice", b"mine")
        await w.deliver(messages, "alice", skip=w.session_of(phone).id)
        assert (phone.seqs(), laptop.seqs()) == ([], [1])
        laptop.ack()
        await w.quiet()
        assert w.unsettled == 0
        assert await w.cursor("alice", CONV, "laptop") == 1
        assert await w.states(CONV, "alice") == []
        assert await w.due() == {}


async def test_a_delivery_to_a_user_who_is_elsewhere_becomes_a_due_row_at_once(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await w.send(CONV, "alice", HELLO, to=("bob",))
        assert w.unsettled == 0
        assert await w.due() == {("bob", CONV): (1, 0)}


async def test_an_expired_message_is_not_written_and_comes_as_a_skip(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        messages = await w.append(CONV, "alice", b"late", loss_time_ms=w.clock.wall_ms() + 100)
        w.clock.passed_ms += 101
        await w.deliver(messages, "bob")
        assert bob.seqs() == []
        (skip,) = bob.of(Skip)
        assert (skip.from_seq, skip.to_seq, skip.reason) == (1, 1, 1)
        bob.ack()
        await w.quiet()
        assert await w.states(CONV, "bob") == ["expired"]
        assert await w.cursor("bob", CONV) == 1


async def test_a_message_is_delivered_in_the_millisecond_of_its_deadline(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        messages = await w.append(CONV, "alice", b"now", loss_time_ms=w.clock.wall_ms() + 100)
        w.clock.passed_ms += 100
        await w.deliver(messages, "bob")
        assert bob.seqs() == [1]
        bob.ack()


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x91\x63", b"\x92\x04\xc0", b"junk" * 100])
async def test_a_record_that_nobody_can_read_is_settled_and_counted(tmp_path: Path, value: bytes) -> None:
    async with node_world(tmp_path) as w:
        await w.real_bus.publish([Outgoing(w.node.inbox, "k", value)])
        await w.quiet()
        assert (w.unsettled, w.node.flows()["malformed"]) == (0, 1)


# ---------------------------------------------------------------------------------------- SENT and marks


async def test_sent_moves_the_senders_cursor_and_writes_no_fate(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("bob")
        alice = await w.level("alice")
        await own(w, alice, "alice", b"1", b"2")
        (sent,) = alice.of(Sent)
        assert [item.seq for item in sent.items] == [1, 2]
        assert w.unsettled == 0
        alice.ack()
        await w.quiet()
        assert await w.cursor("alice", CONV) == 2
        assert w.node.flows()["acked"] == 0


async def test_results_with_a_hole_between_them_are_two_sents(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("bob")
        alice = await w.level("alice")
        messages = await w.append(CONV, "alice", b"1", b"2", b"3", b"4")
        items = [SentItem(m.client_id, m.msg_id, m.seq, m.ts_ms) for m in messages]
        await w.inbox(reply_to(w, alice, items[0], items[2], items[3]))
        assert [[item.seq for item in sent.items] for sent in alice.of(Sent)] == [[1], [3, 4]]
        alice.ack()
        await w.quiet()


async def test_a_refusal_names_its_message(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        alice = await w.level("alice")
        refusal = Refusal(client_id(9), "unknown_user", "nobody", False, 0)
        await w.inbox(reply_to(w, alice, refused=(refusal,)))
        (error,) = alice.of(Error)
        assert (error.op, error.code, error.client_id, error.conv) == (5, "unknown_user", client_id(9), CONV)


async def test_a_reply_for_a_session_that_is_gone_is_settled_and_nothing_else(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        alice = await w.level("alice")
        item = SentItem(client_id(1), 7, 1, 1)
        await w.inbox(Reply("nobody", "alice", CONV, 1, [item], []))
        await w.inbox(Reply(w.session_of(alice).id, "mallory", CONV, 1, [item], []))
        alice.vanish()
        await w.quiet()
        session = w.node.pool.of_device("alice", "phone")
        assert session is not None
        await w.inbox(Reply(session.id, "alice", CONV, 1, [item], []))
        assert alice.of(Sent) == []
        assert w.unsettled == 0


async def test_a_read_mark_goes_to_every_session_but_the_reader(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        laptop = await w.level("bob", "laptop")
        alice = await w.level("alice")
        await w.inbox(Mark(CONV, "bob", 3, ["bob", "alice", "nobody"], w.session_of(bob).id))
        assert bob.of(ReadMark) == []
        assert laptop.of(ReadMark) == alice.of(ReadMark) == [ReadMark(CONV, "bob", 3, -1)]


async def test_a_kick_closes_the_session_it_names_once_and_none_that_is_newer(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        session = w.session_of(bob)
        await w.inbox(
            Kick("bob", "phone", session.id, session.generation - 1, CloseCode.REPLACED, "replaced"),
            Kick("bob", "phone", "another", session.generation + 1, CloseCode.REPLACED, "replaced"),
        )
        assert bob.close_code == 0
        await w.inbox(
            Kick("bob", "phone", session.id, session.generation + 1, CloseCode.REPLACED, "replaced")
        )
        assert bob.close_code == CloseCode.REPLACED
        assert len(bob.of(Kicked)) == 1
        assert w.node.sessions == 0


# -------------------------------------------------------------------------------- the window and BEHIND


async def test_a_full_window_queues_nothing_and_streams_what_follows_as_acks_come(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=4) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", *[b"%d" % n for n in range(1, 11)], to=("bob",))
        assert bob.seqs() == [1, 2, 3, 4]
        assert w.unsettled == 4
        bob.ack()
        await w.quiet()
        assert bob.seqs() == [1, 2, 3, 4, 5, 6, 7, 8]
        while w.session_of(bob).behind:
            bob.ack()
            await w.quiet()
        bob.ack()
        await w.quiet()
        assert bob.seqs() == list(range(1, 11))
        assert (await w.cursor("bob", CONV), await w.due()) == (10, {})
        await w.send(CONV, "alice", b"live again", to=("bob",))
        assert bob.seqs()[-1] == 11
        bob.ack()


async def test_the_window_is_bounded_in_bytes_too(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_bytes=100_000) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", *[bytes(40_000)] * 5, to=("bob",))
        assert bob.seqs() == [1, 2]
        for _ in range(5):
            bob.ack()
            await w.quiet()
        assert bob.seqs() == [1, 2, 3, 4, 5]


async def test_nothing_overtakes_a_conversation_that_is_behind_while_others_go_on(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=4) as w:
        bob = await pair(w)
        await w.known("carol")
        w.store.hold("stream")
        messages = await w.append(CONV, "alice", *[b"%d" % n for n in range(1, 7)])
        await w.deliver(messages[:5], "bob")
        bob.ack()
        await until(lambda: w.store.waiting, "the stream is being read")
        await w.deliver(messages[5:], "bob")
        await w.send("p:bob:carol", "carol", b"other", to=("bob",))
        assert bob.seqs(CONV) == [1, 2, 3, 4]
        assert bob.seqs("p:bob:carol") == [1]
        w.store.let_go("stream")
        await w.quiet()
        assert bob.seqs(CONV) == [1, 2, 3, 4, 5, 6]
        bob.ack()
        await w.quiet()


async def test_what_could_not_be_written_stands_in_a_due_row_that_the_acks_clear(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=1) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        assert await w.due() == {("bob", CONV): (2, w.limits.ack_timeout_ms)}
        assert w.unsettled == 1
        for _ in range(3):
            bob.ack()
            await w.quiet()
        assert (bob.seqs(), await w.due()) == ([1, 2], {})


async def test_a_hole_that_the_store_finds_is_streamed(tmp_path: Path) -> None:
    """Deliver 2 never came: the ack of 3 cannot hide it."""
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        messages = await w.append(CONV, "alice", b"1", b"2", b"3")
        await w.deliver([messages[0], messages[2]], "bob")
        assert bob.seqs() == [1, 3]
        bob.ack()
        await w.quiet()
        assert bob.seqs() == [1, 3, 2, 3]
        assert [m.dup for m in bob.of(Msg)] == [False, False, True, True]
        bob.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 3


async def test_a_burst_larger_than_a_batch_lets_acks_in_between(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=64, inbox_batch=16) as w:
        bob = await pair(w)
        messages = await w.append(CONV, "alice", *[b"%d" % n for n in range(200)])
        records = [
            Deliver(CONV, m.seq, m.msg_id, 0, "alice", ["bob"], "", encode_msg_tail(m)) for m in messages
        ]
        acking = asyncio.create_task(_ack_for_ever(bob))
        try:
            await w.real_bus.publish([Outgoing(w.node.inbox, "k", encode_record(one)) for one in records])
            await until(lambda: bob.seqs() == list(range(1, 201)))
        finally:
            acking.cancel()
            await asyncio.gather(acking, return_exceptions=True)
        assert w.node.flows()["streamed"] == 0
        bob.ack()


async def _ack_for_ever(peer: Peer) -> None:
    while True:
        peer.ack()
        await asyncio.sleep(0)


# ------------------------------------------------------------------------------------------------- timers


async def test_no_ack_is_probed_after_three_seconds_and_moved_after_eight(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        bob.forget()
        await w.send(CONV, "alice", HELLO, to=("bob",))
        await w.pass_ms(2_750)
        assert bob.of(Probe) == []
        await w.pass_ms(500)
        assert len(bob.of(Probe)) == 1
        await w.pass_ms(4_500)
        assert (await w.due(), w.unsettled) == ({}, 1)
        await w.pass_ms(250)
        assert (await w.due(), w.unsettled) == ({("bob", CONV): (1, 0)}, 0)
        (record,) = await w.undelivered()
        assert (record.user, record.device, record.conv, record.from_seq) == ("bob", "phone", CONV, 1)
        assert bob.close_code == 0
        assert bob.seqs() == [1]


async def test_a_frame_that_timed_out_is_not_written_again_until_a_nudge(tmp_path: Path) -> None:
    async with node_world(tmp_path, idle_ms=600_000) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        await w.pass_ms(60_000)
        assert bob.seqs() == [1]
        await w.send(CONV, "alice", b"2", to=("bob",))
        await w.pass_ms(20_000)
        assert bob.seqs() == [1]
        await w.inbox(Nudge("bob", CONV, 1))
        assert bob.seqs() == [1, 1, 2]
        assert [m.dup for m in bob.of(Msg)] == [False, True, True]
        bob.ack()
        await w.quiet()
        assert (await w.cursor("bob", CONV), await w.due()) == (2, {})
        await w.send(CONV, "alice", b"3", to=("bob",))
        assert bob.seqs() == [1, 1, 2, 3]
        bob.ack()


async def test_frames_of_a_paused_conversation_are_late_in_silence(tmp_path: Path) -> None:
    """The row that the first one asked for covers them: one each would be the store's whole work."""
    async with node_world(tmp_path, idle_ms=600_000) as w:
        bob = await pair(w)
        for number in range(6):
            await w.send(CONV, "alice", b"%d" % number, to=("bob",))
            await w.pass_ms(1_000)
        await w.pass_ms(2_250)
        assert ((await w.due())["bob", CONV][0], w.unsettled) == (1, 5)
        asked = w.node.flusher.due_requests
        await w.pass_ms(6_000)
        assert w.node.flusher.due_requests == asked
        assert len(await w.undelivered()) == 1
        assert ((await w.due())["bob", CONV][0], w.unsettled) == (1, 0)
        await w.inbox(Nudge("bob", CONV, 1))
        assert bob.seqs() == [1, 2, 3, 4, 5, 6] * 2
        bob.ack()
        await w.quiet()
        assert (await w.cursor("bob", CONV), await w.due()) == (6, {})


async def test_what_is_late_behind_an_own_message_is_asked_for(tmp_path: Path) -> None:
    """Nobody owes the own one, so no row was asked for when it paused the conversation."""
    async with node_world(tmp_path, idle_ms=600_000) as w:
        bob = await pair(w)
        await own(w, bob, "bob", b"mine")
        await w.pass_ms(2_000)
        await w.send(CONV, "alice", b"yours", to=("bob",))
        await w.pass_ms(6_250)
        assert (await w.due(), w.unsettled) == ({}, 1)
        await w.pass_ms(2_000)
        assert ((await w.due())["bob", CONV][0], w.unsettled) == (2, 0)
        bob.ack()
        await w.quiet()


async def test_any_ack_wakes_what_was_paused(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.known("carol")
        await w.send(CONV, "alice", b"1", to=("bob",))
        await w.pass_ms(8_250)
        await w.send("p:bob:carol", "carol", b"x", to=("bob",))
        assert bob.seqs(CONV) == [1]
        bob.ack()
        await w.quiet()
        assert bob.seqs(CONV) == [1, 1]
        bob.ack()


async def test_a_late_ack_settles_nothing_twice(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        await w.pass_ms(8_250)
        bob.ack()
        await w.quiet()
        assert (w.unsettled, await w.cursor("bob", CONV)) == (0, 0)
        await w.inbox(Nudge("bob", CONV, 1))
        bob.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 1


async def test_other_conversations_go_on_when_a_timeout_has_emptied_the_window(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=4, slow_ms=60_000) as w:
        bob = await pair(w)
        await w.known("carol")
        await w.send(CONV, "alice", *[b"%d" % n for n in range(4)], to=("bob",))
        await w.send("p:bob:carol", "carol", b"x", to=("bob",))
        assert bob.seqs("p:bob:carol") == []
        await w.pass_ms(8_250)
        assert bob.seqs("p:bob:carol") == [1]
        assert bob.seqs(CONV) == [1, 2, 3, 4]
        bob.ack()
        await w.quiet()


async def test_silence_is_half_open_and_the_message_is_due_without_grace(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        bob.dead = True
        await w.send(CONV, "alice", HELLO, to=("bob",))
        await w.pass_ms(7_750)
        assert await w.online("bob") == ["phone"]
        await w.pass_ms(500)
        assert await w.online("bob") == []
        assert (await w.due())["bob", CONV][1] <= 0
        (record,) = await w.undelivered()
        assert (record.conv, record.from_seq, record.reason) == (CONV, 1, "half_open")
        await w.pass_ms(1_250)
        assert (bob.link.close_code, bob.link.told) == (CloseCode.HALF_OPEN, 1)


async def test_what_the_peer_said_after_the_write_and_before_the_probe_is_no_sign_of_life(
    tmp_path: Path,
) -> None:
    """The ack of an earlier message crosses the next one on the wire."""
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        await w.pass_ms(100)
        await w.send(CONV, "alice", b"2", to=("bob",))
        w.clock.passed_ms += 100
        bob.ack(bob.tags()[-2])
        bob.dead = True
        await w.pass_ms(8_250)
        assert await w.online("bob") == []
        assert bob.link.close_code == CloseCode.HALF_OPEN


async def test_a_peer_that_answers_probes_is_never_half_open(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        bob.forget()
        for number in range(12):
            await w.send(CONV, "alice", b"%d" % number, to=("bob",))
            await w.pass_ms(1_500)
        assert bob.close_code == 0
        assert 2 <= len(bob.of(Probe)) <= 8
        bob.ack()


async def test_a_full_window_without_progress_is_closed_after_ten_seconds(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=2) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", b"3", to=("bob",))
        await w.pass_ms(9_750)
        assert bob.close_code == 0
        await w.pass_ms(500)
        assert bob.close_code == CloseCode.SLOW
        assert await w.online("bob") == []


async def test_a_slow_reader_that_makes_progress_is_kept(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=2) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", *[b"%d" % n for n in range(1, 9)], to=("bob",))
        for _ in range(8):
            await w.pass_ms(5_000)
            bob.ack()
            await w.quiet()
        assert bob.close_code == 0
        assert bob.seqs() == list(range(1, 9))
        bob.ack()


async def test_a_write_buffer_without_progress_is_closed_after_ten_seconds(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_bytes=1_000_000) as w:
        bob = await pair(w)
        bob.link.stuck = True
        await w.send(CONV, "alice", *[bytes(60_000)] * 6, to=("bob",))
        assert bob.link.overflow
        for _ in range(4):
            await w.pass_ms(2_500)
            bob.say(Ping())
        await w.pass_ms(500)
        assert bob.link.close_code == CloseCode.SLOW


async def test_nothing_is_repeated_to_a_peer_that_has_not_read_the_first_time(tmp_path: Path) -> None:
    async with node_world(tmp_path, idle_ms=600_000) as w:
        bob = await pair(w)
        bob.link.stuck = True
        await w.send(CONV, "alice", *[bytes(30_000)] * 3, to=("bob",))
        waiting = bob.link.buffered_bytes()
        for _ in range(4):
            await w.pass_ms(2_125)
            bob.say(Ping())
        await w.inbox(Nudge("bob", CONV, 1))
        await w.pass_ms(250)
        assert bob.link.buffered_bytes() - waiting < 100, "PROBE and PONG"
        assert bob.link.close_code == 0
        bob.link.unstick()
        await w.pass_ms(250)
        assert bob.seqs() == [1, 2, 3, 1, 2, 3]
        bob.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 3


async def test_who_reads_nothing_is_closed_though_its_window_was_emptied(tmp_path: Path) -> None:
    async with node_world(tmp_path, idle_ms=600_000) as w:
        bob = await pair(w)
        bob.link.stuck = True
        await w.send(CONV, "alice", *[bytes(30_000)] * 3, to=("bob",))
        for _ in range(4):
            await w.pass_ms(2_125)
            bob.say(Ping())
        await w.inbox(Nudge("bob", CONV, 1))
        for _ in range(5):
            await w.pass_ms(2_000)
            bob.say(Ping())
        await w.pass_ms(500)
        assert bob.link.close_code == CloseCode.SLOW


async def test_a_write_buffer_that_drained_is_forgiven_though_nothing_was_left_to_stream(
    tmp_path: Path,
) -> None:
    async with node_world(tmp_path, window_bytes=1_000_000, ack_timeout_ms=60_000) as w:
        bob = await pair(w)
        bob.link.stuck = True
        messages = await w.append(CONV, "alice", *[bytes(60_000)] * 5)
        await w.deliver(messages, "bob")
        assert bob.link.overflow
        await w.inbox(Nudge("bob", "p:bob:carol", 1))
        await w.pass_ms(1_000)
        assert w.session_of(bob).full_since_mono_ms
        bob.link.unstick()
        await w.pass_ms(250)
        assert not w.session_of(bob).full_since_mono_ms
        await w.pass_ms(12_000)
        assert bob.close_code == 0
        bob.ack()
        await w.quiet()


async def test_a_second_device_that_acks_nothing_is_repeated_by_the_node(tmp_path: Path) -> None:
    """Its user's other device has acknowledged, so no due row is left that would nudge."""
    async with node_world(tmp_path, idle_ms=600_000, slow_ms=600_000) as w:
        phone = await pair(w)
        laptop = await w.level("bob", "laptop")
        await w.send(CONV, "alice", b"1", to=("bob",))
        phone.ack()
        await w.pass_ms(8_250)
        assert await w.due() == {}
        assert len(laptop.seqs()) == 1
        await w.pass_ms(1_250)
        assert len(laptop.seqs()) == 2
        await w.pass_ms(200_000)
        assert len(laptop.seqs()) == 7  # after 1, 2, 4, 8, 16, 30 s; then it waits for an ack
        assert w.node.delivery._retrying == set()
        phone.forget()
        await w.send(CONV, "alice", b"2", to=("bob",))
        phone.ack()
        await w.pass_ms(1_250)
        assert laptop.seqs()[-2:] == [1, 2]  # something new begins the repeats again
        laptop.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV, "laptop") == 2
        assert w.node.delivery._retrying == set()


# ----------------------------------------------------------------------------------- the connection ends


async def test_a_goodbye_leaves_due_rows_after_the_grace_and_settles(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        bob.leave()
        await w.quiet()
        assert w.unsettled == 0
        assert await w.due() == {("bob", CONV): (1, w.limits.grace_ms)}
        assert await w.online("bob") == []
        located = await w.real_presence.locate(["bob"])
        assert located["bob"].grace_until_ms == w.clock.wall_ms() + w.limits.grace_ms


async def test_a_reset_leaves_due_rows_soon_and_no_grace(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        bob.vanish()
        await w.quiet()
        assert await w.due() == {("bob", CONV): (1, w.limits.reset_due_ms)}
        assert await w.real_presence.locate(["bob"]) == {}


async def test_an_ack_that_comes_just_before_the_end_counts(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        bob.ack(bob.tags()[-2])
        bob.vanish()
        await w.quiet()
        assert w.unsettled == 0
        assert await w.states(CONV, "bob") == ["acked", "due"]


async def test_records_that_meet_a_session_without_connection_settle_by_due_rows(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        bob.vanish()
        await w.quiet()
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        await w.inbox(Nudge("bob", CONV, 1))
        assert w.unsettled == 0
        assert await w.due() == {("bob", CONV): (1, 0)}
        again = await w.resume(bob)
        assert again.seqs() == [1, 2]
        again.ack()


async def test_undelivered_that_no_bus_takes_is_left_to_the_due_row(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        w.bus.failing["publish"] = 1
        await w.pass_ms(8_000)
        assert (w.unsettled, await w.due()) == (0, {("bob", CONV): (1, 0)})
        assert w.node.flows()["bus_failures"] == 1
        bob.ack()


async def test_tags_follow_each_other_whatever_is_written(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=8) as w:
        bob = await pair(w)
        await w.known("carol")
        await w.send(CONV, "alice", b"1", to=("bob",))
        await own(w, bob, "bob", b"mine")
        late = await w.append(CONV, "alice", b"late", loss_time_ms=w.clock.wall_ms() + 1)
        w.clock.passed_ms += 2
        await w.deliver(late, "bob")
        await w.send("p:bob:carol", "carol", *[b"%d" % n for n in range(20)], to=("bob",))
        for _ in range(8):
            bob.ack()
            await w.quiet()
        tags = [tag for tag in bob.tags() if tag]
        assert tags == list(range(1, len(tags) + 1))
        assert bob.seqs("p:bob:carol") == list(range(1, 21))
        assert bob.of(Level)


async def test_a_store_that_stays_away_keeps_records_and_loses_no_ack(tmp_path: Path) -> None:
    async with node_world(tmp_path, retry_first_ms=1, retry_most_ms=1) as w:
        bob = await pair(w)
        w.store.failing["flush"] = 1_000_000
        for number in range(1, 51):
            await w.send(CONV, "alice", b"%d" % number, to=("bob",))
            bob.ack()
        await until(lambda: w.node.flusher.store_failures > 20)
        assert w.unsettled == 50
        assert bob.close_code == 0
        w.store.failing.clear()
        await w.quiet()
        assert (w.unsettled, await w.cursor("bob", CONV)) == (0, 50)


async def test_a_user_named_twice_in_a_record_settles_it_once(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        (message,) = await w.append(CONV, "alice", b"1")
        record = Deliver(CONV, 1, message.msg_id, 0, "alice", ["bob", "bob"], "", encode_msg_tail(message))
        await w.inbox(record)
        bob.ack()
        await w.quiet()
        assert (w.unsettled, await w.cursor("bob", CONV)) == (0, 1)
