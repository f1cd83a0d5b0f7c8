"""Errors carry fields; which class it is decides who has to act."""

from __future__ import annotations

import pytest

from fastim import errors
from fastim.errors import (
    BusUnavailable,
    PeerError,
    PresenceUnavailable,
    StoreUnavailable,
    Unavailable,
    UsageError,
)


def test_a_peer_error_carries_code_detail_and_when_to_try_again() -> None:
    error = PeerError("rate_limited", "61 messages; limit 60", retryable=True, retry_after_ms=500)
    assert (error.code, error.detail, error.retryable, error.retry_after_ms) == (
        "rate_limited", "61 messages; limit 60", True, 500,
    )  # fmt: skip
    assert str(error) == "rate_limited: 61 messages; limit 60"
    assert not PeerError("bad_id", "x").retryable


def test_a_callers_mistake_is_a_value_error_and_the_peers_is_not() -> None:
    assert issubclass(UsageError, ValueError)
    assert not issubclass(PeerError, ValueError)


@pytest.mark.parametrize("kind", [BusUnavailable, StoreUnavailable, PresenceUnavailable])
def test_a_backend_that_is_away_says_which_and_whether_for_good(kind: type[BusUnavailable]) -> None:
    away, gone = kind("no answer"), kind("no such topic", temporary=False)
    assert isinstance(away, Unavailable)
    assert (away.temporary, gone.temporary) == (True, False)
    assert str(away) == f"{away.backend} is unavailable: no answer"


def test_every_error_of_ours_has_one_base() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(issubclass(kind, errors.FastimError) for kind in kinds)
