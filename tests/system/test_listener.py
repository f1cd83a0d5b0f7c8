"""The listener over real sockets: what is refused before 101, who is limited, how it drains."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import websockets

from fastim import observe
from fastim._core.conn import CoreConnection
from fastim.clock import SystemClock
from fastim.errors import UsageError
from fastim.node import server
from fastim.node.server import Listener, ListenerConfig, attach_core_metrics
from fastim.node.upgrade import Balancers, FailureLimit
from fastim.protocol import SUBPROTOCOL, Ping, Pong, decode, encode
from tests.unit.conn_world import AUTH, PATIENCE_S, REQUEST, Client, World, until, ws


def request(*lines: str, path: str = "/v1/ws", without: str = "", instead: str = "") -> bytes:
    """The usual request with lines added, and one left out or replaced (named by its start)."""
    kept = REQUEST.decode().replace("/v1/ws", path, 1).split("\r\n")[:-1]
    drop = without or (instead.partition(":")[0] + ":" if instead else "")
    if drop:
        kept = [line for line in kept if not line.lower().startswith(drop.lower())]
    return ("\r\n".join([*kept, *([instead] if instead else []), *lines]) + "\r\n\r\n").encode()


async def answer(client: Client) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of an HTTP answer."""
    async with asyncio.timeout(PATIENCE_S):
        head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await client.reader.readexactly(int(headers.get("content-length", 0)))
    return int(first.split(" ")[1]), headers, body


async def ask(world: World, data: bytes) -> tuple[int, dict[str, str], bytes]:
    client = await world.dial(request=data)
    found = await answer(client)
    if found[0] != 101:
        await client.eof()
    return found


def refused(reason: str) -> float:
    return observe.UPGRADES_REFUSED.labels(reason)._value.get()  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------- taken


async def test_an_independent_client_talks_through_it() -> None:
    async with (
        World() as world,
        websockets.connect(
            f"ws://127.0.0.1:{world.port}/v1/ws",
            subprotocols=[SUBPROTOCOL],
            proxy=None,  # type: ignore[list-item]
        ) as client,
    ):
        assert client.subprotocol == SUBPROTOCOL
        await client.send(AUTH)
        await client.send([encode(Ping())[:1], encode(Ping())[1:]])
        async with asyncio.timeout(PATIENCE_S):
            packet = await client.recv()
            assert isinstance(packet, bytes)
            assert isinstance(decode(36, packet), Pong)
            await (await client.ping(b"are you there"))
        world.owners[0].link.send(bytes(65_536))
        world.owners[0].link.send(bytes(300))
        async with asyncio.timeout(PATIENCE_S):
            assert (await client.recv(), await client.recv()) == (bytes(65_536), bytes(300))
        await client.close(4000, "enough")
        await until(lambda: world.owners[0].closed)
        assert world.owners[0].closed == [(4000, True)]


@pytest.mark.parametrize(
    "lines",
    [
        {"instead": "Connection: keep-alive, Upgrade"},  # Firefox
        {"instead": "connection: UPGRADE"},
        {"instead": "Upgrade: WebSocket"},
        {"instead": "Upgrade: foo, websocket"},
    ],
)
async def test_the_ways_browsers_say_upgrade_are_understood(lines: dict[str, str]) -> None:
    async with World() as world:
        status, headers, _ = await ask(world, request(**lines))
        assert status == 101
        assert headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        await until(lambda: world.owners)


async def test_the_subprotocol_is_chosen_only_when_offered_and_compression_never() -> None:
    async with World() as world:
        for offered, chosen in (
            ((), None),
            (("Sec-WebSocket-Protocol: chat",), None),
            (("Sec-WebSocket-Protocol: FASTIM.V1",), None),
            ((f"Sec-WebSocket-Protocol: chat, {SUBPROTOCOL}",), SUBPROTOCOL),
            (("Sec-WebSocket-Protocol: chat", f"Sec-WebSocket-Protocol: {SUBPROTOCOL}"), SUBPROTOCOL),
        ):
            status, headers, _ = await ask(
                world, request("Sec-WebSocket-Extensions: permessage-deflate", *offered)
            )
            assert (status, headers.get("sec-websocket-protocol")) == (101, chosen)
            assert "sec-websocket-extensions" not in headers
        await until(lambda: len(world.owners) == 5)


