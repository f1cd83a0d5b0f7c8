"""Clients that do not read beside many that do (promise P9).

    python -m tests.attack slow --slow 2000 --good 8000

Everybody connects; the slow ones are members of groups into which somebody writes at a steady pace, the good
ones write to each other. First all of them read. Then the slow ones stop reading and acknowledging, and go on
saying PING: they are alive, only slow. Measured: what each of them costs in user memory of the server and in
memory of the kernel; when the server closes them, counted from the message that no longer fitted their
windows; that what they did not take is told as undelivered and waits for them; and what the good ones notice.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgpack

from fastim._core.frame import split
from fastim.auth import Scope
from fastim.protocol import Op
from tests.attack import hostile
from tests.attack.kernel import buffers_of
from tests.attack.stage import OTHERS_CPU, Stage
from tests.unit.conn_world import REQUEST

USER_KIB: Final = 400.0
"""Until the first is closed: what is theirs. What dispatch needs for all of them at once comes behind it."""
KERNEL_KIB: Final = 128.0
CLOSED_S: Final = 11.0
RATIO: Final = 2.0
"""Of the good ones' p99; not looked at with fewer than 1,000 slow ones: the short form is no benchmark."""
FLOOR_MS: Final = 10.0
"""Twice of less than this proves nothing: it is the measuring process's own."""
BODY: Final = bytes(8_192)
FILLING: Final = 262_144 // len(BODY)
"""The first message that does not fit a window any more: the fields of those before it need room too."""
GROUP: Final = 500
GROUP_PER_S: Final = 6.0
"""The windows are full before the first ack is late: otherwise the conversation only pauses."""
GOOD_PER_S: Final = 200.0
READING_S: Final = 12.0
PING_S: Final = 2.5
RECEIVE_BYTES: Final = 4_096
"""Of the slow ones' kernels: the least, so that what they do not read stays with the server."""
PATIENCE_S: Final = 60.0
_PING: Final = hostile.packet(hostile.frame(Op.PING))
_STAMP: Final = b"<written at>"


