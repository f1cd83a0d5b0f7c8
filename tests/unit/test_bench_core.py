"""What fails `bench core`, and that its loops do what they time."""

from __future__ import annotations

import secrets
import shutil
from types import ModuleType

import pytest

from bench.core import Figures, corebench, failures
from fastim._core import acks, sealed
from fastim._core.cipher import Opener, Sealer
from fastim.protocol import Ping, encode

release = pytest.mark.skipif(
    acks.DEBUG or shutil.which("gcc") is None, reason="the loops are built against the release build"
)


def test_a_median_above_its_gate_fails_and_slack_is_the_short_forms() -> None:
    strict, short = Figures(3, 1.0), Figures(3, 1.15)
    for figures in (strict, short):
        figures.add("C1 split", [9.0, 11.0, 99.0], 10)
        figures.add("no gate", [1e9])
        figures.add("C4 sweep", [0.5, 0.5, 0.4], 0.5, "ms")
    assert failures(strict.found) == ["C1 split: 11.0 ns; gate 10"]
    assert failures(short.found) == []
    assert (strict.found[0]["least"], strict.found[0]["most"]) == (9.0, 99.0)


def test_the_first_round_is_for_warming() -> None:
    figures, rounds = Figures(3, 1.0), iter([100.0, 1.0, 2.0, 3.0])
    figures.take("it", lambda: next(rounds), 2)
    assert figures.found[0]["median"] == 2.0
    assert figures.found[0]["good"]


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    return corebench()


@release
def test_the_loops_leave_as_many_in_flight_as_they_found(loops: ModuleType) -> None:
    table = loops.InFlight(100, 30)
    assert table.entries() == 3_000
    assert table.ack() > 0
    assert table.entries() == 2_900
    assert table.expire(4) > 0
    assert table.entries() == 2_500
    assert table.insert() > 0
    assert table.entries() == 2_600
    assert table.take_all() > 0


@release
def test_a_sweep_of_touched_slots_finds_nobody(loops: ModuleType) -> None:
    full = loops.Full(1_000)
    for _ in range(5):
        assert full.touch() > 0
        assert full.sweep_ms() > 0


@release
def test_what_is_sealed_opens(loops: ModuleType) -> None:
    key = secrets.token_bytes(32)
    sealer, opener = Sealer(key, b"abcd"), Opener(key, b"abcd")
    assert loops.seal_and_open(sealer, opener, 128, 50) > 0
    assert (sealer.counter, opener.counter) == (50, 50)
    stream = sealed.SealedStream(1, Sealer(key, b"abcd"), Opener(key, b"efgh"), client=False)
    assert loops.seal_packet(stream, 128, 50) > 0
    assert loops.split(encode(Ping()), 50) > 0
