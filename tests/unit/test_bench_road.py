"""What voids, spoils or fails a row of `bench road`, and that its programs do as they are told."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import road
from bench.__main__ import main
from bench.floors import Child
from bench.nullstore import NullStore
from bench.road import Row, build, drive, judged, rows, void, write_plan, wrong
from bench.server import free_ports
from fastim.model import Fate
from fastim.store.base import AppendFrame, AppendItem, DueRequest, Flush, Settled

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc was not found")

S4 = Row(name="S4", convs=500, null=True, of_floor=3.0, p99_ms=5)
S4D = Row(name="S4d", convs=5_000, most_us=30, p99_ms=20)
SLOW = Row(name="S4d, fsync + 5 ms", convs=5_000, sync_ms=5, p99_ms=50)
PHASE = {
    "phase": "closed", "rate": 0, "messages_per_s": 40_000, "accepted": 400_000, "cpu_us_until_acked": 12.0,
    "sent_p50_ms": 1.0, "sent_p99_ms": 4.0, "msg_p50_ms": 1.0, "msg_p99_ms": 4.5, "generator_busy": 0.4,
    "others_cores": 0.05, "connections": 1_000, "drained": True, "calls_per_message": 0.0,
}  # fmt: skip
FLOOR = {"e0_us": 3.25, "f0_us": 2.0, "h0_us": 1.25, "floor_us": 4.5}
FOUND: dict[str, Any] = {
    "relay": {"messages_per_s": 120_000}, "generator_exit": 0, "exit_code": 0, "audit_exit": 0, "audit": {},
    "phases": [PHASE, PHASE | {"phase": "open", "rate": 20_000}], "syncs": 4_000,
}  # fmt: skip


def arguments(**changed: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    road.add_arguments(parser)
    args = parser.parse_args([])
    vars(args).update(changed)
    return args


def with_phases(closed: dict[str, Any], paced: dict[str, Any] | None = None) -> dict[str, Any]:
    first, second = FOUND["phases"]
    return FOUND | {"phases": [first | closed, second | (paced or {})]}


def missed(row: Row, found: dict[str, Any], *, short: bool = False) -> list[str]:
    answer: list[str] = judged(row, found | FLOOR, short=short)["missed"]
    return answer


# ------------------------------------------------------------------------------------------------- judging


def test_a_row_within_its_gates_stands() -> None:
    for row in (S4, S4D, SLOW):
        assert (missed(row, FOUND), wrong(row, FOUND, arguments()), void(FOUND, arguments())) == ([], [], [])


def test_s4_is_gated_by_its_ratio_to_the_floor_and_the_short_form_has_slack() -> None:
    slower = with_phases({"cpu_us_until_acked": 15.0})
    assert missed(S4, slower) == ["15.0 µs CPU are 3.33 times E0 + H0; gate 3.00"]
    assert missed(S4, slower, short=True) == []
    assert missed(S4, with_phases({"cpu_us_until_acked": 16.0}), short=True) != []


def test_s4d_is_gated_in_microseconds_and_in_the_short_form_by_the_floor() -> None:
    slower = with_phases({"cpu_us_until_acked": 31.0})
    assert missed(S4D, slower) == ["31.0 µs CPU per message; gate 30"]
    assert missed(S4D, slower, short=True) == []
    assert missed(S4D, with_phases({"cpu_us_until_acked": 36.0}), short=True) != []


@pytest.mark.parametrize("name", ["sent_p99_ms", "msg_p99_ms"])
def test_the_later_of_sent_and_msg_is_gated_at_half_load_and_nowhere_else(name: str) -> None:
    late = with_phases({}, {name: 51.0})
    assert [len(missed(row, late)) for row in (S4, S4D, SLOW)] == [1, 1, 1]
    assert [missed(row, late, short=True) for row in (S4, S4D, SLOW)] == [[], [], []]
    assert missed(S4, with_phases({name: 51.0})) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generator_exit": 1}, "the generator ended with 1"),
        ({"phases": [PHASE]}, "1 of 2 phases"),
        (with_phases({"connections": 999}), "closed: 999 of 1000 connections"),
        (with_phases({}, {"drained": False}), "open: consumers were not drained"),
        ({"exit_code": -9}, "the server ended with -9"),
        ({"audit_exit": 1, "audit": {"lost": 3}}, "audit ended with 1: {'lost': 3}"),
        ({"syncs": 0}, "0 syncs came through slowsync"),
    ],
)
def test_what_no_server_may_do_is_wrong(change: dict[str, Any], said: str) -> None:
    assert said in "\n".join(wrong(SLOW, FOUND | change, arguments()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"relay": {"messages_per_s": 59_000}}, "drove the C server at 59,000 messages/s"),
        (with_phases({"generator_busy": 0.86}), "closed: the generator was busy 86%"),
        (with_phases({}, {"generator_busy": 0.86}), "open: the generator was busy 86%"),
        (with_phases({"others_cores": 0.3}), "closed: others used 0.30 cores"),
    ],
)
def test_a_row_in_which_the_generator_was_short_of_time_is_void(change: dict[str, Any], said: str) -> None:
    assert void(FOUND | change, arguments()) == [
        text for text in void(FOUND | change, arguments()) if said in text
    ]
    assert void(FOUND | change, arguments())


def test_the_scenarios_are_those_of_the_table() -> None:
    assert rows(arguments()) == [S4, S4D, SLOW]
    assert rows(arguments(gate=60.0)) == [Row(name="S4d", convs=500, most_us=60)]
    assert [rows(arguments(only=name)) for name in ("s4", "s4d", "slow")] == [[S4], [S4D], [SLOW]]


# --------------------------------------------------------------------------------- tries, and the exit code


@pytest.fixture
def no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road, "floor", lambda args: {"e0_us": 3.25, "f0_us": 2.0})


def tried(*answers: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The row after these attempts, and how many it took."""
    left = list(answers)
    row = road.measure(S4, arguments(), lambda row, args: dict(left.pop(0)))
    return row, len(answers) - len(left)


