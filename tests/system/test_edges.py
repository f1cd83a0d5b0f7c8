"""The edges of the whole server, as its operators configure them: certificates, balancers, limits."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import struct
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.server import Server
from fastim.model import Kind
from fastim.protocol import Auth, CloseCode, Error, Hello, Ping, Pong, Send, SendItem, Sent, encode
from tests.kill.raw import RawClient, Refused, split
from tests.system.test_tls import client_context, served_name, write_pair
from tests.unit.conn_world import REQUEST, Client

CLIENT = b"PROXY TCP4 203.0.113.9 10.0.0.1 40000 443\r\n"


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        server.end()


async def start(servers: list[Server], directory: Path, node: dict[str, Any], **more: Any) -> Server:
    server = Server(directory, {"node": node} | more)
    servers.append(server)
    server.spawn()
    for _ in range(1_000):
        assert server.process is not None
        assert server.process.poll() is None, server.log_tail()
        if await asyncio.to_thread(answers, f"http://127.0.0.1:{server.http_port}/ready"):
            return server
        await asyncio.sleep(0.02)
    raise AssertionError(server.log_tail())


def answers(url: str) -> bool:
    context = client_context()
    try:
        with urllib.request.urlopen(url, timeout=1, context=context if url.startswith("https") else None):
            return True
    except OSError:
        return False


async def http(port: int, data: bytes) -> bytes:
    """The first line of the answer; empty: dropped."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            return (await reader.readline()).strip()
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


async def test_hangup_serves_the_newer_certificate_and_keeps_open_connections(
    servers: list[Server], tmp_path: Path
) -> None:
    cert, key = write_pair(tmp_path, "old")
    server = await start(servers, tmp_path, {"plain": False, "tls_cert": str(cert), "tls_key": str(key)})
    assert await served_name(server.ws_port) == "old"
    streams = await asyncio.open_connection(
        "127.0.0.1", server.ws_port, ssl=client_context(), server_hostname="localhost"
    )
    alice = Client(*streams)
    alice.raw(REQUEST + b"\r\n")
    assert b" 101 " in await alice.reader.readuntil(b"\r\n\r\n")
    alice.send(encode(Auth(1, 1, server.token("alice"), "phone")))
    assert isinstance(split(await alice.packet())[0], Hello)
    try:
        for name in ("new", "newer"):
            for made, used in zip(write_pair(tmp_path, name), (cert, key), strict=True):
                used.write_bytes(made.read_bytes())
            assert server.process is not None
            server.process.send_signal(signal.SIGHUP)
            for _ in range(500):
                if await served_name(server.ws_port) == name:
                    break
                await asyncio.sleep(0.02)
            assert await served_name(server.ws_port) == name
        key.write_text("not a key")
        server.process.send_signal(signal.SIGHUP)
        for _ in range(500):
            if "was not replaced" in server.log.read_text():
                break
            await asyncio.sleep(0.02)
        assert await served_name(server.ws_port) == "newer"
        alice.send(encode(Ping()))
        while not any(isinstance(frame, Pong) for frame in split(await alice.packet())):
            pass  # LEVEL of the first sync, and its repeats
    finally:
        alice.writer.transport.abort()
    assert server.stop() == 0


async def test_a_balancer_names_clients_in_front_and_their_failures_are_their_own(
    servers: list[Server], tmp_path: Path
) -> None:
    server = await start(
        servers, tmp_path,
        {"proxy_protocol": True, "balancers": ["127.0.0.1"], "failures_per_minute": 3},
    )  # fmt: skip
    good = REQUEST + b"\r\n"
    assert await http(server.ws_port, good) == b"", "a listed balancer must say whom it speaks for"
    for _ in range(3):
        assert b"404" in await http(server.ws_port, CLIENT + good.replace(b"/v1/ws", b"/admin"))
    assert await http(server.ws_port, CLIENT + good) == b""
    other = CLIENT.replace(b"113.9", b"113.10")
    assert b"101" in await http(server.ws_port, other + good)
    assert b"200" in await http(server.ws_port, b"PROXY UNKNOWN\r\n" + good.replace(b"/v1/ws", b"/health"))
    assert server.stop() == 0


async def test_failed_tokens_are_limited_over_ws_and_rest_together_and_good_ones_never(
    servers: list[Server], tmp_path: Path
) -> None:
    server = await start(servers, tmp_path, {"failures_per_minute": 6})
    for _ in range(30):
        async with RawClient("127.0.0.1", server.ws_port, server.token("alice"), "d0", ping_s=0):
            pass
    for _ in range(3):
        with pytest.raises(Refused):
            async with RawClient("127.0.0.1", server.ws_port, "no token", "d0", ping_s=0):
                pass
    bad = b"GET /v1/users/alice/unread HTTP/1.1\r\nhost: x\r\nauthorization: Bearer no\r\n\r\n"
    for _ in range(3):
        assert b"401" in await http(server.http_port, bad)
    assert b"429" in await http(server.http_port, bad)
    assert b"429" in await http(server.ws_port, REQUEST + b"\r\n")
    assert server.stop() == 0


async def test_a_user_who_sends_too_fast_is_told_when_to_come_again(
    servers: list[Server], tmp_path: Path
) -> None:
    server = await start(servers, tmp_path, {"rate_per_s": 5, "rate_burst": 10})
    async with RawClient("127.0.0.1", server.ws_port, server.token("alice"), "d0", ping_s=0) as alice:
        for number in range(12):
            item = SendItem(struct.pack(">QQ", 1, number), int(Kind.TEXT), b"hi")
            alice.send(Send("p:alice:bob", [item]))
        assert await alice.wait_for(
            lambda: sum(isinstance(frame, Sent | Error) for frame in alice.frames) >= 12
        )
        refused = [frame for frame in alice.frames if isinstance(frame, Error)]
        assert 1 <= len(refused) <= 2
        assert all(one.code == "rate_limited" and one.retryable and one.retry_after_ms for one in refused)
    assert server.stop() == 0


async def test_a_peer_that_says_nothing_is_dropped_at_every_step(
    servers: list[Server], tmp_path: Path
) -> None:
    cert, key = write_pair(tmp_path, "one")
    server = await start(
        servers, tmp_path,
        {
            "plain": False, "tls_cert": str(cert), "tls_key": str(key), "tls_timeout_ms": 200,
            "handshake_timeout_ms": 200, "auth_timeout_ms": 200,
        },
    )  # fmt: skip
    sock = socket.create_connection(("127.0.0.1", server.ws_port))
    with sock:
        silent = await asyncio.open_connection(sock=sock)
        secure = [
            await asyncio.open_connection(
                "127.0.0.1", server.ws_port, ssl=client_context(), server_hostname="localhost"
            )
            for _ in range(2)
        ]
        secure[1][1].write(REQUEST + b"\r\n")
        async with asyncio.timeout(10):
            assert await ended(silent[0]) == b""
            assert await ended(secure[0][0]) == b""
            last = await ended(secure[1][0])
        assert last.endswith(struct.pack(">H", CloseCode.AUTH) + b"no AUTH in time")
        for _, writer in (silent, *secure):
            writer.transport.abort()
    assert server.stop() == 0


async def ended(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(-1)
    except (ConnectionError, ssl.SSLError):
        return b""
