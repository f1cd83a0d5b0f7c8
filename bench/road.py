"""S4, S4d: 1:1 messages as clients of a real server see them, beside what the kernel and a C server cost.

S4    the node on the memory bus, with a store that keeps nothing: send, deliver, ack, SENT
                                                  <= 3 x (E0 + H0) CPU per message, p99 <= 5 ms at half load
S4d   the same stored and fsynced, the whole embedded road, 5,000 conversations
                                                  <= 30 µs CPU per message, p99 <= 20 ms at half load
S4d   where every fsync takes 5 ms longer (slowsync.c)                       p99 <= 50 ms at half load

Two phases on one server: closed loop (one message under way per client: the maximum, and the CPU per
message) and open loop at half of that, where latency counts from the moment a message was meant to leave.
Server on core 0, generator (loadgen.c) spinning on core 1, one message per frame. CPU is utime + stime of
all the server's threads, from the beginning of the window until everything sent in it is acked and flushed,
per accepted message. The floor (floor.c) is the mean of what was measured just before and just after a row.

A row is void, and tried once more, when the generator was the bottleneck: it drove the least server that
there is (relay.c) less than 1.5 times as fast, or was busy for more than 85 % of its time; or when others
used the machine. It is wrong, and not tried again, when a client or a message was lost, repeated or out of
order, or the audit of the stopped store finds an obligation open.

--gate is the first form: S4d alone, 500 conversations, nothing gated but CPU per message.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from bench import facts, floors
from bench.floors import BenchError, Child
from bench.nullstore import AUDIT
from bench.server import ROOT, Server, free_ports

GATE_US: Final = 60.0
"""Of the first form."""
FLOOR_US: Final = 4.5
"""E0 + H0 where the gates in µs were set. The short form compares with it: CI is another machine."""
SLACK: Final = 1.15
"""In the short form; which gates no latencies, for other work runs beside CI."""
BUSY_LIMIT: Final = 0.85
OUTPACE: Final = 1.5
OTHERS_LIMIT: Final = 0.25
"""Cores."""
TRIES: Final = 2
SYNC_MS: Final = 5
SETTINGS: Final[dict[str, Any]] = {"node": {"rate_per_s": 1_000_000, "rate_burst": 1_000_000}}
"""The limits that a paced load of one person per connection would run into."""
_TRACEPOINTS: Final = Path("/sys/kernel/tracing")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A server, a load, and the gates; 0: none."""

    name: str
    convs: int
    null: bool = False
    """Without a store."""
    sync_ms: int = 0
    of_floor: float = 0.0
    most_us: float = 0.0
    p99_ms: float = 0.0


def rows(args: argparse.Namespace) -> list[Row]:
    pairs_only = args.clients // 2
    if args.gate:
        return [Row(name="S4d", convs=args.convs or pairs_only, most_us=args.gate)]
    many = args.convs or min(5_000, args.clients * (args.clients - 1) // 2)
    found = [
        Row(name="S4", convs=args.convs or pairs_only, null=True, of_floor=3.0, p99_ms=5),
        Row(name="S4d", convs=many, most_us=30, p99_ms=20),
        Row(name=f"S4d, fsync + {SYNC_MS} ms", convs=many, sync_ms=SYNC_MS, p99_ms=50),
    ]
    return [row for row in found if args.only in ("", _short_name(row))]


def _short_name(row: Row) -> str:
    return "slow" if row.sync_ms else row.name.lower()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("s4", "s4d", "slow"), default="", help="one row")
    parser.add_argument("--clients", type=int, default=1_000)
    parser.add_argument("--convs", type=int, default=0, help="1:1 conversations (default: as above)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--warm-s", type=float, default=2.0)
    parser.add_argument(
        "--rate", type=int, default=0, help="of the open loop, messages/s (default: half the maximum)"
    )
    parser.add_argument(
        "--window", type=int, default=1, help="messages under way per client in the closed loop"
    )
    parser.add_argument("--body", type=int, default=128, help="bytes")
    parser.add_argument(
        "--gate", type=float, nargs="?", const=GATE_US, default=0.0,
        help=f"the first form: fail above this many µs ({GATE_US:.0f})",
    )  # fmt: skip
    parser.add_argument(
        "--short", action="store_true", help="2 s a phase, and 15 %% slack on ratios to the floor alone"
    )
    parser.add_argument("--no-pin", action="store_true", help="leave server and generator on any core")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--keep", action="store_true", help="keep the data directories and say where they are"
    )


# ------------------------------------------------------------------------------------------------- programs


