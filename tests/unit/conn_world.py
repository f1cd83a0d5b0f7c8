"""A hub behind a real listener, owners that write down what they are told, and clients made of bare bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from fastim._core.acks import AckTable
from fastim._core.conn import CoreConnection, CoreHub
from fastim._core.wheel import Wheel
from fastim.clock import SystemClock
from fastim.errors import PeerError
from fastim.node.server import Listener, ListenerConfig
from fastim.protocol import Auth, Error, decode, encode

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
AUTH: Final = encode(Auth(1, 1, "token", "phone"))
PATIENCE_S: Final = 5.0
REQUEST: Final = (
    b"GET /v1/ws HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def encode_error(op: int, error: PeerError) -> bytes:
    return encode(Error(op, error.code, error.detail, error.retryable, error.retry_after_ms))


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for something that sockets bring about."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"did not come true: {what or condition}"
        await asyncio.sleep(0.002)


class Owner:
    """The node's side of one link."""

    def __init__(self, link: CoreConnection) -> None:
        self.link = link
        self.commands: list[tuple[int, bytes]] = []
        self.closed: list[tuple[int, bool]] = []
        self.after_close = 0
        self.busy = False
        """True while a method of the link runs that must not call us."""
        self.on: Callable[[int, bytes], object] | None = None
        self.end: Callable[[], object] | None = None

    def on_command(self, op: int, frame: bytes) -> None:
        assert not self.busy
        assert not self.closed, "a command after on_closed"
        self.commands.append((op, frame))
        if op == 1:
            self.link.authenticated = True
        if self.on is not None:
            self.on(op, frame)

    def on_closed(self, code: int, orderly: bool) -> None:
        assert not self.busy
        self.closed.append((code, orderly))
        if self.end is not None:
            self.end()

    def quietly(self, act: Callable[..., object], *args: object) -> None:
        self.busy = True
        try:
            act(*args)
        finally:
            self.busy = False


class Client:
    """One TCP connection; sends what it is told to and understands frames without checking them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.owner: Owner = None  # type: ignore[assignment]

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def send(self, *frames: bytes) -> None:
        """One packet of whole frames."""
        self.raw(ws(BINARY, b"".join(frames)))

    async def frame(self) -> tuple[int, bytes]:
        """The next WebSocket frame: (opcode, payload)."""
        async with asyncio.timeout(PATIENCE_S):
            first, second = await self.reader.readexactly(2)
            size = second & 0x7F
            if size == 126:
                (size,) = struct.unpack(">H", await self.reader.readexactly(2))
                assert size >= 126
            elif size == 127:
                (size,) = struct.unpack(">Q", await self.reader.readexactly(8))
                assert size >= 65_536
            assert second & 0x80 == 0, "a server does not mask"
            assert first & 0xF0 == 0x80, "whole, and without reserved bits"
            return first & 0xF, await self.reader.readexactly(size)

    async def packet(self) -> bytes:
        kind, payload = await self.frame()
        assert kind == BINARY, (kind, payload)
        return payload

    async def message(self) -> Any:
        """The next packet, which holds one server frame."""
        payload = await self.packet()
        return decode(msgspec.msgpack.decode(payload)[0], payload)

    async def closing(self) -> tuple[int, bytes]:
        """Skip to the close frame: (code, reason); 1005 for one without."""
        while True:
            kind, payload = await self.frame()
            if kind == CLOSE:
                return (struct.unpack(">H", payload[:2])[0], payload[2:]) if payload else (1005, b"")

    async def eof(self) -> None:
        """Read to the end of the connection, whatever it is."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                while await self.reader.read(65_536):
                    pass
            except ConnectionError:
                pass

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        """End TCP with a reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def ws(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = b"\x01\x02\x03\x04",
    size: int | None = None,
    length_form: int | None = None,
) -> bytes:
    """A client's WebSocket frame; every rule can be broken."""
    size = len(payload) if size is None else size
    form = length_form or (7 if size < 126 else 16 if size < 65_536 else 64)
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    flag = 0x80 if mask is not None else 0
    if form == 7:
        head += bytes([flag | size])
    elif form == 16:
        head += bytes([flag | 126]) + struct.pack(">H", size)
    else:
        head += bytes([flag | 127]) + struct.pack(">Q", size)
    if mask is None:
        return head + payload
    whole = mask * (len(payload) // 4 + 1)
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(whole[: len(payload)], "big")
    return head + mask + masked.to_bytes(len(payload), "big")


def ws_close(code: int | None, reason: bytes = b"") -> bytes:
    return ws(CLOSE, b"" if code is None else struct.pack(">H", code) + reason)


class World:
    """`async with World() as world`; everything is gone afterwards, and nothing was fatal unless taken."""

    def __init__(self, *, config: dict[str, Any] | None = None, **bounds: int) -> None:
        self.acks = AckTable()
        self.wheel = Wheel()
        self.config = ListenerConfig(**{"port": 0, "dev": True} | (config or {}))
        self.bounds = bounds
        self.fatal: list[BaseException] = []
        self.acked: list[list[tuple[int, object]]] = []
        self.owners: list[Owner] = []
        self.clients: list[Client] = []
        self.hub: CoreHub = None  # type: ignore[assignment]
        self.listener: Listener = None  # type: ignore[assignment]

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self.hub = CoreHub(loop, self.acks, self.wheel, encode_error=encode_error, **self.bounds)
        self.hub.accept = self.accept
        self.hub.on_fatal = self.fatal.append
        self.hub.on_acked = lambda: self.acked.append(self.acks.drain())
        self.listener = Listener(self.config, self.hub, SystemClock())
        await self.listener.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listener.stop_accepting()
        for client in self.clients:
            await client.close()
        await self.listener.close_all(1001)
        await asyncio.sleep(0)
        self.hub.accept = None
        if error is None:
            assert self.fatal == []
            assert self.wheel.count == 0
            assert all(len(owner.closed) == 1 for owner in self.owners), [o.closed for o in self.owners]

    def accept(self, link: CoreConnection) -> Owner:
        owner = Owner(link)
        self.owners.append(owner)
        return owner

    @property
    def port(self) -> int:
        return self.listener.addresses[0][1]

    async def dial(self, *, receive_bytes: int = 0, request: bytes = REQUEST + b"\r\n") -> Client:
        """A TCP connection with the request sent and nothing read. receive_bytes: of the kernel's buffer."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        except OSError:
            sock.close()
            raise
        client = Client(*await asyncio.open_connection(sock=sock, limit=1 << 22))
        self.clients.append(client)
        client.raw(request)
        return client

    async def connect(self, *, auth: bool = True, receive_bytes: int = 0) -> Client:
        """An upgraded connection, with its owner."""
        known = len(self.owners)
        client = await self.dial(receive_bytes=receive_bytes)
        async with asyncio.timeout(PATIENCE_S):
            head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        await until(lambda: len(self.owners) > known)
        client.owner = self.owners[known]
        if auth:
            client.send(AUTH)
            await until(lambda: client.owner.link.authenticated)
        return client

    def take_fatal(self) -> BaseException:
        assert len(self.fatal) == 1, self.fatal
        return self.fatal.pop()

    def later(self, ms: int) -> int:
        """Sweep as if `ms` had passed; how many links were ended."""
        return self.hub.sweep(self.hub.now_ms() + ms)
