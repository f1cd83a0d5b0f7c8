"""Attackers: many connections at once, each with its script, and what the server answered.

Hides the sockets. One process, one loop, no library: an answer is split and decoded only to be counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from fastim._core.frame import split
from fastim.protocol import Error, Hello, Level, Op, decode
from tests.attack import hostile
from tests.attack.branches import EXPECTED_CLOSES, Branches
from tests.attack.hostile import ME, WHOLE, Script
from tests.unit.conn_world import REQUEST

_RESET: Final = struct.pack("ii", 1, 0)
PATIENCE_S: Final = 10.0
UNANSWERED_S: Final = 0.7
"""What waits for bytes that never come is left to the server's own deadlines."""
CROWD: Final = "crowd"
DEVICES: Final = 5


class Peer(asyncio.Protocol):
    """One connection: counts answers."""

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._buffer = b""
        self._upgraded = False
        self.transport: Any = None
        self.status = 0
        """Of the answer to the request; 0: none came."""
        self.errors = 0
        self.close: tuple[int, str] | None = None
        self.hello: Hello | None = None
        self.tag = 0
        """Of the LEVEL that the first sync ends with."""
        self.ended = False
        self._moved: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        self._tell()

    def eof_received(self) -> bool:
        self.ended = True
        self._tell()
        return False

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._upgraded and not self._take_head():
            return
        while self._take_frame():
            pass
        self._tell()

    def _take_head(self) -> bool:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return False
        self.status = int(head[9:12])
        if self.status == 101:
            self._upgraded = True
            self._buffer = rest
        return self._upgraded

    def _take_frame(self) -> bool:
        buffer = self._buffer
        if len(buffer) < 2:
            return False
        size, at = buffer[1], 2
        if size == 126:
            size, at = int.from_bytes(buffer[2:4], "big"), 4
        elif size == 127:
            size, at = int.from_bytes(buffer[2:10], "big"), 10
        if len(buffer) < at + size:
            return False
        payload = buffer[at : at + size]
        self._buffer = buffer[at + size :]
        if buffer[0] == 0x82:
            self._take_packet(payload)
        elif buffer[0] == 0x88:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            self.close = code, payload[2:].decode()
        return True

    def _take_packet(self, payload: bytes) -> None:
        for op, start, end in split(payload):
            if op == Op.ERROR:
                error = decode(op, payload[start:end])
                assert isinstance(error, Error)
                self.errors += 1
                self._branches.error(error.code, error.detail)
            elif op == Op.LEVEL:
                level = decode(op, payload[start:end])
                assert isinstance(level, Level)
                self.tag = level.tag
            elif op == Op.HELLO:
                hello = decode(op, payload[start:end])
                assert isinstance(hello, Hello)
                self.hello = hello

    def _tell(self) -> None:
        if self._moved is not None and not self._moved.done():
            self._moved.set_result(None)

    async def until(self, condition: Callable[[], Any], within_s: float) -> bool:
        """False when it did not come true in time, or the connection ended first."""
        deadline = time.monotonic() + within_s
        while not condition():
            left = deadline - time.monotonic()
            if self.ended or left <= 0:
                return bool(condition())
            self._moved = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved, left)
        return True

    @property
    def over(self) -> bool:
        return self.ended or self.close is not None


