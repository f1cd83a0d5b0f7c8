"""REST requests for what is not theirs, in odd verbs, paths, headers and bodies (P20).

mallory is known to the server, and member of nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.system.bypass_world import MARK, World, b64, running

TIMES: Final = 150


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield from running(tmp_path_factory.mktemp("bypass"))


QUESTIONS: Final[dict[str, tuple[str, int, str]]] = {
    "badge of another": ("/v1/users/alice/unread", 403, "forbidden"),
    "badge of nobody": ("/v1/users/nobody/unread", 403, "forbidden"),
    "conversations of another": ("/v1/users/alice/conversations", 403, "forbidden"),
    "presence of another": ("/v1/users/alice/online", 403, "forbidden"),
    "presence of nobody": ("/v1/users/nobody/online", 403, "forbidden"),
    "history of others": ("/v1/conversations/p:alice:bob/messages", 403, "forbidden"),
    "history as another": ("/v1/conversations/p:alice:bob/messages?user=alice", 403, "forbidden"),
    "history as two": ("/v1/conversations/p:bob:mallory/messages?user=mallory&user=bob", 400, "bad_request"),
    "history of a group": ("/v1/conversations/g:team/messages", 403, "forbidden"),
    "history of a group that is none": ("/v1/conversations/g:none/messages", 403, "forbidden"),
    "history of s:": ("/v1/conversations/s:alice/messages", 403, "forbidden"),
    "history of a room": ("/v1/conversations/r:lobby/messages", 501, "unsupported"),
    "negative limit": ("/v1/conversations/p:bob:mallory/messages?limit=-1", 400, "bad_request"),
    "huge limit": ("/v1/conversations/p:bob:mallory/messages?limit=1000000", 400, "bad_request"),
    "cursor as text": ("/v1/conversations/p:bob:mallory/messages?after_seq=x", 400, "bad_request"),
    "cursor beyond": ("/v1/conversations/p:bob:mallory/messages?after_seq=99999999999", 200, ""),
    "cursor of 2^53": (f"/v1/conversations/p:bob:mallory/messages?after_seq={1 << 53}", 400, "bad_request"),
    "path with dots": ("/v1/users/mallory/../alice/unread", 404, "not_found"),
    "path with encoded dots": ("/v1/users/mallory/%2e%2e/alice/unread", 404, "not_found"),
    "path with an encoded slash": ("/v1/users/mallory%2f..%2falice/unread", 400, "bad_id"),
    "path with a backslash": ("/v1/users/mallory\\..\\alice/unread", 400, "bad_id"),
    "double slash": ("//v1/users/alice/unread", 404, "not_found"),
    "slash behind": ("/v1/users/alice/unread/", 404, "not_found"),
    "semicolon": ("/v1/users/alice;mallory/unread", 400, "bad_id"),
    "upper case": ("/V1/users/alice/unread", 404, "not_found"),
    "encoded letters": ("/v1/%75sers/alice/unread", 404, "not_found"),
    "user with NUL": ("/v1/users/mallory%00/unread", 400, "bad_id"),
    "user with a line": ("/v1/users/mallory%0aalice/unread", 400, "bad_id"),
    "user in look-alikes": ("/v1/users/%D0%B0lice/unread", 400, "bad_id"),
    "user encoded twice": ("/v1/users/%2561lice/unread", 400, "bad_id"),
    "user of 4 KB": (f"/v1/users/{'a' * 4_000}/unread", 400, "bad_id"),
    "user a pattern": ("/v1/users/%7B%7D:*/unread", 400, "bad_id"),
    "user in SQL": ("/v1/users/alice'--/unread", 400, "bad_id"),
    "another in the query": ("/v1/users/mallory/unread?user=alice", 400, "bad_request"),
    "unread of others": ("/v1/users/mallory/unread?conv=p:alice:bob", 200, ""),
}  # fmt: skip
MESSAGES: Final[dict[str, tuple[dict[str, Any], int, str]]] = {
    "forged sender": ({"conv": "p:alice:bob", "sender": "alice"}, 403, "forbidden"),
    "forged sender to oneself": ({"conv": "p:alice:mallory", "sender": "alice"}, 403, "forbidden"),
    "sender with NUL": ({"conv": "p:alice:bob", "sender": "alice\0"}, 400, "bad_id"),
    "sender in look-alikes": ({"conv": "p:alice:bob", "sender": "\u0430lice"}, 400, "bad_id"),
    "from beside the sender": ({"conv": "p:alice:bob", "from": "alice"}, 400, "bad_request"),
    "into others' conversation": ({"conv": "p:alice:bob"}, 403, "forbidden"),
    "into nobody's": ({"conv": "p:no-one:no-two"}, 403, "forbidden"),
    "into a group": ({"conv": "g:team"}, 403, "not_member"),
    "into a group that is none": ({"conv": "g:none"}, 404, "unknown_group"),
    "into s:": ({"conv": "s:alice"}, 403, "forbidden"),
    "into a room": ({"conv": "r:lobby"}, 501, "unsupported"),
    "order of the pair": ({"conv": "p:mallory:bob"}, 400, "bad_conv"),
    "a change of members": ({"conv": "p:bob:mallory", "kind": 32}, 400, "unknown_kind"),
    "a change of members by name": ({"conv": "p:bob:mallory", "kind": "member"}, 400, "unknown_kind"),
}
OTHERS: Final[dict[str, tuple[str, dict[str, Any], int, str]]] = {
    "a group of one's own": (
        "/v1/groups", {"group": "mine", "owner": "mallory", "members": ["alice"]}, 403, "forbidden",
    ),
    "into the group by making it again": (
        "/v1/groups", {"group": "team", "owner": "mallory", "members": ["mallory"]}, 403, "forbidden",
    ),
    "own role": ("/v1/groups/team/members/mallory", {"role": "owner"}, 404, "not_found"),
    "kick": ("/v1/users/alice/kick", {}, 404, "not_found"),
    "revoke": ("/v1/tokens/revoke", {"user": "alice"}, 404, "not_found"),
}  # fmt: skip
WRITES: Final = OTHERS | {
    name: ("/v1/messages", {"body": MARK} | body, status, code)
    for name, (body, status, code) in MESSAGES.items()
}


@pytest.mark.parametrize(("path", "status", "code"), QUESTIONS.values(), ids=QUESTIONS.keys())
def test_a_client_reads_nothing_of_others(world: World, path: str, status: int, code: str) -> None:
    found, data = world.raw_ask("GET", path, world.token(sub="mallory"))
    answer = json.loads(data)
    assert (found, answer.get("code", "")) == (status, code)
    assert MARK.encode() not in data
    if found == 200:
        assert not answer.get("messages")
        assert not answer.get("badge")


@pytest.mark.parametrize(("path", "body", "status", "code"), WRITES.values(), ids=WRITES.keys())
def test_a_client_writes_nothing_as_or_to_others(
    world: World, path: str, body: Any, status: int, code: str
) -> None:
    found, answer = world.ask("POST", path, world.token(sub="mallory"), body)
    assert (found, answer["code"]) == (status, code)
    assert MARK not in repr(answer)


@pytest.mark.parametrize(
    ("verb", "status"),
    [
        ("TRACE", 405), ("DELETE", 405), ("PUT", 405), ("PATCH", 405), ("HEAD", 405), ("OPTIONS", 405),
        ("POST", 405), ("CONNECT", 405), ("PROPFIND", 405), ("GETX", 400), ("get", 400),
    ],
)  # fmt: skip
def test_a_verb_is_the_one_that_is_meant_or_none(world: World, verb: str, status: int) -> None:
    token = world.token()
    found, data = world.raw_ask(verb, "/v1/users/alice/unread", token)
    assert found == status
    assert b"badge" not in data


def test_a_message_of_others_is_traced_like_one_that_there_is_not(world: World) -> None:
    token = world.token(sub="mallory")
    answers = {}
    for msg_id in (world.secret_msg_id, world.team_msg_id, world.secret_msg_id + 64, 1):
        found = world.raw_ask("GET", f"/v1/messages/{msg_id}/trace", token)
        answers[found[0], found[1].replace(str(msg_id).encode(), b"<id>")] = msg_id
    assert [status for status, _ in answers] == [404]
    status, answer = world.ask("GET", f"/v1/messages/{world.secret_msg_id}/trace?user=bob", token)
    assert (status, answer["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("scope", "method", "path"),
    [
        ("service", "GET", "/v1/conversations/p:alice:bob/messages"),
        ("service", "GET", "/v1/conversations/p:alice:bob/messages?user=alice"),
        ("service", "GET", "/v1/conversations/g:team/messages"),
        ("service", "GET", "/metrics"),
        ("admin", "POST", "/v1/messages"),
    ],
)
def test_a_service_and_an_admin_do_only_what_is_theirs(
    world: World, scope: str, method: str, path: str
) -> None:
    body = {"conv": "p:alice:bob", "sender": "alice", "body": "x"} if method == "POST" else None
    status, answer = world.ask(method, path, world.operations(scope), body, x_forwarded_for="203.0.113.9")
    assert (status, answer["code"]) == (403, "forbidden")


def test_a_service_sees_that_there_are_conversations_and_not_what_is_in_them(world: World) -> None:
    status, data = world.raw_ask("GET", "/v1/users/bob/conversations", world.operations("service"))
    assert status == 200
    assert b"p:alice:bob" in data
    assert MARK.encode() not in data


@pytest.mark.parametrize(
    "headers",
    [
        {"x_http_method_override": "POST"}, {"x_original_url": "/v1/users/mallory/unread"},
        {"x_rewrite_url": "/v1/users/mallory/unread"}, {"x_forwarded_for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"}, {"x_user": "alice"}, {"x_forwarded_user": "alice"},
        {"host": "localhost"},
    ],
)  # fmt: skip
def test_headers_that_others_believe_change_nothing(world: World, headers: dict[str, str]) -> None:
    status, answer = world.ask("GET", "/v1/users/alice/unread", world.token(sub="mallory"), **headers)
    assert (status, answer["code"]) == (403, "forbidden")


def test_a_token_counts_in_one_authorization_header_only(world: World) -> None:
    good = world.token()
    for path in (f"/v1/users/alice/unread?token={good}", f"/v1/users/alice/unread?access_token={good}"):
        assert world.raw_ask("GET", path)[0] == 401
    for headers in (
        {"authorization": good}, {"authorization": f"Basic {b64(good.encode())}"},
        {"cookie": f"token={good}"}, {"x_authorization": f"Bearer {good}"},
        {"proxy_authorization": f"Bearer {good}"},
    ):  # fmt: skip
        assert world.raw_ask("GET", "/v1/users/alice/unread", **headers)[0] == 401
    request = b"GET /v1/users/alice/unread HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    both = f"authorization: Bearer {MARK}\r\nauthorization: Bearer {good}\r\n\r\n".encode()
    assert world.raw_http(request + both).startswith(b"HTTP/1.1 401")


SMUGGLED: Final = b"GET /v1/users/alice/unread HTTP/1.1\r\nhost: x\r\n\r\n"
HEAD: Final = b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + b"content-length: 0\r\ncontent-length: 50\r\n\r\n" + SMUGGLED,
        HEAD + b"content-length: +0\r\n\r\n" + SMUGGLED,
        HEAD + b"content-length : 0\r\n\r\n" + SMUGGLED,
        HEAD + b" folded: x\r\n\r\n" + SMUGGLED,
    ],
    ids=["length and chunks", "unknown coding", "two codings", "two lengths", "signed", "space", "folded"],
)  # fmt: skip
def test_a_request_of_two_readings_is_read_in_none(world: World, request_: bytes) -> None:
    """A proxy in front could have taken the other one."""
    answer = world.raw_http(request_)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_of_somebody_elses_page_sends_nothing(world: World, media: str) -> None:
    """Browsers send these without asking first."""
    body = {"conv": "p:alice:bob", "body": MARK}
    status, answer = world.ask("POST", "/v1/messages", world.token(), body, content_type=media)
    assert (status, answer["code"]) == (415, "unsupported_media_type")


def test_a_page_of_somebody_else_may_not_read(world: World) -> None:
    head = b"OPTIONS /v1/messages HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    asked = b"origin: https://evil.example\r\naccess-control-request-method: POST\r\n\r\n"
    answer = world.raw_http(head + asked)
    assert answer.startswith(b"HTTP/1.1 405")
    assert b"access-control" not in answer.lower()


@pytest.mark.parametrize("header", ["x_forwarded_for", "x_forwarded_proto", "forwarded", "via", "x_real_ip"])
def test_metrics_tell_nothing_to_who_comes_through_a_proxy(world: World, header: str) -> None:
    through = {header: "203.0.113.9"}
    assert world.raw_ask("GET", "/metrics", **through)[0] == 401
    assert world.raw_ask("GET", "/metrics", world.token(), **through)[0] == 403
    assert world.raw_ask("GET", "/metrics", world.operations("admin"), **through)[0] == 200


def test_health_tells_strangers_nothing(world: World) -> None:
    assert world.ask("GET", "/health") == (200, {"status": "ok"})


def test_rest_listens_on_this_machine_only_unless_told_otherwise(world: World) -> None:
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f":{world.server.http_port:04X}"
    assert [row[1] for row in listening if row[3] == "0A" and row[1].endswith(port)] == [f"0100007F{port}"]
    assert port.lower() not in Path("/proc/net/tcp6").read_text().lower()


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ("/v1/users/alice/online", "/v1/users/no-on/online"),
        ("/v1/users/alice/unread", "/v1/users/no-on/unread"),
        ("/v1/users/alice/conversations", "/v1/users/no-on/conversations"),
        ("/v1/conversations/p:alice:bob/messages", "/v1/conversations/p:no-on:one/messages"),
        ("/v1/conversations/s:alice/messages", "/v1/conversations/s:no-on/messages"),
        ("/v1/conversations/g:team/messages", "/v1/conversations/g:none/messages"),
    ],
)
def test_a_refusal_says_the_same_after_the_same_time_for_known_and_unknown(
    world: World, known: str, unknown: str
) -> None:
    """By medians of many in turns: a look-up of somebody who exists would show."""
    token = world.token(sub="mallory")
    took: tuple[list[float], list[float]] = ([], [])
    answers = set()
    for _ in range(TIMES):
        for which, path in enumerate((known, unknown)):
            began = time.perf_counter()
            status, data = world.raw_ask("GET", path, token)
            took[which].append(time.perf_counter() - began)
            answers.add((status, data.replace(b"g:none", b"g:team")))
    ((status, _),) = answers
    assert status == 403
    first, second = map(statistics.median, took)
    assert abs(first - second) < 0.2 * max(first, second), (first, second)