async def test_frames_behind_the_request_are_read() -> None:
    async with World() as world:
        client = await world.dial(request=request() + ws(2, AUTH) + ws(2, encode(Ping())))
        assert (await answer(client))[0] == 101
        assert isinstance(await client.message(), Pong)


async def test_a_request_may_come_byte_by_byte() -> None:
    async with World() as world:
        client = await world.dial(request=b"")
        for byte in request():
            client.raw(bytes([byte]))
            await asyncio.sleep(0)
        assert (await answer(client))[0] == 101
        await until(lambda: world.owners)


# -------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (request(path="/v1/ws?token=secret"), 400, "query"),
        (request(path="/v1/ws?"), 400, "query"),
        (request(path="/"), 404, "path"),
        (request(path="/v1/ws/"), 404, "path"),
        (request(path="/v1/ws/../ws"), 404, "path"),
        (request(path="/v1/WS"), 404, "path"),
        (request(path="/v1/ws%20"), 404, "path"),
        (request(path="http://test/v1/ws"), 404, "path"),
        (request(without="host"), 400, "header"),
        (request("Host: other"), 400, "header"),
        (request(without="upgrade"), 426, "method"),
        (request(instead="Upgrade: h2c"), 426, "method"),
        (request(without="connection"), 426, "method"),
        (request(instead="Connection: close"), 426, "method"),
        (request(without="sec-websocket-version"), 426, "version"),
        (request(instead="Sec-WebSocket-Version: 8"), 426, "version"),
        (request("Sec-WebSocket-Version: 13"), 426, "version"),
        (request(without="sec-websocket-key"), 400, "header"),
        (request(instead="Sec-WebSocket-Key: short"), 400, "header"),
        (request(instead="Sec-WebSocket-Key: \xfc\xfc"), 400, "header"),
        (request("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), 400, "header"),
        (request("Origin: https://evil.example"), 403, "origin"),
    ],
)
async def test_a_request_that_breaks_a_rule_is_refused_before_a_link_exists(
    data: bytes, status: int, reason: str
) -> None:
    async with World() as world:
        before = refused(reason)
        found, headers, body = await ask(world, data)
        assert found == status
        assert refused(reason) == before + 1
        assert (world.owners, world.wheel.count, world.listener.connections) == ([], 0, 0)
        assert headers["connection"] == "close"
        assert body.endswith(b"\n")
        assert b"secret" not in body
        if status == 426:
            assert headers["sec-websocket-version"] == "13"


@pytest.mark.parametrize(
    "data",
    [
        b"POST /v1/ws HTTP/1.1\r\nHost: test\r\n\r\n",
        b"HEAD /v1/ws HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET /v1/ws HTTP/1.0\r\nHost: test\r\n\r\n",
        b"GET /v1/ws\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        request("Content-Length: 5") + b"hello",
        request("Transfer-Encoding: chunked"),
        request(" folded: line"),
        request("no colon"),
        request("bad name : x"),
        request(*[f"X-{i}: x" for i in range(130)]),
    ],
)
async def test_what_is_no_request_of_ours_is_answered_400(data: bytes) -> None:
    async with World() as world:
        before = refused("header")
        status, headers, _ = await ask(world, data)
        assert (status, headers["connection"]) == (400, "close")
        await until(lambda: refused("header") == before + 1)
        assert world.owners == []


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
async def test_a_header_above_16_kib_is_dropped(end: bytes) -> None:
    async with World() as world:
        before = refused("header")
        client = await world.dial(request=request()[:-4] + b"\r\nX: " + b"x" * 17_000 + end)
        await client.eof()
        await until(lambda: refused("header") == before + 1)
        assert world.owners == []


async def test_a_request_that_takes_too_long_is_dropped() -> None:
    async with World(config={"handshake_timeout_s": 0.05}) as world:
        before = refused("timeout")
        for data in (b"", request()[:-2]):
            client = await world.dial(request=data)
            await client.eof()
        await until(lambda: refused("timeout") == before + 2)
        upgraded = await world.connect()
        await asyncio.sleep(0.1)
        assert not upgraded.owner.link.closed


