"""fastim.client.wire: TLS, upgrades that are refused or never answered, and what a server may not send."""

from __future__ import annotations

import asyncio
import gc
import os
import ssl
from http import HTTPStatus
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from fastim import protocol as p
from fastim.client import wire as wire_module
from fastim.client.wire import DialError, Wire, check_url, dial, tls_context
from fastim.errors import UsageError
from fastim.node.tls import dev_certificate, make_server_context
from fastim.protocol import MAX_PACKET_BYTES
from tests.unit.client_script import ScriptedServer, until


class Ear:
    """Keeps what a wire says."""

    def __init__(self) -> None:
        self.packets: list[bytes] = []
        self.ends: list[tuple[int, str]] = []

    def on_packet(self, packet: bytes) -> None:
        assert not self.ends
        self.packets.append(packet)

    def on_closed(self, code: int, reason: str) -> None:
        self.ends.append((code, reason))


async def connected(server: ScriptedServer, context: ssl.SSLContext | None = None) -> tuple[Wire, Ear]:
    ear = Ear()
    return await dial(server.url, ear, context), ear


async def ended(wire: Wire, ear: Ear) -> tuple[int, str]:
    await until(lambda: bool(ear.ends))
    await wire.gone()
    (end,) = ear.ends
    return end


# ------------------------------------------------------------------------------------------------- urls


@pytest.mark.parametrize(
    ("url", "completed"),
    [
        ("wss://chat.example.org", "wss://chat.example.org/v1/ws"),
        ("wss://chat.example.org:444/", "wss://chat.example.org:444/v1/ws"),
        ("wss://chat.example.org/im/v1/ws", "wss://chat.example.org/im/v1/ws"),
        ("ws://127.0.0.1:80", "ws://127.0.0.1:80/v1/ws"),
        ("ws://[::1]:80", "ws://[::1]:80/v1/ws"),
    ],
)
def test_a_url_gets_the_protocols_path(url: str, completed: str) -> None:
    assert check_url(url) == completed


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://chat.example.org", "must be wss://"),
        ("chat.example.org", "must be wss://"),
        ("wss://", "must be wss://"),
        ("ws://chat.example.org", "plain ws is for loopback only"),
        ("ws://192.168.1.7", "plain ws is for loopback only"),
        ("wss://chat.example.org/?token=abc", "must hold no query"),
        ("wss://me:secret@chat.example.org", "must hold no query, fragment or credentials"),
    ],
)
def test_a_url_that_would_leak_or_cannot_work_is_refused(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        check_url(url)
    assert "secret" not in str(refused.value)
    assert "abc" not in str(refused.value)


# -------------------------------------------------------------------------------------------------- tls


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    return dev_certificate(tmp_path)


async def test_a_trusted_certificate_is_accepted(certificate: tuple[Path, Path]) -> None:
    async with ScriptedServer(make_server_context(*certificate)) as server:
        wire, ear = await connected(server, tls_context(certificate[0]))
        peer = await server.peer()
        wire.send(p.encode(p.Ping()))
        await peer.expect(p.Ping)
        await until(lambda: len(ear.packets) == 1)
        wire.close(1000)
        assert (await ended(wire, ear))[0] == 1000


async def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: tuple[Path, Path]) -> None:
    async with ScriptedServer(make_server_context(*certificate)) as server:
        with pytest.raises(DialError, match=r"(?i)certificate"):
            await connected(server, tls_context(None))


async def test_a_certificate_for_another_name_is_refused(certificate: tuple[Path, Path]) -> None:
    async with ScriptedServer(make_server_context(*certificate), host="127.0.0.2") as server:
        with pytest.raises(DialError, match=r"(?i)certificate"):
            await connected(server, tls_context(certificate[0]))


def test_the_default_context_verifies_and_takes_tls_1_2_and_up() -> None:
    context = tls_context(None)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    own = ssl.create_default_context()
    assert tls_context(own) is own


# --------------------------------------------------------------------------------------------- refusals


async def test_nobody_listening_is_a_dial_error() -> None:
    async with ScriptedServer() as server:
        await server.stop()
        with pytest.raises(DialError, match=r"(?i)refused|connect"):
            await connected(server)


async def test_an_http_refusal_says_its_status_and_when_to_come_back() -> None:
    server = ScriptedServer()

    def refuse(socket: ServerConnection, request: Request) -> Response:
        response = socket.respond(HTTPStatus.SERVICE_UNAVAILABLE, "full")
        response.headers["Retry-After"] = "7"
        return response

    server.process_request = refuse
    async with server:
        with pytest.raises(DialError, match="HTTP 503") as refused:
            await connected(server)
        assert refused.value.retry_after_s == 7.0


async def test_a_redirect_is_not_followed() -> None:
    server = ScriptedServer()

    def redirect(socket: ServerConnection, request: Request) -> Response:
        response = socket.respond(HTTPStatus.FOUND, "elsewhere")
        response.headers["Location"] = "wss://evil.example.org/v1/ws"
        return response

    server.process_request = redirect
    async with server:
        with pytest.raises(DialError, match="HTTP 302"):
            await connected(server)


