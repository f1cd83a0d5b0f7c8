"""The short form of the shows, all at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.shows import run as shows


@pytest.mark.timeout(110)
def test_shows_reach_their_figures(
    run: Callable[[Coroutine[Any, Any, list[str]]], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = shows.run_parts(list(shows.PARTS), quick=True, together=True)
    failures = run(asyncio.wait_for(parts, 100))
    assert failures == [], capsys.readouterr().out
