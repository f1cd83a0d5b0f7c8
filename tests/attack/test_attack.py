"""The short form of the attack, and that its own instruments can see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.branches import Branches
from tests.attack.hostile import Random, catalogue
from tests.attack.stage import ROOT, Stage


@pytest.mark.timeout(300)
def test_a_hundred_thousand_refused_frames_hurt_nobody() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "FASTIM_BUILD"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.attack", "--frames", "100000"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" 0 faults\n")


def test_an_answer_that_no_branch_explains_is_seen() -> None:
    branches = Branches()
    branches.error("bad_frame", "something new")
    branches.close(4509, "something new")
    branches.request(418, "something new")
    assert len(branches.unknown) == 3
    branches.error("bad_frame", "op 5: Expected `str`, got `int` - at `$[1]`")
    assert branches.hits["protocol: layout of SEND"] == 1
    assert branches.hits["protocol: wrong type"] == 1
    assert "protocol: layout of READ" in branches.missed()


def test_a_fault_in_the_log_and_a_planted_secret_are_seen(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.secrets["a body"] = body = b"what nobody else may read"
    stage.server.log.write_bytes(
        b"ts=2026-01-01T00:00:00.000Z level=info logger=fastim.app msg=started\n"
        b'ts=2026-01-01T00:00:00.000Z level=error logger=asyncio msg="never retrieved"\n'
        b"ts=2026-01-01T00:00:00.000Z level=info logger=x msg=" + body + b"\n"
        b"  alice " + stage.planted_key.encode() + b"\n"
    )
    bad, leaked = stage.log()
    stage.server.log.unlink()
    assert len(bad) == 1
    assert leaked == ["a body"], "what is printed for people is no log line"


def test_memory_that_grows_is_seen(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.rss = [(n * 10_000, 100_000_000 + n * 30_000) for n in range(100)]
    assert 2.8 < stage.growth()["mib_per_million"] < 2.9
    stage.rss = [(n * 10_000, 100_000_000 + n % 3 * 4_096) for n in range(100)]
    assert abs(stage.growth()["mib_per_million"]) < 0.05


def test_every_rule_is_broken_by_name_and_chance_never_ends() -> None:
    names = [script.name for script in catalogue("a.b.c")]
    assert len(names) > 5_000
    endless = Random(7, 10)
    scripts = [endless.next() for _ in range(500)]
    assert {script.auth for script in scripts} == {True, False}