VOID = FOUND | {"relay": {"messages_per_s": 1}}
WRONG = FOUND | {"audit_exit": 1}


@pytest.mark.usefixtures("no_floor")
def test_a_void_row_is_tried_once_more_and_what_went_wrong_is_not() -> None:
    assert tried(FOUND)[1] == 1
    row, took = tried(VOID, FOUND)
    assert (took, row["void"], len(row["voids"])) == (2, [], 1)
    row, took = tried(VOID, VOID, FOUND)
    assert (took, len(row["void"]), row["voids"][0]) == (2, 1, row["void"])
    row, took = tried(WRONG | VOID | {"audit_exit": 1}, FOUND)
    assert (took, len(row["wrong"])) == (1, 1)


@pytest.mark.usefixtures("no_floor")
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (FOUND, 0), (VOID, 1), (WRONG, 1), (with_phases({"cpu_us_until_acked": 14.0}), 1),
        (with_phases({}, {"msg_p99_ms": 5.1}), 1), (FOUND | {"phases": [], "generator_exit": 2}, 1),
    ],
    ids=["good", "void", "wrong", "too dear", "too late", "nothing"],
)  # fmt: skip
def test_the_exit_code_says_whether_every_gate_was_met_and_the_last_line_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    answer: dict[str, Any],
    code: int,
) -> None:
    real = road.measure
    monkeypatch.setattr(road, "measure", lambda row, args: real(row, args, lambda row, args: dict(answer)))
    assert main(["road", "--only", "s4", "--json", str(tmp_path / "out")]) == code
    result = json.loads((tmp_path / "out").read_text())
    assert result["good"] is (code == 0)
    assert bool(result["failures"]) is (code == 1)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("FAILED: ") for line in lines) == len(result["failures"])
    assert lines[-1].startswith("S4: ")
    if answer["phases"]:
        assert "µs CPU, " in lines[-1]
        assert "[3], p99 " in lines[-1]


# ------------------------------------------------------------------------------------------ the null store


def frame(conv: str, sender: str, count: int) -> AppendFrame:
    return AppendFrame(conv, sender, tuple(AppendItem(bytes(16), 1, b"x") for _ in range(count)))


