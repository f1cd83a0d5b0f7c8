"""What voids or fails a row of `bench fanout`, and that floor and server do as they are told."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import fanout
from bench.__main__ import main
from bench.fanout import Row, judged, measure, rows
from bench.floors import BenchError, Child, Memo, certificate, floor
from bench.server import free_ports

ROW = Row("S1", 1_000, 1, 0.93)
PACED = Row("S2", 1_000, 20, 0.90, most_us=0.25, pause_us=100_000, budget_ms=100)
FLOOR = {
    "cpu_us_per_send": 2.0, "cpu_us_per_delivery": 2.0, "p50_ms": 1.0, "p99_ms": 2.0, "behind": 0,
    "drained": True, "client_busy": 0.3,
}  # fmt: skip
SERVER = FLOOR | {"k": 1.0, "members": 1_000, "missed": 0}

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc was not found")


def faults(
    row: Row, server: dict[str, Any], floor: dict[str, Any] | None = None, *, short: bool = False
) -> str:
    """Of three pairs, the last of which is as told."""
    good = [SERVER | {"cpu_us_per_send": 2.1}] * 2
    answer = judged(row, [FLOOR, FLOOR, FLOOR | (floor or {})], [*good, SERVER | server], short=short)
    return "\n".join(answer["failures"])


def test_a_good_row_stands_and_its_ratio_is_the_median() -> None:
    servers = [SERVER | {"cpu_us_per_send": cpu} for cpu in (2.1, 20.0, 2.0)]
    answer = judged(ROW, [FLOOR] * 3, servers, short=False)
    assert (answer["failures"], answer["ratio"]) == ([], 0.952)


def test_a_ratio_below_the_gate_fails_and_the_short_form_has_slack() -> None:
    slow = [SERVER | {"cpu_us_per_send": 2.4}] * 3
    assert judged(ROW, [FLOOR] * 3, slow, short=False)["failures"] == ["0.833 of the floor; gate 0.930"]
    assert judged(ROW, [FLOOR] * 3, slow, short=True)["failures"] == []


@pytest.mark.parametrize(
    ("row", "server", "floor", "said"),
    [
        (ROW, {"drained": False}, {}, "not everything arrived"),
        (ROW, {}, {"drained": False}, "not everything arrived"),
        (ROW, {"missed": 1}, {}, "skipped, refused or closed"),
        (ROW, {"members": 999}, {}, "not all of 1000 members"),
        (PACED, {"client_busy": 0.7}, {}, "client was busy 70%"),
        (PACED, {}, {"client_busy": 0.7}, "client was busy 70%"),
    ],
)
def test_a_row_in_which_something_was_lost_or_the_client_was_short_of_time_is_void(
    row: Row, server: dict[str, Any], floor: dict[str, Any], said: str
) -> None:
    for short in (False, True):
        assert said in faults(row, server, floor, short=short)


def test_microseconds_are_gated_only_where_the_floor_is_below_the_gate() -> None:
    def answer(floor_us: float, server_us: float) -> list[str]:
        beside = [FLOOR | {"cpu_us_per_delivery": floor_us}]
        return judged(PACED, beside, [SERVER | {"cpu_us_per_delivery": server_us}], short=False)["failures"]

    assert answer(0.20, 0.24) == []
    assert answer(0.20, 0.26) == ["0.260 µs per delivery; gate 0.25"]
    assert answer(0.26, 0.30) == []


def test_the_scenarios_are_those_of_the_table() -> None:
    def said(row: Row) -> tuple[object, ...]:
        return (row.members, row.k, row.budget_ms, row.pause_us // row.k, row.gate)

    plain = [said(row) for row in rows(tls=False, short=False)]
    assert plain[:2] == [(10_000, 1, 0, 0, 0.93), (1_000, 1, 0, 0, 0.93)]
    assert plain[2:5] == [
        (5_000, 4, 20, 5_000, 0.9), (5_000, 20, 100, 5_000, 0.9), (5_000, 1, 5, 25_000, 0.9),
    ]  # fmt: skip
    assert plain[5] == (1_000, 20, 0, 0, 0.9)
    assert {row.gate for row in rows(tls=True, short=False)} == {0.8}


@pytest.mark.parametrize(("cpu", "code"), [(2.1, 0), (2.4, 1)], ids=["at gate", "below"])
def test_the_exit_code_says_whether_every_gate_was_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cpu: float, code: int
) -> None:
    def answer(members: int, todo: list[Row], *rest: object) -> list[dict[str, Any]]:
        found = SERVER | {"cpu_us_per_send": cpu, "members": members}
        return [judged(row, [FLOOR], [found], short=False) for row in todo]

    monkeypatch.setattr(fanout, "measure", answer)
    assert main(["fanout", "--only", "plain"]) == code
    assert ("FAILED: S1, 10000: 0.833 of the floor" in capsys.readouterr().out) is (code == 1)


@needs_gcc
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_floor_and_server_are_measured_in_turns(tmp_path: Path, tls: bool) -> None:
    args = argparse.Namespace(pairs=2, short=True)
    todo = [Row("S1", 20, 1, 0.0), Row("S2", 20, 2, 0.0, pause_us=20_000, budget_ms=20)]
    try:
        found = measure(20, todo, certificate(tmp_path) if tls else None, args)
    except BenchError as error:
        if tls and "without TLS" in str(error):
            pytest.skip("no OpenSSL headers")
        raise
    for row in found:
        # Other tests may run beside this one, so a row may be void; what is counted must be right.
        assert [text for text in row["failures"] if "busy" not in text] == []
        assert len(row["ratios"]) == 2
        assert row["ratio"] > 0
    assert found[0]["server_k"] == 1
    assert 1.0 <= found[1]["server_k"] <= 4


@needs_gcc
def test_a_child_that_ends_is_an_error_and_not_a_wait() -> None:
    dying = Child([sys.executable, "-c", "input(); raise SystemExit(3)"], cpu=None)
    with dying, pytest.raises(BenchError, match="ended with 3"):
        dying.ask("anything")
    (port,) = free_ports(1)
    with floor("fanout", port, 0, 132, "/dev/null", cpu=None) as child, pytest.raises(BenchError, match="2"):
        child.read()


def test_a_memo_is_shared_by_path_and_gone_when_closed() -> None:
    memo = Memo()
    other = Memo(memo.path)
    other["ready"] = 1 << 40
    assert memo["ready"] == 1 << 40
    assert [memo[name] for name in memo.NAMES if name != "ready"] == [0, 0, 0, 0]
    other.close()
    assert memo.path.exists()
    memo.close()
    assert not memo.path.exists()


def test_a_row_can_be_written_as_json() -> None:
    assert (
        msgspec.json.decode(msgspec.json.encode(judged(ROW, [FLOOR], [SERVER], short=False)))["name"] == "S1"
    )
