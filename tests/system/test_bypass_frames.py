"""Frames that ask for what is not theirs, before AUTH and in a session; and upgrades that are none (P20).

mallory is known to the server, and member of nothing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from fastim.protocol import Op
from tests.system.bypass_world import CLOSED_WS, MARK, REFUSED_WS, World, auth, running
from tests.unit.conn_world import REQUEST

ID: Final = bytes(16)
TIMES: Final = 400


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield from running(tmp_path_factory.mktemp("bypass"))


# ------------------------------------------------------------------------------------------- before AUTH

BEFORE_AUTH: Final[dict[Op, list[Any]]] = {
    Op.PING: [], Op.ACK: [1], Op.ACKS: [[1]], Op.SEND: ["p:alice:bob", [[ID, 1, b"x"]]],
    Op.READ: ["p:alice:bob", 1], Op.PULL: ["p:alice:bob", 1, 2], Op.HISTORY: [1, "p:alice:bob"],
    Op.REFRESH: ["x"], Op.CONVS: [1], Op.SYNC: [], Op.JOIN: [1, "lobby", "credential"],
    Op.RECALL: ["p:alice:bob", ID, 1], Op.BLOCK: [1, "bob", True], Op.HELLO: [1, "x", "alice"],
}  # fmt: skip


@pytest.mark.parametrize("op", BEFORE_AUTH.keys(), ids=lambda op: op.name)
def test_nothing_is_done_before_auth(world: World, op: Op) -> None:
    with world.dial() as one:
        one.send([int(op), *BEFORE_AUTH[op]])
        error, close = one.frames()
        assert (error[2], close) == ("unauthenticated", CLOSED_WS)


@pytest.mark.parametrize("op", BEFORE_AUTH.keys(), ids=lambda op: op.name)
def test_nothing_is_done_in_the_packet_of_an_auth_that_is_refused(world: World, op: Op) -> None:
    with world.dial() as one:
        one.send(auth(world.token(key=world.stranger)), [int(op), *BEFORE_AUTH[op]])
        assert [*one.frames()] == [REFUSED_WS, CLOSED_WS]


@pytest.mark.parametrize(
    "frame", [[int(Op.HISTORY), 1, "p:alice:bob"], auth("token")], ids=["HISTORY", "second AUTH"]
)
def test_nothing_is_done_between_auth_and_hello(world: World, frame: list[Any]) -> None:
    """Neither as mallory nor as somebody who is named meanwhile."""
    with world.dial() as one:
        second = auth(world.token(sub="alice")) if frame[0] == Op.AUTH else frame
        one.send(auth(world.token(sub="mallory"), "early"), second)
        *frames, close = one.frames()
        assert close[0] in (4501, 4509)
        assert {found[0] for found in frames} == {int(Op.ERROR)}


# ------------------------------------------------------------------------------------------- in a session

PAIR, NONE = "p:alice:bob", "p:no-one:no-two"
IN_SESSION: Final[dict[str, tuple[Op, list[Any], str]]] = {
    "send into others' conversation": (Op.SEND, [PAIR, [[ID, 1, MARK.encode()]]], "forbidden"),
    "send into s:": (Op.SEND, ["s:alice", [[ID, 1, b"x"]]], "forbidden"),
    "send into one's own s:": (Op.SEND, ["s:mallory", [[ID, 1, b"x"]]], "forbidden"),
    "send into a group": (Op.SEND, ["g:team", [[os.urandom(16), 1, b"x"]]], "not_member"),
    "send into a group that is none": (Op.SEND, ["g:none", [[os.urandom(16), 1, b"x"]]], "unknown_group"),
    "send into a room": (Op.SEND, ["r:lobby", [[ID, 1, b"x"]]], "unsupported"),
    "send with another as the sender": (Op.SEND, [PAIR, [[ID, 1, b"x"]], 0, "alice"], "forbidden"),
    "a change of members of one's own making": (Op.SEND, ["p:bob:mallory", [[ID, 32, b"x"]]], "unknown_kind"),
    "a recall of one's own making": (Op.SEND, ["p:bob:mallory", [[ID, 33, b"x"]]], "unknown_kind"),
    "a kind that is none": (Op.SEND, ["p:bob:mallory", [[ID, 4_294_967_295, b"x"]]], "unknown_kind"),
    "the pair in the other order": (Op.SEND, ["p:mallory:bob", [[ID, 1, b"x"]]], "bad_conv"),
    "read of others": (Op.READ, [PAIR, 1], "forbidden"),
    "read of nobody": (Op.READ, [NONE, 1], "forbidden"),
    "read of a group": (Op.READ, ["g:team", 1], "forbidden"),
    "read of a group that is none": (Op.READ, ["g:none", 1], "forbidden"),
    "read of s: of another": (Op.READ, ["s:alice", 1], "forbidden"),
    "pull of others": (Op.PULL, [PAIR, 1, 10], "forbidden"),
    "pull of nobody": (Op.PULL, [NONE, 1, 10], "forbidden"),
    "history of others": (Op.HISTORY, [1, PAIR], "forbidden"),
    "history of nobody": (Op.HISTORY, [2, NONE], "forbidden"),
    "history of a group": (Op.HISTORY, [3, "g:team"], "forbidden"),
    "history of a group that is none": (Op.HISTORY, [4, "g:none"], "forbidden"),
    "history of s: of another": (Op.HISTORY, [5, "s:alice"], "forbidden"),
    "history of a room": (Op.HISTORY, [6, "r:lobby"], "unsupported"),
    "history of 0": (Op.HISTORY, [7, "p:bob:mallory", 0, 0, 0, 0, 0], "bad_limit"),
    "history of 2^32-1": (Op.HISTORY, [9, "p:bob:mallory", 0, 0, 0, 0, (1 << 32) - 1], "bad_limit"),
    "history by another's name": (Op.HISTORY, [11, PAIR, 0, 0, 0, 0, 50, "alice"], "forbidden"),
    "join a room": (Op.JOIN, [12, "lobby", MARK], "unsupported"),
    "watch others": (Op.WATCH, [13, ["alice"]], "unsupported"),
    "recall another's": (Op.RECALL, [PAIR, ID, 1], "unsupported"),
    "edit another's": (Op.EDIT, [PAIR, ID, 1, b"x"], "unsupported"),
    "a second AUTH without a token": (Op.AUTH, [1, 1, "", "phone"], "already_authenticated"),
    "the server's own SENT": (Op.SENT, [1, PAIR, 1, []], "unsupported"),
    "the server's own KICKED": (Op.KICKED, ["replaced"], "unsupported"),
    "a name with NUL": (Op.HISTORY, [14, "p:alice:bob\0"], "bad_conv"),
    "a name in look-alikes": (Op.HISTORY, [15, "p:\u0430lice:mallory"], "bad_conv"),
    "a name with a line": (Op.HISTORY, [16, "s:mallory\n"], "bad_conv"),
    "a name that is a pattern": (Op.HISTORY, [18, "g:{}:*"], "bad_conv"),
    "a name of topic characters": (Op.HISTORY, [19, "g:../submit"], "bad_conv"),
    "a name in SQL": (Op.HISTORY, [20, "g:x' OR '1'='1"], "bad_conv"),
    "a refresh with nothing": (Op.REFRESH, [""], "unauthenticated"),
}  # fmt: skip


@pytest.mark.parametrize(("op", "fields", "code"), IN_SESSION.values(), ids=IN_SESSION.keys())
def test_a_session_gets_nothing_of_others(world: World, op: Op, fields: list[Any], code: str) -> None:
    with world.session("mallory") as mallory:
        mallory.settled()
        mallory.send([int(op), *fields])
        error, *rest = mallory.settled()
        assert (error[0], error[2]) == (Op.ERROR, code)
        assert MARK not in error[3]
        assert rest == []


BROKEN: Final[dict[str, tuple[Op, list[Any]]]] = {
    "send text instead of bytes": (Op.SEND, [PAIR, [[ID, 1, MARK]]]),
    "history of less than nothing": (Op.HISTORY, [8, "p:bob:mallory", 0, 0, 0, 0, -1]),
    "history from beyond 2^53": (Op.HISTORY, [10, "p:bob:mallory", 1 << 53]),
    "the server's own MSG": (Op.MSG, [1, 1, PAIR]),
    "a name of 10 KB": (Op.HISTORY, [17, "g:" + "a" * 10_000]),
}


@pytest.mark.parametrize(("op", "fields"), BROKEN.values(), ids=BROKEN.keys())
def test_a_frame_that_breaks_its_layout_ends_the_session(world: World, op: Op, fields: list[Any]) -> None:
    with world.session("mallory") as mallory:
        mallory.send([int(op), *fields], [int(Op.HISTORY), 1, PAIR])
        *frames, close = mallory.frames()
        (error,) = (frame for frame in frames if frame[0] == Op.ERROR)
        assert (error[2], close) == ("bad_frame", (4509, b"bad_frame"))
        assert MARK not in error[3]


@pytest.mark.parametrize("conv", ["g:team", "g:none"])
def test_a_pull_of_a_group_streams_nothing_to_who_is_no_member(world: World, conv: str) -> None:
    with world.session("mallory") as mallory:
        mallory.settled()
        mallory.send([int(Op.PULL), conv, 1, 10])
        assert {frame[0] for frame in mallory.settled()} <= {int(Op.LEVEL), int(Op.ERROR)}


def test_lists_and_syncs_from_any_version_hold_only_ones_own(world: World) -> None:
    with world.session("mallory") as mallory:
        for version in (0, 1, (1 << 53) - 1):
            mallory.send([int(Op.CONVS), 1, version], [int(Op.SYNC), version])
        for frame in mallory.settled():
            assert frame[0] in (Op.CHANGES, Op.LEVEL)
            assert "team" not in repr(frame)
            assert PAIR not in repr(frame)


def test_a_second_auth_or_a_refresh_does_not_change_who_it_is(world: World) -> None:
    with world.session("mallory") as mallory:
        mallory.auth(world.token(sub="alice"))
        assert mallory.get(Op.ERROR)[2] == "already_authenticated"
        mallory.send([int(Op.REFRESH), world.token(sub="alice")])
        assert mallory.get(Op.ERROR)[2:4] == ["forbidden", "the new token is for somebody else"]
        mallory.send([int(Op.HISTORY), 1, PAIR])
        assert mallory.get(Op.ERROR)[2] == "forbidden"


def test_a_session_of_another_is_not_resumed(world: World) -> None:
    with world.dial() as alice:
        alice.auth(world.token(), "phone")
        session = alice.get(Op.HELLO)[2]
        for device in ("phone", "laptop"):
            with world.dial() as mallory:
                mallory.auth(world.token(sub="mallory"), device, "app", session, 0)
                hello = mallory.get(Op.HELLO)
                assert (hello[2] != session, hello[3], hello[6]) == (True, "mallory", 2)
        alice.send([int(Op.PING)])
        assert alice.get(Op.PONG)


def test_acks_of_what_one_was_never_sent_settle_nothing_for_others(world: World) -> None:
    """Neither a stranger's nor the sender's own, by id, by the hundred, or by tag."""
    for user in ("mallory", "alice"):
        with world.session(user) as one:
            one.settled()
            for _ in range(200):
                one.send([int(Op.ACKS), [world.secret_msg_id, world.team_msg_id, *range(1, 255)]])
            assert not [frame for frame in one.settled() if frame[0] == Op.ERROR]
            one.send([int(Op.ACK), 1 << 31])
            assert one.get(Op.ERROR)[2] == "bad_ack"
    for msg_id in (world.secret_msg_id, world.team_msg_id):
        _, trace = world.ask("GET", f"/v1/messages/{msg_id}/trace", world.operations("admin"))
        assert [row["user"] for row in trace["obligations"]] == ["bob"]
        assert trace["obligations"][0]["state"] != "acked"
    assert world.ask("GET", "/v1/users/bob/unread", world.token(sub="bob"))[1]["badge"] == 2


# ------------------------------------------------------------------------------------------- upgrades

ORIGINS: Final = (
    "null", "https://evil.example", "https://chat.example.evil.example", "https://evilchat.example",
    "https://sub.chat.example", "HTTPS://CHAT.EXAMPLE", "https://chat.example:8443", "http://chat.example",
    "https://chat.example/", "https://chat.example, https://evil.example", "file://", "",
    "https://chat.example\r\nOrigin: https://chat.example",
)  # fmt: skip


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_of_an_origin_that_is_not_listed_is_refused_before_101(world: World, origin: str) -> None:
    with world.dial(REQUEST + f"Origin: {origin}\r\n\r\n".encode()) as one:
        assert one.status == 403


UPGRADES: Final = {
    "PROXY in front": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + REQUEST,
    "PROXY in front, in bytes": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12) + REQUEST,
    "a token in the query": REQUEST.replace(b"/v1/ws", b"/v1/ws?token=x"),
    "an empty query": REQUEST.replace(b"/v1/ws", b"/v1/ws?"),
    "a way around": REQUEST.replace(b"/v1/ws", b"/v1/ws/../admin"),
    "a way back": REQUEST.replace(b"/v1/ws", b"/x/../v1/ws"),
    "upper case": REQUEST.replace(b"/v1/ws", b"/V1/WS"),
    "a slash behind": REQUEST.replace(b"/v1/ws", b"/v1/ws/"),
    "encoded": REQUEST.replace(b"/v1/ws", b"/%76%31/ws"),
    "NUL behind": REQUEST.replace(b"/v1/ws", b"/v1/ws%00"),
    "by POST": REQUEST.replace(b"GET ", b"POST "),
    "by HTTP/1.0": REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "to HTTP/2": REQUEST.replace(b"websocket", b"h2c"),
    "with a body": REQUEST + b"Content-Length: 5\r\n",
    "two hosts": REQUEST + b"Host: evil.example\r\n",
}


@pytest.mark.parametrize("head", UPGRADES.values(), ids=UPGRADES.keys())
def test_what_is_no_upgrade_of_ours_opens_nothing(world: World, head: bytes) -> None:
    with world.dial(head + b"\r\n") as one:
        assert one.status in (0, 400, 404, 405, 426)


# ------------------------------------------------------------------------------------------- afterwards


@pytest.mark.parametrize(
    ("op", "known", "unknown"),
    [
        (Op.HISTORY, [1, PAIR], [1, NONE]),
        (Op.HISTORY, [1, "g:team"], [1, "g:none"]),
        (Op.HISTORY, [1, "s:alice"], [1, "s:no-one"]),
        (Op.READ, [PAIR, 1], [NONE, 1]),
        (Op.READ, ["g:team", 1], ["g:none", 1]),
        (Op.PULL, [PAIR, 1, 1], [NONE, 1, 1]),
    ],
)
def test_a_refusal_says_the_same_after_the_same_time_for_known_and_unknown(
    world: World, op: Op, known: list[Any], unknown: list[Any]
) -> None:
    """By medians of many in turns: a look-up of somebody who exists would show."""
    took: tuple[list[float], list[float]] = ([], [])
    with world.session("mallory") as mallory:
        mallory.settled()
        for _ in range(TIMES):
            answers = []
            for which, fields in enumerate((known, unknown)):
                began = time.perf_counter()
                mallory.send([int(op), *fields])
                error = mallory.get(Op.ERROR)
                took[which].append(time.perf_counter() - began)
                name = next(part for part in fields if isinstance(part, str))
                answers.append(repr(error).replace(name, "<name>"))
            assert answers[0] == answers[1]
    first, second = map(statistics.median, took)
    assert abs(first - second) < 0.2 * max(first, second), (first, second)
