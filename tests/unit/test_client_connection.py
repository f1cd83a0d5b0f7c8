"""fastim.client.connection: liveness, the bounded queue and packets, over a wire that the test holds."""

from __future__ import annotations

import asyncio
import random

import pytest

from fastim import protocol as p
from fastim._core.frame import split
from fastim.client.connection import (
    CLOGGED_BYTES,
    HELLO_PATIENCE_MS,
    QUEUE_HIGH_BYTES,
    QUEUE_LOW_BYTES,
    Backoff,
    Connection,
)
from fastim.protocol import MAX_FRAMES_PER_PACKET, MAX_PACKET_BYTES
from tests.unit.client_script import msg, until

PING = p.encode(p.Ping())


class StringWire:
    """A wire (client.wire.Wire) whose other end is a list."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.packets: list[bytes] = []
        self.paused = False
        self.waiting_bytes = 0
        self.ended = False

    def send(self, packet: bytes) -> None:
        if not self.ended:
            self.packets.append(packet)

    def close(self, code: int) -> None:
        self._end(code)

    def abort(self) -> None:
        self._end(1006)

    def _end(self, code: int) -> None:
        if not self.ended:
            self.ended = True
            asyncio.get_running_loop().call_soon(self.connection.on_closed, code, "")

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    max_packet_bytes = MAX_PACKET_BYTES

    def buffered_bytes(self) -> int:
        return self.waiting_bytes

    async def gone(self) -> None:
        pass


class VirtualClock:
    """The monotonic clock runs ahead by what the test says; timers still fire in real time."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def mono_ms(self) -> int:
        return int(asyncio.get_running_loop().time() * 1000) + self.ahead_ms

    def wall_ms(self) -> int:
        return 0


class Half(random.Random):
    def random(self) -> float:
        return 0.5


def opened() -> tuple[Connection, StringWire, VirtualClock, list[int]]:
    clock, woken = VirtualClock(), [0]

    def wake() -> None:
        woken[0] += 1

    connection = Connection(clock, Half(), wake)
    wire = StringWire(connection)
    connection.open(wire)
    return connection, wire, clock, woken


async def closed(connection: Connection) -> None:
    connection.abort("test")
    async with asyncio.timeout(5):
        await connection.closed.wait()


async def test_frames_of_a_packet_are_queued_in_order_and_wake_the_worker_once() -> None:
    connection, _, _, woken = opened()
    connection.on_packet(b"".join(p.encode(msg(n, n)) for n in (1, 2, 3)))
    assert woken == [1]
    frames = [p.decode(op, frame) for op, frame in connection.take(2)]
    assert [frame.seq for frame in frames if isinstance(frame, p.Msg)] == [1, 2]
    assert connection.waiting
    assert len(connection.take(9)) == 1
    assert not connection.waiting
    await closed(connection)


async def test_a_probe_is_answered_at_once_and_is_not_the_workers_business() -> None:
    connection, wire, _, _ = opened()
    connection.on_packet(p.encode(p.Probe()) + p.encode(msg(1, 1)))
    assert wire.packets == [PING]
    assert len(connection.take(9)) == 1
    await closed(connection)


async def test_a_packet_that_is_none_ends_the_connection() -> None:
    connection, wire, _, _ = opened()
    connection.on_packet(b"\xc1")
    assert wire.ended
    await connection.closed.wait()
    assert (connection.code, connection.ended) == (1006, True)
    assert "bad packet" in connection.reason