ALLOWED: Final = frozenset({"https://chat.example", "https://chat.example:8443"})


@pytest.mark.parametrize(
    ("origins", "taken"),
    [
        ([], True),
        (["https://chat.example"], True),
        (["https://chat.example:8443"], True),
        (["https://CHAT.example"], False),
        (["http://chat.example"], False),
        (["https://chat.example/"], False),
        (["https://chat.example.evil.example"], False),
        (["https://evilchat.example"], False),
        (["https://sub.chat.example"], False),
        (["https://chat.example:443"], False),
        (["null"], False),
        ([""], False),
        (["https://chat.example", "https://evil.example"], False),
        (["https://chat.example", "https://chat.example"], False),
    ],
)
async def test_an_origin_is_taken_only_when_listed_exactly(origins: list[str], taken: bool) -> None:
    async with World(config={"origins": ALLOWED}) as world:
        status, _, _ = await ask(world, request(*[f"Origin: {origin}" for origin in origins]))
        assert status == (101 if taken else 403)
        await until(lambda: len(world.owners) == taken)


async def test_the_text_of_an_error_of_ours_never_reaches_the_peer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> Any:
        raise RuntimeError("the password is 1234")

    async with World() as world:
        before = refused("internal")
        monkeypatch.setattr(server, "check_request", fail)
        with caplog.at_level(logging.ERROR):
            status, _, body = await ask(world, request())
        assert (status, body) == (500, b"internal error\n")
        assert refused("internal") == before + 1
        assert "upgrade failed" in caplog.text
        caplog.clear()  # its traceback holds the world
        assert (world.owners, world.listener.connections) == ([], 0)


async def test_nothing_is_taken_before_the_node_is_ready() -> None:
    async with World() as world:
        world.hub.accept = None
        status, headers, _ = await ask(world, request())
        assert (status, headers["retry-after"]) == (503, "5")
        assert (await ask(world, request(path="/health")))[0] == 503
        world.hub.accept = world.accept
        assert (await ask(world, request(path="/health")))[0] == 200


async def test_max_connections_is_a_bound_with_an_answer() -> None:
    async with World(config={"max_connections": 2}) as world:
        clients = [await world.connect() for _ in range(2)]
        before = refused("overload")
        status, headers, _ = await ask(world, request())
        assert (status, headers["retry-after"]) == (503, "5")
        assert refused("overload") == before + 1
        clients[0].owner.link.abort()
        await until(lambda: world.listener.connections == 1)
        await world.connect()


async def test_sockets_far_above_max_connections_are_dropped_unanswered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "_OVERSHOOT", 1)
    async with World(config={"max_connections": 1, "failures_per_minute": 1}) as world:
        await world.connect()
        await world.dial(request=b"GET ")
        for _ in range(3):
            client = await world.dial(request=b"")
            await client.eof()
        await world.clients[1].close()
        await until(lambda: len(world.listener._sockets) == 1)
        assert len(world.listener._limit) <= 1


# ------------------------------------------------------------------------------------------- addresses


class HandClock:
    def __init__(self) -> None:
        self.now = 1_000

    def mono_ms(self) -> int:
        return self.now

    wall_ms = mono_ms


def test_a_failure_limit_fills_again_and_forgets() -> None:
    clock = HandClock()
    limit = FailureLimit(6, clock)
    one, two = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("10.0.0.2")
    for _ in range(6):
        assert not limit.blocked(one)
        limit.failed(one)
    assert (limit.blocked(one), limit.blocked(two)) == (True, False)
    clock.now += 9_999
    assert limit.blocked(one)
    clock.now += 2
    assert not limit.blocked(one)
    clock.now += 60_000
    limit.forget()
    assert len(limit) == 0


def test_hosts_of_a_v6_network_share_a_bucket_and_mapped_v4_is_v4() -> None:
    key = FailureLimit.key
    address = ipaddress.ip_address
    assert key(address("2001:db8::1")) == key(address("2001:db8::ffff:1"))
    assert key(address("2001:db8::1")) != key(address("2001:db8:0:1::1"))
    assert key(address("::ffff:10.0.0.1")) == key(address("10.0.0.1"))
    assert key(address("::1")) != key(address("0.0.0.1"))


