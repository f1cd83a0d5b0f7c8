"""The load generator against a stand-in server that keeps the rules, or breaks one on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import websockets

from bench.road import build_loadgen, pairs
from fastim import protocol
from fastim.protocol import Msg, Op, Sent, SentItem, encode
from tests.kill.raw import split

Write = Callable[[str, bytes], Awaitable[None]]


class StandIn:
    """Accepts everything at once. `break_rule` gets each MSG and returns what is written in its place."""

    def __init__(self, break_rule: Callable[[Msg], list[Msg]] = lambda msg: [msg]) -> None:
        self._break_rule = break_rule
        self._sockets: dict[str, websockets.ServerConnection] = {}
        self._tags: Counter[str] = Counter()
        self._seqs: Counter[str] = Counter()
        self.acked: Counter[str] = Counter()

    async def serve(self, socket: websockets.ServerConnection) -> None:
        user = ""
        async for packet in socket:
            assert isinstance(packet, bytes)
            for frame in split(packet):
                match type(frame).__struct_config__.tag:
                    case Op.AUTH:
                        user = frame.token  # type: ignore[attr-defined]
                        self._sockets[user] = socket
                        await socket.send(encode(protocol.Hello(1, "s", user, "d0", 1, 0, *[1] * 8)))
                    case Op.SEND:
                        await self._store(user, frame)  # type: ignore[arg-type]
                    case Op.ACK:
                        self.acked[user] = frame.tag  # type: ignore[attr-defined]

    def _tag(self, user: str) -> int:
        self._tags[user] += 1
        return self._tags[user]

    async def _store(self, user: str, send: protocol.Send) -> None:
        for item in send.items:
            self._seqs[send.conv] += 1
            seq = self._seqs[send.conv]
            sent = Sent(self._tag(user), send.conv, 1, [SentItem(item.client_id, seq, seq, 1)])
            await self._sockets[user].send(encode(sent))
            other = next(name for name in send.conv.split(":")[1:] if name != user)
            msg = Msg(0, False, seq, send.conv, seq, seq, 1, user, item.client_id, 1, 1, 0, 0, item.body)
            for changed in self._break_rule(msg):
                fields = [getattr(changed, name) for name in changed.__struct_fields__]
                await self._sockets[other].send(encode(Msg(self._tag(other), *fields[1:])))


async def drive(stand_in: StandIn) -> tuple[int, list[dict[str, Any]]]:
    """Two clients, one pair, 0.3 s closed and 0.3 s open at 100/s: (exit code, phases)."""
    program = await asyncio.to_thread(build_loadgen)
    with tempfile.NamedTemporaryFile("w") as plan:
        plan.write("c d0 a\nc d0 b\nv p:a:b 0 1\n")
        plan.flush()
        async with websockets.serve(
            stand_in.serve,
            "127.0.0.1",
            0,
            subprotocols=[websockets.Subprotocol("fastim.v1")],
            compression=None,
        ) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            process = await asyncio.create_subprocess_exec(
                program, "127.0.0.1", str(port), "/v1/ws", plan.name, "--warm-s", "0.1", "--closed-s", "0.3",
                "--open-s", "0.3", "--rate", "100", "--pids", str(os.getpid()), "--drain-s", "1",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, _ = await process.communicate()
    return process.returncode or 0, [json.loads(line) for line in out.splitlines()]


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc was not found")


@needs_gcc
async def test_good_server_passes_and_every_tagged_frame_is_acked() -> None:
    stand_in = StandIn()
    code, phases = await drive(stand_in)
    assert code == 0
    assert [phase["phase"] for phase in phases] == ["closed", "open"]
    assert all(phase["good"] and phase["accepted"] and phase["connections"] == 2 for phase in phases)
    assert phases[1]["accepted"] == pytest.approx(30, abs=3)
    assert stand_in.acked == stand_in._tags


def _shift(change: Callable[[Msg], list[Msg]], at: int = 5) -> Callable[[Msg], list[Msg]]:
    return lambda msg: change(msg) if msg.seq == at else [msg]


@needs_gcc
async def test_message_that_never_arrives_is_seen() -> None:
    code, phases = await drive(StandIn(_shift(lambda _: [])))
    assert code == 1
    assert not phases[0]["drained"]
    assert phases[0]["uneven"]


@needs_gcc
async def test_message_that_arrives_twice_is_seen() -> None:
    code, phases = await drive(StandIn(_shift(lambda msg: [msg, msg])))
    assert code == 1
    assert phases[0]["repeats"] == 1


@needs_gcc
async def test_inversion_is_seen() -> None:
    held: list[Msg] = []

    def swap(msg: Msg) -> list[Msg]:
        if len(held) == 0 and msg.sender == "a" and msg.seq > 4:
            held.append(msg)
            return []
        if len(held) == 1 and msg.sender == "a":
            held.append(msg)
            return [msg, held[0]]
        return [msg]

    code, phases = await drive(StandIn(swap))
    assert code == 1
    assert phases[0]["holes"] == 1
    assert phases[0]["repeats"] == 1


def test_everybody_talks_and_no_conversation_is_listed_twice() -> None:
    import random

    chosen = pairs(10, 20, random.Random(7))
    assert len(set(chosen)) == 20
    assert {n for pair in chosen for n in pair} == set(range(10))
    with pytest.raises(ValueError, match="5-45"):
        pairs(10, 46, random.Random(7))
