"""SendRate: how many messages a user may send."""

from __future__ import annotations

import random

import pytest

from fastim.node import commands
from fastim.node.commands import SendRate


class Clock:
    now_ms = 1_000

    def mono_ms(self) -> int:
        return self.now_ms

    def wall_ms(self) -> int:
        raise AssertionError("a rate is measured by the monotonic clock")


def rate(per_s: int = 20, burst: int = 60) -> tuple[SendRate, Clock]:
    clock = Clock()
    return SendRate(clock, per_s, burst), clock


def test_a_burst_passes_and_the_next_message_has_to_wait() -> None:
    limit, _ = rate()
    assert limit.take("bob", 60) == 0
    assert limit.take("bob", 1) == 50


def test_waiting_as_long_as_told_is_enough() -> None:
    limit, clock = rate()
    limit.take("bob", 60)
    for count in (1, 7, 32):
        wait_ms = limit.take("bob", count)
        clock.now_ms += wait_ms - 1
        assert limit.take("bob", count) > 0
        clock.now_ms += 1
        assert limit.take("bob", count) == 0


def test_waiting_as_long_as_told_is_enough_at_any_rate() -> None:
    rng = random.Random(11)
    for _ in range(2_000):
        limit, clock = rate(rng.randrange(1, 2_000), rng.randrange(1, 100))
        for _ in range(4):
            count = rng.randrange(1, 33)
            clock.now_ms += rng.randrange(50)
            wait_ms = limit.take("bob", count)
            if wait_ms:
                clock.now_ms += wait_ms
                assert limit.take("bob", count) == 0


def test_a_refusal_takes_nothing() -> None:
    limit, _ = rate()
    limit.take("bob", 50)
    assert limit.take("bob", 11) > 0
    assert limit.take("bob", 10) == 0


def test_users_do_not_share() -> None:
    limit, _ = rate()
    limit.take("bob", 60)
    assert limit.take("carol", 60) == 0


def test_a_frame_above_the_burst_passes_when_the_bucket_is_full() -> None:
    limit, clock = rate(per_s=10, burst=5)
    assert limit.take("bob", 32) == 0
    assert limit.take("bob", 32) == 500
    clock.now_ms += 500
    assert limit.take("bob", 32) == 0


def test_a_bucket_never_holds_more_than_the_burst() -> None:
    limit, clock = rate(per_s=10, burst=5)
    limit.take("bob", 5)
    clock.now_ms += 10**9
    assert limit.take("bob", 5) == 0
    assert limit.take("bob", 1) > 0


def test_over_time_the_rate_holds() -> None:
    limit, clock = rate(per_s=20, burst=60)
    rng = random.Random(5)
    passed = 0
    for _ in range(5_000):
        clock.now_ms += rng.randrange(20)
        count = rng.randrange(1, 33)
        if limit.take("bob", count) == 0:
            passed += count
    seconds = (clock.now_ms - 1_000) / 1_000
    assert 20 * seconds - 33 <= passed <= 20 * seconds + 60


def test_memory_is_for_those_who_sent_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_BUCKETS", 100)
    limit, clock = rate(per_s=20, burst=60)
    for number in range(10_000):
        limit.take(f"u{number}", 60)
        clock.now_ms += 10
    # A bucket is full again after 3 s, which is 300 users; the bound doubles what is still owed.
    assert len(limit._buckets) <= 2 * 300
    assert limit.take("u9999", 1) > 0
    assert limit.take("u0", 1) == 0


def test_nobody_who_still_owes_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_BUCKETS", 100)
    limit, _ = rate()
    for number in range(1_000):
        limit.take(f"u{number}", 60)
    assert all(limit.take(f"u{number}", 1) > 0 for number in range(1_000))
