"""The short form of the benchmarks: not their figures, but what voids a row (loss, order, the audit)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.__main__ import main

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc was not found")


@needs_gcc
def test_road_loses_nothing_and_its_audit_is_clean(tmp_path: Path) -> None:
    out = tmp_path / "road.json"
    code = main(["road", "--short", "--no-pin", "--seconds", "1.5", "--json", str(out)])
    result = json.loads(out.read_text())
    # A generator that shares its core is busy; that voids figures, not this test.
    failures = [text for text in result["failures"] if "generator was busy" not in text]
    assert failures == []
    assert code == bool(result["failures"])
    assert [phase["phase"] for phase in result["phases"]] == ["closed", "open"]


def test_recovery_stands_for_everything_that_was_unsettled(tmp_path: Path) -> None:
    out = tmp_path / "recovery.json"
    words = ["recovery", "--stored", "20000", "--unsettled", "5000", "--convs", "250", "--settle-s", "0.2"]
    assert main([*words, "--json", str(out)]) == 0, out.read_text()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["audit"]["lost"], row["audit"]["due"] >= 5_000) for row in rows] == [(0, True)] * 2