async def test_null_store_counts_seqs_and_says_which_acks_never_came(tmp_path: Path) -> None:
    store = NullStore(tmp_path / "audit")
    first, second = await store.append([frame("p:a:b", "a", 2), frame("p:a:c", "c", 1)], 7)
    assert [(item.msg_id, item.seq) for item in (*first.items, *second.items)] == [(1, 1), (2, 2), (3, 1)]
    assert (first.members, first.epoch) == (("a", "b"), 1)
    assert store.audit()["open"] == 6
    told = await store.flush(Flush((Settled("b", "d0", "p:a:b", 2, 2, Fate.ACKED),), (), "n", 7))
    assert [(user, behind.cursor, behind.head) for user, _, behind in told.gaps] == [("b", 0, 2)]
    whole = [
        Settled(user, "d0", conv, 1, to_seq, Fate.ACKED, own)
        for user, conv, to_seq, own in (
            ("a", "p:a:b", 2, True), ("b", "p:a:b", 2, False),
            ("c", "p:a:c", 1, True), ("a", "p:a:c", 1, False),
        )
    ]  # fmt: skip
    assert (await store.flush(Flush(tuple(whole), (), "n", 7))).gaps == ()
    await store.settle(3)
    await store.close()
    found = json.loads((tmp_path / "audit").read_text())
    assert found == {"messages": 3, "conversations": 2, "open": 0, "unsettled": 0, "due": 0, "parked": 0}
    await store.flush(Flush((), (DueRequest("b", "p:a:b", 1, 9),), "n", 7))
    assert store.audit()["due"] == 1


# ---------------------------------------------------------------------------------------------- programs


@pytest.fixture
def relay() -> Iterator[tuple[Child, int]]:
    (port,) = free_ports(1)
    with Child([str(build("relay")), str(port)], cpu=None) as child:
        child.read()
        yield child, port


@needs_gcc
@pytest.mark.parametrize("convs", [5, 20])
def test_relay_gives_the_generator_everything_once_and_in_order(relay: tuple[Child, int], convs: int) -> None:
    child, port = relay
    with tempfile.NamedTemporaryFile("w") as plan:
        write_plan(Path(plan.name), str, 10, convs)
        args = arguments(no_pin=True, window=2)
        words = ("--warm-s", 0, "--closed-s", 0.2, "--open-s", 0.2, "--rate", 500)
        code, phases = drive(port, Path(plan.name), child.process.pid, args, *words)
    assert code == 0
    assert [(phase["phase"], phase["good"]) for phase in phases] == [("closed", True), ("open", True)]
    assert phases[1]["accepted"] == pytest.approx(100, abs=10)


@needs_gcc
def test_system_calls_are_counted_where_the_kernel_allows_it(relay: tuple[Child, int]) -> None:
    event = road.calls_event()
    if not event:
        pytest.skip("no tracepoints")
    child, port = relay
    with tempfile.NamedTemporaryFile("w") as plan:
        write_plan(Path(plan.name), str, 2, 1)
        words = ("--closed-s", 0.2, "--calls-s", 0.2, "--calls-event", event, "--warm-s", 0)
        code, phases = drive(port, Path(plan.name), child.process.pid, arguments(no_pin=True), *words)
    assert code == 0
    if len(phases) == 1:
        pytest.skip("no leave to count")
    # SEND read, MSG and SENT written, acks and waits shared: never less than three, never twice as many.
    assert 3 <= phases[1]["calls_per_message"] <= 6


@needs_gcc
def test_slowsync_delays_every_sync_and_counts_it(tmp_path: Path) -> None:
    library = build("slowsync", "-shared", "-fPIC")
    program = (
        "import os, sys, time\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "start = time.monotonic()\n"
        "for _ in range(5): os.write(fd, b'x'); os.fsync(fd); os.fdatasync(fd)\n"
        "print(time.monotonic() - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "file")], check=True, capture_output=True, text=True,
        env=os.environ
        | {"LD_PRELOAD": str(library), "SLOWSYNC_US": "20000", "SLOWSYNC_COUNT": str(tmp_path / "count")},
    )  # fmt: skip
    assert float(done.stdout) >= 0.2
    assert struct.unpack("=Q", (tmp_path / "count").read_bytes()) == (10,)
