"""The PROXY header: what is read, what is refused, and that nothing behind it is taken."""

from __future__ import annotations

import asyncio
import random
import socket
import struct

import pytest

from fastim.errors import PeerError
from fastim.node.proxied import MAX_V1_BYTES, SIGNATURE, Source, parse_v1, read_source

BEHIND = b"GET /v1/ws HTTP/1.1\r\n"


def v2(command: int = 0x21, family: int = 0x11, payload: bytes = b"", size: int | None = None) -> bytes:
    size = len(payload) if size is None else size
    return SIGNATURE + struct.pack("!BBH", command, family, size) + payload


def four(source: str = "203.0.113.7", port: int = 40_000) -> bytes:
    return socket.inet_aton(source) + socket.inet_aton("10.0.0.1") + struct.pack("!HH", port, 443)


def six(source: str = "2001:db8::7", port: int = 40_000) -> bytes:
    parts = [socket.inet_pton(socket.AF_INET6, text) for text in (source, "2001:db8::1")]
    return b"".join(parts) + struct.pack("!HH", port, 443)


async def read(data: bytes, *, pieces: int = 0) -> tuple[Source | None, bytes]:
    """What the header says, and what is left in the socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        reading = loop.create_task(read_source(ours))
        size = pieces or len(data) or 1
        for at in range(0, len(data), size):
            theirs.send(data[at : at + size])
            await asyncio.sleep(0)
        theirs.shutdown(socket.SHUT_WR)
        found = await reading
        left = b""
        while part := await loop.sock_recv(ours, 4_096):
            left += part
        return found, left


@pytest.mark.parametrize("pieces", [0, 1, 7])
@pytest.mark.parametrize(
    ("header", "source"),
    [
        (b"PROXY TCP4 203.0.113.7 10.0.0.1 40000 443\r\n", ("203.0.113.7", 40_000)),
        (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", ("255.255.255.255", 65_535)),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 1 0\r\n", ("2001:db8::7", 1)),
        (b"PROXY UNKNOWN\r\n", None),
        (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
        (v2(payload=four()), ("203.0.113.7", 40_000)),
        (v2(payload=four() + b"\x04\x00\x01x" * 40), ("203.0.113.7", 40_000)),
        (v2(family=0x21, payload=six()), ("2001:db8::7", 40_000)),
        (v2(command=0x20, family=0x00), None),
        (v2(command=0x20, family=0x11, payload=four()), None),
        (v2(family=0x00, payload=b"\x04\x00\x00"), None),
    ],
)
async def test_the_client_is_read_and_nothing_behind_it(
    header: bytes, source: Source | None, pieces: int
) -> None:
    assert await read(header + BEHIND, pieces=pieces) == (source, BEHIND)


@pytest.mark.parametrize(
    "header",
    [
        BEHIND,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
        b"proxy TCP4 203.0.113.7 10.0.0.1 40000 443\r\n",
        b"PROXY TCP4 203.0.113.7 10.0.0.1 40000\r\n",
        b"PROXY TCP4 203.0.113.7 10.0.0.1 40000 443 x\r\n",
        b"PROXY TCP4  203.0.113.7 10.0.0.1 40000 443\r\n",
        b"PROXY TCP4 203.0.113.7 10.0.0.1 40000 443\n",
        b"PROXY TCP4 203.0.113.7 10.0.0.1 65536 443\r\n",
        b"PROXY TCP4 203.0.113.7 10.0.0.1 040 443\r\n",
        b"PROXY TCP4 203.0.113.7 10.0.0.1 -1 443\r\n",
        b"PROXY TCP4 203.0.113.999 10.0.0.1 1 443\r\n",
        b"PROXY TCP4 2001:db8::7 2001:db8::1 1 443\r\n",
        b"PROXY TCP6 203.0.113.7 10.0.0.1 1 443\r\n",
        b"PROXY UDP4 203.0.113.7 10.0.0.1 1 443\r\n",
        b"PROXY UNKNOWNX" + b"\r\n",
        b"PROXY TCP4 " + b"1" * MAX_V1_BYTES + b"\r\n",
        b"PROXY UNKNOWN " + b"x" * MAX_V1_BYTES + b"\r\n",
        v2(command=0x22, payload=four()),
        v2(command=0x11, payload=four()),
        v2(family=0x12, payload=four()),
        v2(family=0x31, payload=bytes(216)),
        v2(payload=four()[:-1]),
        v2(family=0x21, payload=six()[:-1]),
        v2(payload=b"", size=65_535),
    ],
)
async def test_anything_else_is_refused(header: bytes) -> None:
    with pytest.raises(PeerError):
        await read(header)


@pytest.mark.parametrize("header", [b"", b"PROXY", SIGNATURE, v2(payload=four())[:-1]])
async def test_a_peer_that_leaves_within_it_has_left(header: bytes) -> None:
    with pytest.raises(ConnectionResetError):
        await read(header)


def test_no_line_raises_anything_but_a_peer_error() -> None:
    rng = random.Random(11)
    good = b"PROXY TCP4 203.0.113.7 10.0.0.1 40000 443\r\n"
    for _ in range(20_000):
        line = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            line[rng.randrange(len(line))] = rng.randrange(256)
        try:
            found = parse_v1(bytes(line))
        except PeerError:
            continue
        assert found is None or 0 <= found[1] < 65_536
