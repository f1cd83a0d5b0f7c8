"""What the kernel holds for TCP sockets, asked of it socket by socket (sock_diag, as `ss -tm` does).

/proc/net/sockstat has only a sum over both ends of loopback and over everybody on the machine.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_DUMP: Final = 0x301
"""NLM_F_REQUEST | NLM_F_DUMP"""
_SKMEMINFO: Final = 7
_ESTABLISHED: Final = 1 << 1
_HEADER: Final = struct.Struct("=IHHII")
_DONE: Final = 3
_ERROR: Final = 2
_MESSAGE_BYTES: Final = 72


def buffers_of(port: int) -> list[int]:
    """Bytes held for each established IPv4 socket whose own port is `port`: received, queued, set aside."""
    id_ = struct.pack("!HH", 0, 0) + bytes(44)
    request = (
        struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 1 << (_SKMEMINFO - 1), 0, _ESTABLISHED)
        + id_
    )
    found: list[int] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        sock.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _DUMP, 1, 0) + request)
        while True:
            data = sock.recv(1 << 18)
            at = 0
            while at < len(data):
                size, kind, _, _, _ = _HEADER.unpack_from(data, at)
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", data, at + _HEADER.size)[0], "sock_diag")
                start = at + _HEADER.size
                if struct.unpack_from("!H", data, start + 4)[0] == port:
                    found.append(_held(data[start + _MESSAGE_BYTES : at + size]))
                at += (size + 3) & ~3


def _held(attributes: bytes) -> int:
    at = 0
    while at + 4 <= len(attributes):
        size, kind = struct.unpack_from("=HH", attributes, at)
        if kind == _SKMEMINFO:
            received, _, _, _, aside, queued, *_ = struct.unpack_from("=9I", attributes, at + 4)
            return int(received + aside + queued)
        at += (size + 3) & ~3
    return 0
