"""decide() over its whole table: attempts x where the user is x what is held back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.policy import Nudge, ParkIt, Wait, decide, nodes_of
from fastim.presence.base import NOWHERE, Attachment, Location
from fastim.store.base import DueRow

NOW = 1_790_000_000_000
LIMITS = DispatchLimits()


def attachment(node: str = "n1", boot: int = 1, generation: int = 5, session: str = "s") -> Attachment:
    return Attachment("bob", session, "app", node, boot, session, generation, NOW)


def row(attempt: int = 0) -> DueRow:
    return DueRow("bob", "p:alice:bob", 3, NOW, attempt)


LIVE = Location((attachment(),))
IN_GRACE = Location((), NOW + 3_000)


@pytest.mark.parametrize(
    ("attempt", "seconds"), [(0, 1), (1, 2), (2, 4), (3, 8), (4, 16), (5, 30)]
)  # fmt: skip
def test_firings_one_to_six_nudge_with_growing_back_off(attempt: int, seconds: int) -> None:
    decision = decide(row(attempt), LIVE, NOW, 0, LIMITS, lambda: 0.5)
    assert decision == Nudge((("n1", 1),), attempt + 1, NOW + seconds * 1_000)


@pytest.mark.parametrize(("rand", "factor"), [(0.0, 0.8), (0.5, 1.0), (0.999_999_9, 1.2)])
def test_the_back_off_spreads_by_a_fifth(rand: float, factor: float) -> None:
    decision = decide(row(2), LIVE, NOW, 0, LIMITS, lambda: rand)
    assert isinstance(decision, Nudge)
    assert decision.next_due_ms - NOW == pytest.approx(4_000 * factor, abs=1)


@pytest.mark.parametrize("attempt", [6, 7, 100])
def test_the_seventh_firing_parks_even_a_live_user(attempt: int) -> None:
    assert decide(row(attempt), LIVE, NOW, 0, LIMITS, lambda: 0.5) == ParkIt(NOW, 5)


def test_the_seventh_firing_remembers_the_newest_session_that_did_not_ack() -> None:
    location = Location((attachment(generation=9), attachment(generation=4, session="t")))
    assert decide(row(6), location, NOW, 0, LIMITS, lambda: 0.5) == ParkIt(NOW, 9)


@pytest.mark.parametrize("attempt", [0, 3, 6])
def test_a_user_who_is_nowhere_is_parked_at_once(attempt: int) -> None:
    assert decide(row(attempt), NOWHERE, NOW, 0, LIMITS, lambda: 0.5) == ParkIt(NOW, 0)


def test_a_user_in_grace_is_waited_for() -> None:
    assert decide(row(), IN_GRACE, NOW, 0, LIMITS, lambda: 0.5) == Wait(NOW + 3_000)


def test_a_grace_that_a_clock_wrote_which_was_set_back_since_is_no_grace() -> None:
    location = Location((), NOW + 365 * 86_400_000)
    assert decide(row(), location, NOW, 0, LIMITS, lambda: 0.5) == ParkIt(NOW, 0)


def test_a_grace_that_ends_now_has_ended() -> None:
    assert decide(row(), Location((), NOW), NOW, 0, LIMITS, lambda: 0.5) == ParkIt(NOW, 0)


def test_after_a_start_nobody_is_parked_before_the_reconnect_window_ends() -> None:
    assert decide(row(), NOWHERE, NOW, NOW + 20_000, LIMITS, lambda: 0.5) == Wait(NOW + 20_000)
    assert decide(row(), IN_GRACE, NOW, NOW + 20_000, LIMITS, lambda: 0.5) == Wait(NOW + 20_000)
    assert decide(row(), IN_GRACE, NOW, NOW + 1_000, LIMITS, lambda: 0.5) == Wait(NOW + 3_000)


def test_a_live_user_is_nudged_whatever_is_held() -> None:
    location = Location((attachment(),), NOW + 3_000)
    assert isinstance(decide(row(), location, NOW, NOW + 20_000, LIMITS, lambda: 0.5), Nudge)


def test_a_live_user_who_does_not_ack_is_parked_in_the_window_but_pushed_after_it() -> None:
    assert decide(row(6), LIVE, NOW, NOW + 20_000, LIMITS, lambda: 0.5) == ParkIt(NOW + 20_000, 5)


def test_each_node_is_nudged_once() -> None:
    location = Location((attachment("n1"), attachment("n2", 3), attachment("n1", session="t")))
    decision = decide(row(), location, NOW, 0, LIMITS, lambda: 0.5)
    assert isinstance(decision, Nudge)
    assert decision.nodes == (("n1", 1), ("n2", 3))


def test_only_sessions_newer_than_the_attempts_are_nudged_after_parking() -> None:
    attachments = (attachment("n1", generation=5), attachment("n2", generation=6))
    assert nodes_of(attachments, 5) == (("n2", 1),)
    assert nodes_of(attachments, 6) == ()


@given(
    attempt=st.integers(0, 20),
    live=st.booleans(),
    grace=st.integers(-5_000, 5_000),
    hold=st.integers(-30_000, 30_000),
    rand=st.floats(0, 1, exclude_max=True),
)
def test_every_decision_moves_on(attempt: int, live: bool, grace: int, hold: int, rand: float) -> None:
    """Never two firings in one instant (no hot loop), never a park in a grace, never a push in the hold."""
    location = Location((attachment(),) if live else (), NOW + grace)
    decision = decide(row(attempt), location, NOW, NOW + hold, LIMITS, lambda: rand)
    match decision:
        case Nudge():
            assert live
            assert decision.attempt == attempt + 1 <= 6
            assert NOW + 800 <= decision.next_due_ms <= NOW + 36_000
        case Wait():
            assert not live
            assert decision.until_ms == NOW + max(grace, hold) > NOW
        case ParkIt():
            assert (not live and max(grace, hold) <= 0) or (live and attempt >= 6)
            assert decision.push_at_ms >= NOW + max(0, hold)
