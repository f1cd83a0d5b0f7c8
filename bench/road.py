"""S4d, first form: 1:1 messages over the whole embedded road, as clients of the real server see it.

send -> stored and fsynced -> SENT and MSG -> ACK -> cursor and fate flushed. Two phases on one server: closed
loop (one message under way per client: the maximum) and open loop at a given rate (half the maximum unless
told), where latency counts from the moment a message was meant to leave.

Server on core 0, generator (loadgen.c) spinning on core 1. CPU is utime + stime of all the server's threads,
from the beginning of the window until everything sent in it is acked and flushed, per accepted message.

The row is void, and the command fails, unless: every client is still connected; every message arrived once,
in order; the generator was busy less than 85 % of its time; the audit of the stopped store finds every
obligation settled.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench import facts
from bench.server import ROOT, Server

GATE_US = 60.0
"""CPU per message, all threads, closed loop. The goal of S4d is 30, then 15."""
BUSY_LIMIT = 0.85
SETTINGS: dict[str, Any] = {"node": {"rate_per_s": 1_000_000, "rate_burst": 1_000_000}}
"""The limits that a paced load of one person per connection would run into."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=1_000)
    parser.add_argument("--convs", type=int, default=0, help="1:1 conversations (default: clients / 2 pairs)")
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
        "--gate", type=float, nargs="?", const=GATE_US, default=0.0, help="fail above this many µs"
    )
    parser.add_argument("--short", action="store_true", help="200 clients, 2 s a phase")
    parser.add_argument("--no-pin", action="store_true", help="leave both processes on any core")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--keep", action="store_true", help="keep the data directory and say where it is")


def build_loadgen() -> Path:
    """Compile loadgen.c into build/ when it is newer than the program there."""
    source, program = ROOT / "bench" / "loadgen.c", ROOT / "build" / "bench" / "loadgen"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        program.parent.mkdir(parents=True, exist_ok=True)
        fresh = program.with_suffix(".new")
        subprocess.run(
            ["gcc", "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(fresh), str(source)],
            check=True,
        )
        fresh.replace(program)
    return program


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


def write_plan(path: Path, server: Server, clients: int, convs: int) -> None:
    """The generator's plan file; users are named so that their order is their number's."""
    names = [f"u{n:06d}" for n in range(clients)]
    lines = [f"c d0 {server.token(name)}" for name in names]
    lines += [f"v p:{names[a]}:{names[b]} {a} {b}" for a, b in pairs(clients, convs, random.Random(1))]
    path.write_text("\n".join(lines) + "\n")


def run(args: argparse.Namespace) -> int:
    if args.short:
        args.clients, args.seconds, args.warm_s = min(args.clients, 200), min(args.seconds, 2.0), 0.5
    convs = args.convs or args.clients // 2
    result: dict[str, Any] = {
        "bench": "road",
        **facts.gather(),
        "n": args.clients,
        "convs": convs,
        "body_bytes": args.body,
        "window": args.window,
        "pinned": not args.no_pin,
    }
    program = build_loadgen()
    directory = Path(tempfile.mkdtemp(prefix="fastim-road-"))
    server = Server(directory, SETTINGS, cpu=None if args.no_pin else 0)
    try:
        server.start()
        plan = directory / "plan"
        write_plan(plan, server, args.clients, convs)
        command = [
            str(program), "127.0.0.1", str(server.ws_port), "/v1/ws", str(plan),
            "--warm-s", str(args.warm_s), "--closed-s", str(args.seconds), "--open-s", str(args.seconds),
            "--rate", str(args.rate), "--window", str(args.window), "--body", str(args.body),
            "--pids", str(server.pid), *(() if args.no_pin else ("--cpu", "1")),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=args.seconds * 4 + 180)
        result["phases"] = [json.loads(line) for line in done.stdout.splitlines()]
        result["server"] = {**server.memory_kb(), "threads": server.threads()}
        result["exit_code"] = server.stop()
        result["audit_exit"], result["audit"] = server.audit()
    finally:
        server.end()
        if args.keep:
            print(f"kept {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    result["failures"] = guards(result, args, done.returncode)
    result["good"] = not result["failures"]
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["good"] else 1


def guards(result: dict[str, Any], args: argparse.Namespace, generator_exit: int) -> list[str]:
    """Why the row is void; empty when it stands."""
    failures = []
    if generator_exit:
        failures.append(
            f"the generator ended with {generator_exit}: a client or a message was lost, see its lines"
        )
    if len(result["phases"]) != 2:
        failures.append(f"{len(result['phases'])} of 2 phases were finished")
    for phase in result["phases"]:
        name = phase["phase"]
        if phase["connections"] != args.clients:
            failures.append(f"{name}: {phase['connections']} of {args.clients} connections at the end")
        if not phase["drained"]:
            failures.append(f"{name}: consumers were not drained before the end")
        if phase["generator_busy"] > BUSY_LIMIT:
            failures.append(
                f"{name}: the generator was busy {phase['generator_busy']:.0%}; limit {BUSY_LIMIT:.0%}"
            )
        if name == "closed" and args.gate and phase["cpu_us_until_acked"] > args.gate:
            failures.append(f"{phase['cpu_us_until_acked']:.1f} µs CPU per message; gate {args.gate:.0f}")
    if result["exit_code"]:
        failures.append(f"the server ended with {result['exit_code']} after SIGTERM")
    if result["audit_exit"]:
        failures.append(f"fastim audit ended with {result['audit_exit']}: {result['audit']}")
    return failures


def show(result: dict[str, Any]) -> None:
    dirty = " (dirty)" if result["dirty"] else ""
    print(
        f"road: {result['n']} clients, {result['convs']} conversations, {result['body_bytes']} byte bodies, "
        f"one message per frame; commit {result['commit']}{dirty}, {result['cpu']}"
    )
    print(
        f"{'phase':8}{'offered/s':>10}{'messages/s':>12}{'µs CPU/msg':>12}{'cores':>7}"
        f"{'SENT p50/p99 ms':>18}{'MSG p50/p99 ms':>18}{'generator':>11}"
    )
    for p in result["phases"]:
        sent = f"{p['sent_p50_ms']:.1f} / {p['sent_p99_ms']:.1f}"
        msg = f"{p['msg_p50_ms']:.1f} / {p['msg_p99_ms']:.1f}"
        print(
            f"{p['phase']:8}{p['rate'] or '-':>10}{p['messages_per_s']:>12.0f}"
            f"{p['cpu_us_until_acked']:>12.1f}{p['server_cores']:>7.2f}{sent:>18}{msg:>18}"
            f"{p['generator_busy']:>11.0%}"
        )
    print(f"server: {result['server']}, audit exit {result['audit_exit']}")
    for failure in result["failures"]:
        print(f"VOID: {failure}")
