"""Time, as an argument.

`mono_ms` orders what happens inside one process and never goes back; `wall_ms` is what people and other
machines see and may jump. The two never meet in one expression. Everything that measures a duration,
sweeps or retries uses `mono_ms`; timestamps, deadlines that leave the process (loss_time_ms, due rows,
push windows) use `wall_ms`. Tests and the simulation pass their own clock.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where a component reads the time."""

    def mono_ms(self) -> int:
        """Milliseconds since an arbitrary start; never decreases."""
        ...

    def wall_ms(self) -> int:
        """Unix milliseconds; may jump either way."""
        ...


class SystemClock:
    """The machine's own clocks."""

    __slots__ = ()

    def mono_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000
