"""Read a system-call trace and decide whether every SENT left after the fsync of what it promises.

The trace is strace's (`-f -y -xx -o FILE`): one line per call, or two for a call during which another
thread was seen. A call's place in the file is that of its first line, its end that of its last. For each
client_id in a SENT the first write of the same 16 bytes to the log of the store must have ended, and a sync
of that file begun after it must have ended, before the socket call began.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

CALLS = ("pwrite64", "write", "writev", "pwritev", "sendto", "sendmsg", "fsync", "fdatasync")
_SYNCS = ("fsync", "fdatasync")
_BEGUN = re.compile(r"(\d+) +(\w+)\((\d+)<([^>]*)>(.*)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>.*= (-?\d+)")
_RESULT = re.compile(r"\) += (-?\d+)")
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
SENT_ITEM = b"\x94\xc4\x10"
"""How the array of one accepted message begins: its client_id follows (protocol.SentItem)."""


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


@dataclass
class Call:
    """One system call on a file or socket. end 0: it had not returned when the trace ended."""

    name: str
    path: str
    data: bytes
    start: int
    end: int = 0
    result: int = -1


@dataclass
class Order:
    """What was found."""

    sent: dict[bytes, int] = field(default_factory=dict)
    """client_id -> the line at which its SENT left first."""
    synced: int = 0
    """Syncs of the store's log that succeeded."""
    bad: list[str] = field(default_factory=list)


def read_calls(lines: Iterable[str]) -> list[Call]:
    calls: list[Call] = []
    open_calls: dict[str, Call] = {}
    for number, line in enumerate(lines, 1):
        if resumed := _RESUMED.match(line):
            call = open_calls.pop(resumed[1], None)
            if call is not None:
                call.end, call.result = number, int(resumed[3])
            continue
        begun = _BEGUN.match(line)
        if begun is None or begun[2] not in CALLS:
            continue
        path = begun[4]
        data = b"".join(unhex(found) for found in _BYTES.findall(begun[5]))
        call = Call(begun[2], unhex(path).decode() if "\\x" in path else path, data, number)
        calls.append(call)
        if line.rstrip().endswith("<unfinished ...>"):
            open_calls[begun[1]] = call
        elif result := _RESULT.search(begun[5]):
            call.end, call.result = number, int(result[1])
    return calls


def judge(calls: list[Call], log_suffix: str = "-wal") -> Order:
    """log_suffix: how the name of the store's log ends."""
    order = Order()
    logs = [call for call in calls if call.path.endswith(log_suffix) and call.end and call.result >= 0]
    writes = [call for call in logs if call.name not in _SYNCS]
    syncs = [call for call in logs if call.name in _SYNCS]
    order.synced = len(syncs)
    for call in calls:
        if not call.path.startswith("socket:"):
            continue
        at = call.data.find(SENT_ITEM)
        while at >= 0:
            client_id = call.data[at + 3 : at + 19]
            if len(client_id) == 16:
                order.sent.setdefault(client_id, call.start)
            at = call.data.find(SENT_ITEM, at + 1)
    first_write: dict[bytes, Call] = {}
    for write in writes:
        for client_id in order.sent:
            if client_id not in first_write and client_id in write.data:
                first_write[client_id] = write
    for client_id, left in order.sent.items():
        write = first_write.get(client_id)
        if write is None or write.end >= left:
            order.bad.append(f"SENT of {client_id.hex()} (line {left}) left before it was written to the log")
        elif not any(write.end < sync.start and sync.end < left for sync in syncs):
            text = f"left before a sync of its write (line {write.start})"
            order.bad.append(f"SENT of {client_id.hex()} (line {left}) {text}")
    return order


def read_trace(path: Path) -> Order:
    with path.open(errors="replace") as file:
        return judge(read_calls(file))
