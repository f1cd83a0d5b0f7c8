"""Catching up: C1-C3 of catchup.py, N1 and N2 of session.py, and that every wait ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastim.bus.records import Nudge
from fastim.model import Kind
from fastim.node.session import CURSOR
from fastim.protocol import Changes, Level, Msg, Pull, Skip, Sync
from tests.system.node_world import NodeWorld, Peer, node_world, until

CONV = "p:alice:bob"
OTHER = "p:bob:carol"


async def bodies(w: NodeWorld, conv: str, sender: str, count: int, size: int = 4) -> None:
    for start in range(0, count, 32):
        await w.append(conv, sender, *[b"%0*d" % (size, n) for n in range(start, min(count, start + 32))])


async def ack_all(w: NodeWorld, peer: Peer) -> None:
    """Acknowledge until nothing more comes."""
    seen = -1
    while seen != len(peer.frames):
        seen = len(peer.frames)
        peer.ack()
        await w.quiet()


def positions(peer: Peer, conv: str) -> list[tuple[int, int]]:
    """MSG and SKIP of a conversation as (from_seq, to_seq), in the order of arrival."""
    found = []
    for frame in peer.frames:
        if isinstance(frame, Msg) and frame.conv == conv:
            found.append((frame.seq, frame.seq))
        elif isinstance(frame, Skip) and frame.conv == conv:
            found.append((frame.from_seq, frame.to_seq))
    return found


# --------------------------------------------------------------------------------------------- first sync


async def test_a_first_sync_tells_the_list_streams_everything_and_ends_in_level(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob", "carol")
        await bodies(w, CONV, "alice", 3)
        await bodies(w, OTHER, "carol", 2)
        bob = await w.connect("bob")
        kinds = [type(frame).__name__ for frame in bob.frames]
        assert kinds == ["Hello", "Changes", "Msg", "Msg", "Msg", "Msg", "Msg", "Level"]
        (changes,) = bob.of(Changes)
        assert {(c.conv, c.head, c.unread, c.cursor) for c in changes.items} == {
            (CONV, 3, 3, 0),
            (OTHER, 2, 2, 0),
        }
        assert (bob.seqs(CONV), bob.seqs(OTHER)) == ([1, 2, 3], [1, 2])
        (level,) = bob.of(Level)
        assert level.user_cursor == changes.user_cursor == bob.hello.user_cursor
        bob.ack()
        await w.quiet()
        assert (await w.cursor("bob", CONV), await w.cursor("bob", OTHER)) == (3, 2)
        assert w.session_of(bob).level_version == level.user_cursor


async def test_nothing_to_tell_is_level_at_once(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await w.connect("bob")
        assert [type(frame).__name__ for frame in bob.frames] == ["Hello", "Changes", "Level"]
        bob.ack()


async def test_a_long_list_is_paged_and_level_comes_after_the_last_stream(tmp_path: Path) -> None:
    async with node_world(tmp_path, page_conversations=2, window_messages=3) as w:
        people = [f"u{n}" for n in range(7)]
        await w.known("bob", *people)
        for user in people:
            await bodies(w, f"p:bob:{user}", user, 2)
        bob = await w.connect("bob")
        assert [len(c.items) for c in bob.of(Changes)] == [2, 2, 2, 1]
        assert [c.more for c in bob.of(Changes)] == [True, True, True, False]
        await ack_all(w, bob)
        assert all(bob.seqs(f"p:bob:{user}") == [1, 2] for user in people)
        assert isinstance(bob.frames[-1], Level)
        assert len(bob.of(Level)) == 1


async def test_level_waits_for_a_conversation_that_the_window_holds_up(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=2) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 5)
        bob = await w.connect("bob")
        for seqs in ([1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]):
            assert bob.seqs() == seqs
            assert bool(bob.of(Level)) == (len(seqs) == 5)
            bob.ack()
            await w.quiet()


async def test_what_is_written_is_contiguous_with_skips_in_the_holes(tmp_path: Path) -> None:
    async with node_world(tmp_path, page_messages=2) as w:
        await w.known("alice", "bob")
        soon = w.clock.wall_ms() + 10
        await w.append(CONV, "alice", b"1")
        await w.append(CONV, "alice", b"2", b"3", loss_time_ms=soon)
        await w.append(CONV, "alice", b"4")
        await w.append(CONV, "alice", b"5", loss_time_ms=soon)
        w.clock.passed_ms += 11
        bob = await w.connect("bob")
        found = positions(bob, CONV)
        assert [n for first, last in found for n in range(first, last + 1)] == [1, 2, 3, 4, 5]
        assert bob.seqs() == [1, 4]
        bob.ack()
        await w.quiet()
        assert await w.states(CONV, "bob") == ["acked", "expired", "expired", "acked", "expired"]
        assert await w.cursor("bob", CONV) == 5


async def test_own_messages_are_streamed_and_settle_without_a_fate(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "bob", 2)
        await bodies(w, CONV, "alice", 1)
        bob = await w.level("bob")
        assert bob.seqs() == [1, 2, 3]
        assert await w.cursor("bob", CONV) == 3
        assert w.node.flows()["acked"] == 1


async def test_a_live_message_during_the_pages_waits_for_its_stream(tmp_path: Path) -> None:
    """Race B: presence has the session before its pages are read."""
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 2)
        w.store.hold("conversations")
        bob = await w.connect("bob")
        await w.send(CONV, "alice", b"live", to=("bob",))
        assert bob.seqs() == []
        w.store.let_go("conversations")
        await w.quiet()
        assert bob.seqs() == [1, 2, 3]
        assert [m.dup for m in bob.of(Msg)] == [False, False, False]
        bob.ack()
        await w.quiet()
        await w.send(CONV, "alice", b"later", to=("bob",))
        assert bob.seqs() == [1, 2, 3, 4]
        bob.ack()


async def test_a_live_message_while_a_page_is_read_is_streamed_behind_it(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 2)
        w.store.late = True
        w.store.hold("stream")
        bob = await w.connect("bob")
        await until(lambda: w.store.waiting, "the page is read")
        await w.send(CONV, "alice", b"3", to=("bob",))
        assert bob.seqs() == []
        w.store.let_go("stream")
        await w.quiet()
        assert bob.seqs() == [1, 2, 3]
        assert not w.session_of(bob).behind
        bob.ack()


async def test_a_delivery_that_the_stream_was_faster_than_is_only_a_repeat(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        messages = await w.append(CONV, "alice", b"1", b"2")
        bob = await w.connect("bob")
        await w.deliver(messages, "bob")
        assert bob.seqs() == [1, 2, 1, 2]
        bob.ack()
        await w.quiet()
        assert (w.unsettled, await w.cursor("bob", CONV)) == (0, 2)


# ----------------------------------------------------------------------------------- pages that are void


@pytest.mark.parametrize("what", ["pull", "nudge after a pause", "timeout"])
async def test_a_page_is_void_when_its_conversation_moved_while_it_was_read(
    tmp_path: Path, what: str
) -> None:
    async with node_world(tmp_path, page_messages=2, idle_ms=600_000) as w:
        bob = await w.level("bob")
        await w.known("alice")
        await w.send(CONV, "alice", b"1", b"2", b"3", b"4", to=("bob",))
        bob.ack(bob.tags()[1])
        await w.quiet()
        session = w.session_of(bob)
        w.store.late = True
        w.store.hold("stream")
        bob.forget()
        bob.say(Pull(CONV, 3, 4))
        await until(lambda: w.store.waiting, "the page is read")
        if what == "pull":
            bob.say(Pull(CONV, 2, 4))
        elif what == "timeout":
            await w.pass_ms(8_250)
            assert session.behind[CONV].paused
        else:
            session.behind[CONV].paused = True
            await w.inbox(Nudge("bob", CONV, 1))
        w.store.let_go("stream")
        await w.quiet()
        if what == "timeout":
            assert bob.seqs() == []
            await w.inbox(Nudge("bob", CONV, 1))
        first = bob.seqs()[0]
        assert first <= 3
        assert bob.seqs() == list(range(first, 5))
        await ack_all(w, bob)
        assert await w.cursor("bob", CONV) == 4


async def test_a_page_is_void_when_the_connection_changed_while_it_was_read(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 2)
        w.store.late = True
        w.store.hold("stream")
        bob = await w.connect("bob")
        await until(lambda: w.store.waiting, "the page is read")
        again = w.dial()
        w.auth(again, "bob", session=bob.hello.session)
        await until(lambda: again.frames, "HELLO")
        w.store.let_go("stream")
        await w.quiet()
        assert bob.seqs() == []
        assert again.seqs() == [1, 2]
        assert again.tags() == [1, 2, 3]
        again.ack()


async def test_a_list_page_is_void_when_another_sync_began_while_it_was_read(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 1)
        w.store.late = True
        w.store.hold("conversations")
        bob = await w.connect("bob")
        await until(lambda: w.store.waiting, "the list is read")
        bob.say(Sync(0))
        w.store.let_go("conversations")
        await w.quiet()
        assert [len(c.items) for c in bob.of(Changes)] == [1]
        assert len(bob.of(Level)) == 1
        assert bob.seqs() == [1]
        bob.ack()


# -------------------------------------------------------------------------------------------- not a member


async def test_a_conversation_that_is_not_the_users_is_left_alone(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.real_store.create_group("secret", "alice", ["carol"], w.clock.wall_ms())
        bob = await w.level("bob")
        bob.say(Pull("g:secret", 1, 5), Pull("g:nowhere", 1, 5))
        await w.quiet()
        assert bob.seqs() == []
        assert w.session_of(bob).behind == {}
        assert bob.close_code == 0


async def test_not_a_member_and_no_connection_any_more_is_no_fault(tmp_path: Path) -> None:
    """The answer "not a member" came after the connection had ended, with a sync waiting for it."""
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 1)
        w.store.hold("stream")
        bob = await w.connect("bob")
        await until(lambda: w.store.waiting, "the stream is asked for")
        session = w.session_of(bob)
        session.behind["g:nowhere"] = session.behind.pop(CONV)
        assert session.sync is not None
        session.sync.waiting = {"g:nowhere"}
        bob.vanish()
        w.store.let_go("stream")
        await w.quiet()
        session.behind.pop("g:nowhere", None)


# ----------------------------------------------------------------------------------------- the store is away


@pytest.mark.parametrize("call", ["conversations", "position", "stream"])
async def test_a_store_that_is_away_delays_and_costs_nothing_else(tmp_path: Path, call: str) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob", "carol")
        await bodies(w, CONV, "alice", 3)
        await bodies(w, OTHER, "carol", 2)
        w.store.failing[call] = 3
        bob = await w.connect("bob")
        assert bob.close_code == 0
        assert not bob.of(Level)
        await w.pass_ms(1_500)
        assert (bob.seqs(CONV), bob.seqs(OTHER), len(bob.of(Level))) == ([1, 2, 3], [1, 2], 1)
        assert w.node.catchup.store_failures == 3
        assert w.node.catchup._stalled == set()
        bob.ack()


async def test_a_session_that_ends_while_it_waits_for_the_store_is_forgotten(tmp_path: Path) -> None:
    async with node_world(tmp_path, resume_ttl_ms=1_000) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 1)
        w.store.failing["conversations"] = 1_000
        bob = await w.connect("bob")
        bob.vanish()
        await w.pass_ms(1_500)
        assert w.node.sessions == 0
        assert w.node.catchup._stalled == set()
        assert not w.node.catchup._queue


async def test_a_list_waits_while_too_much_is_unwritten(tmp_path: Path) -> None:
    async with node_world(tmp_path, page_conversations=1) as w:
        people = [f"u{n}" for n in range(3)]
        await w.known("bob", *people)
        bob = await w.level("bob")
        for user in people:
            await bodies(w, f"p:bob:{user}", user, 1)
        bob.link.stuck = True
        bob.link.send(b"\x92\x25" + b"\xc5\xff\x00" + bytes(0xFF00))
        bob.link.send(b"\x92\x25" + b"\xc5\xff\x00" + bytes(0xFF00))
        asked = w.store.calls.count("conversations")
        bob.say(Sync(0))
        await w.pass_ms(1_000)
        assert w.store.calls.count("conversations") == asked
        bob.link.out.clear()
        bob.link.out_bytes = 0
        bob.link.unstick()
        await w.pass_ms(500)
        assert sorted(conv for c in bob.of(Changes)[-3:] for conv in [c.items[0].conv]) == [
            f"p:bob:{user}" for user in people
        ]
        bob.ack()


# --------------------------------------------------------------------------------------- pulls and nudges


async def test_a_pull_is_answered_without_a_hole_up_to_the_head(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 6)
        bob = await w.level("bob")
        bob.forget()
        bob.say(Pull(CONV, 3, 4))
        await w.quiet()
        assert bob.seqs() == [3, 4, 5, 6]
        assert all(m.dup for m in bob.of(Msg))
        bob.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 6


async def test_a_pull_beyond_the_head_ends_and_leaves_the_conversation_live(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 2)
        bob = await w.level("bob")
        bob.say(Pull(CONV, 1_000_000, 1_000_001))
        await w.quiet()
        assert w.session_of(bob).behind == {}
        await w.send(CONV, "alice", b"3", to=("bob",))
        assert bob.seqs()[-1] == 3
        bob.ack()


async def test_a_pull_begins_where_it_says_though_the_cursor_is_below(tmp_path: Path) -> None:
    """1-2 are stored and 4 is held, so nothing can be acknowledged by tag; 3 never came."""
    async with node_world(tmp_path, window_messages=2, idle_ms=10**7, slow_ms=10**7) as w:
        await w.known("alice")
        bob = await w.level("bob")
        messages = await w.append(CONV, "alice", b"1", b"2", b"3", b"4")
        await w.deliver(messages[:2], "bob")
        await w.pass_ms(8_250)
        await w.inbox(Nudge("bob", CONV, 1))
        bob.forget()
        bob.say(Pull(CONV, 3, 3))
        await w.pass_ms(8_250)
        bob.say(Pull(CONV, 3, 3))
        await w.quiet()
        assert bob.seqs()[-2:] == [3, 4]
        await ack_all(w, bob)
        assert await w.cursor("bob", CONV) == 4


async def test_pulls_of_invented_conversations_are_bounded(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=1, pulls_waiting=8) as w:
        await w.known("alice", "bob")
        bob = await w.level("bob")
        await w.send(CONV, "alice", b"1", to=("bob",))
        bob.say(*[Pull(f"g:x{n}", 1, 2) for n in range(50)])
        bob.say(Pull("g:x3", 1, 2))
        await w.quiet()
        assert len(w.session_of(bob).behind) == 8
        assert bob.codes == ["busy"] * 42
        bob.ack()
        await w.quiet()
        assert w.session_of(bob).behind == {}
        bob.ack()


async def test_a_nudge_streams_from_the_cursor_what_the_node_has_never_heard_of(tmp_path: Path) -> None:
    """Presence was wrong: the messages were parked while the user was connected."""
    async with node_world(tmp_path) as w:
        await w.known("alice")
        bob = await w.level("bob")
        await bodies(w, CONV, "alice", 3)
        await w.inbox(Nudge("bob", CONV, 0), Nudge("bob", CONV, 1), Nudge("nobody", CONV, 1))
        assert bob.seqs() == [1, 2, 3]
        assert w.unsettled == 0
        await ack_all(w, bob)
        assert await w.cursor("bob", CONV) == 3


async def test_a_nudge_streams_only_what_is_above_what_is_under_way(tmp_path: Path) -> None:
    """Presence was away when the second message was routed: no inbox record of it came."""
    async with node_world(tmp_path) as w:
        await w.known("alice")
        bob = await w.level("bob")
        await w.send(CONV, "alice", b"1", to=("bob",))
        await bodies(w, CONV, "alice", 1)
        await w.inbox(Nudge("bob", CONV, 0))
        assert bob.seqs() == [1, 2]
        await ack_all(w, bob)
        assert await w.cursor("bob", CONV) == 2


async def test_a_nudge_wakes_a_stream_that_stands_still(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice")
        bob = await w.level("bob")
        await bodies(w, CONV, "alice", 1)
        session = w.session_of(bob)
        session.put_behind(CONV, 1, CURSOR)
        await w.quiet()
        assert bob.seqs() == []
        await w.inbox(Nudge("bob", CONV, 1))
        assert bob.seqs() == [1]
        bob.ack()


async def test_sync_on_a_live_connection_streams_again_what_lies_above_the_cursor(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("alice")
        bob = await w.level("bob")
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        before = bob.of(Level)[-1].user_cursor
        bob.say(Sync(before))
        await w.quiet()
        assert bob.seqs() == [1, 2, 1, 2]
        assert [m.dup for m in bob.of(Msg)] == [False, False, True, True]
        assert bob.of(Level)[-1].user_cursor > before
        await ack_all(w, bob)
        assert await w.cursor("bob", CONV) == 2


# ------------------------------------------------------------------------------------------------ fairness


async def test_a_slow_session_and_a_long_conversation_hold_up_nobody(tmp_path: Path) -> None:
    async with node_world(tmp_path, catchup_workers=1, page_messages=4, window_messages=8) as w:
        await w.known("alice", "bob", "carol", "dave")
        await bodies(w, CONV, "alice", 200)
        await bodies(w, OTHER, "carol", 2)
        await bodies(w, "p:alice:dave", "alice", 2)
        bob = await w.connect("bob")
        dave = await w.connect("dave")
        assert dave.seqs() == [1, 2]
        assert bob.seqs(OTHER) == [1, 2]
        assert len(bob.seqs()) == 8
        dave.ack()
        await ack_all(w, bob)
        assert bob.seqs(CONV) == list(range(1, 201))
        assert not w.session_of(bob).behind


async def test_a_worker_rests_when_nothing_can_be_written(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_messages=2, slow_ms=10**9, idle_ms=10**7) as w:
        await w.known("alice", "bob")
        await bodies(w, CONV, "alice", 10)
        bob = await w.connect("bob")
        calls = len(w.store.calls)
        for _ in range(20):
            w.node.catchup.wake(w.session_of(bob))
            await w.quiet()
        await w.pass_ms(2_000)
        assert len(w.store.calls) == calls
        bob.ack()


async def test_a_large_message_that_leaves_no_room_waits_without_reading_again(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_bytes=50_000) as w:
        await w.known("alice", "bob")
        await w.append(CONV, "alice", bytes(30_000), bytes(40_000), b"small")
        bob = await w.connect("bob")
        assert bob.seqs() == [1]
        calls = len(w.store.calls)
        await w.pass_ms(2_000)
        assert len(w.store.calls) == calls
        await ack_all(w, bob)
        assert bob.seqs() == [1, 2, 3]


async def test_a_message_above_the_whole_window_passes_alone(tmp_path: Path) -> None:
    async with node_world(tmp_path, window_bytes=10_000) as w:
        await w.known("alice", "bob")
        await w.append(CONV, "alice", bytes(60_000), bytes(60_000))
        bob = await w.connect("bob")
        await ack_all(w, bob)
        assert bob.seqs() == [1, 2]


async def test_gaps_that_follow_each_other_end(tmp_path: Path) -> None:
    """Acks in the worst order, one flush each: the cursor reaches the head all the same."""
    async with node_world(tmp_path) as w:
        await w.known("alice")
        bob = await w.level("bob")
        messages = await w.send(CONV, "alice", *[b"%d" % n for n in range(8)], to=("bob",))
        for message in reversed(messages):
            bob.ack_ids(message.msg_id)
            await w.quiet()
        await ack_all(w, bob)
        assert await w.cursor("bob", CONV) == 8
        assert await w.due() == {}


async def test_events_of_a_group_are_streamed_and_owed_by_nobody(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.real_store.create_group("team", "alice", ["bob"], w.clock.wall_ms())
        bob = await w.connect("bob")
        (event,) = bob.of(Msg)
        assert (event.conv, event.kind) == ("g:team", Kind.MEMBER)
        bob.ack()
        await w.quiet()
        assert await w.cursor("bob", "g:team") == 1
        assert w.node.flows()["acked"] == 0