def test_a_failure_limit_stays_small_under_a_spread_attack() -> None:
    clock = HandClock()
    limit = FailureLimit(100, clock)
    for i in range(50_000):
        clock.now += 1
        limit.failed(ipaddress.ip_address(i + (10 << 24)))
    assert len(limit) <= 2_048


async def test_only_failures_are_limited_and_the_limit_is_per_address() -> None:
    async with World(config={"failures_per_minute": 3}) as world:
        for _ in range(10):
            client = await world.connect()
            client.raw(ws(8, b"\x03\xe8"))
            await client.eof()
        for _ in range(2):
            assert (await ask(world, request(path="/nothing")))[0] == 404
        late = await world.connect(auth=False)
        assert world.later(6_000) >= 1
        await late.closing()
        late.raw(ws(8, b"\x03\xe8"))
        await late.eof()
        await until(lambda: world.listener.connections == 0)
        before = refused("rate")
        status, headers, _ = await ask(world, request())
        assert (status, headers["retry-after"], refused("rate")) == (429, "5", before + 1)
        assert (await ask(world, request(path="/health")))[0] == 200, "balancers still see us"


async def test_leaving_without_a_request_is_no_failure() -> None:
    async with World(config={"failures_per_minute": 2}) as world:
        for _ in range(5):
            client = await world.dial(request=b"")
            client.writer.write_eof()
            await client.eof()
            client = await world.dial(request=b"GET /")
            await asyncio.sleep(0.01)
            client.reset()
        await until(lambda: not world.listener._sockets)
        await world.connect()


BALANCED: Final = {"dev": False, "balancers": ("127.0.0.1/32", "10.0.0.0/8")}


@pytest.mark.parametrize(
    ("lines", "peer"),
    [
        (["X-Forwarded-For: 203.0.113.9"], "203.0.113.9:0"),
        (["X-Forwarded-For: 198.51.100.1, 203.0.113.9"], "203.0.113.9:0"),
        (["X-Forwarded-For: 203.0.113.9, 10.1.2.3"], "203.0.113.9:0"),
        (["X-Forwarded-For: 198.51.100.1", "X-Forwarded-For: 203.0.113.9,10.1.2.3"], "203.0.113.9:0"),
        (["X-Forwarded-For: 2001:db8::7"], "[2001:db8::7]:0"),
        (["X-Forwarded-For: 203.0.113.9, unknown"], "127.0.0.1"),
        (["X-Forwarded-For: "], "127.0.0.1"),
        ([], "127.0.0.1"),
    ],
)
async def test_a_listed_balancer_names_the_client(lines: list[str], peer: str) -> None:
    async with World(config=BALANCED) as world:
        assert (await ask(world, request(*lines)))[0] == 101
        await until(lambda: world.owners)
        assert world.owners[0].link.peer.startswith(peer)


async def test_failures_behind_a_balancer_count_for_the_client_it_named_and_never_for_itself() -> None:
    async with World(config=BALANCED | {"failures_per_minute": 2}) as world:
        for _ in range(2):
            assert (await ask(world, request("X-Forwarded-For: 203.0.113.9", path="/no")))[0] == 404
        assert (await ask(world, request("X-Forwarded-For: 203.0.113.9")))[0] == 429
        for _ in range(5):
            assert (await ask(world, request(path="/no")))[0] == 404
            assert (await ask(world, b"no request\r\n\r\n"))[0] == 400
        assert (await ask(world, request("X-Forwarded-For: 203.0.113.10")))[0] == 101
        assert (await ask(world, request()))[0] == 101
        await until(lambda: len(world.owners) == 2)


async def test_a_plain_connection_from_somebody_who_is_no_balancer_is_refused() -> None:
    async with World(config={"dev": False, "balancers": ("10.0.0.0/8",)}) as world:
        status, _, _ = await ask(world, request("X-Forwarded-For: 10.0.0.1"))
        assert status == 403


async def test_the_word_of_somebody_who_is_no_balancer_does_not_count() -> None:
    async with World() as world:
        assert (await ask(world, request("X-Forwarded-For: 203.0.113.9")))[0] == 101
        await until(lambda: world.owners)
        assert world.owners[0].link.peer.startswith("127.0.0.1:")


