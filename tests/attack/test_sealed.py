"""The short form of `python -m tests.attack.sealed`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.attack import sealed
from tests.attack.sealed import Nonces


@pytest.mark.timeout(110)
def test_no_nonce_is_repeated_and_no_attack_is_answered(
    tmp_path: Path,
    run: Callable[[Coroutine[Any, Any, sealed.Run]], sealed.Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run(asyncio.wait_for(sealed.live(60_000, 2, 7, tmp_path), 100))
    assert (found.nonces.repeated, found.answered) == (0, 0), capsys.readouterr().out
    assert found.nonces.frames >= 60_000
    assert found.nonces.keys == 2 * (found.connections + found.renewed)
    assert found.attacks > 300
    assert found.renewed >= 2
    assert found.checked > 0


def test_the_count_sees_a_repeated_nonce() -> None:
    nonces = Nonces()
    one, other = nonces.of((b"k" * 32, b"pre1")), nonces.of((b"k" * 32, b"pre2"))
    for counter in (*range(1, 5_000), 1 << 20):
        nonces.use(one, counter)
        nonces.use(other, counter)
    assert (nonces.repeated, nonces.frames, nonces.keys) == (0, 10_000, 2)
    for counter in (1, 4_999, 1 << 20):
        nonces.use(nonces.of((b"k" * 32, b"pre1")), counter)
    assert nonces.repeated == 3
