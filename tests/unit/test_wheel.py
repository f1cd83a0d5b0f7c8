"""The wheel's edges: reuse, time, horizon, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastim._core.wheel import Wheel
from fastim.errors import UsageError

DAY_MS = 86_400_000
IDLE_MS = 30_000


def tick(wheel: Wheel, start_ms: int, end_ms: int) -> list[int]:
    """Sweep every 250 ms over [start, end]."""
    return [slot for now in range(start_ms, end_ms + 1, 250) for slot in wheel.sweep(now, IDLE_MS, 100)]


def test_a_silent_slot_is_reported_once_until_touched() -> None:
    wheel = Wheel()
    slot = wheel.add(0)
    assert tick(wheel, 0, 29_750) == []
    assert wheel.sweep(30_000, IDLE_MS, 10) == [slot]
    assert tick(wheel, 30_250, 90_000) == []
    wheel.touch(slot, 90_000)
    assert tick(wheel, 90_250, 119_750) == []
    assert wheel.sweep(120_000, IDLE_MS, 10) == [slot]


def test_a_removed_slot_is_never_reported_and_is_used_again() -> None:
    wheel = Wheel()
    first, second = wheel.add(0), wheel.add(0)
    wheel.remove(first)
    assert tick(wheel, 0, 60_000) == [second]
    assert wheel.add(60_000) == first
    assert (len(wheel), wheel.count) == (2, 2)


@pytest.mark.parametrize("slot", [-1, 0, 1, 5_000_000])
def test_a_slot_that_is_not_held_is_refused(slot: int) -> None:
    wheel = Wheel()
    wheel.remove(wheel.add(0))
    with pytest.raises(UsageError, match="is not held"):
        wheel.touch(slot, 5)
    with pytest.raises(UsageError, match="is not held"):
        wheel.remove(slot)


def test_cap_means_call_again() -> None:
    wheel = Wheel()
    slots = [wheel.add(0) for _ in range(5)]
    assert tick(wheel, 0, 29_750) == []
    assert wheel.sweep(30_000, IDLE_MS, 2) == slots[:2]
    assert wheel.sweep(30_000, IDLE_MS, 2) == slots[2:4]
    assert wheel.sweep(30_000, IDLE_MS, 2) == slots[4:]


def test_time_never_goes_backwards() -> None:
    wheel = Wheel()
    wheel.add(1000)
    wheel.sweep(2000, IDLE_MS, 1)
    for late in (lambda: wheel.sweep(1999, IDLE_MS, 1), lambda: wheel.add(1999), lambda: wheel.grace(1999)):
        with pytest.raises(ValueError, match="1999, which is before 2000"):
            late()


@pytest.mark.parametrize(("idle_ms", "cap"), [(0, 1), (13 * DAY_MS, 1), (1, 0), (1, -1)])
def test_arguments_out_of_range_are_refused(idle_ms: int, cap: int) -> None:
    with pytest.raises(UsageError):
        Wheel().sweep(0, idle_ms, cap)


def test_stall_ms_of_0_is_refused() -> None:
    with pytest.raises(UsageError, match="stall_ms is 0"):
        Wheel(stall_ms=0)


def test_a_stalled_process_sweeps_nobody_and_adds_the_stall_to_everybody() -> None:
    wheel = Wheel(stall_ms=1000)
    slot = wheel.add(0)
    assert tick(wheel, 0, 20_000) == []
    assert wheel.sweep(80_000, IDLE_MS, 10) == []
    assert tick(wheel, 80_250, 89_750) == []
    assert wheel.sweep(90_000, IDLE_MS, 10) == [slot]


def test_grace_gives_everybody_a_whole_idle_time() -> None:
    wheel = Wheel()
    slot = wheel.add(0)
    assert tick(wheel, 0, 29_000) == []
    wheel.grace(29_100)
    assert tick(wheel, 29_250, 59_000) == []
    assert wheel.sweep(59_100, IDLE_MS, 10) == [slot]
    wheel.grace(59_200)
    assert tick(wheel, 59_250, 120_000) == []


def test_touched_slots_stay_for_years_and_silent_ones_leave_after_any_of_them() -> None:
    wheel = Wheel(stall_ms=DAY_MS)
    start = now = 123_456_789
    slot = wheel.add(now)
    while now < start + 800 * DAY_MS:
        now += DAY_MS // 2
        assert wheel.sweep(now, DAY_MS, 10) == []
        wheel.touch(slot, now)
    assert wheel.sweep(now + DAY_MS - 1, DAY_MS, 10) == []
    assert wheel.sweep(now + DAY_MS, DAY_MS, 10) == [slot]
    assert wheel.sweep(now + 2 * DAY_MS, DAY_MS, 10) == []


@pytest.mark.parametrize("days", [12, 24, 25, 49, 50, 99, 10_000])
def test_one_sweep_after_any_time_does_not_wrap(days: int) -> None:
    silent = Wheel(stall_ms=20_000 * DAY_MS)
    slot = silent.add(5)
    assert silent.sweep(5 + days * DAY_MS, 12 * DAY_MS, 10) == [slot]
    fresh = Wheel(stall_ms=20_000 * DAY_MS)
    fresh.add(5)
    second = fresh.add(5 + days * DAY_MS)
    assert fresh.sweep(5 + days * DAY_MS + 10, 12 * DAY_MS, 10) == [0]
    assert second == 1


def test_memory_stays_flat_over_millions_of_connections(peak_kb: Callable[[], int]) -> None:
    wheel = Wheel()

    def churn() -> None:
        slots = [wheel.add(0) for _ in range(1000)]
        for slot in slots:
            wheel.remove(slot)

    churn()
    before = peak_kb()
    for _ in range(500):
        churn()
    assert peak_kb() - before < 2048
    assert wheel.add(0) < 1000
