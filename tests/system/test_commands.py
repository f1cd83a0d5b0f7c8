"""What a client may ask: M1 and M2 of commands.py, limits, refusals, and that questions hold up nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fastim import protocol as p
from fastim.auth import Identity, Scope
from fastim.bus.records import ReadNotice, Submit
from fastim.protocol import (
    Changes,
    CloseCode,
    Convs,
    Error,
    History,
    HistoryPage,
    Ping,
    Pong,
    Pull,
    Read,
    ReadMark,
    Refresh,
    Refreshed,
    Send,
    SendItem,
)
from tests.system.dispatch_world import client_id
from tests.system.node_world import NodeWorld, Peer, node_world, until

CONV = "p:alice:bob"


def item(number: int, body: bytes = b"hi", kind: int = 1) -> SendItem:
    return SendItem(client_id(number), kind, body)


async def alice(w: NodeWorld) -> Peer:
    await w.known("bob")
    return await w.level("alice")


# ---------------------------------------------------------------------------------------------------- SEND


async def test_a_send_becomes_one_submit_with_everything_dispatch_needs(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        sent = SendItem(client_id(1), 1, b"hi", w.clock.wall_ms() + 5, 1, ["bob"])
        peer.say(Send(CONV, [sent, item(2)], 7))
        await w.quiet()
        (submit,) = await w.submitted()
        assert isinstance(submit, Submit)
        assert (submit.conv, submit.sender, submit.device, submit.session) == (
            CONV, "alice", "phone", w.session_of(peer).id,
        )  # fmt: skip
        assert (submit.items, submit.read_seq, submit.reply_to) == ([sent, item(2)], 7, w.node.inbox)
        assert not submit.service
        assert w.node.flows()["submitted"] == 2


async def test_sends_keep_their_order_and_go_out_together(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        peer.say(*[Send(CONV, [item(number)]) for number in range(1, 31)])
        await w.quiet()
        assert [s.items[0].client_id for s in await w.submitted()] == [client_id(n) for n in range(1, 31)]
        assert w.bus.calls.count("publish") == 1


@pytest.mark.parametrize(
    ("conv", "code"),
    [
        ("p:bob:carol", "forbidden"),
        ("p:bob:alice", "bad_conv"),
        ("p:alice:alice", "bad_conv"),
        ("p:alice:", "bad_conv"),
        ("x:alice", "bad_conv"),
        ("", "bad_conv"),
        ("s:alice", "forbidden"),
        ("r:lobby", "unsupported"),
        ("g:no space", "bad_conv"),
    ],
)
async def test_a_send_to_what_is_not_the_senders_names_every_message(
    tmp_path: Path, conv: str, code: str
) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        peer.say(Send(conv, [item(1), item(2)]))
        await w.quiet()
        errors = [(e.op, e.code, e.client_id, e.conv, e.retryable) for e in peer.of(Error)]
        assert errors == [(5, code, client_id(n), conv, False) for n in (1, 2)]
        assert await w.submitted() == []
        assert peer.close_code == 0


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (item(2, kind=99), "unknown_kind"),
        (item(2, kind=0), "unknown_kind"),
        (item(2, kind=32), "unknown_kind"),
        (item(2, bytes(61_441)), "too_big"),
    ],
)
async def test_a_message_that_dispatch_would_refuse_is_refused_at_once(
    tmp_path: Path, bad: SendItem, code: str
) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        peer.say(Send(CONV, [item(1), bad]))
        await w.quiet()
        assert [(e.code, e.client_id) for e in peer.of(Error)] == [(code, client_id(n)) for n in (1, 2)]
        assert any(c in peer.of(Error)[0].detail for c in ("61,440", "known:"))
        assert await w.submitted() == []


async def test_the_largest_body_passes(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        peer.say(Send(CONV, [item(1, bytes(61_440))]))
        await w.quiet()
        assert len(await w.submitted()) == 1


async def test_more_than_the_rate_is_refused_with_a_time_after_which_it_passes(tmp_path: Path) -> None:
    async with node_world(tmp_path, rate_per_s=10, rate_burst=20) as w:
        peer = await alice(w)
        peer.say(Send(CONV, [item(n) for n in range(16)]))
        peer.say(Send(CONV, [item(20), item(21), item(22), item(23), item(24)]))
        await w.quiet()
        errors = peer.of(Error)
        assert {e.code for e in errors} == {"rate_limited"}
        assert [e.client_id for e in errors] == [client_id(n) for n in range(20, 25)]
        assert all(e.retryable and e.retry_after_ms == 100 for e in errors)
        await w.pass_ms(100)
        peer.forget()
        peer.say(Send(CONV, [item(20), item(21), item(22), item(23), item(24)]))
        await w.quiet()
        assert peer.codes == []
        assert len(await w.submitted()) == 2


async def test_the_rate_is_the_users_not_the_devices(tmp_path: Path) -> None:
    async with node_world(tmp_path, rate_per_s=10, rate_burst=4) as w:
        phone = await alice(w)
        laptop = await w.level("alice", "laptop")
        bob = await w.level("bob")
        phone.say(Send(CONV, [item(n) for n in range(4)]))
        laptop.say(Send(CONV, [item(9)]))
        bob.say(Send(CONV, [item(8)]))
        await w.quiet()
        assert (phone.codes, laptop.codes, bob.codes) == ([], ["rate_limited"], [])


async def test_a_bus_that_is_away_is_a_retryable_refusal_of_every_message(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        w.bus.failing["publish"] = 1
        peer.say(Send(CONV, [item(1), item(2)]), Send("p:alice:carol", [item(3)]))
        await w.quiet()
        assert [(e.code, e.client_id, e.retryable) for e in peer.of(Error)] == [
            ("unavailable", client_id(n), True) for n in (1, 2, 3)
        ]
        peer.say(Send(CONV, [item(1), item(2)]))
        await w.quiet()
        assert len(await w.submitted()) == 1
        assert w.node.flows()["bus_failures"] == 1


async def test_a_send_whose_connection_went_away_is_submitted_and_answered_to_nobody(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        w.bus.hold("publish")
        peer.say(Send(CONV, [item(1)]))
        await until(lambda: w.bus.waiting, "the publish is held")
        peer.say(Send(CONV, [item(2)]))
        peer.vanish()
        w.bus.failing["publish"] = 1
        w.bus.let_go("publish")
        await w.quiet()
        assert len(await w.submitted()) == 1
        assert peer.codes == []


# --------------------------------------------------------------------------------------------- READ and lists


async def test_read_moves_the_mark_answers_and_tells_dispatch(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("bob")
        await w.append(CONV, "bob", b"1", b"2", b"3")
        peer = await w.level("alice")
        peer.say(Read(CONV, 2, True))
        await w.quiet()
        assert peer.of(ReadMark) == [ReadMark(CONV, "alice", 2, 1)]
        (notice,) = await w.submitted()
        assert notice == ReadNotice(CONV, "alice", 2, w.session_of(peer).id, True)
        peer.say(Read(CONV, 1), Read(CONV, 999))
        await w.quiet()
        assert sorted((m.seq, m.unread) for m in peer.of(ReadMark)[1:]) in (
            [(2, 1), (3, 0)],
            [(3, 0), (3, 0)],
        )


async def test_a_read_without_a_bus_is_answered_once(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("bob")
        await w.append(CONV, "bob", b"1")
        peer = await w.level("alice")
        w.bus.failing["publish"] = 1
        peer.say(Read(CONV, 1))
        await w.quiet()
        assert (peer.of(ReadMark), peer.codes) == ([ReadMark(CONV, "alice", 1, 0)], [])


async def test_history_pages_both_ways_and_comes_back_with_its_req(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("bob")
        await w.append(CONV, "bob", *[b"%d" % n for n in range(1, 11)])
        peer = await w.level("alice")
        peer.say(History(1, CONV, limit=3), History(2, CONV, before_seq=4, limit=9))
        peer.say(History(3, CONV, after_seq=8, limit=1))
        await w.quiet()
        pages = {page.req: ([m.seq for m in page.messages], page.more) for page in peer.of(HistoryPage)}
        assert pages == {1: ([8, 9, 10], True), 2: ([1, 2, 3], False), 3: ([9], True)}


async def test_a_history_page_fits_a_frame_and_says_that_there_is_more(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        await w.known("bob")
        for _ in range(4):
            await w.append(CONV, "bob", bytes(30_000))
        await w.append(CONV, "bob", bytes(61_440))
        peer = await w.level("alice")
        got: list[int] = []
        before = 0
        for _ in range(5):
            peer.say(History(1, CONV, before_seq=before))
            await w.quiet()
            page = peer.of(HistoryPage)[-1]
            assert len(p.encode(page)) <= p.MAX_PACKET_BYTES
            got = [m.seq for m in page.messages] + got
            before = got[0]
            if not page.more:
                break
        assert got == [1, 2, 3, 4, 5]
        peer.say(History(2, CONV, after_seq=1))
        await w.quiet()
        assert ([m.seq for m in peer.of(HistoryPage)[-1].messages], peer.of(HistoryPage)[-1].more) == (
            [2],
            True,
        )


async def test_convs_lists_what_changed_page_by_page(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        people = [f"u{n}" for n in range(5)]
        await w.known(*people)
        for user in people:
            await w.append(f"p:alice:{user}", user, b"hello " + user.encode())
        peer = await w.level("alice")
        peer.forget()
        found: list[tuple[str, str, int]] = []
        cursor, more, req = 0, True, 0
        while more:
            req += 1
            peer.say(Convs(req, cursor, 2))
            await w.quiet()
            (page,) = [c for c in peer.of(Changes) if c.req == req]
            found += [(c.conv, c.preview, c.unread) for c in page.items]
            cursor, more = page.user_cursor, page.more
        assert found == [(f"p:alice:{user}", f"hello {user}", 1) for user in people]


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("frame", "code", "req", "conv"),
    [
        (History(4, "p:bob:carol"), "forbidden", 4, "p:bob:carol"),
        (History(5, "nonsense"), "bad_conv", 5, "nonsense"),
        (History(6, CONV, limit=0), "bad_limit", 6, CONV),
        (History(7, CONV, limit=201), "bad_limit", 7, CONV),
        (History(8, "g:nowhere"), "forbidden", 8, "g:nowhere"),
        (Convs(9, 0, 0), "bad_limit", 9, ""),
        (Convs(10, 0, 101), "bad_limit", 10, ""),
        (Read("p:bob:carol", 1), "forbidden", 0, "p:bob:carol"),
        (Read("g:secret", 1), "forbidden", 0, "g:secret"),
        (Read("g:nowhere", 1), "forbidden", 0, "g:nowhere"),
        (Pull("p:bob:carol", 1, 2), "forbidden", 0, "p:bob:carol"),
        (Pull(CONV, 0, 2), "bad_range", 0, CONV),
        (Pull(CONV, 3, 2), "bad_range", 0, CONV),
        (Refresh("bad"), "unauthenticated", 0, ""),
        (Refresh("mallory"), "forbidden", 0, ""),
        (p.Join(11, "lobby"), "unsupported", 11, ""),
        (p.Leave(12, "lobby"), "unsupported", 12, ""),
        (p.Signal(CONV, 1), "unsupported", 0, CONV),
        (p.Recall(CONV, client_id(1), 1), "unsupported", 0, CONV),
        (p.Edit(CONV, client_id(1), 1, b"x"), "unsupported", 0, CONV),
        (p.Delete(13, CONV, [1]), "unsupported", 13, CONV),
        (p.Clear(14, CONV, 1), "unsupported", 14, CONV),
        (p.Setting(15, "draft", b"x"), "unsupported", 15, ""),
        (p.Block(16, "bob", True), "unsupported", 16, ""),
        (p.Watch(17, ["bob"]), "unsupported", 17, ""),
        (p.Unwatch(18, ["bob"]), "unsupported", 18, ""),
        (p.Received(CONV, 1), "unsupported", 0, CONV),
        (p.Rekey(1, bytes(32), "s"), "unsupported", 0, ""),
    ],
)
async def test_a_refusal_says_what_was_asked_and_keeps_the_connection(
    tmp_path: Path, frame: p.Frame, code: str, req: int, conv: str
) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        await w.real_store.create_group("secret", "bob", ["carol"], w.clock.wall_ms())
        await w.append("g:secret", "bob", b"1")
        peer.say(frame)
        await w.quiet()
        (error,) = peer.of(Error)
        assert (error.code, error.req, error.conv) == (code, req, conv)
        assert error.op == type(frame).__struct_config__.tag
        assert peer.close_code == 0
        assert await w.submitted() == []
        peer.say(Ping())
        assert peer.link.state == "open"


@pytest.mark.parametrize("op", [0, 26, 31, 32, 35, 99, 127])
async def test_an_unknown_op_is_unsupported_and_a_servers_op_is_too(tmp_path: Path, op: int) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        peer.link.receive(msgspec.msgpack.encode([op, 1, 2, 3]))
        await w.quiet()
        assert peer.codes in (["unsupported"], ["bad_frame"])
        assert (peer.close_code == 0) == (peer.codes == ["unsupported"])


@pytest.mark.parametrize(
    "raw",
    [
        [5, CONV, [[b"short", 1, b"x"]]],
        [5, CONV, []],
        [5, 7, [[client_id(1), 1, b"x"]]],
        [5, CONV, [[client_id(1), 1, "text"]]],
        [8, "x"],
        [8, 1, CONV, -1],
        [7, CONV, 1.0, 2],
        [6, CONV],
        [11, 1 << 60],
    ],
)
async def test_a_malformed_frame_closes_its_connection_and_disturbs_nobody(
    tmp_path: Path, raw: list[object]
) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        bystander = await w.level("bob")
        peer.link.receive(msgspec.msgpack.encode(raw))
        await w.quiet()
        assert (peer.codes, peer.close_code) == (["bad_frame"], CloseCode.BAD_FRAME)
        await w.send(CONV, "alice", b"1", to=("bob",))
        assert (bystander.close_code, bystander.seqs()) == (0, [1])
        bystander.ack()


async def test_more_questions_than_may_wait_are_busy_and_block_no_other_frame(tmp_path: Path) -> None:
    async with node_world(tmp_path, requests_per_session=2) as w:
        peer = await alice(w)
        w.store.hold("history")
        peer.say(*[History(n, CONV) for n in range(1, 5)])
        peer.say(Send(CONV, [item(1)]), Ping())
        await w.quiet()
        assert [(e.code, e.req, e.retryable) for e in peer.of(Error)] == [
            ("busy", 3, True),
            ("busy", 4, True),
        ]
        assert len(await w.submitted()) == 1
        assert peer.of(Pong)
        w.store.let_go("history")
        await w.quiet()
        assert sorted(page.req for page in peer.of(HistoryPage)) == [1, 2]
        peer.say(History(5, CONV))
        await w.quiet()
        assert peer.of(HistoryPage)[-1].req == 5


@pytest.mark.parametrize("frame", [History(1, CONV), Convs(1), Read(CONV, 1)])
async def test_a_store_that_is_away_is_a_retryable_answer(tmp_path: Path, frame: p.Frame) -> None:
    async with node_world(tmp_path) as w:
        peer = await alice(w)
        for call in ("history", "conversations", "read"):
            w.store.failing[call] = 1
        peer.say(frame)
        await w.quiet()
        (error,) = peer.of(Error)
        assert (error.code, error.retryable) == ("unavailable", True)
        assert error.retry_after_ms > 0
        assert w.session_of(peer).requests == 0
        w.store.failing.clear()


# -------------------------------------------------------------------------------------------------- REFRESH


async def test_a_newer_token_lengthens_the_session_and_is_the_one_that_is_revoked(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        now_ms = w.clock.wall_ms()
        scopes = frozenset({Scope.CLIENT})
        w.tokens["first"] = Identity("bob", scopes, now_ms + 10_000, "test", "t1")
        w.tokens["second"] = Identity("bob", scopes, now_ms + 600_000, "test", "t2")
        peer = await w.level("bob", token="first")
        peer.say(Refresh("second"))
        await w.quiet()
        assert peer.of(Refreshed) == [Refreshed(now_ms + 600_000)]
        for _ in range(3):
            await w.pass_ms(8_000)
            peer.say(Ping())
        assert peer.close_code == 0
        w.node.revoke("t1")
        assert peer.close_code == 0
        w.node.revoke("t2")
        await w.quiet()
        assert peer.close_code == CloseCode.REVOKED


async def test_a_newer_token_for_another_device_is_refused(tmp_path: Path) -> None:
    async with node_world(tmp_path) as w:
        w.tokens["tablet"] = Identity("bob", frozenset({Scope.CLIENT}), 10**15, "test", "t", "tablet")
        w.tokens["service"] = Identity("bob", frozenset({Scope.SERVICE}), 10**15, "test", "t")
        peer = await w.level("bob")
        peer.say(Refresh("tablet"), Refresh("service"))
        await w.quiet()
        assert peer.codes == ["forbidden", "forbidden"]
        assert w.session_of(peer).identity.token_id == "id-of-bob"
