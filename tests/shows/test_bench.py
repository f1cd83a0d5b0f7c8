"""The short form of the benchmarks: not their figures, but what voids a row (loss, order, the audit)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.__main__ import main

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc was not found")


@needs_gcc
def test_road_loses_nothing_and_its_audits_are_clean(tmp_path: Path) -> None:
    out = tmp_path / "road.json"
    words = ["road", "--short", "--no-pin", "--clients", "100", "--seconds", "1", "--json", str(out)]
    code = main(words)
    result = json.loads(out.read_text())
    # A generator that shares its core is busy, and so may the machine be; that voids figures, not this test.
    assert [row["wrong"] for row in result["rows"]] == [[], [], []], out.read_text()
    assert code == bool(result["failures"])
    assert [row["name"] for row in result["rows"]] == ["S4", "S4d", "S4d, fsync + 5 ms"]
    for row in result["rows"]:
        assert [phase["phase"] for phase in row["phases"]][:2] == ["closed", "open"]
        assert row["ratio"] > 1


def test_recovery_stands_for_everything_that_was_unsettled(tmp_path: Path) -> None:
    out = tmp_path / "recovery.json"
    words = ["recovery", "--stored", "20000", "--unsettled", "5000", "--convs", "250", "--settle-s", "0.2"]
    assert main([*words, "--json", str(out)]) == 0, out.read_text()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["audit"]["lost"], row["audit"]["due"] >= 5_000) for row in rows] == [(0, True)] * 2
