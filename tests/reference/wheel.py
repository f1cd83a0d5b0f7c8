"""The slow twin of fastim._core.wheel: a dict of absolute times."""

from __future__ import annotations

from fastim.errors import UsageError


class Wheel:
    def __init__(self, *, stall_ms: int = 1000) -> None:
        self.stall_ms = stall_ms
        self.touched: dict[int, int] = {}
        self.reported: set[int] = set()
        self.now = 0
        self.swept: int | None = None

    def advance(self, mono_ms: int) -> None:
        if mono_ms < self.now:
            raise UsageError("time goes backwards")
        self.now = mono_ms

    def add(self, slot: int, mono_ms: int) -> None:
        """Takes the slot that the wheel under test chose."""
        self.advance(mono_ms)
        assert slot not in self.touched
        self.touched[slot] = mono_ms

    def touch(self, slot: int, mono_ms: int) -> None:
        if slot not in self.touched:
            raise UsageError("not held")
        self.touched[slot] = mono_ms
        self.reported.discard(slot)

    def remove(self, slot: int) -> None:
        if slot not in self.touched:
            raise UsageError("not held")
        del self.touched[slot]
        self.reported.discard(slot)

    def sweep(self, mono_ms: int, idle_ms: int, cap: int) -> list[int]:
        self.advance(mono_ms)
        gap = 0 if self.swept is None else mono_ms - self.swept
        self.swept = mono_ms
        if gap > self.stall_ms:
            self.forward(gap)
            return []
        silent = sorted(
            slot
            for slot, touched in self.touched.items()
            if touched <= mono_ms - idle_ms and slot not in self.reported
        )[:cap]
        self.reported.update(silent)
        return silent

    def grace(self, mono_ms: int) -> None:
        self.advance(mono_ms)
        self.swept = mono_ms
        self.forward(mono_ms)

    def forward(self, by_ms: int) -> None:
        for slot in self.touched.keys() - self.reported:
            self.touched[slot] = min(self.touched[slot] + by_ms, self.now)
