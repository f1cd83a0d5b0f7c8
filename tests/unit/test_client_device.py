"""fastim.client.device, frame by frame, without a network: what is stored, shown, acknowledged, asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import pytest

from fastim import protocol as p
from fastim.client.device import ACK_DELAY_MS, ACK_EVERY, CONVS_RETRY_MS, Device
from fastim.client.events import Connected, Delivery, Gone, Message, ReadMark, StateChanged
from fastim.client.localstore import Batch, ConvRow, Reset, Snapshot, Ticket
from fastim.client.ordering import HOLD_MS
from fastim.client.outbox import Unsent
from fastim.errors import Unavailable
from fastim.model import Kind, SkipReason

CONV = "p:alice:bob"
F = TypeVar("F", bound=p.Frame)
WALL_MS = 1_700_000_000_000
SERVER_AHEAD_MS = 5_000


class HandClock:
    def __init__(self) -> None:
        self.now_ms = 1_000

    def mono_ms(self) -> int:
        return self.now_ms

    def wall_ms(self) -> int:
        return WALL_MS + self.now_ms


@dataclass
class Bench:
    """A device whose commits succeed at once."""

    clock: HandClock
    device: Device
    out: list[p.Frame] = field(default_factory=list)
    feed: list[Message | Gone | Reset] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    def turn(self, *frames: p.Frame) -> None:
        for frame in frames:
            self.device.take(frame)
        batch = self.device.drain()
        if batch:
            self.batches.append(batch)
            self.feed += batch.feed
        self.device.committed(batch)
        self.device.tick()
        self.out += self.device.out
        self.device.out.clear()

    def wait(self, ms: int) -> None:
        self.clock.now_ms += ms
        self.turn()

    def sent(self, kind: type[F]) -> list[F]:
        """Frames of this kind that were written since the last call."""
        found = [frame for frame in self.out if isinstance(frame, kind)]
        self.out = [frame for frame in self.out if not isinstance(frame, kind)]
        return found

    def shown(self) -> list[int]:
        return [entry.seq for entry in self.feed if isinstance(entry, Message)]


def bench(*rows: ConvRow, ticket: Ticket | None = None, outbox: list[Unsent] | None = None) -> Bench:
    clock = HandClock()
    ticket = ticket or Ticket("alice")
    snapshot = Snapshot(ticket, list(rows), outbox or [], [], 0, 0, 0)
    return Bench(clock, Device(snapshot, clock, random.Random(1)))


def hello(resumed: int = 0, user: str = "alice") -> p.Hello:
    server_ms = WALL_MS + 1_000 + SERVER_AHEAD_MS
    return p.Hello(
        1, "s1", user, "d0", server_ms, resumed, 10_000, 30_000, 120_000, 128, 1 << 18, 1 << 16, 0, 0
    )


def live(*rows: ConvRow, resumed: int = 0, ticket: Ticket | None = None) -> Bench:
    made = bench(*rows, ticket=ticket)
    made.turn(hello(resumed))
    return made


def msg(tag: int, seq: int, conv: str = CONV, *, sender: str = "bob", epoch: int = 1, **more: int) -> p.Msg:
    return p.Msg(
        tag, False, 1_000 + seq, conv, seq, seq, epoch, sender, bytes(8) + seq.to_bytes(8, "big"),
        more.get("kind", int(Kind.TEXT)), WALL_MS + seq, more.get("loss_time_ms", 0), 0,
        f"text {seq}".encode(),
    )  # fmt: skip


def unsent(n: int, conv: str = CONV) -> Unsent:
    return Unsent(n, n.to_bytes(16, "big"), conv, 1, b"mine", 0, 0, (), 0, WALL_MS)


def change(conv: str = CONV, **fields: object) -> p.ConvChange:
    plain = p.ConvChange(conv, 10, 50, 1, 40, 7, 0, False, "bob", 1, WALL_MS, "hello", 50)
    return msgspec.structs.replace(plain, **fields)


# ------------------------------------------------------------------------------------------------- acks


def test_nothing_is_acknowledged_before_its_batch_is_committed() -> None:
    made = live()
    device = made.device
    device.take(msg(1, 1))
    made.clock.now_ms += ACK_DELAY_MS
    batch = device.drain()
    assert batch.ticket is not None
    assert batch.ticket.tag == 1
    device.tick()
    device.ack()
    assert device.out == []
    device.committed(batch)
    device.tick()
    made.clock.now_ms += ACK_DELAY_MS
    device.tick()
    assert device.out == [p.Ack(1)]


def test_an_ack_is_cumulative_and_leaves_within_200_ms() -> None:
    made = live()
    made.turn(msg(1, 1), msg(2, 2))
    assert made.sent(p.Ack) == []
    assert (made.device.next_due_ms() or 0) <= made.clock.now_ms + 200
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(2)]
    made.wait(1_000)
    assert made.sent(p.Ack) == []


def test_32_frames_are_acknowledged_at_once() -> None:
    made = live()
    made.turn(*(msg(seq, seq) for seq in range(1, ACK_EVERY + 1)))
    assert made.sent(p.Ack) == [p.Ack(ACK_EVERY)]


def test_a_held_frame_holds_back_the_ack_of_those_behind_it() -> None:
    made = live()
    made.turn(msg(1, 1), msg(2, 3), msg(3, 1, "g:team"))
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(1)]
    made.turn(msg(4, 2))
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(4)]


def test_a_known_frame_is_acknowledged_and_not_shown() -> None:
    made = live(ConvRow(CONV, 1, 0, 5, head=5))
    made.turn(msg(1, 4), msg(2, 5))
    made.wait(ACK_DELAY_MS)
    assert made.shown() == []
    assert made.sent(p.Ack) == [p.Ack(2)]


def test_a_frame_without_a_tag_is_shown_and_not_acknowledged() -> None:
    made = live()
    made.turn(msg(0, 1))
    made.wait(ACK_DELAY_MS)
    assert made.shown() == [1]
    assert made.sent(p.Ack) == []


# ------------------------------------------------------------------------------------------------ order


def test_messages_are_shown_in_order_whatever_the_arrival() -> None:
    made = live()
    made.turn(msg(1, 2), msg(2, 4))
    assert made.shown() == []
    made.turn(msg(3, 1))
    made.turn(msg(4, 3))
    assert made.shown() == [1, 2, 3, 4]


def test_a_hole_is_pulled_after_500_ms() -> None:
    made = live(ConvRow(CONV, 1, 0, 1, head=1))
    made.turn(msg(1, 5))
    made.wait(HOLD_MS - 1)
    assert made.sent(p.Pull) == []
    made.wait(1)
    assert made.sent(p.Pull) == [p.Pull(CONV, 2, 4)]


def test_a_skip_is_a_gap_in_the_feed_and_closes_the_hole() -> None:
    made = live()
    made.turn(p.Skip(1, CONV, 1, 3, SkipReason.EXPIRED, 1), msg(2, 4))
    assert made.feed[0] == Gone(CONV, 1, 3, SkipReason.EXPIRED)
    assert made.shown() == [4]


def test_an_expired_message_counts_as_a_skip_by_the_servers_clock() -> None:
    made = live()
    server_now = WALL_MS + 1_000 + SERVER_AHEAD_MS
    made.turn(msg(1, 1, loss_time_ms=server_now - 1), msg(2, 2, loss_time_ms=server_now))
    assert made.feed[0] == Gone(CONV, 1, 1, SkipReason.EXPIRED)
    assert made.shown() == [2]
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(2)]


def test_the_servers_clock_does_not_follow_jumps_of_this_machines() -> None:
    made = live()
    before = made.device.server_now_ms()
    made.clock.wall_ms = lambda: 0  # type: ignore[method-assign]
    made.clock.now_ms += 50
    assert made.device.server_now_ms() == before + 50


def test_another_epoch_starts_over_and_marks_the_place_in_the_feed() -> None:
    made = live(ConvRow(CONV, 1, 0, 7, head=7, read=7))
    made.turn(msg(1, 1, epoch=2))
    assert isinstance(made.feed[0], Reset)
    assert made.shown() == [1]
    row = made.batches[-1].convs[CONV]
    assert (row.epoch, row.last, row.start, row.read) == (2, 1, 0, 0)


def test_another_epoch_with_a_hole_is_pulled_from_1() -> None:
    made = live(ConvRow(CONV, 1, 0, 7, head=7))
    made.turn(msg(1, 9, epoch=2))
    made.wait(HOLD_MS)
    assert made.sent(p.Pull) == [p.Pull(CONV, 1, 8)]


# ------------------------------------------------------------------------------------------- own messages


def test_a_send_leaves_only_after_its_commit_and_under_one_frame_per_conversation() -> None:
    made = live()
    made.device.add(unsent(1))
    made.device.tick()
    assert made.device.out == []
    made.device.add(unsent(2))
    made.turn()
    (send,) = made.sent(p.Send)
    assert [item.client_id for item in send.items] == [unsent(1).client_id, unsent(2).client_id]


def test_sent_takes_its_place_in_the_order_and_leaves_the_outbox() -> None:
    made = live(ConvRow(CONV, 1, 0, 1, head=1))
    made.device.add(unsent(1))
    made.turn()
    made.turn(p.Sent(1, CONV, 1, [p.SentItem(unsent(1).client_id, 77, 3, WALL_MS)]))
    assert made.shown() == []
    assert StateChanged(unsent(1).client_id, CONV, Delivery.SENT, 3, 77) in made.device.signals
    assert not any(batch.closed for batch in made.batches), "it stays in the outbox until its place is stored"
    made.turn(msg(2, 2))
    assert made.shown() == [2, 3]
    own = made.feed[-1]
    assert isinstance(own, Message)
    assert (own.sender, own.body, own.msg_id, own.client_id) == ("alice", b"mine", 77, unsent(1).client_id)
    assert made.batches[-1].closed == [unsent(1).client_id]
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(2)]


def test_the_tag_of_a_sent_with_several_items_waits_for_all_of_them() -> None:
    made = live()
    made.device.add(unsent(1))
    made.device.add(unsent(2))
    made.turn()
    items = [p.SentItem(unsent(n).client_id, 70 + n, n + 1, WALL_MS) for n in (2, 1)]
    made.turn(p.Sent(1, CONV, 1, items))
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == []
    made.turn(msg(2, 1))
    made.wait(ACK_DELAY_MS)
    assert made.shown() == [1, 2, 3]
    assert made.sent(p.Ack) == [p.Ack(2)]


def test_an_own_message_whose_sent_was_lost_comes_as_msg_and_leaves_the_outbox() -> None:
    made = live()
    made.device.add(unsent(1))
    made.turn()
    own = msgspec.structs.replace(msg(1, 1, sender="alice"), client_id=unsent(1).client_id)
    made.turn(own)
    assert made.shown() == [1]
    assert unsent(1).client_id in made.batches[-1].closed
    assert len(made.device.outbox) == 0
    made.turn(p.Sent(2, CONV, 1, [p.SentItem(unsent(1).client_id, 1_001, 1, WALL_MS)]))
    made.wait(ACK_DELAY_MS)
    assert made.shown() == [1]
    assert made.sent(p.Ack) == [p.Ack(2)]


def test_sent_without_a_tag_is_placed_too_and_its_msg_is_dropped() -> None:
    made = live()
    made.device.add(unsent(1))
    made.turn()
    made.turn(p.Sent(0, CONV, 1, [p.SentItem(unsent(1).client_id, 1_001, 1, WALL_MS)]))
    made.turn(msgspec.structs.replace(msg(1, 1, sender="alice"), client_id=unsent(1).client_id))
    made.wait(ACK_DELAY_MS)
    assert made.shown() == [1]
    assert made.sent(p.Ack) == [p.Ack(1)]


def test_sent_for_a_message_that_is_not_here_is_pulled_and_acknowledged_when_it_has_come() -> None:
    made = live(ConvRow(CONV, 1, 0, 1, head=1))
    made.turn(p.Sent(1, CONV, 1, [p.SentItem(bytes(16), 77, 2, WALL_MS)]))
    made.wait(HOLD_MS)
    assert made.sent(p.Pull) == [p.Pull(CONV, 2, 2)]
    assert made.sent(p.Ack) == []
    made.turn(msg(2, 2, sender="alice"))
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(2)]


def test_a_refused_message_stays_for_the_app_to_see() -> None:
    made = live()
    made.device.add(unsent(1))
    made.turn()
    made.turn(p.Error(int(p.Op.SEND), "too_big", "why", client_id=unsent(1).client_id, conv=CONV))
    assert made.batches[-1].refused[0].refused == "too_big"
    assert [entry.refused for entry in made.device.entries()] == ["too_big"]
    made.device.discard(unsent(1).client_id)
    made.turn()
    assert made.batches[-1].closed == [unsent(1).client_id]
    assert made.device.entries() == []


def test_nothing_is_sent_into_a_clogged_socket() -> None:
    made = live()
    made.device.clogged = True
    made.device.add(unsent(1))
    made.turn()
    assert made.sent(p.Send) == []
    made.device.clogged = False
    made.turn()
    assert len(made.sent(p.Send)) == 1


# ------------------------------------------------------------------------------------------- connections


def test_auth_asks_to_resume_what_is_stored() -> None:
    made = bench(ticket=Ticket("alice", "s0", 17, 33, 34))
    auth = made.device.auth("token", "d0", "app", "agent")
    assert (auth.session, auth.tag, auth.user_cursor) == ("s0", 17, 33)


def test_a_new_session_counts_tags_from_the_beginning() -> None:
    made = bench(ticket=Ticket("alice", "s0", 17, 33, 34))
    made.turn(hello(2))
    assert made.batches[-1].ticket is not None
    assert made.batches[-1].ticket.tag == 0
    made.turn(msg(1, 1))
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(1)]


def test_a_hot_resume_goes_on_with_the_tags() -> None:
    made = bench(ConvRow(CONV, 1, 0, 4, head=4), ticket=Ticket("alice", "s1", 17, 33, 34))
    made.turn(hello(1))
    made.turn(msg(18, 4), msg(20, 5))
    made.wait(ACK_DELAY_MS)
    assert made.shown() == [5]
    assert made.sent(p.Ack) == [p.Ack(20)]
    assert made.device.fault == ""


def test_what_was_held_when_the_connection_was_lost_is_not_acknowledged_by_the_next_ticket() -> None:
    made = live()
    made.turn(msg(1, 1), msg(2, 3))
    made.device.lost()
    assert made.device.ticket.tag == 1
    assert made.device.auth("t", "d0", "app", "").tag == 1


def test_what_was_under_way_is_sent_again_after_hello_and_not_before() -> None:
    made = live()
    made.device.add(unsent(1))
    made.turn()
    made.sent(p.Send)
    made.device.lost()
    made.wait(60_000)
    assert made.out == []
    made.turn(hello(1))
    (send,) = made.sent(p.Send)
    assert send.items[0].client_id == unsent(1).client_id


def test_a_missing_tag_ends_the_connection_with_a_new_session() -> None:
    made = live()
    made.turn(msg(1, 1), msg(3, 2))
    assert "tag 3 came after 1" in made.device.fault
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(1)]
    made.device.forget_session()
    made.device.lost()
    assert (made.device.auth("t", "d0", "app", "").session, made.device.fault) == ("", "")


def test_a_last_tag_above_what_came_ends_the_connection() -> None:
    made = live()
    made.turn(msg(1, 1), p.Pong(WALL_MS, 2, 0))
    assert "tag 1 of 2 arrived" in made.device.fault


def test_the_store_of_another_user_is_not_touched() -> None:
    made = bench(ticket=Ticket("alice", "s0", 3, 4, 5))
    made.turn(hello(0, "mallory"), msg(1, 1))
    assert made.device.wrong_store
    assert not made.device.live
    assert made.device.ticket.session == "s0"


def test_a_first_hello_says_whose_store_it_is() -> None:
    made = bench(ticket=Ticket())
    made.turn(hello())
    assert made.device.user == "alice"
    assert Connected("alice", "s1", 0) in made.device.signals


def test_a_frame_of_the_future_is_ignored_with_its_tag() -> None:
    made = live()
    made.device.unknown()
    made.turn(msg(2, 1))
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(2)]


# ---------------------------------------------------------------------------------------- level and lists


def test_level_is_stored_with_or_after_what_came_before_it() -> None:
    made = live()
    made.turn(msg(1, 1), p.Level(2, 9))
    ticket = made.batches[-1].ticket
    assert ticket is not None
    assert (ticket.user_cursor, ticket.tag) == (9, 2)
    assert made.batches[-1].feed != []


def test_level_waits_while_something_is_held() -> None:
    made = live()
    made.turn(msg(1, 2), p.Level(2, 9))
    assert made.device.ticket.user_cursor == 0
    made.turn(msg(3, 1))
    assert made.device.ticket.user_cursor == 9
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(3)]


def test_level_of_a_lost_connection_is_not_stored_by_the_next() -> None:
    made = live()
    made.turn(msg(1, 2), p.Level(2, 9))
    made.device.lost()
    made.turn(hello(2))
    made.turn(msg(1, 1))
    assert made.device.ticket.user_cursor == 0


def test_a_device_that_holds_nothing_starts_at_the_cursors_of_the_list() -> None:
    made = live()
    made.turn(p.Changes(0, [change(cursor=50, head=52)], 10, False), msg(1, 51), msg(2, 52))
    assert made.shown() == [51, 52]
    row = made.device.rows[CONV]
    assert (row.start, row.last, row.head, row.unread, row.preview) == (50, 52, 52, 7, "text 52")


def test_an_unknown_conversation_is_looked_up_in_the_list() -> None:
    made = live()
    made.turn(msg(1, 51), msg(2, 52))
    (convs,) = made.sent(p.Convs)
    assert made.shown() == []
    made.turn(p.Changes(convs.req, [change(cursor=50)], 10, False))
    assert made.shown() == [51, 52]
    assert made.sent(p.Pull) == []


def test_the_list_is_asked_for_again_when_nobody_answers() -> None:
    made = live()
    made.turn(msg(1, 51))
    assert len(made.sent(p.Convs)) == 1
    made.turn(msg(2, 61, "g:other"))
    assert made.sent(p.Convs) == []
    made.wait(CONVS_RETRY_MS)
    made.turn(msg(3, 71, "g:third"))
    assert len(made.sent(p.Convs)) == 1


def test_pages_of_the_list_are_followed_to_the_end() -> None:
    made = live()
    made.turn(p.Level(1, 30))
    (first,) = made.sent(p.Convs)
    assert first.user_cursor == 0
    made.turn(p.Changes(first.req, [change()], 10, True))
    (second,) = made.sent(p.Convs)
    assert second.user_cursor == 10
    made.turn(p.Changes(second.req, [change("g:team")], 30, False))
    assert made.sent(p.Convs) == []
    assert made.device.ticket.list_cursor == 30


def test_the_list_is_not_asked_for_when_it_came_by_itself() -> None:
    made = live()
    made.turn(p.Changes(0, [change()], 30, False), p.Level(1, 30))
    assert made.sent(p.Convs) == []
    assert made.device.ticket.list_cursor == 30


def test_a_hot_resume_asks_for_what_changed_in_the_list_meanwhile() -> None:
    made = live(resumed=1, ticket=Ticket("alice", "s1", 4, 20, 20))
    made.turn(p.Level(5, 30))
    assert [convs.user_cursor for convs in made.sent(p.Convs)] == [20]


def test_pages_that_begin_above_what_the_list_has_do_not_move_its_cursor() -> None:
    made = bench(ticket=Ticket("alice", "s0", 4, 20, 5))
    made.device.auth("t", "d0", "app", "")
    made.turn(hello(2), p.Changes(0, [change(version=25)], 30, False), p.Level(1, 30))
    assert [convs.user_cursor for convs in made.sent(p.Convs)] == [5]


def test_an_older_list_entry_does_not_replace_a_newer_one() -> None:
    made = live()
    made.turn(p.Changes(0, [change(version=10, unread=3)], 10, False))
    made.turn(p.Changes(0, [change(version=9, unread=8)], 10, False))
    assert made.device.rows[CONV].unread == 3


def test_a_list_entry_with_another_epoch_starts_the_conversation_over() -> None:
    made = live(ConvRow(CONV, 1, 0, 7, head=7, version=3))
    made.turn(p.Changes(0, [change(epoch=2, head=4, cursor=0)], 10, False))
    made.wait(HOLD_MS)
    assert made.sent(p.Pull) == [p.Pull(CONV, 1, 4)]


def test_history_that_was_cut_is_a_gap_up_to_the_cursor() -> None:
    made = live(ConvRow(CONV, 1, 0, 7, head=7, version=3))
    made.turn(p.Changes(0, [change(head=90, cursor=80, limited=True)], 10, False), msg(1, 81))
    assert made.feed[0] == Gone(CONV, 8, 80, SkipReason.RETENTION)
    assert made.shown() == [81]


def test_unread_grows_with_messages_of_others_and_not_with_own_or_read_ones() -> None:
    made = live(ConvRow(CONV, 1, 0, 0, read=2))
    made.turn(
        msg(1, 1),
        msg(2, 2),
        msg(3, 3),
        msg(4, 4, sender="alice"),
        msg(5, 5, kind=int(Kind.MEMBER)),
        msg(6, 6),
    )
    row = made.device.rows[CONV]
    assert (row.unread, row.preview, row.last_sender) == (2, "text 6", "bob")


def test_messages_that_the_list_counted_are_not_counted_again() -> None:
    made = live()
    made.turn(
        p.Changes(0, [change(cursor=48, head=50, unread=7)], 10, False), msg(1, 49), msg(2, 50), msg(3, 51)
    )
    assert made.device.rows[CONV].unread == 8


# ------------------------------------------------------------------------------------------------ reading


def test_a_read_mark_is_stored_and_told_until_the_server_knows() -> None:
    made = live(ConvRow(CONV, 1, 0, 9, head=9, unread=9))
    made.device.read(CONV, 99, private=True)
    made.turn()
    row = made.batches[-1].convs[CONV]
    assert (row.read, row.unread) == (9, 0)
    assert made.sent(p.Read) == [p.Read(CONV, 9, True)]
    made.device.lost()
    made.turn(hello(1))
    assert made.sent(p.Read) == [p.Read(CONV, 9, True)]
    made.turn(p.ReadMark(CONV, "alice", 9, 0))
    made.device.lost()
    made.turn(hello(1))
    assert made.sent(p.Read) == []


def test_a_read_mark_in_the_middle_is_counted_by_the_store() -> None:
    made = live(ConvRow(CONV, 1, 0, 9, head=9, unread=9))
    made.device.read(CONV, 4, private=False)
    assert made.device.recounts == {CONV}
    made.device.recounted(CONV, 5)
    made.turn()
    assert made.batches[-1].convs[CONV].unread == 5


def test_read_marks_never_go_back() -> None:
    made = live(ConvRow(CONV, 1, 0, 9, head=9, read=6, read_told=6))
    made.device.read(CONV, 5, private=False)
    made.turn(p.ReadMark(CONV, "alice", 3, 8))
    assert made.device.rows[CONV].read == 6
    assert made.sent(p.Read) == []


def test_a_read_that_could_not_be_stored_is_told_again() -> None:
    made = live(ConvRow(CONV, 1, 0, 9, head=9))
    made.device.read(CONV, 9, private=False)
    made.turn()
    made.sent(p.Read)
    made.turn(p.Error(int(p.Op.READ), "unavailable", "", True, 2_000, conv=CONV))
    assert made.sent(p.Read) == []
    made.wait(2_000)
    assert made.sent(p.Read) == [p.Read(CONV, 9)]


def test_the_mark_of_another_device_moves_this_one() -> None:
    made = live(ConvRow(CONV, 1, 0, 9, head=9, unread=9))
    made.turn(p.ReadMark(CONV, "alice", 9, 0))
    row = made.device.rows[CONV]
    assert (row.read, row.unread) == (9, 0)
    assert ReadMark(CONV, "alice", 9) in made.device.signals


def test_marks_of_peers_are_kept_and_only_move_forward() -> None:
    made = live(ConvRow(CONV, 1, 0, 9, head=9))
    made.turn(p.ReadMark(CONV, "bob", 5), p.ReadMark(CONV, "bob", 4))
    assert made.device.reads == {CONV: {"bob": 5}}
    assert made.batches[-1].reads == {(CONV, "bob"): 5}


# ---------------------------------------------------------------------------------------- history, beats


def item(seq: int, epoch: int = 1) -> p.HistoryItem:
    return p.HistoryItem(seq, CONV, seq, seq, epoch, "bob", bytes(16), 1, WALL_MS, 0, 0, b"old")


def test_a_page_below_what_is_here_extends_it() -> None:
    made = live(ConvRow(CONV, 1, 50, 60, head=60))
    req = made.device.ask_history(CONV, 51, 2)
    made.turn()
    assert made.sent(p.History) == [p.History(req, CONV, 51, 0, 0, 0, 2)]
    made.turn(p.HistoryPage(req, CONV, [item(48), item(50)], True))
    assert [page.seq for page in made.batches[-1].pages] == [48, 50]
    assert made.device.rows[CONV].start == 47
    assert made.device.answers[0][0] == req
    req = made.device.ask_history(CONV, 48, 2)
    made.turn(p.HistoryPage(req, CONV, [item(40)], False))
    assert made.device.rows[CONV].start == 0


def test_a_page_from_elsewhere_is_not_kept() -> None:
    made = live(ConvRow(CONV, 1, 50, 60, head=60))
    req = made.device.ask_history(CONV, 30, 2)
    made.turn(p.HistoryPage(req, CONV, [item(28), item(29)], True))
    assert made.device.rows[CONV].start == 50
    assert not any(batch.pages for batch in made.batches)


def test_a_page_of_another_epoch_is_not_kept() -> None:
    made = live(ConvRow(CONV, 1, 50, 60, head=60))
    req = made.device.ask_history(CONV, 51, 2)
    made.turn(p.HistoryPage(req, CONV, [item(50, epoch=2)], False))
    assert made.device.rows[CONV].start == 50


def test_history_needs_a_connection() -> None:
    made = bench(ConvRow(CONV, 1, 50, 60))
    with pytest.raises(Unavailable, match="not connected"):
        made.device.ask_history(CONV, 51, 2)


def test_a_change_of_which_nothing_comes_for_a_beat_is_asked_for() -> None:
    made = live()
    made.turn(p.Level(1, 10))
    made.turn(p.Pong(WALL_MS, 1, 12))
    made.turn(p.Pong(WALL_MS, 1, 12))
    assert made.sent(p.Sync) == []
    made.turn(p.Pong(WALL_MS, 1, 12))
    assert made.sent(p.Sync) == [p.Sync(10)]


def test_a_change_whose_messages_come_is_not_asked_for() -> None:
    made = live()
    made.turn(p.Level(1, 10))
    for seq in range(1, 8):
        made.turn(msg(1 + seq, seq), p.Pong(WALL_MS, 1 + seq, 10 + seq))
    assert made.sent(p.Sync) == []


def test_a_head_notice_is_pulled_and_acknowledged_when_it_is_reached() -> None:
    made = live(ConvRow("g:large", 1, 0, 3, head=3))
    made.turn(p.Head(1, "g:large", 5))
    made.wait(HOLD_MS)
    assert made.sent(p.Pull) == [p.Pull("g:large", 4, 5)]
    made.turn(msg(0, 4, "g:large"), msg(0, 5, "g:large"))
    made.wait(ACK_DELAY_MS)
    assert made.sent(p.Ack) == [p.Ack(1)]


def test_messages_for_an_app_that_is_too_far_behind_wait_and_are_not_acknowledged() -> None:
    made = live()
    made.device.add(unsent(1))
    made.turn(msg(1, 1))
    made.device.set_full(True)
    made.turn(msg(2, 2), p.Skip(3, CONV, 3, 4, 1, 1), p.Level(4, 9))
    made.turn(p.Sent(5, CONV, 1, [p.SentItem(unsent(1).client_id, 77, 5, WALL_MS)]))
    made.wait(HOLD_MS * 4)
    assert made.shown() == [1]
    assert len(made.device.outbox) == 0, "the answer to an own message does not wait"
    assert made.sent(p.Pull) == []
    assert made.sent(p.Ack) == [p.Ack(1)]
    assert made.device.ticket.user_cursor == 0
    made.device.set_full(False)
    made.turn()
    made.wait(ACK_DELAY_MS)
    assert made.shown() == [1, 2, 5]
    assert made.sent(p.Ack) == [p.Ack(5)]
    assert made.sent(p.Pull) == []
    assert made.device.ticket.user_cursor == 9


def test_what_waited_for_the_app_comes_again_after_a_lost_connection() -> None:
    made = live()
    made.device.set_full(True)
    made.turn(msg(1, 1))
    made.device.lost()
    made.device.set_full(False)
    made.turn(hello(1))
    assert made.shown() == []
    made.turn(msg(1, 1))
    assert made.shown() == [1]


def test_level_of_a_user_of_whom_nothing_is_known_is_a_level_too() -> None:
    made = live()
    assert not made.device.level
    made.turn(p.Level(1, 0))
    assert made.device.level
    made.device.lost()
    assert not made.device.level


def test_reading_what_is_here_leaves_what_is_on_its_way_to_be_counted() -> None:
    made = live()
    made.turn(p.Changes(0, [change(cursor=48, head=50, unread=10)], 10, False), msg(1, 49))
    assert made.device.rows[CONV].unread == 10
    made.device.read(CONV, 49, private=False)
    assert made.device.rows[CONV].unread == 0
    made.turn(msg(2, 50))
    assert made.device.rows[CONV].unread == 1
