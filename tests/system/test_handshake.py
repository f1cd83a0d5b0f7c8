"""Births and ends of sessions: H1-H3 of handshake.py, and every await between AUTH and HELLO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastim.auth import Identity, Scope
from fastim.bus.base import inbox_topic
from fastim.bus.records import Kick, Mark, Nudge, Reply, decode_inbox
from fastim.protocol import (
    Ack,
    Auth,
    Changes,
    CloseCode,
    Hello,
    History,
    Kicked,
    Level,
    Msg,
    Ping,
    Pong,
    Read,
    ReadMark,
    Send,
    SendItem,
    Sent,
    SentItem,
)
from tests.system.dispatch_world import client_id
from tests.system.node_world import Faulty, NodeWorld, Peer, node_world, until

CONV = "p:alice:bob"


async def pair(w: NodeWorld) -> Peer:
    await w.known("alice")
    return await w.level("bob")


def kinds(peer: Peer) -> list[str]:
    return [type(frame).__name__ for frame in peer.frames]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("more", "code", "close"),
    [
        ({"token": "bad"}, "unauthenticated", CloseCode.AUTH),
        ({"device": "no space"}, "bad_id", CloseCode.BAD_FRAME),
        ({"device": ""}, "bad_id", CloseCode.BAD_FRAME),
        ({"device_class": "toaster"}, "bad_id", CloseCode.BAD_FRAME),
        ({"version_min": 2, "version_max": 9}, "bad_version", CloseCode.BAD_FRAME),
        ({"version_min": 0, "version_max": 0}, "bad_version", CloseCode.BAD_FRAME),
        ({"token": "service"}, "forbidden", CloseCode.AUTH),
        ({"token": "bound"}, "unauthenticated", CloseCode.AUTH),
    ],
)
async def test_a_refused_auth_is_answered_and_closed(
    tmp_path: Path, more: dict[str, object], code: str, close: int
) -> None:
    async with node_world(tmp_path) as w:
        w.tokens["service"] = Identity("svc", frozenset({Scope.SERVICE}), 10**15, "test", "t1")
        w.tokens["bound"] = Identity("bob", frozenset({Scope.CLIENT}), 10**15, "test", "t2", "tablet")
        peer = await w.connect("bob", **more)
        assert (peer.codes, peer.close_code, peer.of(Hello)) == ([code], close, [])
        assert (w.node.sessions, await w.online("bob")) == (0, [])


async def test_anything_before_hello_ends_the_connection(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        w.store.hold("register_device")
        peer = w.dial()
        w.auth(peer, "bob")
        peer.say(Ping())
        assert len(peer.of(Pong)) <= 1  # it is known who it is
        peer.say(History(1, CONV))
        w.store.let_go("register_device")
        await w.quiet()
        assert (peer.codes, peer.close_code, peer.of(Hello)) == (["unauthenticated"], CloseCode.AUTH, [])
        assert (w.node.connections, await w.online("bob")) == (0, [])


@pytest.mark.parametrize(
    "first", [Ping(), Ack(1), History(1, CONV), Send(CONV, [SendItem(client_id(1), 1, b"x")])]
)
async def test_anything_before_auth_ends_the_connection(tmp_path: Path, first: object) -> None:
    async with node_world(tmp_path) as w:
        peer = w.dial()
        peer.say(first)  # type: ignore[arg-type]
        await w.quiet()
        assert (peer.codes, peer.close_code) == (["unauthenticated"], CloseCode.AUTH)


async def test_a_second_auth_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await w.level("bob")
        w.auth(bob, "mallory")
        await w.quiet()
        assert bob.codes == ["already_authenticated"]
        assert bob.close_code == 0
        assert (w.session_of(bob).user, await w.online("mallory")) == ("bob", [])


async def test_a_sixth_device_is_refused_until_one_leaves(tmp_path: Path) -> None:
    async with node_world(tmp_path, devices_per_user=2) as w:
        phone, laptop = await w.level("bob", "phone"), await w.level("bob", "laptop")
        third = await w.connect("bob", "tablet")
        assert (third.codes, third.close_code) == (["too_many_devices"], CloseCode.KICKED)
        again = await w.level("bob", "laptop")
        assert (laptop.close_code, again.close_code) == (CloseCode.REPLACED, 0)
        phone.leave()
        await w.quiet()
        tablet = await w.level("bob", "tablet")
        assert tablet.close_code == 0


async def test_a_hot_resume_counts_against_the_devices_too(tmp_path: Path) -> None:
    async with node_world(tmp_path, devices_per_user=2) as w:
        first = [await w.level("bob", f"a{n}") for n in range(2)]
        for peer in first:
            peer.vanish()
        await w.quiet()
        for n in range(2):
            await w.level("bob", f"b{n}")
        again = await w.resume(first[1])
        assert (again.codes, again.close_code) == (["too_many_devices"], CloseCode.KICKED)
        assert len(await w.online("bob")) == 2


async def test_ever_new_devices_leave_a_bounded_number_of_sessions(tmp_path: Path) -> None:
    async with node_world(tmp_path, devices_per_user=3) as w:
        for number in range(20):
            peer = await w.level("bob", f"d{number}")
            peer.vanish()
            await w.quiet()
            w.clock.passed_ms += 10
        assert w.node.sessions == 3
        again = await w.connect("bob", "d19", session=peer.hello.session, tag=1)
        assert again.hello.resumed == 1
        again.ack()


# ------------------------------------------------------------------------------------------------- resuming


async def test_hello_says_whether_the_session_is_new_hot_or_cold(tmp_path: Path) -> None:
    async with node_world(tmp_path, resume_ttl_ms=2_000) as w:
        bob = await w.level("bob")
        assert bob.hello.resumed == 0
        bob.vanish()
        await w.pass_ms(1_000)
        hot = await w.resume(bob)
        assert (hot.hello.resumed, hot.hello.session) == (1, bob.hello.session)
        hot.ack()
        hot.vanish()
        await w.pass_ms(2_250)
        assert w.node.sessions == 0
        cold = await w.connect("bob", session=bob.hello.session, tag=3)
        assert cold.hello.resumed == 2
        assert cold.hello.session != bob.hello.session
        assert cold.tags()[0] == 1
        cold.ack()


async def test_a_hot_resume_replays_what_is_under_way_under_the_same_tags(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", b"3", to=("bob",))
        first = bob.tags()[-3]
        bob.vanish()
        await w.quiet()
        again = await w.resume(bob, tag=first)
        assert [(m.tag, m.seq, m.dup, m.body) for m in again.of(Msg)] == [
            (first + 1, 2, True, b"2"),
            (first + 2, 3, True, b"3"),
        ]
        assert kinds(again)[:3] == ["Hello", "Msg", "Msg"]
        (level,) = again.of(Level)
        assert level.tag == first + 3
        await w.send(CONV, "alice", b"4", to=("bob",))
        assert again.of(Msg)[-1].tag == first + 4
        again.ack()
        await w.quiet()
        assert (await w.cursor("bob", CONV), await w.states(CONV, "bob")) == (4, ["acked"] * 4)
        assert await w.due() == {}


async def test_what_was_acknowledged_one_by_one_is_missing_in_the_replay(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        messages = await w.send(CONV, "alice", *[b"%d" % n for n in range(1, 7)], to=("bob",))
        w.store.hold("flush")
        bob.ack_ids(messages[0].msg_id, messages[1].msg_id, messages[3].msg_id)
        await w.quiet()
        bob.vanish()
        await w.quiet()
        again = await w.resume(bob, tag=1)
        replayed = [m.seq for m in again.of(Msg) if m.tag <= bob.tags()[-1]]
        assert replayed == [3, 5, 6]
        w.store.let_go("flush")
        await w.quiet()
        again.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 6


@pytest.mark.parametrize("acked_late", [False, True])
async def test_an_ack_after_a_resume_is_known_whatever_was_under_way(
    tmp_path: Path, acked_late: bool
) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        last = bob.tags()[-1]
        if not acked_late:
            bob.ack()
            await w.quiet()
        bob.vanish()
        await w.quiet()
        again = await w.resume(bob, tag=1 if acked_late else last)
        again.say(Ack(1), Ack(last), Ack(last - 1))
        again.say(Ping())
        await w.quiet()
        assert again.close_code == 0
        assert again.of(Pong)[0].last_tag >= last
        assert await w.cursor("bob", CONV) == 2
        again.ack()


async def test_a_resume_with_a_tag_that_was_never_sent_is_the_end_of_the_session(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        bob.vanish()
        await w.quiet()
        wrong = await w.connect("bob", session=bob.hello.session, tag=99)
        assert (wrong.codes, wrong.close_code, w.node.sessions) == (["bad_ack"], CloseCode.BAD_FRAME, 0)
        right = await w.connect("bob", session=bob.hello.session, tag=2)
        assert (right.hello.resumed, right.seqs()) == (2, [1])
        right.ack()


async def test_a_session_of_somebody_else_or_of_another_device_is_not_resumed(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        mallory = await w.connect("mallory", session=bob.hello.session, tag=1)
        laptop = await w.connect("bob", "laptop", session=bob.hello.session, tag=1)
        assert (mallory.hello.resumed, laptop.hello.resumed, bob.close_code) == (2, 2, 0)
        assert len({p.hello.session for p in (bob, mallory, laptop)}) == 3
        mallory.ack()
        laptop.ack()


async def test_a_replay_that_lacks_something_is_not_level(tmp_path: Path) -> None:
    """SENT of seq 3 is under way, 1 and 2 were never heard of here."""
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.append(CONV, "alice", b"1", b"2")
        (mine,) = await w.append(CONV, "bob", b"3")
        item = SentItem(mine.client_id, mine.msg_id, mine.seq, mine.ts_ms)
        await w.inbox(Reply(bob.hello.session, "bob", CONV, 1, [item], []))
        bob.vanish()
        await w.quiet()
        again = await w.resume(bob, tag=1)
        assert [s.items[0].seq for s in again.of(Sent)] == [3]
        assert again.seqs() == [1, 2, 3]
        assert isinstance(again.frames[-1], Level)
        again.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 3


async def test_what_came_while_nobody_was_connected_is_streamed_behind_the_replay(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        bob.vanish()
        await w.quiet()
        await w.append(CONV, "alice", b"3")  # routed nowhere
        await w.send(CONV, "alice", b"4", to=("bob",))  # routed here all the same
        again = await w.resume(bob, tag=1)
        assert again.seqs() == [1, 2, 3, 4]
        assert [m.dup for m in again.of(Msg)][:2] == [True, True]
        again.ack()
        await w.quiet()
        assert (await w.cursor("bob", CONV), await w.due()) == (4, {})


async def test_a_hot_resume_after_a_timeout_streams_what_was_taken_out_of_the_window(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        await w.pass_ms(8_250)
        await w.send("p:bob:carol", "carol", b"x", to=("bob",))
        bob.vanish()
        await w.quiet()
        again = await w.resume(bob, tag=1)
        assert again.seqs(CONV) == [1, 2]
        assert again.seqs("p:bob:carol") == [1]
        again.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 2


async def test_a_level_that_was_under_way_is_told_again_only_behind_its_list(tmp_path: Path) -> None:
    """CHANGES has no tag and is not replayed: a LEVEL before it would be stored and hide that it was lost."""
    async with node_world(tmp_path) as w:
        await w.known("alice")
        await w.append(CONV, "alice", b"1")
        bob = await w.connect("bob")
        assert kinds(bob) == ["Hello", "Changes", "Msg", "Level"]
        bob.vanish()
        await w.quiet()
        again = await w.connect("bob", session=bob.hello.session, tag=1)  # MSG came, and nothing else
        assert kinds(again) == ["Hello", "Changes", "Level"]
        assert again.of(Level)[0].tag == 3
        assert [item.conv for item in again.of(Changes)[0].items] == [CONV]
        again.say(Ack(2))
        again.ack()
        await w.quiet()
        assert again.close_code == 0
        assert w.acks.unacked(w.session_of(again).ack_slot) == (0, 0)


async def test_a_resumed_session_learns_what_another_device_has_read(tmp_path: Path) -> None:
    """LEVEL says that everything up to its version was told, read marks included."""
    async with node_world(tmp_path) as w:
        phone = await pair(w)
        laptop = await w.level("bob", "laptop")
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        phone.ack()
        laptop.ack()
        await w.quiet()
        phone.vanish()
        await w.quiet()
        laptop.say(Read(CONV, 2))
        await w.quiet()
        again = await w.resume(phone)
        read = {item.conv: (item.read, item.unread) for c in again.of(Changes) for item in c.items}
        assert read == {CONV: (2, 0)}
        assert again.hello.badge == 0
        again.ack()


async def test_hello_of_a_hot_resume_tells_the_badge_of_now(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        assert bob.hello.badge == 0
        bob.vanish()
        await w.quiet()
        await w.append(CONV, "alice", b"1", b"2")
        again = await w.resume(bob)
        assert again.hello.badge == 2
        again.ack()


async def test_a_hot_resume_needs_no_store(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        bob.vanish()
        await w.quiet()
        for call in ("unread", "version", "conversations", "stream", "position"):
            w.store.failing[call] = 1_000
        again = await w.resume(bob, tag=1)
        assert (again.hello.resumed, again.seqs()) == (1, [1])
        assert not again.of(Level)
        w.store.failing.clear()
        await w.pass_ms(500)
        assert again.of(Level)
        again.ack()


async def test_a_new_device_starts_where_the_furthest_other_one_stands(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        phone = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        phone.ack()
        await w.quiet()
        await w.append(CONV, "alice", b"3")
        laptop = await w.connect("bob", "laptop")
        assert laptop.seqs() == [3]
        assert laptop.of(Changes)[0].items[0].cursor == 2
        laptop.ack()


# --------------------------------------------------------------------------------------------- replacing


async def test_the_same_device_replaces_silently(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        laptop = await w.level("bob", "laptop")
        again = await w.connect("bob")
        assert (bob.close_code, again.close_code, laptop.close_code) == (CloseCode.REPLACED, 0, 0)
        assert again.seqs() == [1]
        assert await w.online("bob") == ["laptop", "phone"]
        assert (w.node.sessions, w.node.connections, w.unsettled) == (2, 2, 0)
        bob.say(Ping())
        again.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 1


async def test_a_resume_over_a_connection_that_still_stands_takes_over(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", b"2", to=("bob",))
        again = await w.resume(bob, tag=bob.tags()[-2])
        assert bob.close_code == CloseCode.REPLACED
        assert bob.of(Kicked)[0].by_device == "phone"
        assert (again.hello.resumed, again.seqs()) == (1, [2])
        again.ack()
        await w.quiet()
        assert (await w.cursor("bob", CONV), await w.online("bob")) == (2, ["phone"])


async def test_a_session_on_another_node_is_told_to_close(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.real_bus.ensure(inbox_topic("n2", 5))
        await w.real_presence.open_lease("n2", 5, 10**12)
        await w.real_presence.attach("bob", "phone", "app", "n2", 5, "session-there")
        await w.level("bob")
        reader = w.real_bus.reader(inbox_topic("n2", 5), "test", max_unsettled=10)
        (record,) = await reader.read(10)
        kick = decode_inbox(record.value)
        assert isinstance(kick, Kick)
        assert (kick.session, kick.code) == ("session-there", CloseCode.REPLACED)
        await reader.close()


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "call", ["store.register_device", "presence.locate", "presence.attach", "store.unread"]
)
async def test_two_logins_of_one_device_at_once_leave_one_session(
    tmp_path: Path, hot: bool, late: bool, call: str
) -> None:
    """The first is held at an await, before or after the call was carried out, while the second goes by."""
    if hot and call == "store.register_device":
        return
    async with node_world(tmp_path) as w:
        await w.known("alice")
        await w.append(CONV, "alice", b"1")
        more = {}
        if hot:
            bob = await w.level("bob")
            bob.vanish()
            await w.quiet()
            more = {"session": bob.hello.session, "tag": 1}
        port, name = part(w, call)
        port.late = late
        port.hold(name)
        first = w.dial()
        w.auth(first, "bob", **more)
        await until(lambda: port.waiting, "the first login is held")
        gate = port._gates.pop(name)
        second = await w.connect("bob", **more)
        gate.set()
        await w.quiet()
        sessions = [session for session in w.node.pool if session.user == "bob"]
        assert len(sessions) == 1
        winner, loser = (second, first) if sessions[0].link is second.link else (first, second)
        assert sessions[0].link is winner.link
        assert (winner.close_code, len(winner.of(Hello))) == (0, 1)
        assert loser.close_code in (CloseCode.REPLACED, CloseCode.TRY_LATER)
        (located,) = (await w.real_presence.locate(["bob"])).values()
        assert [(a.session, a.generation) for a in located.attachments] == [
            (sessions[0].id, sessions[0].generation)
        ]
        assert winner.frames[0] == winner.hello
        assert winner.tags() == sorted(set(winner.tags()))
        assert set(winner.seqs()) == (set() if hot else {1})
        winner.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 1


def part(w: NodeWorld, call: str) -> tuple[Faulty, str]:
    port, name = call.split(".")
    return {"store": w.store, "presence": w.presence, "bus": w.bus}[port], name


# -------------------------------------------------------------------------- the way from AUTH to HELLO ends


STOPS: dict[str, Callable[[Peer], None]] = {
    "reset": Peer.vanish,
    "goodbye": Peer.leave,
    "idle": lambda peer: peer.link.close(CloseCode.IDLE, "idle"),
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize(
    "call", ["store.register_device", "presence.locate", "presence.attach", "store.unread", "store.version"]
)
async def test_a_connection_that_ends_during_its_login_leaves_nobody_online(
    tmp_path: Path, stop: str, late: bool, hot: bool, call: str
) -> None:
    if hot and call == "store.register_device":
        return
    async with node_world(tmp_path) as w:
        await w.known("alice")
        more = {}
        if hot:
            bob = await w.level("bob")
            await w.send(CONV, "alice", b"1", to=("bob",))
            bob.vanish()
            await w.quiet()
            more = {"session": bob.hello.session, "tag": 1}
        port, name = part(w, call)
        port.late = late
        port.hold(name)
        peer = w.dial()
        w.auth(peer, "bob", **more)
        await until(lambda: port.waiting, "the login is held")
        STOPS[stop](peer)
        port.let_go(name)
        await w.quiet()
        assert peer.of(Hello) == []
        assert (w.node.connections, await w.online("bob"), w.acks.count) == (0, [], 0)
        port.late = False
        again = await w.connect("bob", **more)
        assert again.hello.resumed == (1 if hot else 0)
        assert again.seqs() == ([1] if hot else [])
        again.ack()


async def test_an_older_session_survives_a_newer_connection_that_died_at_once(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        w.store.hold("register_device")
        peer = w.dial()
        w.auth(peer, "bob")
        await until(lambda: w.store.waiting, "the login is held")
        peer.vanish()
        w.store.let_go("register_device")
        await w.quiet()
        assert (bob.close_code, await w.online("bob")) == (0, ["phone"])


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize(
    "call", ["store.register_device", "presence.locate", "presence.attach", "store.unread", "store.version"]
)
async def test_a_backend_that_is_away_asks_the_client_to_come_again(
    tmp_path: Path, hot: bool, call: str
) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        bob.vanish()
        await w.quiet()
        more = {"session": bob.hello.session, "tag": 1} if hot else {}
        port, name = part(w, call)
        port.failing[name] = 1
        peer = await w.connect("bob", **more)
        if hot and call.startswith("store"):
            assert peer.hello.resumed == 1
            port.failing.clear()
        else:
            assert (peer.close_code, peer.of(Hello)) == (CloseCode.TRY_LATER, [])
            assert (w.node.connections, await w.online("bob"), w.acks.count) == (0, [], 0)
            peer = await w.connect("bob", **more)
            assert peer.hello.resumed == (1 if hot else 0)
        assert peer.seqs() == [1]
        peer.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 1


@pytest.mark.parametrize(
    "call", ["store.register_device", "presence.locate", "presence.attach", "store.unread"]
)
async def test_a_login_that_takes_too_long_is_asked_to_come_again(tmp_path: Path, call: str) -> None:
    async with node_world(tmp_path, login_ms=20) as w:
        port, name = part(w, call)
        port.hold(name)
        peer = w.dial()
        w.auth(peer, "bob")
        await until(lambda: peer.close_code, "the login is given up")
        await w.quiet()
        assert (peer.close_code, w.node.sessions, w.acks.count) == (CloseCode.TRY_LATER, 0, 0)
        port.let_go(name)


async def test_a_slow_backend_is_not_the_clients_lateness(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        w.store.hold("register_device")
        peer = w.dial()
        w.auth(peer, "bob")
        await until(lambda: w.store.waiting, "the login is held")
        w.clock.passed_ms += 900
        for _ in range(8):
            w.clock.passed_ms += 900
            w.node.sweep(w.clock.mono_ms())
        assert peer.close_code == 0
        w.store.let_go("register_device")
        await w.quiet()
        assert peer.hello.resumed == 0
        peer.ack()


async def test_nothing_is_written_between_auth_and_hello(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        bob.vanish()
        await w.quiet()
        w.presence.hold("attach")
        peer = w.dial()
        w.auth(peer, "bob", session=bob.hello.session, tag=1)
        await until(lambda: w.presence.waiting, "the login is held")
        (mine,) = await w.append(CONV, "bob", b"2")
        item = SentItem(mine.client_id, mine.msg_id, mine.seq, mine.ts_ms)
        await w.send(CONV, "alice", b"3", to=("bob",))
        await w.inbox(
            Reply(bob.hello.session, "bob", CONV, 1, [item], []),
            Mark(CONV, "alice", 1, ["bob"], ""),
            Nudge("bob", CONV, 1),
        )
        await w.pass_ms(4_000)
        w.node.go_away(1_000)
        assert peer.frames == []
        w.presence.let_go("attach")
        await w.quiet()
        assert isinstance(peer.frames[0], Hello)
        assert peer.seqs() == [1, 2, 3]
        assert peer.tags() == sorted(set(peer.tags()))
        peer.ack()
        await w.quiet()
        assert await w.cursor("bob", CONV) == 3


async def test_a_question_of_an_older_connection_is_not_answered_on_a_newer_one(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.append(CONV, "alice", b"1")
        w.store.hold("history")
        bob.say(History(7, CONV))
        await until(lambda: w.store.waiting, "the question is held")
        again = await w.resume(bob)
        w.store.let_go("history")
        await w.quiet()
        assert "HistoryPage" not in kinds(again)
        assert w.session_of(again).requests == 0
        again.ack()


# -------------------------------------------------------------------------------------------------- the end


async def test_a_detach_that_presence_did_not_take_is_tried_until_it_is(tmp_path: Path) -> None:
    async with node_world(tmp_path, retry_first_ms=1, retry_most_ms=2) as w:
        bob = await pair(w)
        w.presence.failing["detach"] = 5
        bob.leave()
        await until(lambda: w.presence.calls.count("detach") == 6)
        await w.quiet()
        assert await w.online("bob") == []


async def test_a_late_detach_does_not_remove_the_next_attachment(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        w.presence.hold("detach")
        bob.vanish()
        await until(lambda: w.presence.waiting, "the detach is held")
        again = await w.resume(bob)
        w.presence.let_go("detach")
        await w.quiet()
        assert await w.online("bob") == ["phone"]
        again.ack()


@pytest.mark.parametrize("how", ["half open", "kick"])
async def test_a_session_that_is_lost_while_it_registers_is_detached(tmp_path: Path, how: str) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        await w.send(CONV, "alice", b"1", to=("bob",))
        bob.vanish()
        await w.quiet()
        session = w.session_of(bob)
        w.presence.late = True
        w.presence.hold("attach")
        peer = w.dial()
        w.auth(peer, "bob", session=bob.hello.session, tag=1)
        await until(lambda: w.presence.waiting, "the login is held")
        if how == "kick":
            w.node.handshake.kick(session, CloseCode.KICKED, "policy")
        else:
            w.node.handshake.lose(session, CloseCode.HALF_OPEN, "half_open")
        w.presence.let_go("attach")
        await w.quiet()
        assert (await w.online("bob"), w.node.connections, peer.of(Hello)) == ([], 0, [])


async def test_a_session_that_ends_while_it_is_resumed_is_asked_to_come_again(tmp_path: Path) -> None:
    """Only a cold login reads how far the device's LEVEL is durable."""
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        bob.vanish()
        await w.quiet()
        w.presence.hold("locate")
        peer = w.dial()
        w.auth(peer, "bob", session=bob.hello.session, tag=1, user_cursor=10**15)
        await until(lambda: w.presence.waiting, "the login is held")
        w.node.handshake.kick(w.session_of(bob), CloseCode.KICKED, "policy")
        w.presence.let_go("locate")
        await w.quiet()
        assert (peer.close_code, peer.of(Hello), w.node.sessions) == (CloseCode.TRY_LATER, [], 0)