class Phone(asyncio.Protocol):
    """One client; it acknowledges what it reads until it is told to stop reading."""

    def __init__(self, latencies: list[tuple[float, float]] | None) -> None:
        self._latencies = latencies
        """Where to write down (when, seconds) of each stamped message; None: it is sent none."""
        self._buffer = b""
        self._upgraded = False
        self.transport: Any = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = False
        self.closed = b""
        """What the server's close frame said."""
        self.sent = 0
        """Packets of SENT."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        if not self.ready.done():
            self.ready.set_exception(ConnectionResetError())

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        if not self._upgraded:
            head, end, buffer = buffer.partition(b"\r\n\r\n")
            if not end:
                self._buffer = head
                return
            assert head.startswith(b"HTTP/1.1 101 "), head
            self._upgraded = True
        at, tag = 0, 0
        while len(buffer) - at >= 2:
            size, start = buffer[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(buffer[at + 2 : at + 4], "big"), at + 4
            elif size == 127:
                size, start = int.from_bytes(buffer[at + 2 : at + 10], "big"), at + 10
            if len(buffer) - start < size:
                break
            if buffer[at] == 0x88:
                self.closed = buffer[start : start + size]
            if buffer[at] == 0x82:
                tag = max(tag, self._packet(buffer[start : start + size]))
            at = start + size
        self._buffer = buffer[at:]
        if tag:
            self.transport.write(hostile.packet(hostile.frame(Op.ACK, tag)))

    def _packet(self, packet: bytes) -> int:
        """The newest tag in it."""
        tag = 0
        for op, start, end in split(packet):
            if op == Op.MSG:
                tag = int.from_bytes(packet[start + 5 : start + 9], "big")
                if self._latencies is not None:
                    self._stamped(packet[start:end])
            elif op in (Op.SENT, Op.LEVEL, Op.SKIP):
                tag = msgpack.unpackb(packet[start:end])[1]
                self.sent += op == Op.SENT
            elif op == Op.PROBE:
                self.transport.write(_PING)
            elif op == Op.HELLO:
                self.ready.set_result(None)
        return tag

    def _stamped(self, msg: bytes) -> None:
        at = msg.find(_STAMP) + len(_STAMP)
        now = time.monotonic()
        assert self._latencies is not None
        self._latencies.append((now, now - float(msg[at : at + 20])))


class Crowd:
    """Everybody who is connected, what they write, and what they measured."""

    def __init__(self, stage: Stage, good: int, slow: int) -> None:
        self._stage = stage
        self._good: list[Phone] = [None] * good  # type: ignore[list-item]
        self.slow: list[Phone] = [None] * slow  # type: ignore[list-item]
        self.writer: Phone = None  # type: ignore[assignment]
        self.latencies: list[tuple[float, float]] = []

    async def connect(self) -> None:
        """32 at a time: a storm is another test's."""
        gate = asyncio.Semaphore(32)

        async def one(phones: list[Phone], number: int, user: str, small: bool) -> None:
            async with gate:
                phones[number] = await self._dial(user, small=small)

        self.writer = await self._dial("writer", small=False)
        wanted = [one(self._good, n, f"good{n:05d}", False) for n in range(len(self._good))]
        wanted += [one(self.slow, n, f"slow{n:05d}", True) for n in range(len(self.slow))]
        await asyncio.gather(*wanted)

    async def _dial(self, user: str, *, small: bool) -> Phone:
        sock = socket.socket()
        sock.setblocking(False)
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self._stage.server.ws_port))
        latencies = self.latencies if user.startswith("good") else None
        _, phone = await loop.create_connection(lambda: Phone(latencies), sock=sock)
        token = self._stage.server.token(user)
        phone.transport.write(REQUEST + b"\r\n" + hostile.packet(hostile.auth(token)))
        await asyncio.wait_for(phone.ready, PATIENCE_S)
        return phone

    async def chat(self) -> None:
        """Good ones write to their neighbours, GOOD_PER_S in all, whether or not answers come."""
        number = 0
        begun = time.monotonic()
        while True:
            number += 1
            await asyncio.sleep(max(0.0, begun + number / GOOD_PER_S - time.monotonic()))
            which = number % (len(self._good) // 2) * 2
            body = _STAMP + b"%020.9f" % time.monotonic()
            item = hostile.send(f"p:good{which:05d}:good{which + 1:05d}", body, number.to_bytes(16, "big"))
            if not self._good[which].ended:
                self._good[which].transport.write(hostile.packet(item))

    async def write(self, groups: int) -> None:
        """GROUP_PER_S into each group, in turn."""
        number = 1 << 100
        while True:
            for group in range(groups):
                number += 1
                item = hostile.send(f"g:slow{group}", BODY, number.to_bytes(16, "big"))
                self.writer.transport.write(hostile.packet(item))
                await asyncio.sleep(1 / GROUP_PER_S / groups)

    async def beat(self) -> None:
        """Everybody says PING, the slow ones too."""
        phones = [*self._good, *self.slow, self.writer]
        while True:
            for at in range(0, len(phones), 50):
                for phone in phones[at : at + 50]:
                    if not phone.ended:
                        phone.transport.write(_PING)
                await asyncio.sleep(PING_S / len(phones) * 50)

    def p99_ms(self, since: float) -> float:
        found = sorted(seconds for when, seconds in self.latencies if when >= since)
        return round(found[int(len(found) * 0.99)] * 1_000, 2) if found else 0.0

    def good_ended(self) -> list[str]:
        """What the good ones whose connection ended were told: nobody's may."""
        return [repr(phone.closed) for phone in [*self._good, self.writer] if phone.ended]

    def end(self) -> None:
        for phone in [*self._good, *self.slow, self.writer]:
            if phone is not None:
                phone.transport.abort()


def make_groups(stage: Stage, slow: int) -> int:
    """Over REST; how many. Their owner, who writes, is one of the members."""
    token = stage.server.token("admin", Scope.ADMIN)
    groups = -(-slow // (GROUP - 1))
    for group in range(groups):
        members = [f"slow{n:05d}" for n in range(group, slow, groups)]
        request = urllib.request.Request(
            f"http://127.0.0.1:{stage.server.http_port}/v1/groups",
            json.dumps({"group": f"slow{group}", "owner": "writer", "members": members}).encode(),
            {"authorization": f"Bearer {token}", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 201
    return groups


def user_bytes(stage: Stage) -> int:
    return stage.server.memory_kb()["VmRSS"] * 1_024


async def starve(stage: Stage, crowd: Crowd, groups: int) -> dict[str, Any]:
    """From the moment the slow ones stop reading until all of them are closed."""
    slow = len(crowd.slow)
    user, sent = user_bytes(stage), crowd.writer.sent
    for phone in crowd.slow:
        phone.transport.pause_reading()
    began = time.monotonic()
    full_s = first_s = last_s = 0.0
    most_user = later_user = closed = 0
    kernel: list[int] = []
    while closed < slow and time.monotonic() < began + PATIENCE_S:
        await asyncio.sleep(0.1)
        after_s = time.monotonic() - began
        grown = user_bytes(stage) - user
        most_user, later_user = max(most_user, grown if not closed else 0), max(later_user, grown)
        held = await asyncio.to_thread(buffers_of, stage.server.ws_port)
        kernel = max(kernel, sorted(held)[-slow:], key=sum)
        if not full_s and crowd.writer.sent - sent >= FILLING * groups:
            full_s = after_s
        found = int(await asyncio.to_thread(stage.metric, 'fastim_connections_closed_total{code="4408"}'))
        first_s = first_s or (after_s if found else 0.0)
        last_s = after_s if found > closed else last_s
        closed = found
    return {
        "closed_4408": closed,
        "filled_s": round(full_s, 2),
        "first_closed_s": round(first_s, 2),
        "last_closed_s": round(last_s, 2),
        "user_kib_each": round(most_user / slow / 1_024, 1),
        "user_kib_each_later": round(later_user / slow / 1_024, 1),
        "kernel_kib_each": round(sum(kernel) / slow / 1_024, 1),
        "kernel_kib_most": round(max(kernel) / 1_024, 1),
    }


async def play(stage: Stage, good: int, slow: int, reading_s: float) -> dict[str, Any]:
    groups = make_groups(stage, slow)
    crowd = Crowd(stage, good, slow)
    began = time.monotonic()
    await crowd.connect()
    connected_s = time.monotonic() - began
    tasks = [asyncio.create_task(work) for work in (crowd.beat(), crowd.chat(), crowd.write(groups))]
    await asyncio.sleep(reading_s / 3)
    since = time.monotonic()
    await asyncio.sleep(reading_s * 2 / 3)
    reading_ms, since = crowd.p99_ms(since), time.monotonic()
    starved = await starve(stage, crowd, groups)
    await asyncio.sleep(2.0)
    result = starved | {
        "connected_s": round(connected_s, 1),
        "good_p99_ms": {"reading": reading_ms, "starving": crowd.p99_ms(since)},
        "good_messages": len(crowd.latencies),
        "good_ended": crowd.good_ended(),
        "told": int(await asyncio.to_thread(stage.metric, "fastim_undelivered_total")),
    }
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    crowd.end()
    return result


def run(good: int, slow: int, reading_s: float = READING_S) -> dict[str, Any]:
    """The result, with what did not hold in `faults`."""
    _allow_files(good + slow + 200)
    os.sched_setaffinity(0, {OTHERS_CPU})
    with tempfile.TemporaryDirectory() as directory:
        limits = {"rate_per_s": 100_000, "rate_burst": 100_000, "auth_timeout_ms": 30_000}
        stage = Stage(Path(directory), {"node": limits})
        stage.start()
        try:
            result = asyncio.run(play(stage, good, slow, reading_s))
            ids = Path(directory) / "ids"
            result |= {"good": good, "slow": slow, "server": stage.stop(ids), "waiting": _waiting(ids)}
        finally:
            stage.server.end()
    return result | {"faults": [*_faults(result)]}


def _allow_files(count: int) -> None:
    """For this process and the server, which inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count > hard:
        raise SystemExit(f"{count:,} descriptors are needed; the hard limit is {hard:,} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


def _waiting(ids: Path) -> int:
    """How many of the slow ones have what they did not take before them: a retry or the next sync."""
    states: dict[str, set[str]] = {}
    with ids.open() as lines:
        for line in lines:
            row = json.loads(line)
            if row["user"].startswith("slow"):
                states.setdefault(row["user"], set()).add(row["state"])
    left = [found - {"acked"} for found in states.values()]
    return sum(bool(found) and found <= {"due", "parked"} for found in left)


def _faults(result: dict[str, Any]) -> Iterator[str]:
    if result["closed_4408"] != result["slow"] or result["good_ended"]:
        ended = result["good_ended"]
        yield f"{result['closed_4408']} of {result['slow']} closed 4408; good ones that ended: {ended[:5]}"
    for what, limit in (("user_kib_each", USER_KIB), ("kernel_kib_most", KERNEL_KIB)):
        if result[what] > limit:
            yield f"{what} is {result[what]}; limit {limit}"
    took = result["last_closed_s"] - result["filled_s"]
    if not result["filled_s"] or took > CLOSED_S:
        yield f"the last was closed {took:.1f} s after its window was full; limit {CLOSED_S}"
    if result["told"] < result["slow"] or result["waiting"] != result["slow"]:
        yield f"{result['told']} told as undelivered, {result['waiting']} waiting, of {result['slow']}"
    ms = result["good_p99_ms"]
    if result["slow"] >= 1_000 and ms["starving"] > RATIO * max(ms["reading"], FLOOR_MS):
        yield f"the good ones' p99 went from {ms['reading']} to {ms['starving']} ms; limit {RATIO} times"
    server = result["server"]
    if server["exit"] or server["audit"] or server["log_faults"] or server["secrets_in_log"]:
        yield f"the server: {server}"
