"""Seeds of the correct build, and every planted error on its pinned seed: the short form of `make sim`.

The runs are in processes of their own with a fixed hash seed, so that pinned seeds mean the same everywhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.models import MODELS, run_seed
from tests.simulation.planted import PLANTED

ROOT = Path(__file__).parents[2]
LIMIT_S = 150
SHORT_SEEDS = 200


def simulate(*arguments: str) -> list[dict[str, Any]]:
    """The outcomes that the command reports, one JSON line each."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.run", "--json", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        timeout=LIMIT_S,
        check=False,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def planted_outcomes() -> dict[str, dict[str, Any]]:
    return {found["planted"]: found for found in simulate("--planted")}


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_lost_repeated_or_out_of_order_whatever_fails(model: str) -> None:
    outcomes = simulate("--model", model, "--seeds", str(SHORT_SEEDS), "--correct")
    assert len(outcomes) == SHORT_SEEDS
    assert {found["seed"]: found["violations"] for found in outcomes if found["violations"]} == {}
    assert sum(found["figures"].get("kills", 0) for found in outcomes) > SHORT_SEEDS / 4


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_caught_and_its_stage_is_fair(
    name: str, planted_outcomes: dict[str, dict[str, Any]]
) -> None:
    found = planted_outcomes[name]
    assert found["control"] == [], "the correct build fails on the stage of this error"
    assert found["caught"], f"the seed shows only {found['violations']}"


@pytest.mark.parametrize("model", MODELS)
def test_the_same_seed_gives_the_same_run(model: str) -> None:
    first, second = (run_seed(5, verbose=True, model=model) for _ in range(2))
    assert first.trace == second.trace
    assert (first.digest, first.figures) == (second.digest, second.figures)
    assert run_seed(6, model=model).digest != first.digest


@pytest.mark.parametrize("model", MODELS)
def test_another_process_gives_the_same_run(model: str) -> None:
    (ours,) = simulate("--model", model, "--seed", "7")
    (theirs,) = simulate("--model", model, "--seed", "7")
    assert ours["digest"] == theirs["digest"]
