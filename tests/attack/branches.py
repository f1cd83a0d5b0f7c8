"""Every way in which a client can be refused, and which of them an answer shows.

A branch is a place in frame, conn, protocol, handshake, commands, delivery, upgrade or picows that a client
can reach; it is told by the ERROR's code and text, by the close frame's code and reason, or by the HTTP
status and body. An answer that no branch explains is a finding too: `Branches.unknown`.

Not here: what only a limit opened for the attack or a backend that is away would say (failures per address:
tests/system/test_edges.py; unavailable: tests/system/test_dispatch.py), what new keys are refused for
(tests/attack/sealed.py), and what is checked a second time behind somebody who checks it already: the size of
a packet, the number of ids of an ACKS, opcodes and control frames behind picows.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from fastim.protocol import Op

IN_C: Final = frozenset({Op.PING, Op.ACK, Op.ACKS, Op.SEALED})
"""Client ops that the core answers before protocol.decode could refuse them."""

_FRAME: Final = {
    "frame: truncated": r"the value at byte \d+ is [\d,]+ bytes; -?\d+ are left",
    "frame: not an array": r"a frame starts with 0x",
    "frame: no op": r"has 0 elements; at least 1, the op",
    "frame: not an integer": r"0x\w\w at byte \d+ is not an integer",
    "frame: op out of range": r"the op of the frame at byte \d+ is",
    "frame: array too large": r"the array at byte \d+ has",
    "frame: map too large": r"the map at byte \d+ has",
    "frame: too deep": r"nesting at byte \d+ is 9 deep",
    "frame: extension": r"is an extension type",
    "frame: no msgpack": r"is no msgpack type",
    "frame: empty packet": r"the packet has 0 frames",
    "frame: too many frames": r"the packet has 65 frames or more",
    "frame: ACK without a tag": r"ACK has 1 elements",
    "frame: ACK's tag out of range": r"ACK's tag is",
    "frame: ACKS without ids": r"ACKS has 1 elements",
    "frame: ACKS' ids are no array": r"the ids of ACKS start with",
    "frame: an id of ACKS out of range": r"an id of ACKS is",
}

_LAYOUT: Final = {
    "protocol: wrong type": r"op \d+: Expected `[^`]+`, got `",
    "protocol: missing fields": r"op \d+: Expected `array` of at least length",
    "protocol: number out of range": r"op \d+: Expected `int` [<>]=",
    "protocol: length out of range": r"op \d+: Expected `\w+` of length",
    "protocol: text that is not UTF-8": r"op \d+: 'utf-8' codec",
}

ERRORS: Final[dict[str, tuple[str, str]]] = {
    **{name: ("bad_frame", pattern) for name, pattern in (_FRAME | _LAYOUT).items()},
    **{
        f"protocol: layout of {op.name}": ("bad_frame", rf"op {op.value}: ")
        for op in Op
        if op not in IN_C and op is not Op.PROBE
    },
    "conn: before AUTH": ("unauthenticated", r"op \d+ before AUTH"),
    "service: before HELLO": ("unauthenticated", r"AUTH is the first frame, once"),
    "service: no keys agreed": ("bad_seal", r"no keys were agreed"),
    "handshake: token": ("unauthenticated", r"the token is not valid"),
    "handshake: version": ("bad_version", r"versions "),
    "handshake: device": ("bad_id", r"device is "),
    "handshake: device class": ("bad_id", r"device_class is "),
    "handshake: too many devices": ("too_many_devices", r"\d+ other devices are connected"),
    "delivery: tag of a resume": ("bad_ack", r"tag is \d+; the last one sent was"),
    "acks: a tag that was never sent": ("bad_ack", r"tag \d+ was never sent"),
    "protocol: unknown op": ("unsupported", r"op \d+ is not supported by protocol version"),
    "commands: reserved op": ("unsupported", r"op \d+ \(\w+\) is not supported by this server yet"),
    "commands: the server's op": ("unsupported", r"op \d+ is not a client's"),
    "commands: AUTH again": ("already_authenticated", r""),
    "commands: refreshed for somebody else": ("forbidden", r"the new token is for somebody else"),
    "commands: unknown kind": ("unknown_kind", r"kind is "),
    "commands: body too big": ("too_big", r"body is "),
    "commands: too fast": ("rate_limited", r""),
    "commands: page size": ("bad_limit", r""),
    "commands: range": ("bad_range", r""),
    "commands: too many requests": ("busy", r"\d+ requests are under way"),
    "commands: too many pulls": ("busy", r"[\d,]+ conversations wait to be streamed"),
    "auth: conversation's name": ("bad_conv", r""),
    "auth: a room": ("unsupported", r"rooms are not supported"),
    "auth: send into somebody else's": ("forbidden", r"send is refused: not a member"),
    "auth: send into s:": ("forbidden", r"send is refused: s: conversations"),
    "auth: read somebody else's": ("forbidden", r"read is refused: not a member"),
    "store: a group one is not in": ("forbidden", r"\S+ is not in g:"),
    "dispatch: other content": ("conflict", r""),
    "dispatch: expired": ("expired", r""),
    "dispatch: unknown group": ("unknown_group", r""),
}

CLOSES: Final[dict[str, tuple[int, str]]] = {
    "conn: reserved bits": (1002, r"reserved bits are set"),
    "conn: a message inside another": (1002, r"a message starts inside another"),
    "conn: a continuation of nothing": (1002, r"a continuation of no message"),
    "conn: close code": (1002, r"the close code is not assigned"),
    "conn: text": (1003, r"text; frames are binary"),
    "conn: message too big": (1009, r"the message is above 65,536 bytes"),
    "conn: too many fragments": (1009, r"the message has more than 64 fragments"),
    "conn: no AUTH": (4501, r"no AUTH in time"),
    "conn: half a message": (4408, r"a message was not finished in time"),
    "conn: half a frame": (4408, r"a frame was not finished in time"),
    "conn: a seal nobody asked for": (4509, r"\Z"),
    "conn: bad frame": (4509, r"bad_frame"),
    "conn: bad ack": (4509, r"bad_ack"),
    "conn: unauthenticated": (4501, r"unauthenticated"),
    "picows: opcode": (1002, r"Received frame with invalid opcode"),
    "picows: fragmented control frame": (1002, r"Received fragmented control frame"),
    "picows: no mask": (1002, r"Received un-masked frame"),
    "picows: control frame above 125": (1002, r"Received control frame with payload size"),
    "picows: length in 16 bits that needs 7": (1002, r"Received frame with invalid 16-bit"),
    "picows: length in 64 bits": (1002, r"Received frame with invalid 64-bit"),
    "picows: frame too big": (1009, r"Received frame with payload size exceeding"),
    "picows: close code": (1002, r"Received CLOSE with invalid close code: "),
    "picows: half a close code": (1002, r"Received CLOSE with invalid close code size"),
    "picows: reason that is not UTF-8": (1007, r"Received CLOSE with invalid UTF-8"),
    "service: refused before HELLO, identity": (4509, r"bad_id"),
    "service: refused before HELLO, version": (4509, r"bad_version"),
    "service: refused before HELLO, keys": (4509, r"bad_seal"),
    "service: refused before HELLO, devices": (4503, r"too_many_devices"),
}
EXPECTED_CLOSES: Final = frozenset({1000, 1005, 4507})
"""No refusals: the attacker left by itself, or its device came again elsewhere."""

REQUESTS: Final[dict[str, tuple[int, str]]] = {
    "upgrade: path": (404, r"WebSocket connections are taken at"),
    "upgrade: query": (400, r"no query string"),
    "upgrade: origin": (403, r"this Origin is not allowed"),
    "upgrade: host": (400, r"exactly one Host"),
    "upgrade: method": (426, r"Upgrade: websocket and Connection"),
    "upgrade: version": (426, r"Sec-WebSocket-Version must be 13"),
    "upgrade: key": (400, r"Sec-WebSocket-Key must be"),
    "picows: no request": (400, r""),
    "upgrade: dropped without an answer": (0, r""),
}

_Table = dict[object, list[tuple[str, re.Pattern[str]]]]


def _compiled(table: dict[str, tuple[str, str]] | dict[str, tuple[int, str]]) -> _Table:
    found: _Table = {}
    for name, (code, pattern) in table.items():
        found.setdefault(code, []).append((name, re.compile(pattern)))
    return found


class Branches:
    """Counts answers by branch."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter(dict.fromkeys([*ERRORS, *CLOSES, *REQUESTS], 0))
        self.unknown: Counter[str] = Counter()
        self._tables = (_compiled(ERRORS), _compiled(CLOSES), _compiled(REQUESTS))
        self._seen: dict[tuple[object, str], list[str]] = {}

    def error(self, code: str, detail: str) -> None:
        self._count(0, code, detail)

    def close(self, code: int, reason: str) -> None:
        self._count(1, code, reason)

    def request(self, status: int, body: str) -> None:
        self._count(2, status, body)

    def _count(self, table: int, code: object, text: str) -> None:
        names = self._seen.get((code, text))
        if names is None:
            names = self._names(table, code, text)
            if len(self._seen) < 100_000:
                self._seen[code, text] = names
        for name in names:
            self.hits[name] += 1
        if not names:
            self.unknown[f"{code} {text[:120]}"] += 1

    def _names(self, table: int, code: object, text: str) -> list[str]:
        """An ERROR of a layout shows op and kind of fault; of the others the first that fits."""
        fitting = [name for name, pattern in self._tables[table].get(code, []) if pattern.match(text)]
        if not fitting and table == 0:
            fitting = [name for name, pattern in self._tables[0].get(code, []) if pattern.search(text)]
        return fitting if table == 0 else fitting[:1]

    def missed(self) -> list[str]:
        return sorted(name for name, count in self.hits.items() if not count)
