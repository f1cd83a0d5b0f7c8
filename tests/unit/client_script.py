"""A server whose other end is a test: real sockets, real frames, and every answer written by hand.

It is the `websockets` library, so that two independent implementations of RFC 6455 meet.

    async with ScriptedServer() as server:
        async with Client(server.url, "token", "d0") as client:
            peer = await server.login()          # takes AUTH, says HELLO
            await peer.send(msg(1, 1))
            assert await peer.expect(p.Ack) == p.Ack(1)
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

import websockets
from websockets.asyncio.server import Server, ServerConnection, serve

from fastim import protocol as p
from fastim._core.frame import split
from fastim.client.events import Event
from fastim.client.wire import WS_PATH
from fastim.model import Kind

F = TypeVar("F", bound=p.Frame)
DEADLINE_S = 10.0


class Hurry(random.Random):
    """Randomness that draws no waits: reconnects and resends come at once."""

    def uniform(self, a: float, b: float) -> float:
        return 0.01


CONV = "p:alice:bob"


class Peer:
    """The server's end of one connection."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        self.frames: list[p.Frame] = []
        """Arrived and not yet expected."""
        self.all: list[p.Frame] = []
        self.closed = asyncio.Event()
        self._arrived = asyncio.Event()
        self.answers_pings = True
        self.last_tag = 0
        self.user_cursor = 0

    async def read(self) -> None:
        try:
            async for packet in self.socket:
                assert isinstance(packet, bytes)
                for op, start, end in split(packet):
                    frame = p.decode(op, packet[start:end])
                    self.all.append(frame)
                    if isinstance(frame, p.Ping) and self.answers_pings:
                        await self.send(p.Pong(now_ms(), self.last_tag, self.user_cursor))
                    self.frames.append(frame)
                self._arrived.set()
        except websockets.ConnectionClosedError:
            pass
        self.closed.set()
        self._arrived.set()

    async def expect(self, kind: type[F]) -> F:
        """The next frame of this kind; others before it stay."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for frame in self.frames:
                    if isinstance(frame, kind):
                        self.frames.remove(frame)
                        return frame
                assert not self.closed.is_set(), f"closed while waiting for {kind.__name__}; got {self.all}"
                self._arrived.clear()
                await self._arrived.wait()

    async def acked(self, tag: int) -> None:
        """Until an ACK of at least this tag has come."""
        while (await self.expect(p.Ack)).tag < tag:
            pass

    async def send(self, *frames: p.Frame) -> None:
        """One packet."""
        for frame in frames:
            self.last_tag = max(self.last_tag, getattr(frame, "tag", 0))
        await self.socket.send(b"".join(p.encode(frame) for frame in frames))

    async def hello(self, resumed: int = 0, **fields: int | str) -> p.Auth:
        """Take AUTH and answer it."""
        auth = await self.expect(p.Auth)
        await self.send(hello(resumed, **fields))
        return auth

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self.socket.close(code, reason)
        await self.wait_closed()

    async def wait_closed(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.closed.wait()

    def abort(self) -> None:
        self.socket.transport.abort()


class ScriptedServer:
    """Listens on a loopback port; connections wait in a queue for the test."""

    def __init__(self, context: ssl.SSLContext | None = None, host: str = "localhost") -> None:
        self._context = context
        self._host = host
        self._server: Server | None = None
        self._peers: asyncio.Queue[Peer] = asyncio.Queue()
        self.accepted = 0
        self.port = 0
        self.process_request: Callable[..., Awaitable[object] | object] | None = None

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def listen(self) -> None:
        """Also again after `stop`, on the same port."""
        self._server = await serve(
            self._serve,
            "127.0.0.1" if self._host == "localhost" else self._host,
            self.port,
            ssl=self._context,
            subprotocols=[p.SUBPROTOCOL],  # type: ignore[list-item]
            compression=None,
            ping_interval=None,
            close_timeout=1,
            process_request=self.process_request,  # type: ignore[arg-type]
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    @property
    def url(self) -> str:
        return f"{'wss' if self._context else 'ws'}://{self._host}:{self.port}{WS_PATH}"

    async def _serve(self, socket: ServerConnection) -> None:
        self.accepted += 1
        peer = Peer(socket)
        self._peers.put_nowait(peer)
        await peer.read()

    async def peer(self) -> Peer:
        """The next connection."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._peers.get()

    async def login(self, resumed: int = 0, **fields: int | str) -> Peer:
        """The next connection, with AUTH taken and HELLO said."""
        peer = await self.peer()
        await peer.hello(resumed, **fields)
        return peer

    @property
    def idle(self) -> bool:
        """No connection waits to be looked at."""
        return self._peers.empty()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def hello(resumed: int = 0, **fields: int | str) -> p.Hello:
    values: dict[str, int | str] = {
        "version": 1, "session": "s1", "user": "alice", "device": "d0", "server_ms": now_ms(),
        "resumed": resumed, "heartbeat_ms": 10_000, "idle_ms": 30_000, "resume_ttl_ms": 120_000,
        "window_messages": 128, "window_bytes": 1 << 18, "max_packet_bytes": 1 << 16, "badge": 0,
        "user_cursor": 0,
    }  # fmt: skip
    return p.Hello(**{**values, **fields})  # type: ignore[arg-type]


def msg(
    tag: int, seq: int, conv: str = CONV, sender: str = "bob", body: bytes = b"", loss_time_ms: int = 0
) -> p.Msg:
    return p.Msg(
        tag, False, 1_000 + seq, conv, seq, seq, 1, sender, bytes(8) + seq.to_bytes(8, "big"), int(Kind.TEXT),
        now_ms(), loss_time_ms, 0, body or f"text {seq}".encode(),
    )  # fmt: skip


def history_item(seq: int) -> p.HistoryItem:
    """The same message as msg() makes, as history gives it."""
    found = msg(0, seq)
    return p.HistoryItem(*(getattr(found, name) for name in p.HistoryItem.__struct_fields__))


def sent(tag: int, send: p.Send, first_seq: int) -> p.Sent:
    """Everything of a SEND was stored."""
    items = [
        p.SentItem(item.client_id, 1_000 + first_seq + n, first_seq + n, now_ms())
        for n, item in enumerate(send.items)
    ]
    return p.Sent(tag, send.conv, 1, items)


E = TypeVar("E", bound=Event)


async def next_event(events: object, kind: type[E]) -> E:
    """The next event of this kind; others are passed over."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            event = await anext(events)  # type: ignore[call-overload]
            if isinstance(event, kind):
                return event


async def events_until(events: object, enough: Callable[[list[Event]], bool]) -> list[Event]:
    """Everything up to the event after which there is enough."""
    seen: list[Event] = []
    async with asyncio.timeout(DEADLINE_S):
        while not enough(seen):
            seen.append(await anext(events))  # type: ignore[call-overload]
    return seen


async def until(condition: Callable[[], bool]) -> None:
    """Until the condition holds, looked at every few milliseconds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - a condition, not an event
            await asyncio.sleep(0.005)
