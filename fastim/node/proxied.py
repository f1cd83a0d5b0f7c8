"""The PROXY protocol, versions 1 and 2: whom a balancer speaks for, said in front of everything else.

Hides both layouts. Read from listed balancers only, and then it must be there: a receiver that guesses could
be told any address by anybody. Not one byte behind the header is taken from the socket, so TLS or the request
follow as if nothing had been in front of them.

 v1   PROXY TCP4 203.0.113.7 10.0.0.1 40000 443\\r\\n     or TCP6, or UNKNOWN
 v2   12 bytes of signature · 0x20 LOCAL, 0x21 PROXY · family · length · addresses · fields that are not read

Tests: tests/unit/test_proxied.py, tests/system/test_listener.py. Source: HAProxy, "The PROXY protocol", 2.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import struct
from typing import Final

from fastim.errors import PeerError

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
MAX_V1_BYTES: Final = 107
MAX_V2_BYTES: Final = 2_048
"""Behind the 16 bytes in front: 36 for addresses, the rest for fields that nobody here reads."""

_PORT = re.compile(r"(?:0|[1-9][0-9]{0,4})\Z")
_LOCAL: Final = 0x20
_PROXY: Final = 0x21
_UNSPECIFIED: Final = 0x00
_LAYOUTS: Final = {0x11: ("!4s4sHH", ipaddress.IPv4Address), 0x21: ("!16s16sHH", ipaddress.IPv6Address)}

Source = tuple[str, int]
"""Address and port of the client."""


def _bad(detail: str) -> PeerError:
    return PeerError("bad_request", detail)


def parse_v1(line: bytes) -> Source | None:
    """A whole line with its end; None: the balancer speaks for itself. Raises PeerError."""
    if not line.endswith(b"\r\n") or len(line) > MAX_V1_BYTES:
        raise _bad(f"the PROXY line has no end within {MAX_V1_BYTES} bytes")
    if line == b"PROXY UNKNOWN\r\n" or line.startswith(b"PROXY UNKNOWN "):
        return None
    words = line[:-2].decode("latin-1").split(" ")
    if len(words) != 6 or words[0] != "PROXY" or words[1] not in ("TCP4", "TCP6"):
        raise _bad("the PROXY line must be PROXY, TCP4 or TCP6, two addresses, two ports")
    kind = ipaddress.IPv4Address if words[1] == "TCP4" else ipaddress.IPv6Address
    try:
        source, _ = kind(words[2]), kind(words[3])
    except ValueError:
        raise _bad(f"the PROXY line holds an address that is no {words[1]} one") from None
    if not all(_PORT.match(word) and int(word) < 65_536 for word in words[4:]):
        raise _bad("the PROXY line holds a port that is none of 0-65535")
    return str(source), int(words[4])


def parse_v2(command: int, family: int, payload: bytes) -> Source | None:
    """The bytes behind the signature; None: the balancer speaks for itself. Raises PeerError."""
    if command == _LOCAL:
        return None
    if command != _PROXY:
        raise _bad(f"PROXY version and command are 0x{command:02x}; must be 0x20 or 0x21")
    if family == _UNSPECIFIED:
        return None
    if family not in _LAYOUTS:
        raise _bad(f"PROXY family is 0x{family:02x}; must be 0x11 or 0x21, TCP")
    layout, kind = _LAYOUTS[family]
    if len(payload) < struct.calcsize(layout):
        raise _bad(f"PROXY addresses are {len(payload)} bytes; must be {struct.calcsize(layout)}")
    source, _, port, _ = struct.unpack_from(layout, payload)
    return str(kind(source)), port


async def read_source(sock: socket.socket) -> Source | None:
    """Take the header from a fresh socket; None: the balancer speaks for itself.

    The caller sets the deadline. Raises PeerError, ConnectionResetError when the peer leaves.
    """
    # The shortest line of version 1 is 15 bytes, so 12 are never too many.
    start = await _exactly(sock, len(SIGNATURE))
    if start == SIGNATURE:
        command, family, size = struct.unpack("!BBH", await _exactly(sock, 4))
        if size > MAX_V2_BYTES:
            raise _bad(f"the PROXY header is {size:,} bytes; limit {MAX_V2_BYTES:,}")
        return parse_v2(command, family, await _exactly(sock, size))
    if not start.startswith(b"PROXY "):
        raise _bad("a listed balancer did not begin with PROXY (node.proxy_protocol)")
    line = start
    while not line.endswith(b"\n") and len(line) < MAX_V1_BYTES:
        # Byte by byte: what is behind the line is not ours to take.
        line += await _exactly(sock, 1)
    return parse_v1(line)


async def _exactly(sock: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    found = b""
    while len(found) < count:
        part = await loop.sock_recv(sock, count - len(found))
        if not part:
            raise ConnectionResetError
        found += part
    return found