class Swarm:
    """Runs scripts against one server. The counts are for the caller to read at any moment."""

    def __init__(self, port: int, token: Callable[[str], str], branches: Branches) -> None:
        self._port = port
        self._token = token
        self.tokens: dict[str, str] = {}
        self.branches = branches
        self.connections = 0
        self.refused = 0
        """Frames and requests that were answered by a refusal."""
        self.failures: list[str] = []
        self._numbers = itertools.count()
        self._holders: list[Peer] = []

    def token_of(self, user: str) -> str:
        if user not in self.tokens:
            self.tokens[user] = self._token(user)
        return self.tokens[user]

    async def start(self) -> None:
        """Somebody with as many devices as a user may have."""
        for number in range(DEVICES):
            peer = await self._connect()
            peer.transport.write(self._login(CROWD, f"d{number}"))
            assert await peer.until(lambda peer=peer: peer.hello is not None, PATIENCE_S)  # type: ignore[misc]
            self._holders.append(peer)

    def stop(self) -> None:
        for peer in self._holders:
            peer.transport.abort()

    async def work(self, number: int, scripts: Iterator[Script]) -> None:
        """One attacker, under a name of its own."""
        user = f"mallory{number:02d}"
        for script in scripts:
            try:
                await self._run(script, user)
            except (OSError, AssertionError, TimeoutError) as error:
                self.failures.append(f"{script.name}: {error!r}")

    # -- one script

    async def _connect(self) -> Peer:
        sock = socket.socket()
        sock.setblocking(False)
        # No port waits for two minutes behind us, and more addresses have more ports.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        sock.bind((f"127.0.0.{2 + next(self._numbers) % 40}", 0))
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, ("127.0.0.1", self._port))
        except OSError:
            sock.close()
            raise
        _, peer = await loop.create_connection(lambda: Peer(self.branches), sock=sock)
        self.connections += 1
        return peer

    def _login(self, user: str, device: str) -> bytes:
        return REQUEST + b"\r\n" + hostile.packet(hostile.auth(self.token_of(user), device))

    async def _run(self, script: Script, user: str) -> None:
        peer = await self._connect()
        try:
            if script.raw:
                await self._ask(peer, script)
            elif script.crowd:
                peer.transport.write(self._login(CROWD, "one more"[:3]))
                await self._finish(peer, script)
            elif script.auth:
                await self._session(peer, script, user)
            else:
                peer.transport.write(REQUEST + b"\r\n" + self._last(script))
                await self._finish(peer, script)
        finally:
            peer.transport.abort()
        self._count(peer)

    async def _ask(self, peer: Peer, script: Script) -> None:
        peer.transport.write(script.raw)
        await peer.until(lambda: peer.ended, PATIENCE_S)
        body = peer._buffer.partition(b"\r\n\r\n")[2].decode("latin-1")
        if not peer.ended or peer.status == 101:
            self.failures.append(f"{script.name}: status {peer.status}, ended {peer.ended}")
        self.branches.request(peer.status, body)

    async def _session(self, peer: Peer, script: Script, user: str) -> None:
        peer.transport.write(self._login(user, "d0"))
        if not await peer.until(lambda: peer.hello is not None or peer.close is not None, PATIENCE_S):
            self.failures.append(f"{script.name}: no HELLO")
            return
        if script.resume:
            await self._resume(peer, user)
            return
        name = user.encode()
        refused = b"".join(script.refused)
        if script.name != "random, in a session":
            refused = b"".join(_renamed(part, name) for part in script.refused)
        if script.wait_s:
            # Acknowledges what it got: otherwise it would be taken for gone before it is late.
            await peer.until(lambda: peer.tag, PATIENCE_S)
            refused += hostile.packet(hostile.frame(Op.ACK, peer.tag))
        if script.answers:
            peer.transport.write(refused)
            await peer.until(lambda: peer.errors >= script.answers, PATIENCE_S)
            refused = b""
        peer.transport.write(refused + self._last(script))
        await self._finish(peer, script)

    async def _resume(self, peer: Peer, user: str) -> None:
        assert peer.hello is not None
        again = await self._connect()
        token, session = self.token_of(user), peer.hello.session
        beyond = hostile.auth(token, "d0", "app", session, (1 << 32) - 1)
        again.transport.write(REQUEST + b"\r\n" + hostile.packet(beyond))
        await again.until(lambda: again.over, PATIENCE_S)
        again.transport.abort()
        self._count(again)

    def _last(self, script: Script) -> bytes:
        return script.last if script.wait_s else script.last + WHOLE

    async def _finish(self, peer: Peer, script: Script) -> None:
        over = await peer.until(lambda: peer.over, script.wait_s or UNANSWERED_S)
        if not over and script.wait_s:
            self.failures.append(f"{script.name}: the server did not end it within {script.wait_s} s")

    def _count(self, peer: Peer) -> None:
        self.refused += peer.errors
        if peer.close is not None:
            code, reason = peer.close
            if code not in EXPECTED_CLOSES:
                self.branches.close(code, reason)
                self.refused += not peer.errors or code not in (4501, 4503, 4509)
        elif peer.status not in (0, 101):
            self.refused += 1


def _renamed(part: bytes, name: bytes) -> bytes:
    """A masked packet that speaks of ME, speaking of `name`."""
    assert len(name) == len(ME)
    size = part[1] & 0x7F
    at = 4 if size == 126 else 2
    mask, body = part[at : at + 4], part[at + 4 :]
    plain = bytes(byte ^ mask[n & 3] for n, byte in enumerate(body))
    return hostile.packet(plain.replace(ME, name))
