"""A client with bad manners: it reads what it is told to read and acknowledges nothing by itself.

Plain ws, one socket, no library: the SDK never behaves like this. `deaf` stops reading, so the kernel's
window closes; otherwise frames are read and kept, and only `ack()` answers them.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import struct
from types import TracebackType
from typing import Self

import msgspec

from fastim import protocol
from fastim.protocol import Auth, Frame, Hello, Msg, Op, Ping, Sent, Skip, encode

_DEADLINE_S = 10.0


class Refused(Exception):
    """The server did not let us in: an HTTP status, a close code, or nothing."""


class RawClient:
    """async with RawClient("127.0.0.1", port, token, "d0") as client: ...

    frames: everything read, oldest first. ping_s: how often it beats (0: never). shrink: a small receive
    buffer, so that a deaf client fills up soon.
    """

    def __init__(
        self, host: str, port: int, token: str, device: str, *, ping_s: float = 8.0, shrink: bool = False
    ) -> None:
        self._address = (host, port)
        self._token, self._device = token, device
        self._ping_s, self._shrink = ping_s, shrink
        self._tasks: list[asyncio.Task[None]] = []
        self._hearing = asyncio.Event()
        self._hearing.set()
        self._arrived = asyncio.Event()
        self.frames: list[Frame] = []
        self.hello: Hello | None = None
        self.close_code = 0
        """0 while open; 1006 when the connection ended without a close frame."""
        self.closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        try:
            await asyncio.wait_for(self._open(), _DEADLINE_S)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, Refused) as error:
            await self.stop()
            raise Refused(str(error) or type(error).__name__) from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _open(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        if self._shrink:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self._address)
            self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=1 << 20)
        except BaseException:
            sock.close()
            raise
        key = base64.b64encode(os.urandom(16)).decode()
        host, port = self._address
        self._writer.write(
            f"GET /v1/ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: {protocol.SUBPROTOCOL}\r\n\r\n".encode()
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            raise Refused(head.split(b"\r\n", 1)[0].decode("latin-1"))
        self.send(Auth(1, 1, self._token, self._device))
        self._tasks.append(asyncio.create_task(self._read(), name="raw-read"))
        if self._ping_s:
            self._tasks.append(asyncio.create_task(self._beat(), name="raw-beat"))
        await self.wait_for(lambda: self.hello is not None or bool(self.close_code))
        if self.hello is None:
            raise Refused(f"closed with {self.close_code}")

    def send(self, *frames: Frame) -> None:
        """One packet."""
        self._send_ws(2, b"".join(encode(frame) for frame in frames))

    def _send_ws(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + struct.pack(">H", size)
        mask = os.urandom(4)
        repeated = (mask * (size // 4 + 1))[:size]
        masked = (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")
        self._writer.write(bytes([0x80 | opcode]) + length + mask + masked)

    def deaf(self) -> None:
        """Stop reading from the socket."""
        self._hearing.clear()
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def ack(self) -> None:
        """Everything read so far is stored."""
        tags = [frame.tag for frame in self.frames if isinstance(frame, Msg | Sent | Skip | protocol.Level)]
        if tags:
            self.send(protocol.Ack(max(tags)))

    def messages(self, conv: str = "") -> list[Msg]:
        """The MSG frames read so far."""
        return [frame for frame in self.frames if isinstance(frame, Msg) and conv in ("", frame.conv)]

    async def wait_for(self, condition, deadline_s: float = _DEADLINE_S) -> bool:  # type: ignore[no-untyped-def]
        """Until the condition holds, looked at after every packet. False at the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                while not condition():
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return False
        return True

    async def _beat(self) -> None:
        while not self.closed.is_set():
            await asyncio.sleep(self._ping_s)
            self.send(Ping())

    async def _read(self) -> None:
        try:
            while True:
                await self._hearing.wait()
                first, second = await self._reader.readexactly(2)
                size = second & 0x7F
                if size == 126:
                    size = int.from_bytes(await self._reader.readexactly(2), "big")
                elif size == 127:
                    size = int.from_bytes(await self._reader.readexactly(8), "big")
                payload = await self._reader.readexactly(size)
                match first & 0x0F:
                    case 2:
                        self._take(payload)
                    case 8:
                        self.close_code = int.from_bytes(payload[:2], "big") or 1005
                        break
                    case 9:
                        self._send_ws(10, payload)
                self._arrived.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        self.close_code = self.close_code or 1006
        self.closed.set()
        self._arrived.set()

    def _take(self, packet: bytes) -> None:
        for frame in split(packet):
            if isinstance(frame, Hello):
                self.hello = frame
            self.frames.append(frame)
            if type(frame).__struct_config__.tag == int(Op.PROBE):
                self.send(Ping())

    def abort(self) -> None:
        """End the connection by a reset, without a close frame."""
        self._writer.transport.abort()

    async def stop(self) -> None:
        """Close the socket without a close frame and end the tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_writer"):
            self._writer.transport.abort()
        if not self.close_code:
            self.close_code = 1006
        self.closed.set()


def split(packet: bytes) -> list[Frame]:
    """The frames of a packet, unknown ops left out."""
    frames: list[Frame] = []
    at = 0
    while at < len(packet):
        size = _value_bytes(packet, at)
        part = packet[at : at + size]
        op = msgspec.msgpack.decode(part, type=list)[0]
        if op in set(Op):
            frames.append(protocol.decode(op, part))
        at += size
    return frames


_FIXED = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9}
_FIXED |= {0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}


def _value_bytes(data: bytes, at: int) -> int:
    """The length of the msgpack value that begins at `at`."""
    lead = data[at]
    if lead < 0x80 or lead >= 0xE0:
        return 1
    if lead in _FIXED:
        return _FIXED[lead]
    if 0xA0 <= lead <= 0xBF:
        return 1 + (lead & 0x1F)
    if lead in _SIZED:
        width = _SIZED[lead]
        return 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "big")
    if lead & 0xF0 == 0x90 or lead in (0xDC, 0xDD):
        width = 0 if lead < 0xA0 else 2 if lead == 0xDC else 4
        items = lead & 0x0F if not width else int.from_bytes(data[at + 1 : at + 1 + width], "big")
    elif lead & 0xF0 == 0x80 or lead in (0xDE, 0xDF):
        width = 0 if lead < 0x90 else 2 if lead == 0xDE else 4
        items = 2 * (lead & 0x0F if not width else int.from_bytes(data[at + 1 : at + 1 + width], "big"))
    else:
        raise ValueError(f"byte {lead:#x} at {at} begins no msgpack value we know")
    end = at + 1 + width
    for _ in range(items):
        end += _value_bytes(data, end)
    return end - at
