"""The client's sealed wire, against a server's end that is written by hand."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import pytest

from fastim._core.frame import split
from fastim._core.sealed import SealedStream
from fastim.client import sealed as module
from fastim.client.sealed import SealedWire, sealed_dial
from fastim.client.wire import DialError, Receiver, Wire
from fastim.protocol import (
    MAX_PACKET_BYTES,
    MAX_SEALED_BYTES,
    Auth,
    Error,
    Keys,
    Op,
    Ping,
    Probe,
    Rekey,
    decode,
    encode,
)
from fastim.sealing import SealKeys, SharedKey, StaticKey
from tests.system.dispatch_world import HandClock

STATIC = StaticKey.generate("k1")
SHARED = SharedKey("factory", bytes(range(32)))
PING, PROBE, AUTH = encode(Ping()), encode(Probe()), encode(Auth(1, 1, "the token", "phone"))


class Below:
    """The wire under the sealed one, and the server behind it."""

    max_packet_bytes = MAX_PACKET_BYTES

    def __init__(self, receiver: Receiver, keys: SealKeys) -> None:
        self.receiver = receiver
        self.keys = keys
        self.written: list[bytes] = []
        self.closed: list[str] = []
        self.stream: SealedStream | None = None
        self.answer: Callable[[Rekey], bytes] | None = None
        self.opened: list[bytes] = []
        self.holds_back = False
        """KEYS inside SEALED are not answered by themselves."""

    # -- wire.Wire

    def send(self, packet: bytes) -> None:
        self.written.append(packet)
        if self.stream is not None:
            packet = self.stream.open(packet)
            self.opened.append(packet)
        op, start, end = split(packet)[0]
        if op == Op.REKEY and not self.holds_back:
            rekey = decode(op, packet[start:end])
            assert isinstance(rekey, Rekey)
            asyncio.get_running_loop().call_soon(self.reply, rekey)

    def close(self, code: int) -> None:
        self.closed.append(f"close {code}")

    def abort(self) -> None:
        self.closed.append("abort")

    def pause(self) -> None:
        self.closed.append("pause")

    def resume(self) -> None:
        self.closed.append("resume")

    def buffered_bytes(self) -> int:
        return 77

    async def gone(self) -> None:
        self.closed.append("gone")

    # -- the server

    def reply(self, rekey: Rekey, *before: bytes) -> None:
        if self.answer is not None:
            self.receiver.on_packet(self.answer(rekey))
            return
        keys, agreed = self.keys.answer(rekey)
        packet = b"".join(before) + encode(keys)
        if self.stream is None:
            self.receiver.on_packet(packet)
            self.stream = SealedStream(rekey.key_id, *agreed.server(), client=False)
        else:
            sealed = self.stream.seal(packet)
            self.stream.renew(rekey.key_id, *agreed.server())
            self.receiver.on_packet(sealed)

    def say(self, *frames: bytes) -> None:
        assert self.stream is not None
        self.receiver.on_packet(self.stream.seal(b"".join(frames)))


class Above:
    """The connection: keeps what it is given."""

    def __init__(self) -> None:
        self.packets: list[bytes] = []
        self.ends: list[tuple[int, str]] = []

    def on_packet(self, packet: bytes) -> None:
        self.packets.append(packet)

    def on_closed(self, code: int, reason: str) -> None:
        self.ends.append((code, reason))


class Line:
    """Both ends."""

    def __init__(
        self, *, shared: SharedKey | None = None, wanted: StaticKey = STATIC, frames: int = 1_000_000
    ) -> None:
        self.clock = HandClock()
        self.above = Above()
        self.below: Below
        self.answer: Callable[[Rekey], bytes] | None = None
        self.silent = False
        self._dial = sealed_dial(self._dial_below, wanted.seal_key(shared), self.clock, rekey_frames=frames)

    async def _dial_below(self, receiver: Receiver) -> Wire:
        self.below = Below(receiver, SealKeys([STATIC], [SHARED]))
        self.below.answer = self.answer
        self.below.holds_back = self.silent
        return self.below

    async def dial(self) -> SealedWire:
        wire = await self._dial(self.above)
        assert isinstance(wire, SealedWire)
        return wire


async def refused(line: Line, words: str, rest_s: float = module.REFUSED_REST_S) -> None:
    """No wire came about, no token left, and nothing is open."""
    with pytest.raises(DialError, match=words) as error:
        await line.dial()
    assert error.value.retry_after_s == rest_s
    assert [split(packet)[0][0] for packet in line.below.written] == [Op.REKEY]
    assert line.below.closed == ["abort", "gone"]
    assert line.above.packets == []
    assert line.above.ends == []


# ------------------------------------------------------------------------------------------------ fine


@pytest.mark.parametrize("shared", [None, SHARED], ids=["plain", "pre-shared"])
async def test_what_is_sent_and_received_is_as_without_a_seal(shared: SharedKey | None) -> None:
    line = Line(shared=shared)
    wire = await line.dial()
    wire.send(AUTH)
    line.below.say(PROBE, PROBE)
    assert line.below.opened == [AUTH]
    assert line.above.packets == [PROBE + PROBE]
    assert all(b"the token" not in packet for packet in line.below.written)
    assert wire.max_packet_bytes == MAX_SEALED_BYTES


async def test_everything_but_packets_is_passed_on() -> None:
    line = Line()
    wire = await line.dial()
    wire.pause()
    wire.resume()
    assert wire.buffered_bytes() == 77
    wire.close(1000)
    wire.abort()
    await wire.gone()
    assert line.below.closed == ["pause", "resume", "close 1000", "abort", "gone"]
    line.below.receiver.on_closed(1012, "restart")
    assert line.above.ends == [(1012, "restart")]


# --------------------------------------------------------------------------------------------- refused


async def test_a_server_that_holds_another_key_of_that_name_gets_no_token() -> None:
    await refused(Line(wanted=StaticKey.generate("k1")), "does not hold the static key 'k1'")


async def test_a_server_that_does_not_hold_the_name_is_given_a_rest() -> None:
    line = Line(wanted=StaticKey.generate("k9"))
    line.answer = lambda rekey: encode(Error(Op.REKEY, "bad_seal", "no keys were agreed", False, 10**12))
    await refused(line, "does not seal with 'k9': bad_seal")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (PING, "answered REKEY with op 2"),
        (b"", "no good"),
        (b"\xc1", "no good"),
        (b"\x92\x34\x01", "no good"),
        (encode(Keys(1, bytes(32), bytes(16))), "does not hold"),
        (encode(Keys(1, b"", b"")), "does not hold"),
    ],
)
async def test_an_answer_that_is_none_is_a_failed_dial(answer: bytes, words: str) -> None:
    line = Line()
    line.answer = lambda rekey: answer
    await refused(line, words, module.REFUSED_REST_S if words == "does not hold" else 0.0)


async def test_keys_are_alone_in_their_packet() -> None:
    line = Line()
    keys = SealKeys([STATIC])
    line.answer = lambda rekey: encode(keys.answer(rekey)[0]) + PROBE
    await refused(line, re.escape("answered REKEY with op 52"), 0.0)


async def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGREE_TIMEOUT_S", 0.02)
    line = Line()
    line.silent = True
    await refused(line, "in time", 0.0)


async def test_a_wire_that_closes_meanwhile_is_a_failed_dial() -> None:
    line = Line()
    line.silent = True
    dialling = asyncio.create_task(line.dial())
    await asyncio.sleep(0)
    line.below.receiver.on_closed(4509, "")
    with pytest.raises(DialError, match=r"closed while keys were agreed \(4509\)"):
        await dialling
    assert line.above.ends == []


async def test_a_dial_that_is_cancelled_leaves_no_wire_behind() -> None:
    line = Line()
    line.silent = True
    dialling = asyncio.create_task(line.dial())
    await asyncio.sleep(0)
    dialling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dialling
    assert line.below.closed == ["abort", "gone"]


@pytest.mark.parametrize("kind", ["touched", "in clear", "again", "of the other direction"])
async def test_a_frame_that_does_not_open_ends_the_connection(kind: str) -> None:
    line = Line()
    wire = await line.dial()
    stream = line.below.stream
    assert stream is not None
    line.below.say(PROBE)
    good = stream.seal(PROBE)
    forged = {
        "touched": good[:-1] + bytes([good[-1] ^ 1]), "in clear": PROBE, "again": good,
        "of the other direction": b"\x94\x18" + good[2:],
    }[kind]  # fmt: skip
    if kind == "again":
        line.below.receiver.on_packet(good)
    line.below.receiver.on_packet(forged)
    assert line.below.closed == ["abort"]
    taken = list(line.above.packets)
    line.below.receiver.on_packet(stream.seal(PROBE))
    assert line.above.packets == taken == [PROBE] * (2 if kind == "again" else 1)
    line.below.receiver.on_closed(1006, "")
    assert line.above.ends == [(1006, "the seal of the connection was broken on the way")]
    wire.abort()


async def test_a_close_without_a_word_is_no_reason_to_stay_away() -> None:
    for code, reason, heard in (
        (4509, "", (1006, "the seal of the connection was broken on the way")),
        (4509, "bad_frame", (4509, "bad_frame")),
        (4411, "", (4411, "")),
    ):
        line = Line()
        await line.dial()
        line.below.receiver.on_closed(code, reason)
        assert line.above.ends == [heard]


# -------------------------------------------------------------------------------------------- new keys


async def test_new_keys_are_asked_for_when_the_old_are_used_up() -> None:
    line = Line(frames=10)
    wire = await line.dial()
    line.clock.passed_ms += module.REKEY_LEAST_MS
    for _ in range(25):
        wire.send(PING)
        await asyncio.sleep(0.001)
        line.below.say(PROBE)
    assert [split(packet)[0][0] for packet in line.below.opened].count(Op.REKEY) == 1
    line.clock.passed_ms += module.REKEY_LEAST_MS
    wire.send(PING)
    await asyncio.sleep(0.001)
    assert [split(packet)[0][0] for packet in line.below.opened].count(Op.REKEY) == 2
    assert line.above.packets == [PROBE] * 25
    assert line.below.opened.count(PING) == 26


async def test_new_keys_are_asked_for_when_the_old_are_an_hour_old() -> None:
    line = Line()
    wire = await line.dial()
    wire.send(PING)
    line.clock.passed_ms += module.REKEY_MS - 1
    wire.send(PING)
    assert line.below.opened == [PING, PING]
    line.clock.passed_ms += 1
    line.below.say(PROBE)
    await asyncio.sleep(0.001)
    assert len(line.below.opened) == 3
    wire.send(PING)
    assert line.below.opened[-1] == PING
    assert line.below.stream is not None
    assert (line.below.stream.open_key_id, line.below.stream.pending) == (2, False)


async def test_what_is_said_before_the_new_keys_come_goes_under_the_old() -> None:
    line = Line(frames=2)
    wire = await line.dial()
    line.below.holds_back = True
    line.clock.passed_ms += module.REKEY_LEAST_MS
    for _ in range(6):
        wire.send(PING)
    rekey = decode(Op.REKEY, next(packet for packet in line.below.opened if packet != PING))
    assert isinstance(rekey, Rekey)
    line.below.say(PROBE)
    line.below.reply(rekey, PROBE, PING)
    line.below.say(PROBE)
    wire.send(PING)
    assert line.below.opened.count(PING) == 7
    assert line.above.packets == [PROBE, PROBE + PING, PROBE]


async def test_keys_without_a_proof_end_the_connection() -> None:
    line = Line(frames=1)
    wire = await line.dial()
    line.below.holds_back = True
    line.clock.passed_ms += module.REKEY_LEAST_MS
    wire.send(PING)
    line.below.say(encode(Keys(2, bytes(range(32)), bytes(16))))
    assert line.below.closed == ["abort"]


async def test_a_server_that_gives_no_new_keys_is_left_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(frames=1)
    wire = await line.dial()
    line.below.holds_back = True
    stream = wire._stream
    assert stream is not None

    class Spent:
        left = 0

    monkeypatch.setattr(wire, "_stream", Spent())
    wire.send(PING)
    wire.send(PING)
    assert line.below.closed == ["abort", "abort"]
    assert line.below.opened == []