def test_balancers_are_checked_when_configured() -> None:
    with pytest.raises(UsageError, match=r"node\.balancers.*10\.0\.0\.300"):
        Balancers(["10.0.0.300"])
    assert ipaddress.ip_address("::ffff:10.0.0.1") in Balancers(["10.0.0.0/8"])


# ----------------------------------------------------------------------------------------------- PROXY

PROXIED: Final = BALANCED | {"proxy_protocol": True}
CLIENT: Final = b"PROXY TCP4 203.0.113.9 10.0.0.1 40000 443\r\n"
CLIENT_V2: Final = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xcb\x00\x71\x09\x0a\x00\x00\x01\x9c\x40\x01\xbb"


@pytest.mark.parametrize("header", [CLIENT, CLIENT_V2])
async def test_a_listed_balancer_says_in_front_whom_it_speaks_for(header: bytes) -> None:
    async with World(config=PROXIED) as world:
        assert (await ask(world, header + request("X-Forwarded-For: 198.51.100.1")))[0] == 101
        await until(lambda: world.owners)
        assert world.owners[0].link.peer == "203.0.113.9:40000", "what the client itself forwards is nothing"


async def test_a_listed_balancer_behind_another_names_the_client_in_its_header() -> None:
    async with World(config=PROXIED) as world:
        header = b"PROXY TCP4 10.1.2.3 10.0.0.1 1 443\r\n"
        assert (await ask(world, header + request("X-Forwarded-For: 203.0.113.9")))[0] == 101
        await until(lambda: world.owners)
        assert world.owners[0].link.peer == "203.0.113.9:0"


async def test_a_listed_balancer_that_says_nothing_in_front_is_dropped() -> None:
    async with World(config=PROXIED | {"tls_timeout_s": 0.1}) as world:
        before = refused("source")
        for data in (request(), b"", CLIENT[:-3]):
            client = await world.dial(request=data)
            await client.eof()
        await until(lambda: refused("source") == before + 3)
        assert world.owners == []
        assert (await ask(world, CLIENT + request()))[0] == 101
        await until(lambda: world.owners)


async def test_a_balancer_that_checks_whether_we_live_counts_for_nobody() -> None:
    async with World(config=PROXIED | {"failures_per_minute": 1}) as world:
        for _ in range(5):
            client = await world.dial(request=b"PROXY UNKNOWN\r\n" + request(path="/health"))
            assert (await answer(client))[0] == 200
            await (await world.dial(request=b"")).close()
        assert (await ask(world, CLIENT + request()))[0] == 101
        await until(lambda: world.owners)


async def test_failures_count_for_whom_the_header_named() -> None:
    async with World(config=PROXIED | {"failures_per_minute": 2}) as world:
        for _ in range(2):
            assert (await ask(world, CLIENT + request(path="/no")))[0] == 404
        await (await world.dial(request=CLIENT + request())).eof()
        assert world.owners == [], "dropped before it may say anything"
        assert (await ask(world, CLIENT.replace(b"113.9", b"113.8") + request()))[0] == 101
        await until(lambda: world.owners)


@pytest.mark.parametrize("header", [CLIENT, CLIENT_V2])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"proxy_protocol": True},
        {"proxy_protocol": True, "dev": False, "balancers": ("10.0.0.0/8",)},
        BALANCED,
    ],
)
async def test_the_header_of_whom_nobody_listed_is_no_request(header: bytes, config: dict[str, Any]) -> None:
    async with World(config=config) as world:
        client = await world.dial(request=header + request())
        assert (await answer(client))[0] == 400
        assert world.owners == []


# --------------------------------------------------------------------------------------------- exposure


