"""People who chat while others attack: every message arrives once, in order, and how long it took.

    python -m tests.attack.bystanders PORT PAIRS PER_S      tokens as JSON on the first line of standard input

Each further line of input names a phase that begins; the end of input ends the run. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from typing import Any

import uvloop

from fastim.model import Kind
from fastim.protocol import Frame, Msg, Send, SendItem, Sent
from tests.attack.hostile import BODY
from tests.kill.raw import RawClient

_HEAD = struct.Struct(">QQ")
_SETTLE_S = 10.0


class Writer(RawClient):
    """Sends numbered messages; the next one only after SENT, as the protocol asks."""

    def __init__(self, port: int, token: str, conv: str, per_s: float) -> None:
        super().__init__("127.0.0.1", port, token, "desk", ping_s=5.0)
        self._conv = conv
        self._pause_s = 1 / per_s
        self.sent = 0
        self.ended = False

    def _take(self, packet: bytes) -> None:
        super()._take(packet)
        self.sent += sum(isinstance(frame, Sent) for frame in self.frames)
        self.ack()
        self.frames.clear()

    async def write(self) -> None:
        number = 0
        while not self.ended and not self.closed.is_set():
            due = time.monotonic() + self._pause_s
            number += 1
            body = _HEAD.pack(number, time.monotonic_ns()) + BODY
            client_id = struct.pack(">QQ", hash(self._conv) & (1 << 63) - 1, number)
            self.send(Send(self._conv, [SendItem(client_id, int(Kind.TEXT), body)]))
            if not await self.wait_for(lambda number=number: self.sent >= number):  # type: ignore[misc]
                return
            await asyncio.sleep(max(0.0, due - time.monotonic()))


class Reader(RawClient):
    """Acknowledges what it reads, and writes down when it came."""

    def __init__(self, port: int, token: str, phases: list[str], latencies: dict[str, list[int]]) -> None:
        super().__init__("127.0.0.1", port, token, "desk", ping_s=5.0)
        self._phases, self._latencies = phases, latencies
        self.read = 0
        self.wrong = 0
        """Not the next number, or another body than was sent."""

    def _take(self, packet: bytes) -> None:
        super()._take(packet)
        now = time.monotonic_ns()
        for frame in self.frames:
            if isinstance(frame, Msg):
                self._look(frame, now)
        self.ack()
        self.frames.clear()

    def _look(self, frame: Frame, now: int) -> None:
        assert isinstance(frame, Msg)
        number, sent_ns = _HEAD.unpack(frame.body[: _HEAD.size])
        if number != self.read + 1 or frame.body[_HEAD.size :] != BODY:
            self.wrong += 1
            return
        self.read += 1
        self._latencies[self._phases[-1]].append(now - sent_ns)


async def run(port: int, pairs: int, per_s: float) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    tokens = json.loads(await lines.readline())
    phases, latencies = ["quiet"], {"quiet": []}
    writers, readers = [], []
    for number in range(pairs):
        one, other = f"stander{number}a", f"stander{number}b"
        readers.append(Reader(port, tokens[other], phases, latencies))
        writers.append(Writer(port, tokens[one], f"p:{one}:{other}", per_s))
        await readers[-1].__aenter__()
        await writers[-1].__aenter__()
    print("ready", flush=True)
    writing = [asyncio.create_task(writer.write()) for writer in writers]
    while line := await lines.readline():
        latencies.setdefault(line.decode().strip(), [])
        phases.append(line.decode().strip())
    for writer in writers:
        writer.ended = True
    await asyncio.gather(*writing)
    for writer, reader in zip(writers, readers, strict=True):
        await reader.wait_for(lambda writer=writer, reader=reader: reader.read >= writer.sent, _SETTLE_S)
    dropped = [client.close_code for client in (*writers, *readers) if client.closed.is_set()]
    for client in (*writers, *readers):
        await client.stop()
    return {
        "sent": sum(writer.sent for writer in writers),
        "read": sum(reader.read for reader in readers),
        "wrong": sum(reader.wrong for reader in readers),
        "dropped": dropped,
        "ms": {phase: _percentiles(found) for phase, found in latencies.items()},
    }


def _percentiles(found: list[int]) -> dict[str, float]:
    ordered = sorted(found) or [0]

    def at(part: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * part))] / 1e6, 2)

    return {"n": len(found), "p50": at(0.5), "p99": at(0.99), "max": at(1.0)}


if __name__ == "__main__":
    uvloop.install()
    result = asyncio.run(run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
    print(json.dumps(result))