class Mute:
    """Accepts TCP and never answers; keeps its sockets' ends."""

    async def __aenter__(self) -> Mute:
        self.open: set[asyncio.StreamWriter] = set()
        self.accepted = asyncio.Event()
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self.server.sockets[0].getsockname()[1]
        self.url = f"ws://127.0.0.1:{port}/v1/ws"
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        self.accepted.set()
        while await reader.read(1_000):
            pass
        self.open.discard(writer)
        writer.close()

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        await self.server.wait_closed()


async def test_a_server_that_never_answers_the_upgrade_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "DIAL_TIMEOUT_S", 0.2)
    async with Mute() as mute:
        with pytest.raises(DialError, match="in time"):
            await dial(mute.url, Ear(), None)
        await until(lambda: not mute.open)


async def test_a_dial_that_is_cancelled_leaves_no_socket_behind() -> None:
    async with Mute() as mute:
        before = len(os.listdir("/proc/self/fd"))
        dialling = asyncio.create_task(dial(mute.url, Ear(), None))
        await mute.accepted.wait()
        await asyncio.sleep(0.01)
        dialling.cancel()
        await asyncio.gather(dialling, return_exceptions=True)
        await until(lambda: not mute.open)
        gc.collect()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


# ---------------------------------------------------------------------------------------------- packets


async def test_packets_come_whole_and_in_order_also_from_fragments() -> None:
    async with ScriptedServer() as server:
        wire, ear = await connected(server)
        peer = await server.peer()
        await peer.socket.send(b"one")
        await peer.socket.send([b"tw", b"o", b"!"])
        await peer.socket.send(bytes(MAX_PACKET_BYTES))
        await until(lambda: len(ear.packets) == 3)
        assert ear.packets == [b"one", b"two!", bytes(MAX_PACKET_BYTES)]
        wire.close(1000)
        await ended(wire, ear)


async def test_text_is_refused_with_1003() -> None:
    async with ScriptedServer() as server:
        wire, ear = await connected(server)
        peer = await server.peer()
        await peer.socket.send("text")
        assert await ended(wire, ear) == (1006, "the server sent TEXT")
        await peer.wait_closed()
        assert peer.socket.close_code == 1003


async def test_a_packet_above_the_limit_closes() -> None:
    async with ScriptedServer() as server:
        wire, ear = await connected(server)
        peer = await server.peer()
        await peer.socket.send(bytes(MAX_PACKET_BYTES + 1))
        assert (await ended(wire, ear))[0] == 1006
        assert ear.packets == []
        await peer.wait_closed()
        assert peer.socket.close_code == 1009


async def test_fragments_above_the_limit_close_with_1009() -> None:
    async with ScriptedServer() as server:
        wire, ear = await connected(server)
        peer = await server.peer()
        await peer.socket.send([bytes(40_000), bytes(40_000)])
        assert (await ended(wire, ear))[0] == 1006
        await peer.wait_closed()
        assert peer.socket.close_code == 1009


async def test_the_servers_close_code_and_reason_arrive_whatever_the_number() -> None:
    async with ScriptedServer() as server:
        for code in (1012, 4008, 4507, 4999):
            wire, ear = await connected(server)
            peer = await server.peer()
            await peer.close(code, "because")
            assert await ended(wire, ear) == (code, "because")


async def test_a_reset_is_1006() -> None:
    async with ScriptedServer() as server:
        wire, ear = await connected(server)
        peer = await server.peer()
        peer.abort()
        assert await ended(wire, ear) == (1006, "")
        wire.send(b"nobody")
        wire.close(1000)
        wire.abort()
        assert wire.buffered_bytes() == 0


async def test_websocket_pings_are_answered() -> None:
    async with ScriptedServer() as server:
        wire, ear = await connected(server)
        peer = await server.peer()
        async with asyncio.timeout(5):
            await (await peer.socket.ping())
        wire.abort()
        assert (await ended(wire, ear))[0] == 1006


async def test_a_paused_wire_reads_nothing_until_it_is_resumed() -> None:
    async with ScriptedServer() as server:
        wire, ear = await connected(server)
        peer = await server.peer()
        wire.pause()
        await peer.socket.send(b"one")
        await asyncio.sleep(0.05)
        assert ear.packets == []
        wire.resume()
        await until(lambda: ear.packets == [b"one"])
        wire.close(1000)
        await ended(wire, ear)


async def test_a_peer_that_does_not_finish_closing_is_dropped() -> None:
    async with ScriptedServer() as server:
        wire, ear = await connected(server)
        peer = await server.peer()
        peer.socket.transport.pause_reading()
        wire.close(1000)
        assert (await ended(wire, ear))[0] == 1000
        peer.abort()
