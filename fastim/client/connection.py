"""One connection to a server: frames in a bounded queue, heartbeat, liveness, and when to come back.

The worker of the client takes frames when it has stored the ones before; what must not wait for a disk is
done here: PROBE is answered, PING is sent, a silent server is given up, reading stops while too much waits.

 OPEN ──close(), server's close, silence──▶ CLOSED(code, reason), after the last frame was queued

K1  a PROBE is answered at once, whatever the worker does     tests/unit/test_client_connection.py
K2  what waits in the queue is bounded                        same
K3  the first beat comes after heartbeat x random             same
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from fastim._core.frame import split
from fastim.client.wire import Wire
from fastim.clock import Clock
from fastim.errors import PeerError
from fastim.protocol import MAX_FRAMES_PER_PACKET, MAX_PACKET_BYTES, CloseCode, Frame, Op, Ping, encode

QUEUE_HIGH_BYTES: Final = 524_288
QUEUE_LOW_BYTES: Final = 131_072
CLOGGED_BYTES: Final = 262_144
"""So much unwritten: nothing new is sent until it drains."""
HELLO_PATIENCE_MS: Final = 10_000
HEARTBEAT_LEAST_MS: Final = 10
_PING: Final = encode(Ping())


class Connection:
    """The receiver of a wire. `on_frames` is called when there is something to take, or the end."""

    def __init__(self, clock: Clock, rng: random.Random, on_frames: Callable[[], None]) -> None:
        self._clock = clock
        self._rng = rng
        self._on_frames = on_frames
        self._wire: Wire | None = None
        self._gone: Wire | None = None
        self._queue: deque[tuple[int, bytes]] = deque()
        """(op, frame)"""
        self._queued_bytes = 0
        self._paused = False
        self._most_bytes = MAX_PACKET_BYTES
        self._heard_mono_ms = clock.mono_ms()
        self._heartbeat_ms = 0
        self._beat_mono_ms = 0
        self._timer: asyncio.TimerHandle | None = None
        self._why = ""
        self.code = 0
        """Close code, 0 while open."""
        self.reason = ""
        self.closed = asyncio.Event()

    # -- wire.Receiver

    def on_packet(self, packet: bytes) -> None:
        self._heard_mono_ms = self._clock.mono_ms()
        try:
            frames = split(packet)
        except PeerError as error:
            self.abort(f"the server sent a bad packet: {error.detail}")
            return
        for op, start, end in frames:
            if op == Op.PROBE:
                self._send_bytes(_PING)
            else:
                self._queue.append((op, packet[start:end]))
                self._queued_bytes += end - start
        if self._queued_bytes > QUEUE_HIGH_BYTES and not self._paused and self._wire is not None:
            self._paused = True
            self._wire.pause()
        self._on_frames()

    def on_closed(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = self._why or reason
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._gone, self._wire = self._wire, None
        self.closed.set()
        self._on_frames()

    # -- for the client

    def open(self, wire: Wire) -> None:
        """The wire is there. A wire that has closed meanwhile has said so already."""
        if self.code:
            self._gone = wire
            return
        self._wire = wire
        self._most_bytes = wire.max_packet_bytes
        self._heard_mono_ms = self._clock.mono_ms()
        self._arm()

    def take(self, most: int) -> list[tuple[int, bytes]]:
        """(op, frame) of up to `most` frames, oldest first."""
        queue = self._queue
        taken = [queue.popleft() for _ in range(min(most, len(queue)))]
        self._queued_bytes -= sum(len(frame) for _, frame in taken)
        if self._paused and self._queued_bytes < QUEUE_LOW_BYTES and self._wire is not None:
            self._paused = False
            self._heard_mono_ms = self._clock.mono_ms()
            self._wire.resume()
        return taken

    @property
    def ended(self) -> bool:
        """Closed, and every frame of it was taken."""
        return bool(self.code) and not self._queue

    @property
    def waiting(self) -> bool:
        """Whether there are frames to take."""
        return bool(self._queue)

    @property
    def clogged(self) -> bool:
        return self._wire is not None and self._wire.buffered_bytes() > CLOGGED_BYTES

    def send(self, frames: Iterable[Frame]) -> None:
        """In order, as few packets as the limits allow."""
        packet: list[bytes] = []
        size = 0
        for frame in frames:
            part = encode(frame)
            if packet and (size + len(part) > self._most_bytes or len(packet) == MAX_FRAMES_PER_PACKET):
                self._send_bytes(b"".join(packet))
                packet, size = [], 0
            packet.append(part)
            size += len(part)
        if packet:
            self._send_bytes(b"".join(packet))

    def _send_bytes(self, packet: bytes) -> None:
        if self._wire is not None:
            self._wire.send(packet)

    def live(self, heartbeat_ms: int) -> None:
        """HELLO has come: beat from now on."""
        self._heartbeat_ms = max(heartbeat_ms, HEARTBEAT_LEAST_MS)
        self._beat_mono_ms = self._clock.mono_ms() + int(self._heartbeat_ms * self._rng.random())
        self._arm()

    def close(self, why: str = "") -> None:
        """Leave in good order."""
        self._why = self._why or why
        if self._wire is not None:
            self._wire.close(CloseCode.NORMAL)

    def abort(self, why: str) -> None:
        """Drop the connection."""
        self._why = self._why or why
        if self._wire is not None:
            self._wire.abort()

    async def gone(self) -> None:
        """After close or abort: until nothing of the socket is left."""
        wire = self._wire or self._gone
        if wire is not None:
            await wire.gone()

    # -- timers

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        wait_ms = self._silent_after_ms() - self._clock.mono_ms()
        if self._heartbeat_ms:
            wait_ms = min(wait_ms, self._beat_mono_ms - self._clock.mono_ms())
        self._timer = asyncio.get_running_loop().call_later(max(wait_ms, 0) / 1000 + 0.001, self._on_timer)

    def _silent_after_ms(self) -> int:
        patience_ms = self._heartbeat_ms * 2 + 2_000 if self._heartbeat_ms else HELLO_PATIENCE_MS
        return self._heard_mono_ms + patience_ms

    def _on_timer(self) -> None:
        self._timer = None
        mono_ms = self._clock.mono_ms()
        if self._paused:
            self._heard_mono_ms = mono_ms  # nobody listens; that is not the server's silence
        if mono_ms >= self._silent_after_ms():
            self.abort("the server is silent" if self._heartbeat_ms else "the server sent no HELLO")
            return
        if self._heartbeat_ms and mono_ms >= self._beat_mono_ms:
            self._beat_mono_ms = mono_ms + self._heartbeat_ms
            self._send_bytes(_PING)
        self._arm()


class Backoff:
    """When to come back: full jitter between 0.5 s and 0.5 s x 2^failures, at most 20 s."""

    LEAST_S: Final = 0.5
    MOST_S: Final = 20.0

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.failures = 0

    def next_s(self, at_least_s: float = 0.0) -> float:
        """Counts a failure and says how long to wait."""
        self.failures += 1
        most_s = min(self.MOST_S, self.LEAST_S * 2 ** min(self.failures, 16))
        return max(at_least_s, self._rng.uniform(self.LEAST_S, most_s))

    def lived(self, lived_ms: int, heartbeat_ms: int) -> None:
        """A connection that lived through a heartbeat was none."""
        if lived_ms >= heartbeat_ms:
            self.failures = 0
