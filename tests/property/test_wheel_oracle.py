"""fastim._core.wheel does what its slow twin does, over any history of a fake clock."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastim._core.wheel import Wheel
from tests.reference.wheel import Wheel as Oracle

IDLE_MS = 30_000
DAY_MS = 86_400_000


class WheelAgrees(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.wheel = Wheel(stall_ms=1000)
        self.oracle = Oracle(stall_ms=1000)
        self.now = 7

    def a_slot(self, index: int) -> int:
        held = sorted(self.oracle.touched)
        return held[index % len(held)]

    @rule(ms=st.sampled_from([0, 1, 249, 250, 999, 1000, 1001, 29_999, 30_000, 5_000_000, 7 * DAY_MS]))
    def time_passes(self, ms: int) -> None:
        self.now += ms

    @rule()
    def add(self) -> None:
        slot = self.wheel.add(self.now)
        self.oracle.add(slot, self.now)

    @precondition(lambda self: self.oracle.touched)
    @rule(index=st.integers(0, 99))
    def touch(self, index: int) -> None:
        slot = self.a_slot(index)
        self.wheel.touch(slot, self.now)
        self.oracle.touch(slot, self.now)

    @precondition(lambda self: self.oracle.touched)
    @rule(index=st.integers(0, 99))
    def remove(self, index: int) -> None:
        slot = self.a_slot(index)
        self.wheel.remove(slot)
        self.oracle.remove(slot)

    @rule(cap=st.sampled_from([1, 2, 1000]), idle_ms=st.sampled_from([1, 900, IDLE_MS, DAY_MS]))
    def sweep(self, cap: int, idle_ms: int) -> None:
        assert self.wheel.sweep(self.now, idle_ms, cap) == self.oracle.sweep(self.now, idle_ms, cap)

    @rule(cap=st.sampled_from([1, 1000]))
    def sweep_without_a_stall(self, cap: int) -> None:
        # A first sweep takes up whatever stall there was; so the second one reports silence.
        self.sweep(cap, IDLE_MS)
        self.now += 250
        self.sweep(cap, IDLE_MS)

    @rule(ticks=st.sampled_from([31, 125]))
    def a_quiet_half_minute(self, ticks: int) -> None:
        for _ in range(ticks):
            self.now += 250
            self.sweep(1000, IDLE_MS)

    @rule()
    def grace(self) -> None:
        self.wheel.grace(self.now)
        self.oracle.grace(self.now)

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.wheel) == len(self.oracle.touched)


WheelAgrees.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestWheelAgrees = WheelAgrees.TestCase


def test_silent_peers_leave_within_30_to_31_s_and_live_ones_never_whatever_stalls() -> None:
    """P7 on a fake clock: 200 peers beat every 10 s, half fall silent, the process stands still at random.

    Silence is measured without the time in which this process itself stood still.
    """
    for seed in range(20):
        rng = random.Random(seed)
        wheel = Wheel(stall_ms=1000)
        now = 1_000
        next_beat = {wheel.add(now): now + rng.randrange(10_000) for _ in range(200)}
        silent_since: dict[int, int] = {}
        stalls: list[tuple[int, int]] = []
        left: set[int] = set()
        calm_ms = 0
        while calm_ms < 40_000:
            step = 250
            if now >= 180_000:
                calm_ms += step
            elif rng.random() < 0.01:
                step = rng.randrange(1_001, 90_000)
                stalls.append((now, now + step))
            now += step
            # A process that wakes sweeps before it has read what waits in its sockets.
            for slot in wheel.sweep(now, 30_000, 1000):
                assert slot in silent_since, (seed, now)
                since = silent_since[slot]
                stalled = sum(end - start for start, end in stalls if start >= since)
                assert 30_000 <= now - since - stalled <= 31_000, (seed, now)
                left.add(slot)
            for slot in [slot for slot, due in next_beat.items() if due <= now]:
                wheel.touch(slot, now)
                next_beat[slot] = now + 10_000
                if calm_ms == 0 and rng.random() < 0.1:
                    silent_since[slot] = now
                    del next_beat[slot]
        assert left == silent_since.keys(), seed