def build(name: str, *flags: str) -> Path:
    """bench/<name>.c as a program (or with -shared a library) in build/bench, unless it is there and new."""
    source = ROOT / "bench" / f"{name}.c"
    program = ROOT / "build" / "bench" / name
    newest = max(path.stat().st_mtime for path in (source, ROOT / "bench" / "wire.h"))
    if not program.exists() or program.stat().st_mtime < newest:
        program.parent.mkdir(parents=True, exist_ok=True)
        fresh = program.with_suffix(".new")
        command = ["gcc", "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", *flags, "-o", str(fresh)]
        subprocess.run([*command, str(source), "-ldl"], check=True)
        fresh.replace(program)
    return program


def build_loadgen() -> Path:
    return build("loadgen")


def calls_event() -> int:
    """The kernel's number of "a system call begins"; 0 where it cannot be had."""
    event = _TRACEPOINTS / "events" / "raw_syscalls" / "sys_enter" / "id"
    try:
        if not event.exists():
            # As perf does.
            command = ["mount", "-t", "tracefs", "tracefs", str(_TRACEPOINTS)]
            subprocess.run(command, capture_output=True, check=False)
        return int(event.read_text())
    except OSError:
        return 0


class NullServer(Server):
    """`fastim serve` with nullstore.py's store."""

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "bench.nullstore", *arguments]

    def audit(self, data: Path | None = None, ids: Path | None = None) -> tuple[int, dict[str, Any]]:
        found: dict[str, Any] = json.loads(((data or self.data) / AUDIT).read_text())
        wrong = any(found[name] for name in ("open", "unsettled", "due", "parked"))
        return int(wrong), found


# ----------------------------------------------------------------------------------------------------- load


def pairs(clients: int, convs: int, rng: random.Random) -> list[tuple[int, int]]:
    """Who talks to whom: neighbours first, so that everybody talks, then distinct random pairs."""
    if clients < 2 or clients % 2:
        raise ValueError(f"clients is {clients}; must be even")
    most = clients * (clients - 1) // 2
    if not clients // 2 <= convs <= most:
        raise ValueError(f"convs is {convs}; must be {clients // 2}-{most} for {clients} clients")
    chosen = [(n, n + 1) for n in range(0, clients, 2)]
    seen = set(chosen)
    while len(chosen) < convs:
        first, second = sorted(rng.sample(range(clients), 2))
        if (first, second) not in seen:
            seen.add((first, second))
            chosen.append((first, second))
    return chosen


def write_plan(path: Path, token: Callable[[str], str], clients: int, convs: int) -> None:
    """The generator's plan file; users are named so that their order is their number's."""
    names = [f"u{n:06d}" for n in range(clients)]
    lines = [f"c d0 {token(name)}" for name in names]
    lines += [f"v p:{names[a]}:{names[b]} {a} {b}" for a, b in pairs(clients, convs, random.Random(1))]
    path.write_text("\n".join(lines) + "\n")


