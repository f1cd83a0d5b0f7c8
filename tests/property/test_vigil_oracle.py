"""Vigil against the slow one: a boot is fenced only after an unbroken run of answered looks (A1)."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastim.dispatch.adoption import Vigil
from fastim.dispatch.limits import DispatchLimits
from fastim.store.base import OpenBoot
from tests.reference.vigil import Look, SlowVigil

LIMITS = DispatchLimits()
STARTS = [("n1", 1), ("n1", 2), ("n2", 1)]

subsets = st.frozensets(st.sampled_from(STARTS))
steps = st.tuples(
    st.sampled_from((400, 500, 700, 1_999, 2_000, 2_001, 9_000)),
    st.sampled_from((0, 1, 30, 600, 5_000)),
    st.frozensets(st.sampled_from(STARTS), min_size=1),
    st.frozensets(st.sampled_from(STARTS), max_size=1),
    st.one_of(subsets, st.just(frozenset()), st.none()),
)


@settings(max_examples=400)
@given(st.lists(steps, max_size=40))
def test_the_vigil_decides_as_the_slow_one(history: list[tuple]) -> None:  # type: ignore[type-arg]
    vigil = Vigil(LIMITS)
    slow = SlowVigil(LIMITS.adopt_after_ms, LIMITS.adopt_gap_ms)
    now_ms = 1_000
    for pause_ms, trip_ms, opened, fenced, live in history:
        asked_ms = now_ms + pause_ms
        now_ms = asked_ms + trip_ms
        boots = [OpenBoot(*start, start in fenced) for start in sorted(opened)]
        look = Look(asked_ms, now_ms, tuple((b.node, b.boot, b.fenced) for b in boots), live)
        assert vigil.look(asked_ms, now_ms, boots, live) == slow.look(look)
        for start in STARTS:
            assert vigil.missing_ms(start) == slow.missing_ms(start)


def looks(vigil: Vigil, *answers: frozenset[tuple[str, int]] | None, every_ms: int = 500) -> list[bool]:
    boot = OpenBoot("n1", 1, False)
    return [
        vigil.look(number * every_ms, number * every_ms + 5, [boot], live) == [("n1", 1)]
        for number, live in enumerate(answers)
    ]


GONE: frozenset[tuple[str, int]] = frozenset()
HERE = frozenset({("n1", 1)})


def test_a_lease_that_is_missing_for_four_seconds_is_enough() -> None:
    assert looks(Vigil(LIMITS), *[GONE] * 10).index(True) == 9


def test_a_node_that_registers_again_in_between_starts_the_count_anew() -> None:
    assert not any(looks(Vigil(LIMITS), *[GONE] * 8, HERE, *[GONE] * 8))


def test_presence_that_does_not_answer_is_no_evidence() -> None:
    assert not any(looks(Vigil(LIMITS), *[GONE] * 8, None, *[GONE] * 8))


def test_a_dispatcher_that_stood_still_has_seen_nothing_meanwhile() -> None:
    assert not any(looks(Vigil(LIMITS), GONE, GONE, GONE, every_ms=LIMITS.adopt_gap_ms + 10))


def test_a_newer_boot_of_the_same_node_does_not_stand_in_for_the_older() -> None:
    newer = frozenset({("n1", 2)})
    assert looks(Vigil(LIMITS), *[newer] * 10)[-1]


def test_an_answer_that_took_long_does_not_lengthen_the_run() -> None:
    vigil = Vigil(LIMITS)
    boots = [OpenBoot("n1", 1, False)]
    assert vigil.look(0, 10, boots, GONE) == []
    assert vigil.look(500, 9_000, boots, GONE) == []
    assert vigil.missing_ms(("n1", 1)) == 490
