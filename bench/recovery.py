"""Show 6: how long a killed server takes until it accepts sends again; it must not grow with the store.

A store is filled through SqliteStore itself: most messages settled by flushes, the newest `--unsettled`
neither acked nor due, as after a kill -9 in the middle of traffic. Then `fastim serve` is started on it, and
the clock runs from exec until a client's SEND was answered by SENT. Once with `--stored` messages, once with
twice as many and the same number unsettled: recovery must cost O(unsettled), so the second time may be at
most 1.25 times the first plus 0.5 s. Then the server is killed, and the audit of what it left must find every
unsettled obligation behind a due row, and none lost: a recovery that forgot some would be fast as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from bench import facts
from bench.server import Server
from fastim import protocol
from fastim.model import Fate, Kind
from fastim.store.base import AppendFrame, AppendItem, Flush, MessageStore, Settled
from tests.kill.raw import RawClient, Refused

LIMIT_S = 5.0
RATIO, SLACK_S = 1.25, 0.5
PER_CONV = 20
"""Messages per conversation and append; 50 frames a batch."""
FRAMES = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stored", type=int, default=1_000_000)
    parser.add_argument("--unsettled", type=int, default=100_000)
    parser.add_argument("--convs", type=int, default=5_000, help="conversations they lie in")
    parser.add_argument("--settle-s", type=float, default=5.0, help="how long to watch memory afterwards")
    parser.add_argument("--json", type=Path)


def people(number: int) -> tuple[str, str, str]:
    """The two users of conversation `number`, and its name."""
    first, second = f"r{number:05d}a", f"r{number:05d}b"
    return first, second, f"p:{first}:{second}"


class Filler:
    """Appends rounds of PER_CONV messages to every conversation, and settles them or not."""

    def __init__(self, store: MessageStore, convs: int) -> None:
        self._store = store
        self._convs = convs
        self._body = b"y" * 128

    async def register(self) -> None:
        now = time.time_ns() // 1_000_000
        for number in range(self._convs):
            for user in people(number)[:2]:
                await self._store.register_device(user, "d0", "app", now)

    async def add(self, messages: int, *, settled: bool) -> int:
        """Append about `messages`, a whole number of batches; returns how many."""
        done = 0
        number = 0
        while done < messages:
            now = time.time_ns() // 1_000_000
            frames, marks = [], []
            for _ in range(FRAMES):
                first, _, conv = people(number % self._convs)
                items = tuple(AppendItem(_uuid7(now), int(Kind.TEXT), self._body) for _ in range(PER_CONV))
                frames.append(AppendFrame(conv, first, items))
                number += 1
            results = await self._store.append(frames, now)
            done += FRAMES * PER_CONV
            if not settled:
                continue
            for frame, result in zip(frames, results, strict=True):
                low, high = result.items[0].seq, result.items[-1].seq
                other = frame.conv.rpartition(":")[2]
                marks.append(Settled(other, "d0", frame.conv, low, high, Fate.ACKED))
                marks.append(Settled(frame.sender, "d0", frame.conv, low, high, Fate.ACKED, own=True))
            await self._store.flush(Flush(tuple(marks), (), "bench", now))
        if settled:
            await self._store.settle(await self._store.head_msg_id())
        return done


def _uuid7(now_ms: int) -> bytes:
    random = uuid.uuid4().bytes
    return now_ms.to_bytes(6, "big") + bytes([0x70 | random[6] & 0x0F]) + random[7:]


async def fill(data: Path, steps: list[tuple[int, bool]], convs: int) -> int:
    """steps: (messages, settled). Returns how many were stored."""
    store = await open_store(data)
    filler = Filler(store, convs)
    try:
        await filler.register()
        return sum([await filler.add(count, settled=settled) for count, settled in steps])
    finally:
        await store.close()


async def open_store(data: Path) -> MessageStore:
    from fastim.store.sqlite import SqliteStore

    return await SqliteStore.open(data)


async def first_sent(server: Server, start: float) -> tuple[float, float]:
    """Seconds from `start` until a client was let in, and until its SEND was accepted."""
    first, _, conv = people(0)
    token = server.token(first)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.process is not None and server.process.poll() is not None:
            raise SystemExit(f"the server ended by itself:\n{server.log_tail()}")
        try:
            async with RawClient("127.0.0.1", server.ws_port, token, "d0") as client:
                let_in = time.monotonic() - start
                client_id = _uuid7(time.time_ns() // 1_000_000)
                while time.monotonic() < deadline and not client.close_code:
                    client.send(protocol.Send(conv, [protocol.SendItem(client_id, int(Kind.TEXT), b"first")]))
                    if await client.wait_for(partial(_accepted, client, client_id), 0.5):
                        return let_in, time.monotonic() - start
        except Refused:
            await asyncio.sleep(0.02)
    raise SystemExit(f"nothing was accepted within 60 s:\n{server.log_tail()}")


def _accepted(client: RawClient, client_id: bytes) -> bool:
    return any(
        isinstance(frame, protocol.Sent) and any(item.client_id == client_id for item in frame.items)
        for frame in client.frames
    )


async def measure(server: Server, settle_s: float) -> dict[str, Any]:
    start = time.monotonic()
    server.spawn()
    let_in, took = await first_sent(server, start)
    at_sent = server.memory_kb()
    await asyncio.sleep(settle_s)
    return {
        "let_in_s": round(let_in, 3),
        "first_sent_s": round(took, 3),
        "peak_rss_mb_at_first_sent": round(at_sent["VmHWM"] / 1024, 1),
        "peak_rss_mb": round(server.memory_kb()["VmHWM"] / 1024, 1),
        "cpu_s": round(server.cpu_s(), 2),
    }


def size_mb(data: Path) -> float:
    return round(sum(path.stat().st_size for path in data.rglob("*") if path.is_file()) / 1e6, 1)


def run(args: argparse.Namespace) -> int:
    result: dict[str, Any] = {
        "bench": "recovery",
        **facts.gather(),
        "n": args.stored,
        "unsettled": args.unsettled,
        "convs": args.convs,
    }
    directory = Path(tempfile.mkdtemp(prefix="fastim-recovery-"))
    rows: list[dict[str, Any]] = []
    servers: list[Server] = []
    try:
        for times in (1, 2):
            server = Server(directory / f"x{times}")
            servers.append(server)
            began = time.monotonic()
            steps = [(args.stored * times - args.unsettled, True), (args.unsettled, False)]
            stored = asyncio.run(fill(server.data, steps, args.convs))
            row: dict[str, Any] = {
                "stored": stored,
                "store_mb": size_mb(server.data),
                "fill_s": round(time.monotonic() - began, 1),
            }
            row |= asyncio.run(measure(server, args.settle_s))
            server.kill()
            row["audit_exit"], audit = server.audit()
            row["audit"] = audit["states"]
            rows.append(row)
            print(json.dumps(row), flush=True)
            shutil.rmtree(server.data)
    finally:
        for server in servers:
            server.end()
        shutil.rmtree(directory, ignore_errors=True)
    small, large = (row["first_sent_s"] for row in rows)
    bound = small * RATIO + SLACK_S
    failures = [f"{row['stored']} stored: {row['first_sent_s']} s; limit {LIMIT_S} s"
                for row in rows if row["first_sent_s"] > LIMIT_S]  # fmt: skip
    for row in rows:
        states = row["audit"]
        if row["audit_exit"] or states["lost"] or states["due"] < args.unsettled:
            failures.append(f"{row['stored']} stored: audit exit {row['audit_exit']}, {states}")
    if large > bound:
        failures.append(f"twice the messages took {large} s; limit {bound:.2f} s (1.25 x {small} + 0.5)")
    result |= {"rows": rows, "failures": failures, "good": not failures}
    for row in rows:
        print(
            f"recovery: {row['stored']:,} stored, {args.unsettled:,} unsettled: {row['first_sent_s']:.2f} s "
            f"from exec until a SEND is accepted, peak RSS {row['peak_rss_mb']} MB"
        )
    for failure in failures:
        print(f"FAILED: {failure}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failures else 0