def drive(
    port: int, plan: Path, pid: int, args: argparse.Namespace, *options: object
) -> tuple[int, list[dict[str, Any]]]:
    """loadgen's exit code and the phases that it finished."""
    command = [
        build_loadgen(), "127.0.0.1", port, "/v1/ws", plan, "--window", args.window, "--body", args.body,
        "--pids", pid, *options, *(() if args.no_pin else ("--cpu", floors.CLIENT_CPU)),
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, text=True, timeout=args.seconds * 4 + 180
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def relayed(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """The same clients and conversations on a server that does nothing: how fast the generator is."""
    (port,) = free_ports(1)
    with tempfile.NamedTemporaryFile("w", prefix="fastim-plan-") as plan:
        write_plan(Path(plan.name), str, args.clients, row.convs)
        with Child([str(build("relay")), str(port)], cpu=None if args.no_pin else floors.SERVER_CPU) as relay:
            relay.read()
            seconds = min(args.seconds, 3.0)
            code, phases = drive(
                port, Path(plan.name), relay.process.pid, args, "--warm-s", 0.5, "--closed-s", seconds
            )
    if code or not phases:
        raise BenchError(f"loadgen ended with {code} on the C server")
    return phases[0]


def floor(args: argparse.Namespace) -> dict[str, float]:
    """E0, F0 and H0 in µs, at as many connections and messages of this size."""
    seconds = 1.0 if args.short else 2.0
    head = 2 if args.body < 126 else 4
    e0 = floors.echo_floor(args.clients, seconds, args.body, rounds=2)["cpu_us"]
    f0 = floors.send_floor(args.clients, args.body + head)
    return {"e0_us": e0, "f0_us": f0}


def mean_floor(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    e0, f0 = ((before[name] + after[name]) / 2 for name in ("e0_us", "f0_us"))
    found = {"e0_us": e0, "f0_us": f0, "h0_us": e0 - f0, "floor_us": 2 * e0 - f0}
    return {name: round(value, 3) for name, value in found.items()}


# ------------------------------------------------------------------------------------------------------ rows


def attempt(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """One server, from its start to its audit."""
    directory = Path(tempfile.mkdtemp(prefix="fastim-road-"))
    kind = NullServer if row.null else Server
    server = kind(directory, SETTINGS, cpu=None if args.no_pin else floors.SERVER_CPU)
    syncs = directory / "syncs"
    if row.sync_ms:
        server.environment = {
            "LD_PRELOAD": str(build("slowsync", "-shared", "-fPIC")), "SLOWSYNC_COUNT": str(syncs),
            "SLOWSYNC_US": str(row.sync_ms * 1_000),
        }  # fmt: skip
    found: dict[str, Any] = {"relay": relayed(row, args)}
    try:
        server.start()
        plan = directory / "plan"
        write_plan(plan, server.token, args.clients, row.convs)
        found["generator_exit"], found["phases"] = drive(
            server.ws_port, plan, server.pid, args, "--warm-s", args.warm_s, "--closed-s", args.seconds,
            "--open-s", args.seconds, "--rate", args.rate, "--calls-s", min(args.seconds, 2.0),
            "--calls-event", calls_event(),
        )  # fmt: skip
        found["server"] = {**server.memory_kb(), "threads": server.threads()}
        if row.sync_ms:
            found["syncs"] = struct.unpack("=Q", syncs.read_bytes())[0]
        found["exit_code"] = server.stop()
        found["audit_exit"], found["audit"] = server.audit()
    finally:
        server.end()
        if args.keep:
            print(f"kept {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return found


def measure(
    row: Row, args: argparse.Namespace, attempt: Callable[[Row, argparse.Namespace], dict[str, Any]] = attempt
) -> dict[str, Any]:
    """A row, tried again when it is void. What went wrong is not tried away."""
    before = floor(args)
    voids: list[list[str]] = []
    for _ in range(TRIES):
        found = attempt(row, args)
        after = floor(args)
        found |= {"wrong": wrong(row, found, args), "void": void(found, args)}
        if found["wrong"] or not found["void"]:
            break
        voids.append(found["void"])
        before = after
    return judged(row, found | mean_floor(before, after) | {"voids": voids}, short=args.short)


def wrong(row: Row, found: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """What no server may do."""
    texts = []
    phases = found["phases"]
    if found["generator_exit"]:
        code = found["generator_exit"]
        texts.append(f"the generator ended with {code}: a client or a message was lost, see its lines")
    if len(phases) < 2:
        texts.append(f"{len(phases)} of 2 phases were finished")
    for phase in phases:
        name = phase["phase"]
        if phase["connections"] != args.clients:
            texts.append(f"{name}: {phase['connections']} of {args.clients} connections at the end")
        if not phase["drained"]:
            texts.append(f"{name}: consumers were not drained before the end")
    if found["exit_code"]:
        texts.append(f"the server ended with {found['exit_code']} after SIGTERM")
    if found["audit_exit"]:
        texts.append(f"the audit ended with {found['audit_exit']}: {found['audit']}")
    accepted = sum(phase["accepted"] for phase in phases)
    if row.sync_ms and found["syncs"] < accepted / 10_000:
        texts.append(f"{found['syncs']} syncs came through slowsync for {accepted} messages")
    return texts


def void(found: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Why the figures say nothing of the server."""
    texts = []
    for phase in found["phases"]:
        name, busy, others = phase["phase"], phase["generator_busy"], phase["others_cores"]
        if busy > BUSY_LIMIT:
            texts.append(f"{name}: the generator was busy {busy:.0%}; limit {BUSY_LIMIT:.0%}")
        if others > OTHERS_LIMIT and not args.short:
            texts.append(f"{name}: others used {others:.2f} cores; limit {OTHERS_LIMIT}")
        if name == "closed" and found["relay"]["messages_per_s"] < OUTPACE * phase["messages_per_s"]:
            texts.append(
                f"the generator drove the C server at {found['relay']['messages_per_s']:,.0f} messages/s,"
                f" less than {OUTPACE} times as fast"
            )
    return texts


def judged(row: Row, found: dict[str, Any], *, short: bool) -> dict[str, Any]:
    """The figures of a row, and the gates that it missed."""
    phases = {phase["phase"]: phase for phase in found["phases"]}
    result = msgspec.to_builtins(row) | found | {"missed": []}
    if not {"closed", "open"} <= phases.keys():
        return result
    closed, paced = phases["closed"], phases["open"]
    cpu_us = closed["cpu_us_until_acked"]
    result |= {
        "messages_per_s": closed["messages_per_s"],
        "cpu_us": cpu_us,
        "ratio": round(cpu_us / found["floor_us"], 2),
        "calls": phases["calls"]["calls_per_message"] if "calls" in phases else None,
        "half_cpu_us": paced["cpu_us_until_acked"],
        "half_p99_ms": max(paced["sent_p99_ms"], paced["msg_p99_ms"]),
    }
    missed = result["missed"]
    of_floor = row.of_floor or (short and row.most_us / FLOOR_US)
    if of_floor:
        gate = of_floor * (SLACK if short else 1)
        if result["ratio"] > gate:
            missed.append(f"{cpu_us:.1f} µs CPU are {result['ratio']:.2f} times E0 + H0; gate {gate:.2f}")
    elif row.most_us and cpu_us > row.most_us:
        missed.append(f"{cpu_us:.1f} µs CPU per message; gate {row.most_us:.0f}")
    if row.p99_ms and not short and result["half_p99_ms"] > row.p99_ms:
        missed.append(f"p99 is {result['half_p99_ms']:.1f} ms at half load; gate {row.p99_ms:.0f}")
    return result


# -------------------------------------------------------------------------------------------------------- run


def run(args: argparse.Namespace) -> int:
    if args.short:
        args.seconds, args.warm_s = min(args.seconds, 2.0), min(args.warm_s, 1.0)
    result: dict[str, Any] = {
        "bench": "road", **facts.gather(), "n": args.clients, "body_bytes": args.body,
        "window": args.window, "pinned": not args.no_pin, "short": args.short,
    }  # fmt: skip
    result["rows"] = [measure(row, args) for row in rows(args)]
    result["failures"] = [
        f"{row['name']}: {kind}: {text}"
        for row in result["rows"] for kind in ("wrong", "void", "missed") for text in row[kind]
    ]  # fmt: skip
    result["good"] = not result["failures"]
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["good"] else 1


def show(result: dict[str, Any]) -> None:
    """The figures are the last line."""
    dirty = " (dirty)" if result["dirty"] else ""
    print(
        f"road: {result['n']} clients, {result['body_bytes']} byte bodies, one message per frame;"
        f" commit {result['commit']}{dirty}, {result['cpu']}, load {result['load_before']}"
    )
    print(
        f"{'':20}{'convs':>6}{'messages/s':>11}{'µs/msg':>8}{'E0':>6}{'F0':>6}{'E0+H0':>7}{'ratio':>7}"
        f"{'calls':>7}{'C server':>10}{'half/s':>8}{'µs/msg':>8}{'SENT p50/p99 ms':>17}{'MSG p50/p99 ms':>17}"
        f"{'generator':>11}{'others':>8}"
    )
    for row in result["rows"]:
        if "ratio" not in row:
            continue
        closed, paced = row["phases"][:2]
        sent = f"{paced['sent_p50_ms']:.1f} / {paced['sent_p99_ms']:.1f}"
        msg = f"{paced['msg_p50_ms']:.1f} / {paced['msg_p99_ms']:.1f}"
        print(
            f"{row['name']:20}{row['convs']:>6}{row['messages_per_s']:>11.0f}{row['cpu_us']:>8.1f}"
            f"{row['e0_us']:>6.2f}{row['f0_us']:>6.2f}{row['floor_us']:>7.2f}{row['ratio']:>7.2f}"
            f"{row['calls'] or '-':>7}{row['relay']['messages_per_s']:>10.0f}{paced['rate']:>8}"
            f"{row['half_cpu_us']:>8.1f}{sent:>17}{msg:>17}{closed['generator_busy']:>11.0%}"
            f"{max(closed['others_cores'], paced['others_cores']):>8.2f}"
        )
    for row in result["rows"]:
        counted = row["audit"].get("states", row["audit"])
        some = ", ".join(f"{number:,} {what}" for what, number in counted.items() if number)
        print(f"{row['name']}: audit exit {row['audit_exit']}: {some}; server {row.get('server')}")
        for texts in row["voids"]:
            print(f"{row['name']}: a try was void: {'; '.join(texts)}")
    for text in result["failures"]:
        print(f"FAILED: {text}")
    print("; ".join(figure(row) for row in result["rows"]))


def figure(row: dict[str, Any]) -> str:
    """What the row is about, with the gates behind it."""
    if "ratio" not in row:
        return f"{row['name']}: nothing"
    parts = []
    if row["of_floor"]:
        parts.append(f"{row['cpu_us']:.1f} µs CPU, {row['ratio']:.2f} x (E0 + H0) [{row['of_floor']:.0f}]")
    else:
        gate = f" [{row['most_us']:.0f}]" if row["most_us"] else ""
        parts.append(f"{row['cpu_us']:.1f} µs CPU{gate}")
    if row["p99_ms"]:
        parts.append(f"p99 {row['half_p99_ms']:.1f} ms [{row['p99_ms']:.0f}]")
    return f"{row['name']}: {', '.join(parts)}"