async def test_a_token_that_ends_closes_its_connection_and_its_session(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        ends_ms = w.clock.wall_ms() + 20_000
        w.tokens["short"] = Identity("bob", frozenset({Scope.CLIENT}), ends_ms, "test", "short")
        peer = await w.level("bob", token="short")
        for _ in range(7):
            await w.pass_ms(2_500)
            peer.say(Ping())
        assert peer.close_code == 0
        await w.pass_ms(7_500)
        assert peer.close_code == CloseCode.AUTH
        assert (w.node.sessions, await w.online("bob")) == (0, [])


async def test_a_revoked_token_closes_its_sockets_and_no_others(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        w.tokens["other"] = Identity("bob", frozenset({Scope.CLIENT}), 10**15, "test", "other")
        phone, laptop = await w.level("bob"), await w.level("bob", "laptop", token="other")
        waiting = await w.level("bob", "tablet")
        waiting.vanish()
        await w.quiet()
        w.node.revoke("id-of-bob")
        await w.quiet()
        assert (phone.close_code, laptop.close_code) == (CloseCode.REVOKED, 0)
        assert w.node.sessions == 1
        assert await w.online("bob") == ["laptop"]


@pytest.mark.parametrize("call", ["store.register_device", "presence.attach", "store.unread"])
async def test_a_token_that_is_revoked_during_the_login_opens_no_session(tmp_path: Path, call: str) -> None:
    async with node_world(tmp_path) as w:
        port, name = part(w, call)
        port.hold(name)
        peer = w.dial()
        w.auth(peer, "bob")
        await until(lambda: port.waiting, "the login is held")
        w.node.revoke("id-of-bob")
        port.let_go(name)
        await w.quiet()
        assert (peer.close_code, peer.of(Hello)) == (CloseCode.REVOKED, [])
        assert (w.node.connections, await w.online("bob")) == (0, [])


async def test_expiry_of_sessions_without_a_connection_is_by_their_own_time(tmp_path: Path) -> None:
    async with node_world(tmp_path, resume_ttl_ms=10_000) as w:
        first, second = await w.level("alice"), await w.level("bob")
        first.vanish()
        await w.pass_ms(5_000)
        second.say(Ping())
        second.vanish()
        await w.pass_ms(5_250)
        assert [session.user for session in w.node.pool] == ["bob"]
        await w.pass_ms(5_000)
        assert w.node.sessions == 0


async def test_marks_go_on_after_a_resume(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        bob = await pair(w)
        bob.vanish()
        await w.quiet()
        again = await w.resume(bob)
        await w.inbox(Mark(CONV, "alice", 5, ["bob"], ""))
        assert again.of(ReadMark) == [ReadMark(CONV, "alice", 5, -1)]
        again.ack()


async def test_a_frame_that_is_no_auth_in_bytes_is_a_bad_frame(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        peer = w.dial()
        peer.link.receive(b"\x92\x01\xa1x")
        await w.quiet()
        assert (peer.codes, peer.close_code) == (["bad_frame"], CloseCode.BAD_FRAME)
        assert Auth.__struct_config__.tag == 1
