"""The short form of `make kill`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.kill import run as kill


@pytest.mark.timeout(110)
def test_three_kills_lose_repeat_and_reorder_nothing(
    tmp_path: Path, run: Callable[[Coroutine[Any, Any, int]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    args = kill.arguments(["--messages", "500", "--kills", "3", "--quick", "--seed", "7"])
    code = run(asyncio.wait_for(kill.live(args, tmp_path), 100))
    text = capsys.readouterr().out
    assert code == 0, text
    assert "lost=0 duplicates=0 inversions=0 ledger=0 kills=3 in_flight_at_kill>=1 for 3 kills" in text
