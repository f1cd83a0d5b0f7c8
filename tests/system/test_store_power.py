"""Accepted survives power loss (P2): no commit that returned is missing, wherever the power goes."""

from __future__ import annotations

import asyncio

import pytest

from tests.system.power import try_cuts


@pytest.mark.parametrize("seed", [1, 2])
def test_what_was_returned_is_there_after_a_cut_at_any_of_500_points(seed: int) -> None:
    outcome = asyncio.run(try_cuts(seed, cuts=500, steps=250))
    assert outcome.cuts == 500
    assert outcome.promises > 300
    assert outcome.bad == []


def test_the_same_with_synchronous_normal_loses_something() -> None:
    outcome = asyncio.run(try_cuts(1, cuts=100, steps=150, synchronous="NORMAL"))
    assert len(outcome.bad) > 20
    assert any("returned and is not there" in sentence for _, wrong in outcome.bad for sentence in wrong)