@asynccontextmanager
async def listening(**config: Any) -> AsyncIterator[Listener]:
    async with World() as world:
        listener = Listener(ListenerConfig(**{"port": 0} | config), world.hub, SystemClock())
        try:
            await listener.start()
            yield listener
        finally:
            listener.stop_accepting()
            await listener.close_all(1001)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "plain ws needs --dev"),
        ({"dev": True, "host": "0.0.0.0"}, "loopback only"),
        ({"dev": True, "host": ""}, "loopback only"),
        ({"dev": True, "host": "no.such.host.invalid"}, r"node\.host"),
        ({"dev": True, "host": "127.0.0.1", "port": 70_000}, "port"),
    ],
)
async def test_a_plain_socket_that_the_internet_could_reach_is_refused(
    config: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        async with listening(**config):
            pass


async def test_dev_listens_on_every_loopback_address_with_one_port() -> None:
    async with listening(dev=True, host="localhost") as listener:
        assert {port for _, port in listener.addresses} == {listener.addresses[0][1]}
        assert {host for host, _ in listener.addresses} <= {"127.0.0.1", "::1"}


async def test_a_port_that_is_taken_is_said_and_leaves_nothing_open() -> None:
    async with listening(dev=True) as first:
        port = first.addresses[0][1]
        with pytest.raises(
            UsageError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"
        ):
            async with listening(dev=True, port=port):
                pass


# ------------------------------------------------------------------------------------------------ the end


async def test_draining_refuses_new_ones_and_keeps_those_that_are_open() -> None:
    async with World() as world:
        client = await world.connect()
        assert (await ask(world, request(path="/health")))[2] == b"ok\n"
        waiting = await world.dial(request=b"")
        await until(lambda: len(world.listener._sockets) == 2)
        world.listener.draining = True
        assert (await ask(world, request(path="/health")))[0] == 503
        world.listener.stop_accepting()
        world.listener.stop_accepting()
        waiting.raw(request())
        assert (await answer(waiting))[0] == 503
        with pytest.raises(ConnectionRefusedError):
            await world.dial()
        client.send(encode(Ping()))
        assert isinstance(await client.message(), Pong)


async def test_close_all_closes_everybody_over_its_window_and_waits_for_them() -> None:
    async with World() as world:
        clients = [await world.connect() for _ in range(20)]
        await world.dial(request=b"GET /")
        await until(lambda: len(world.listener._sockets) == 21)
        loop = asyncio.get_running_loop()
        at: list[float] = []

        async def polite(client: Client) -> None:
            code, reason = await client.closing()
            at.append(loop.time())
            assert (code, reason) == (1012, b"restart")
            client.raw(ws(8, b"\x03\xf4"))
            await client.eof()

        readers = [asyncio.create_task(polite(client)) for client in clients]
        begin = loop.time()
        await world.listener.close_all(1012, "restart", window_ms=500)
        assert all(owner.closed == [(1012, True)] for owner in world.owners)
        assert (world.listener.connections, world.listener._sockets) == (0, set())
        await asyncio.gather(*readers)
        assert max(at) - min(at) >= 0.3
        assert max(at) - begin < 2.0


async def test_close_all_aborts_who_does_not_answer() -> None:
    async with World() as world:
        client = await world.connect()
        await world.listener.close_all(1012)
        assert client.owner.closed == [(1012, False)]


async def test_every_connection_is_counted_in_and_out() -> None:
    async with World() as world:
        detach = attach_core_metrics(world.hub)
        opened = observe.CONNECTIONS_OPENED._value.get()
        now = observe.CONNECTIONS._value.get()
        frames = observe.FRAMES_IN.value()
        other = observe.CONNECTIONS_CLOSED.labels("other")._value.get()
        client = await world.connect()
        assert observe.CONNECTIONS_OPENED._value.get() == opened + 1
        assert observe.CONNECTIONS._value.get() == now + 1
        client.raw(ws(8, b"\x0c\x00"))
        await client.eof()
        await until(lambda: observe.CONNECTIONS._value.get() == now)
        assert observe.CONNECTIONS_CLOSED.labels("other")._value.get() == other + 1
        assert observe.FRAMES_IN.value() == frames + 1
        detach()
        assert observe.FRAMES_IN.value() == frames + 1


async def test_a_link_that_was_never_connected_does_nothing() -> None:
    async with World() as world:
        link = CoreConnection(world.hub, "nobody")
        assert (link.closed, link.slot, link.close_code) == (True, -1, 0)
        link.send(b"\x91\x02")
        link.close(4000)
        link.abort()
        link.parser_failed(1002)
        assert link.buffered_bytes() == 0
