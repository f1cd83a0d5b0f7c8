"""One simulated connection: two ordered pipes between two loops, and the ways in which it fails.

Inside one direction bytes keep their order, as in TCP; across connections, and across the two directions,
anything can overtake. Faults, each at any moment:

cut         a reset: what is under way is lost, both ends see 1006 (a killed end sees nothing)
half-open   what is sent from now on goes nowhere, both ways, and neither end is told
stalled     the peer stops reading: what is sent waits (and counts as unsent) until it reads again
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from tests.simulation.loop import SimLoop

END_OF_TCP: Final = 0
"""In place of a close code: the other end's kernel said goodbye, the program did not."""


class End(Protocol):
    """What a pipe delivers to. Called on the end's own loop."""

    def on_packet(self, packet: bytes) -> None: ...

    def on_closed(self, code: int) -> None: ...


class Pipe:
    """One direction."""

    def __init__(self, target_loop: SimLoop, target: End, latency_s: Callable[[], float]) -> None:
        self.target_loop = target_loop
        self.target = target
        self.latency_s = latency_s
        self.gone = False
        """Half-open or cut: what is sent is lost."""
        self.stalled = False
        self.waiting: deque[bytes] = deque()
        """Held back by a stall."""
        self.waiting_bytes = 0
        self._floor = 0.0
        self._epoch = 0
        self._closed_code: int | None = None

    def send(self, packet: bytes) -> None:
        if self.gone or self._closed_code is not None:
            return
        if self.stalled:
            self.waiting.append(packet)
            self.waiting_bytes += len(packet)
            return
        self._later(self._packet, packet)

    def close(self, code: int) -> None:
        """An orderly close frame, behind what was sent."""
        if self.gone or self._closed_code is not None:
            return
        self._closed_code = code
        if not self.stalled:
            self._later(self._close, code)

    def cut(self) -> None:
        """Lose what is under way; the target sees 1006."""
        if self.gone:
            return
        self.gone = True
        self._epoch += 1
        self.waiting.clear()
        self.waiting_bytes = 0
        self._later(self._reset)

    def lose_silently(self) -> None:
        """Half-open: from now on nothing arrives, what is under way included."""
        self.gone = True
        self._epoch += 1
        self.waiting.clear()
        self.waiting_bytes = 0

    def stall(self, stalled: bool) -> None:
        self.stalled = stalled
        if not stalled:
            while self.waiting:
                self._later(self._packet, self.waiting.popleft())
            self.waiting_bytes = 0
            if self._closed_code is not None and not self.gone:
                self._later(self._close, self._closed_code)

    def _later(self, deliver: Callable[..., None], *args: Any) -> None:
        now = self.target_loop.scheduler.now
        self._floor = max(self._floor, now + self.latency_s())
        if not self.target_loop.dead:
            self.target_loop.call_at(self._floor, deliver, self._epoch, *args)

    def _packet(self, epoch: int, packet: bytes) -> None:
        if epoch == self._epoch:
            self.target.on_packet(packet)

    def _close(self, epoch: int, code: int) -> None:
        if epoch == self._epoch:
            self.target.on_closed(code)

    def _reset(self, epoch: int) -> None:
        if epoch == self._epoch:
            self.target.on_closed(1006)