async def test_reading_stops_while_too_much_waits() -> None:
    connection, wire, _, _ = opened()
    packet = p.encode(msg(1, 1, body=bytes(50_000)))
    for _ in range(QUEUE_HIGH_BYTES // 50_000 + 1):
        connection.on_packet(packet)
    assert wire.paused
    while connection._queued_bytes >= QUEUE_LOW_BYTES:
        assert wire.paused
        connection.take(1)
    assert not wire.paused
    await closed(connection)


async def test_what_came_before_the_end_is_taken_before_it_counts_as_ended() -> None:
    connection, _, _, woken = opened()
    connection.on_packet(p.encode(msg(1, 1)))
    connection.on_closed(4008, "half-open")
    assert not connection.ended
    connection.take(9)
    assert connection.ended
    assert (connection.code, connection.reason, woken[0]) == (4008, "half-open", 2)


async def test_frames_go_out_in_few_packets_within_the_limits() -> None:
    connection, wire, _, _ = opened()
    connection.send([p.Ack(n) for n in range(MAX_FRAMES_PER_PACKET + 6)])
    assert [len(split(packet)) for packet in wire.packets] == [MAX_FRAMES_PER_PACKET, 6]
    wire.packets.clear()
    items = [p.SendItem(bytes(16), 1, bytes(30_000))]
    connection.send([p.Send("p:a:b", items) for _ in range(5)])
    assert [len(split(packet)) for packet in wire.packets] == [2, 2, 1]
    assert max(map(len, wire.packets)) <= MAX_PACKET_BYTES
    connection.send([])
    assert len(wire.packets) == 3
    await closed(connection)


async def test_a_full_write_buffer_shows() -> None:
    connection, wire, _, _ = opened()
    assert not connection.clogged
    wire.waiting_bytes = CLOGGED_BYTES + 1
    assert connection.clogged
    await closed(connection)
    assert not connection.clogged


async def test_the_first_beat_comes_after_a_random_part_of_the_heartbeat() -> None:
    connection, wire, _, _ = opened()
    started = asyncio.get_running_loop().time()
    connection.live(60)
    await until(lambda: wire.packets == [PING])
    first_s = asyncio.get_running_loop().time() - started
    await until(lambda: wire.packets == [PING, PING])
    second_s = asyncio.get_running_loop().time() - started
    assert first_s >= 0.025
    assert second_s >= 0.085
    await closed(connection)


async def test_a_server_that_is_silent_is_given_up() -> None:
    connection, wire, clock, _ = opened()
    connection.live(10)
    await until(lambda: bool(wire.packets))
    assert not wire.ended
    clock.ahead_ms += 10 * 2 + 2_000
    await until(lambda: bool(connection.code))
    assert connection.reason == "the server is silent"


async def test_a_server_that_says_anything_is_not_given_up() -> None:
    connection, wire, clock, _ = opened()
    connection.live(10)
    for _ in range(5):
        clock.ahead_ms += 1_500
        connection.on_packet(p.encode(p.Pong(0, 0, 0)))
        beats = len(wire.packets)
        await until(lambda: len(wire.packets) > beats + 1)  # noqa: B023
    assert not wire.ended
    await closed(connection)


async def test_a_connection_that_we_do_not_read_is_not_silent() -> None:
    connection, wire, clock, _ = opened()
    connection.live(10)
    packet = p.encode(msg(1, 1, body=bytes(60_000)))
    while not wire.paused:
        connection.on_packet(packet)
    clock.ahead_ms += 60_000
    beats = len(wire.packets)
    await until(lambda: len(wire.packets) > beats + 2)
    assert not wire.ended
    await closed(connection)


async def test_a_server_without_hello_is_given_up() -> None:
    connection, wire, clock, _ = opened()
    clock.ahead_ms += HELLO_PATIENCE_MS
    connection._arm()
    await until(lambda: bool(connection.code))
    assert connection.reason == "the server sent no HELLO"
    assert wire.packets == []


async def test_a_wire_that_closed_while_it_was_handed_over_stays_closed() -> None:
    clock = VirtualClock()
    connection = Connection(clock, Half(), lambda: None)
    wire = StringWire(connection)
    connection.on_closed(1012, "restart")
    connection.open(wire)
    connection.send([p.Ping()])
    assert wire.packets == []
    assert connection.ended


@pytest.mark.parametrize("seed", range(5))
def test_waits_between_connections_are_jittered_and_grow_up_to_20_s(seed: int) -> None:
    backoff = Backoff(random.Random(seed))
    waits = [backoff.next_s() for _ in range(12)]
    for failures, wait_s in enumerate(waits, 1):
        assert 0.5 <= wait_s <= min(20.0, 0.5 * 2**failures)
    assert max(waits) > 8
    backoff.lived(9_999, 10_000)
    assert backoff.failures == 12
    backoff.lived(10_000, 10_000)
    assert backoff.next_s() <= 1.0
    assert backoff.next_s(30.0) == 30.0
