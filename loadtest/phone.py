"""One device on gevent: a blocking websocket below, the rules of fastim.client.device above.

The SDK's own state machine is sans-I/O, so the load test follows exactly the rules that apps follow: order,
holes, acks after storing, one SEND under way per conversation, resends under the same client_id. Only the
plumbing is here: a greenlet that reads, one that keeps time, and a lock around every turn.
"""

from __future__ import annotations

import random
import ssl
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import gevent
import gevent.lock
import websocket

from fastim import protocol as p
from fastim._core.frame import split
from fastim.client.device import Device
from fastim.client.events import Delivery, Message, StateChanged
from fastim.client.localstore import MemoryLocalStore
from fastim.client.outbox import Unsent
from fastim.clock import SystemClock
from fastim.model import Kind

T = TypeVar("T")
HELLO_PATIENCE_S = 10.0
FASTEST_RECONNECT_S, SLOWEST_RECONNECT_S = 0.5, 20.0


def finished(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits (the store in memory)."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise RuntimeError("the local store waited for something")


def uuid7() -> bytes:
    drawn = uuid.uuid4().bytes
    return (time.time_ns() // 1_000_000).to_bytes(6, "big") + bytes([0x70 | drawn[6] & 0x0F]) + drawn[7:]


class Phone:
    """on_shown(message), on_answer(client_id, msg_id or 0, code) are called as things happen."""

    def __init__(
        self,
        url: str,
        token: str,
        user: str,
        ca_file: str | None,
        on_shown: Callable[[Message], None],
        on_answer: Callable[[bytes, int, str], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self.user = user
        self._url, self._token, self._ca_file = url, token, ca_file
        self._on_shown, self._on_answer, self._on_trouble = on_shown, on_answer, on_trouble
        self._clock = SystemClock()
        self._store = MemoryLocalStore(keep=64, max_waiting=0)
        self._device = Device(finished(self._store.open("d0")), self._clock, random.Random())
        self._turn = gevent.lock.RLock()
        self._socket: websocket.WebSocket | None = None
        self._sends = 0
        self._over = False
        self._tries = 0
        self._greenlets: list[gevent.Greenlet] = []

    @property
    def live(self) -> bool:
        return self._device.live

    @property
    def unanswered(self) -> int:
        return len(self._device.entries())

    def start(self) -> None:
        """Connect and stay connected. Returns once HELLO came; raises ConnectionError."""
        self._greenlets = [gevent.spawn(self._live_on), gevent.spawn(self._keep_time)]
        for greenlet in self._greenlets:
            greenlet.link_exception(
                lambda dead: self._on_trouble(f"{type(dead.exception).__name__} ended the phone")
            )
        deadline = time.monotonic() + HELLO_PATIENCE_S
        while not self.live:
            if time.monotonic() > deadline:
                raise ConnectionError(f"{self.user}: no HELLO within {HELLO_PATIENCE_S} s")
            gevent.sleep(0.01)

    def stop(self) -> None:
        self._over = True
        self.cut()
        gevent.killall(self._greenlets, block=False)

    def send(self, client_id: bytes, conv: str, body: bytes) -> None:
        """Into the outbox; the answer comes by on_answer, perhaps before this returns."""
        with self._turn:
            self._sends += 1
            self._device.add(
                Unsent(self._sends, client_id, conv, Kind.TEXT, body, 0, 0, (), 0, self._clock.wall_ms())
            )
            self._go_on()

    def cut(self, *, forget: bool = False) -> None:
        """Lose the connection; `forget`: the next one asks for a new session instead of a resume."""
        if forget:
            with self._turn:
                self._device.forget_session()
        found = self._socket
        if found is not None:
            found.shutdown()

    # ------------------------------------------------------------------------------------------ connection

    def _live_on(self) -> None:
        while not self._over:
            began = time.monotonic()
            try:
                self._connected()
            except (OSError, websocket.WebSocketException) as error:
                if not self._over and self._tries > 3:
                    self._on_trouble(f"{type(error).__name__}")
            self._tries = 0 if time.monotonic() - began > 5.0 else self._tries + 1
            longest = min(FASTEST_RECONNECT_S * 2**self._tries, SLOWEST_RECONNECT_S)
            gevent.sleep(random.uniform(0.1, longest))

    def _connected(self) -> None:
        options = {"ca_certs": self._ca_file} if self._ca_file else {"cert_reqs": ssl.CERT_REQUIRED}
        # Without an Origin: a request with one is a browser's.
        link = websocket.create_connection(
            self._url, timeout=30.0, sslopt=options, suppress_origin=True, subprotocols=[p.SUBPROTOCOL],
            skip_utf8_validation=True,
        )  # fmt: skip
        self._socket = link
        try:
            link.send_binary(p.encode(self._device.auth(self._token, "d0", "app", "loadtest")))
            while True:
                try:
                    packet = link.recv()
                except ValueError:
                    # ssl's word for a socket that cut() closed under its reader.
                    if link.sock is not None:
                        raise
                    return
                if not isinstance(packet, bytes) or not packet:
                    return
                self._arrived(packet)
        finally:
            self._socket = None
            link.shutdown()
            with self._turn:
                self._go_on()
                self._device.lost()

    def _arrived(self, packet: bytes) -> None:
        with self._turn:
            for op, start, end in split(packet):
                if op == p.Op.PROBE:
                    self._write([p.Ping()])
                else:
                    self._device.take(p.decode(op, packet[start:end]))
            if self._device.kicked is not None:
                self._on_trouble(f"kicked: {self._device.kicked.reason}")
            self._go_on()
            if self._device.fault:
                self._on_trouble(self._device.fault)
                self.cut()

    def _keep_time(self) -> None:
        beat_s = time.monotonic() + 10.0 * random.random()
        while not self._over:
            gevent.sleep(0.05)
            with self._turn:
                due_ms = self._device.next_due_ms()
                if due_ms is not None and due_ms <= self._clock.mono_ms():
                    self._go_on()
                if self.live and time.monotonic() >= beat_s:
                    beat_s = time.monotonic() + 10.0
                    self._write([p.Ping()])

    # ------------------------------------------------------------------------------------------------- turn

    def _go_on(self) -> None:
        """Store what has come, show it, and send what may be sent now."""
        device = self._device
        device.tick()
        batch = device.drain()
        placed = finished(self._store.commit(batch)) if batch else []
        device.committed(batch)
        device.tick()
        for position, shown in placed:
            if isinstance(shown, Message) and not shown.is_control:
                self._on_shown(shown)
            self._store.mark(position, position)
        signals, device.signals = device.signals, []
        for signal in signals:
            if isinstance(signal, StateChanged):
                if signal.state is Delivery.SENT:
                    self._on_answer(signal.client_id, signal.msg_id, "")
                elif signal.state is Delivery.REFUSED:
                    device.discard(signal.client_id)
                    self._on_answer(signal.client_id, 0, signal.code)
        frames, device.out = device.out, []
        self._write(frames)

    def _write(self, frames: list[p.Frame]) -> None:
        link = self._socket
        if link is None or not frames:
            return
        try:
            packet = b""
            for frame in map(p.encode, frames):
                if packet and len(packet) + len(frame) > p.MAX_PACKET_BYTES:
                    link.send_binary(packet)
                    packet = b""
                packet += frame
            link.send_binary(packet)
        except (OSError, websocket.WebSocketException):
            self.cut()
