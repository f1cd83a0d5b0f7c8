"""REST as HTTP: what is answered to peers that are malformed, slow, deaf, forged or not let in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from fastim import observe
from fastim.api.rest import RestLimits
from fastim.auth import Scope
from fastim.errors import InternalError, StoreUnavailable
from tests.leaks import MARK
from tests.system.rest_world import ALICE, BOB, ROOT, SHOP, bearer, problem, token, world

CONV = "p:alice:bob"
MESSAGE = {"conv": CONV, "sender": "alice", "body": MARK}

# ------------------------------------------------------------------------------------------- health and such


async def test_health_ready_and_metrics(tmp_path: Path) -> None:
    async with world(tmp_path) as here:

        async def metrics() -> bytes:
            return observe.exposition()

        here.status.metrics = metrics
        assert (await here.get("/health")).json() == {"status": "ok"}
        assert (await here.get("/ready")).json() == {"status": "ready"}
        assert (await here.client.head("/health")).status_code == 200
        answer = await here.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "fastim_errors_sent" in answer.text
        here.status.waiting_for = lambda: ["node"]
        assert "node" in problem(await here.get("/ready"), 503, "not_ready")["detail"]
        here.status.draining = "restart (SIGTERM)"
        problem(await here.get("/health"), 503, "draining")
        problem(await here.get("/ready"), 503, "draining")


async def test_metrics_are_for_this_machine_or_an_admin(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        for header in ("x-forwarded-for", "forwarded", "x-forwarded-host"):
            through = {header: "127.0.0.1"}
            problem(await here.get("/metrics", headers=through), 401, "unauthenticated")
            problem(await here.get("/metrics", ALICE, headers=through), 403, "forbidden")
            problem(await here.get("/metrics", SHOP, headers=through), 403, "forbidden")
            assert (await here.get("/metrics", ROOT, headers=through)).status_code == 200


async def test_openapi_describes_every_route(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        found = (await here.get("/openapi.json")).json()
        assert found["openapi"] == "3.1.0"
        operations = {(method, path) for path, rows in found["paths"].items() for method in rows}
        assert ("post", "/v1/messages") in operations
        assert len(operations) == 11
        send = found["paths"]["/v1/messages"]["post"]
        assert set(send["responses"]) >= {
            "201",
            "400",
            "401",
            "403",
            "404",
            "409",
            "410",
            "413",
            "429",
            "503",
        }
        history = found["paths"]["/v1/conversations/{conv}/messages"]["get"]
        limit = next(one for one in history["parameters"] if one["name"] == "limit")
        assert limit["schema"]["maximum"] == 200
        text = json.dumps(found)
        for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
            assert name in found["components"]["schemas"]


# ------------------------------------------------------------------------------------------------ HTTP itself


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v2/messages", 404, "not_found"),
        ("GET", "/v1/users/bob/../alice", 404, "not_found"),
        ("GET", "//v1//groups", 404, "not_found"),
        ("GET", "/%2e%2e/etc/passwd", 404, "not_found"),
        ("GET", "/v1/messages", 405, "method_not_allowed"),
        ("PUT", "/v1/groups", 405, "method_not_allowed"),
        ("DELETE", "/v1/users/bob/unread", 405, "method_not_allowed"),
        ("TRACE", "/health", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/groups", 405, "method_not_allowed"),
    ],
)
async def test_wrong_path_or_method_is_a_problem(
    tmp_path: Path, method: str, path: str, status: int, code: str
) -> None:
    async with world(tmp_path) as here:
        raw = await here.raw(f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        head, _, body = raw.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"application/problem+json" in head
        assert json.loads(body)["code"] == code
        if status == 405:
            assert b"\r\nallow: " in head


@pytest.mark.parametrize(
    ("content", "media", "status", "code"),
    [
        (b"", "application/json", 400, "bad_request"),
        (b"{", "application/json", 400, "bad_request"),
        (b"[]", "application/json", 400, "bad_request"),
        (b"\xff\xfe", "application/json", 400, "bad_request"),
        (b"[" * 100_000, "application/json", 400, "bad_request"),
        (b'{"conv": "\\ud800"}', "application/json", 400, "bad_request"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b"x" * 300_000, "application/json", 413, "too_big"),
    ],
)
async def test_malformed_body_is_a_problem(
    tmp_path: Path, content: bytes, media: str, status: int, code: str
) -> None:
    async with world(tmp_path) as here:
        headers = bearer(SHOP) | {"content-type": media}
        answer = await here.client.post("/v1/messages", content=content, headers=headers)
        problem(answer, status, code)
        assert (await here.get("/health")).status_code == 200


async def test_body_without_a_length_is_cut_at_the_limit(tmp_path: Path) -> None:
    async with world(tmp_path) as here:

        async def endless() -> Any:
            for _ in range(100):
                yield b"x" * 8_192

        headers = bearer(SHOP) | {"content-type": "application/json"}
        answer = await here.client.post("/v1/messages", content=endless(), headers=headers)
        assert "limit 262,144" in problem(answer, 413, "too_big")["detail"]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=201", "limit=x", "limit=1&limit=2", "before_seq=-1", "page=2", "limit=%ff"]
)
async def test_bad_query_is_a_problem(tmp_path: Path, query: str) -> None:
    async with world(tmp_path) as here:
        answer = await here.get(f"/v1/conversations/{CONV}/messages?{query}", ALICE)
        problem(answer, 400, "bad_request")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20_000 + b"\r\n\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 200_000, b"431"),
        (b"GET /" + b"a" * 20_000, b"431"),
        (b"GET /health HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % n for n in range(200)) + b"\r\n", b"431"),
    ],
)
async def test_head_that_is_no_http_or_too_large_is_answered_and_closed(
    tmp_path: Path, request_bytes: bytes, status: bytes
) -> None:
    async with world(tmp_path) as here:
        answer = await here.raw(request_bytes)
        assert answer.split(b" ")[1] == status
        assert b"application/problem+json" in answer
        assert answer.count(b"HTTP/1.1 4") == 1
        assert (await here.get("/health")).status_code == 200


async def test_slow_head_and_slow_body_are_ended(tmp_path: Path) -> None:
    async with world(tmp_path, request_timeout_ms=100) as here:
        assert b"408" in (await here.raw(b"GET /health HTTP/1.1\r\nhost"))[:20]
        assert await here.raw(b"") == b""
        head = (
            f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SHOP}\r\n"
            f"content-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
        )
        assert b"408" in (await here.raw(head.encode()))[:20]


async def test_keep_alive_does_not_lift_the_limits(tmp_path: Path) -> None:
    async with world(tmp_path, request_timeout_ms=200) as here:
        first = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        answer = await here.raw(first + b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 40_000)
        assert answer.count(b"200 OK") <= 1
        assert b"431" in answer
        assert b"408" in await here.raw(first + b"GET /health HTT")


@pytest.mark.parametrize(
    ("head", "rest", "statuses"),
    [
        ("GET /v1/users/alice/unread", b"\r\nnonsense\r\n\r\n", ["200", "400"]),
        ("GET /v1/users/alice/unread", b"\r\nGET /health HTTP/1.1\r\nx: " + b"x" * 20_000, ["200", "431"]),
        ("GET /v1/users/alice/unread", b"connection: close\r\n\r\nnonsense\r\n\r\n", ["200"]),
        ("GET /v1/users/alice/unread", b"\r\n" + b"GET / HTTP/1.1\r\n\r\n" * 3 + b"x\r\n", ["200", "400"]),
        ("POST /v1/messages", b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n", ["400"]),
    ],
)  # fmt: skip
async def test_answers_keep_the_order_of_their_requests_when_the_next_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, head: str, rest: bytes, statuses: list[str]
) -> None:
    """Whoever shares a connection among others, as proxies do, must not give one the answer of another."""
    async with world(tmp_path) as here:
        raw = await here.raw(f"{head} HTTP/1.1\r\nauthorization: Bearer {ALICE}\r\n".encode() + rest)
        assert re.findall(r"HTTP/1.1 (\d+) ", raw.decode()) == statuses
        assert caplog.records == []


async def test_a_peer_that_leaves_with_requests_in_hand_fills_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as here:
        request = f"GET /v1/users/alice/unread HTTP/1.1\r\nauthorization: Bearer {ALICE}\r\n\r\n".encode()
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", here.port)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.write(request * 5)
            writer.transport.abort()
        assert (await here.get("/health")).status_code == 200
        assert caplog.records == []


async def test_connections_above_the_limit_are_dropped(tmp_path: Path) -> None:
    async with world(tmp_path, max_connections=3) as here:
        held = [await asyncio.open_connection("127.0.0.1", here.port) for _ in range(3)]
        request = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        with contextlib.suppress(ConnectionError):
            assert await here.raw(request) == b""
        for _, writer in held:
            writer.close()


async def test_peer_that_does_not_read_its_answer_is_cut_off(tmp_path: Path) -> None:
    async with world(tmp_path, answer_timeout_ms=500) as here:
        for _ in range(17):
            await here.sent(CONV, "x" * 61_000, "alice")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", here.port))
        head = f"host: x\r\nauthorization: Bearer {BOB}\r\n\r\n"
        request = f"GET /v1/conversations/{CONV}/messages HTTP/1.1\r\n{head}"
        await asyncio.get_running_loop().sock_sendall(sock, request.encode())
        open_before = here.http.connections
        async with asyncio.timeout(5):
            while here.http.connections >= open_before and here.http.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        sock.close()


# --------------------------------------------------------------------------------------------------- safety


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer x.y.z"},
        {"authorization": "Basic YTpi"},
        {"authorization": f"Token {ALICE}"},
        {"authorization": f"Bearer {ALICE} {ALICE}"},
        {"authorization": f"Bearer {ALICE[:-2]}AA"},
        {"authorization": "Bearer " + token("alice", ttl_s=1, now_s=1_000_000)},
        {"cookie": f"token={ALICE}"},
        {"x-access-token": ALICE},
    ],
)
async def test_no_good_token_in_the_one_header_is_unauthenticated(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    async with world(tmp_path) as here:
        answer = await here.client.get("/v1/users/alice/unread", headers=headers)
        problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert ALICE not in answer.text


async def test_token_in_the_query_is_not_taken(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        answer = await here.get(f"/v1/users/alice/unread?access_token={ALICE}")
        problem(answer, 401, "unauthenticated")
        answer = await here.get(f"/v1/users/alice/unread?access_token={ALICE}", ALICE)
        problem(answer, 400, "bad_request")
        assert ALICE not in answer.text


async def test_two_authorization_headers_are_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        two = f"authorization: Bearer {ALICE}\r\n" * 2
        raw = await here.raw(
            f"GET /v1/users/alice/unread HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{two}\r\n".encode()
        )
        assert raw.startswith(b"HTTP/1.1 401")


async def test_only_failed_tokens_block_an_address_and_only_where_a_token_is_needed(tmp_path: Path) -> None:
    async with world(tmp_path, failures_per_minute=3) as here:
        for _ in range(10):
            assert (await here.get("/v1/users/alice/unread", ALICE)).status_code == 200
        for _ in range(3):
            problem(await here.get("/v1/users/alice/unread", "x.y.z"), 401, "unauthenticated")
        answer = await here.get("/v1/users/alice/unread", ALICE)
        assert problem(answer, 429, "rate_limited")["retryable"]
        assert (await here.get("/health")).status_code == 200


async def test_only_a_listed_balancers_word_names_another_address(tmp_path: Path) -> None:
    async with world(tmp_path, failures_per_minute=1) as here:
        forged = {"x-forwarded-for": "203.0.113.9"}
        await here.get("/v1/users/alice/unread", "x.y.z", headers=forged)
        problem(await here.get("/v1/users/alice/unread", ALICE), 429, "rate_limited")
    async with world(tmp_path, failures_per_minute=1, balancers=("127.0.0.0/8",)) as here:
        await here.get("/v1/users/alice/unread", "x.y.z", headers=forged)
        problem(await here.get("/v1/users/alice/unread", ALICE, headers=forged), 429, "rate_limited")
        other = {"x-forwarded-for": "203.0.113.9, 203.0.113.10"}
        assert (await here.get("/v1/users/alice/unread", ALICE, headers=other)).status_code == 200


async def test_browsers_of_listed_origins_only_may_read(tmp_path: Path) -> None:
    origin = "https://chat.example.org"
    limits = RestLimits(origins=frozenset({origin}))
    async with world(tmp_path, limits=limits) as here:
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        answer = await here.client.options("/v1/messages", headers=ask | {"origin": origin})
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == origin
        assert "authorization" in answer.headers["access-control-allow-headers"]
        for other in (
            "https://evil.example",
            origin.upper(),
            origin + ":8443",
            "null",
            "https://x." + origin[8:],
        ):
            answer = await here.client.options("/v1/messages", headers=ask | {"origin": other})
            assert answer.status_code == 405
            assert "access-control-allow-origin" not in answer.headers
        answer = await here.get("/v1/users/bob/unread", headers={"origin": origin})
        assert problem(answer, 401, "unauthenticated")
        assert answer.headers["access-control-allow-origin"] == origin
        assert "origin" in answer.headers["vary"]
    async with world(tmp_path) as here:
        answer = await here.get("/health", headers={"origin": origin})
        assert "access-control-allow-origin" not in answer.headers


async def test_own_fault_is_logged_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:

        async def broken(*_: object, **__: object) -> None:
            raise RuntimeError("the password is hunter2")

        monkeypatch.setattr(here.presence, "locate", broken)
        answer = await here.get("/v1/users/bob/online", BOB)
        problem(answer, 500, "internal")
        assert "hunter2" not in answer.text
        assert "hunter2" in caplog.text
        assert (await here.get("/health")).status_code == 200


async def test_internal_error_ends_the_process_after_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:

        async def broken(*_: object, **__: object) -> None:
            raise InternalError("a state that cannot be")

        monkeypatch.setattr(here.presence, "locate", broken)
        problem(await here.get("/v1/users/bob/online", BOB), 500, "internal")
        assert isinstance(here.fatal.pop(), InternalError)


async def test_store_that_is_away_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path) as here:

        async def away(*_: object, **__: object) -> None:
            raise StoreUnavailable("/data/store.db: disk full")

        monkeypatch.setattr(here.store, "unread", away)
        answer = await here.get("/v1/users/bob/unread", BOB)
        found = problem(answer, 503, "unavailable")
        assert found["retryable"]
        assert "/data" not in answer.text
        assert answer.headers["retry-after"] == "2"


async def test_service_and_admin_tokens_do_not_become_people(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        problem(await here.send({"conv": "p:bob:root", "body": "x"}, ROOT), 403, "forbidden")
        both = token("alice", Scope.CLIENT, Scope.ADMIN)
        assert (await here.get(f"/v1/conversations/{CONV}/messages", both)).status_code == 200


async def test_stop_lets_a_request_in_hand_finish(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.get("/health")  # a connection that is accepted already
        sending = asyncio.create_task(here.send(MESSAGE))
        await asyncio.sleep(0.005)
        await here.http.stop(5.0)
        assert (await sending).status_code == 201
        assert here.http.connections == 0
