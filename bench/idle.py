"""S6 and P7: authenticated connections that only beat, every 10 s, on the real server.

memory   user memory per connection, RSS or anonymous, whichever grew more: 11 KB plain, 46 KB TLS
cpu      of all the server's threads, over that of a C echo server under the same beats: 1.3
silent   half of 10,000 connections stop: they leave 30 to 31 s after their last frame, nobody else does
paused   the server stands still for 60 s (SIGSTOP): nobody is removed for it

Server on core 0, clients (floor.c) on core 1. The floor answers the same beats of as many clients with an
echo, under the system's congestion control like the server. Both are under their beats all the time, on the
same core, and are read for the same 10 s; the figure is the median of the ratios. They are idle for most of a
second, so it is a figure of wake-ups.

A run is void when a client was lost or refused, a beat was not answered, or the server did not end well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from bench import facts, floors
from bench.floors import SERVER_CPU, BenchError
from bench.sitting import SatServer, Sitters, memory_kb, need_tls, quiet, sitters

MEMORY_KB: Final = {"plain": 11.0, "tls": 46.0}
CPU_RATIO: Final = 1.3
SLACK: Final = 1.15
IDLE_S: Final = (30.0, 31.0)
UNTUNED: Final = {"FLOOR_CONGESTION": ""}
PARTS: Final = ("load", "silent", "paused")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("plain", "tls"), help="only these sockets")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="load: memory and CPU")
    parser.add_argument("--clients", type=int, default=15_000)
    parser.add_argument("--silent", type=int, default=10_000, help="clients of the parts silent and paused")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of server and floor")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each")
    parser.add_argument("--pause-s", type=float, default=60.0)
    parser.add_argument(
        "--short", action="store_true", help="1,000 clients, 2 pairs, 15 %% slack, plain only"
    )
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> int:
    if args.short:
        args.clients, args.silent = min(args.clients, 1_000), min(args.silent, 500)
        args.pairs, args.pause_s, args.only = (
            min(args.pairs, 2),
            min(args.pause_s, 35.0),
            args.only or "plain",
        )
    result: dict[str, Any] = {
        "bench": "idle", "short": args.short, **facts.gather(), "n": args.clients, "beat_ms": 10_000
    }  # fmt: skip
    failures, void = [], []
    for mode in ("plain", "tls"):
        if args.only not in (None, mode):
            continue
        if mode == "tls" and need_tls():
            void.append(f"tls: {need_tls()}")
            continue
        try:
            if "load" in args.parts:
                result[mode] = load(mode, args)
                failures += [
                    f"{mode}: {text}" for text in load_failures(mode, result[mode], short=args.short)
                ]
            for part in ("silent", "paused"):
                # What leaves when is the wheel's, whatever carries the bytes: once is enough.
                if part in args.parts and part not in result:
                    result[part] = {"silent": silent, "paused": paused}[part](mode, args)
                    failures += [f"{part}: {text}" for text in result[part]["failures"]]
        except BenchError as error:
            failures.append(f"{mode}: {error}")
    result |= {"failures": failures, "void": void, "good": not failures and (not void or args.short)}
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["good"] else 1


# -------------------------------------------------------------------------------------------- memory and CPU


def load(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """15,000 clients on the server and as many on the echo floor, in two processes each."""
    tls = mode == "tls"
    directory = Path(tempfile.mkdtemp(prefix="fastim-idle-"))
    server = SatServer(directory, tls=tls, cpu=SERVER_CPU)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(server.end)
        server.start()
        plan = directory / "plan"
        server.write_plan(plan, args.clients)
        warm_up(server, plan, tls=tls)
        before = memory_kb(server.pid)
        ours = stack.enter_context(sitters(server.ws_port, plan, args.clients, 2, tls=tls))
        entered = whole(ours.connect())
        quiet(server.cpu_s)
        time.sleep(2 * args.seconds if not args.short else 3)
        after = memory_kb(server.pid)
        found: dict[str, Any] = {
            "entered": entered,
            "memory_kb": {name: round((after[name] - before[name]) / args.clients, 2) for name in before},
        }
        pair = floors.certificate(directory) if tls else None
        floor = floors.EchoServer(pair, env=UNTUNED)
        stack.enter_context(floor.child)
        theirs = stack.enter_context(
            sitters(floor.port, plan, args.clients, 2, tls=tls, echo=True, env=UNTUNED)
        )
        whole(theirs.connect())
        found["cpu"] = in_turns(server, floor, ours, theirs, args)
        found["reports"] = [ours.report(), theirs.report()]
        found["floor_kb"] = round(memory_kb(floor.pid)["anonymous"] / args.clients, 2)
    return found


def warm_up(server: SatServer, plan: Path, *, tls: bool) -> None:
    """What only the first clients cost: imports, pools, pages of the allocator."""
    with sitters(server.ws_port, plan, 200, 1, tls=tls) as first:
        whole(first.connect())
    quiet(server.cpu_s)


def whole(answer: dict[str, Any]) -> dict[str, Any]:
    if answer["in"] != answer["of"]:
        raise BenchError(f"{answer['in']} of {answer['of']} clients came in")
    return answer


def in_turns(
    server: SatServer, floor: floors.EchoServer, ours: Sitters, theirs: Sitters, args: argparse.Namespace
) -> dict[str, Any]:
    """Both are under their beats all the time; each is looked at for the same seconds."""
    ours.report(), theirs.report()
    rows = []
    for _ in range(args.pairs):
        mine, beside = server.cpu_s(), floor.counted()["cpu_s"]
        start = time.monotonic()
        time.sleep(args.seconds)
        wall = time.monotonic() - start
        rows.append(((server.cpu_s() - mine) / wall, (floor.counted()["cpu_s"] - beside) / wall))
    ratios = sorted(mine / beside for mine, beside in rows)
    beats_per_s = args.clients / 10
    return {
        "server_us_per_s": round(statistics.median(mine for mine, _ in rows) / args.clients * 1e6, 3),
        "floor_us_per_s": round(statistics.median(beside for _, beside in rows) / args.clients * 1e6, 3),
        "server_us_per_beat": round(statistics.median(mine for mine, _ in rows) / beats_per_s * 1e6, 2),
        "floor_us_per_beat": round(statistics.median(beside for _, beside in rows) / beats_per_s * 1e6, 2),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
    }


def load_failures(mode: str, found: dict[str, Any], *, short: bool) -> list[str]:
    slack = SLACK if short else 1.0
    failures = []
    gate = MEMORY_KB[mode] * slack
    worst = max(found["memory_kb"].values())
    if worst > gate:
        failures.append(f"{worst} KB user memory per connection; gate {gate:.1f}")
    if found["cpu"]["ratio"] > CPU_RATIO * slack:
        failures.append(f"{found['cpu']['ratio']} times the floor's idle CPU; gate {CPU_RATIO * slack:.2f}")
    for name, report in zip(("server", "floor"), found["reports"], strict=True):
        failures += [f"void: {name}: {text}" for text in not_quiet(report)]
    return failures


def not_quiet(report: dict[str, Any]) -> list[str]:
    """What should not happen to clients who only sit."""
    found = []
    if report["lost"] or report["evicted"] or report["in"] != report["of"]:
        found.append(f"{report['in']} of {report['of']} clients are left, {report['lost']} were lost")
    if report["errors"] or report["probes"]:
        found.append(f"{report['errors']} errors and {report['probes']} probes came")
    # The newest beats may still be under way.
    if report["beats"] - report["pongs"] > report["of"] // 50 + 10:
        found.append(f"{report['pongs']} of {report['beats']} beats were answered")
    return found


# --------------------------------------------------------------------------------------- who leaves, and when


@contextlib.contextmanager
def crowd(mode: str, args: argparse.Namespace) -> Any:
    """A server, and clients who have beaten at least once."""
    directory = Path(tempfile.mkdtemp(prefix="fastim-idle-"))
    server = SatServer(directory, tls=mode == "tls", cpu=SERVER_CPU)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(server.end)
        server.start()
        plan = directory / "plan"
        server.write_plan(plan, args.silent)
        people = stack.enter_context(sitters(server.ws_port, plan, args.silent, 2, tls=mode == "tls"))
        whole(people.connect())
        time.sleep(11)
        people.report()
        yield server, people


def silent(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Half of the clients say nothing more, each from a moment of its own on."""
    with crowd(mode, args) as (_, people):
        half = args.silent // 2
        people.silence(half)
        time.sleep(45)
        report = people.report()
    failures = []
    if report["evicted"] != half:
        failures.append(f"{report['evicted']} of {half} silent clients left")
    if report["lost"] or report["in"] != args.silent - half:
        failures.append(f"{report['lost']} of the others were removed; {report['in']} are left")
    if not IDLE_S[0] <= report["evicted_min_s"] <= report["evicted_max_s"] <= IDLE_S[1]:
        failures.append(
            f"they left {report['evicted_min_s']}-{report['evicted_max_s']} s after their last frame;"
            f" gate {IDLE_S[0]:.0f}-{IDLE_S[1]:.0f}"
        )
    return report | {"n": args.silent, "failures": failures}


def paused(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """The process stands still for longer than anybody may be silent; the clients go on beating."""
    with crowd(mode, args) as (server, people):
        server.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(args.pause_s)
        finally:
            server.process.send_signal(signal.SIGCONT)
        time.sleep(35)
        during = people.report()
        time.sleep(11)
        after = people.report()
    failures = []
    for report in (during, after):
        if report["lost"] or report["evicted"] or report["in"] != args.silent:
            failures.append(
                f"{args.silent - report['in']} clients were removed after a pause of {args.pause_s:.0f} s"
            )
            break
    failures += [text for text in not_quiet(after) if "beats" in text]
    return during | {"n": args.silent, "pause_s": args.pause_s, "failures": failures}


# ---------------------------------------------------------------------------------------------------- report


def show(result: dict[str, Any]) -> None:
    print(
        f"idle: {result['n']} clients, a beat every 10 s;"
        f" commit {result['commit']}, load {result['load_before']}"
    )
    for mode in ("plain", "tls"):
        found = result.get(mode)
        if found is None:
            continue
        memory, cpu = found["memory_kb"], found["cpu"]
        print(
            f"{mode:6} {memory['rss']:.2f} KB RSS, {memory['anonymous']:.2f} KB anonymous per connection"
            f" (gate {MEMORY_KB[mode]:.0f}; the floor {found['floor_kb']:.2f})"
        )
        print(
            f"       CPU per connection and second {cpu['server_us_per_s']:.2f} µs, floor"
            f" {cpu['floor_us_per_s']:.2f}: {cpu['ratio']:.2f} of it (gate {CPU_RATIO}); per beat"
            f" {cpu['server_us_per_beat']:.1f} / {cpu['floor_us_per_beat']:.1f} µs"
        )
        seen = found["reports"][0]
        print(
            f"       a beat is answered in {seen['rtt_p50_ms']:.2f} ms (p50), {seen['rtt_p99_ms']:.2f} (p99)"
        )
    if "silent" in result:
        found = result["silent"]
        print(
            f"silent {found['evicted']} left {found['evicted_min_s']:.2f}-{found['evicted_max_s']:.2f} s"
            f" after their last frame, {found['in']} of {found['n']} stayed, {found['lost']} lost"
        )
    if "paused" in result:
        found = result["paused"]
        print(f"paused {found['pause_s']:.0f} s: {found['in']} of {found['n']} clients are still there")
    for text in result["void"]:
        print(f"VOID: {text}")
    for text in result["failures"]:
        print(f"FAILED: {text}")
    print(f"idle: {'good' if result['good'] else 'failed'}: {'; '.join(figures(result))}")


def figures(result: dict[str, Any]) -> list[str]:
    """Everything that has a gate, with it."""
    found = []
    for mode in ("plain", "tls"):
        if mode in result:
            memory, ratio = max(result[mode]["memory_kb"].values()), result[mode]["cpu"]["ratio"]
            found.append(
                f"{mode} {memory:.2f} KB (<= {MEMORY_KB[mode]:.0f}), {ratio:.2f} x CPU (<= {CPU_RATIO})"
            )
    if "silent" in result:
        silent = result["silent"]
        found.append(
            f"silent left after {silent['evicted_min_s']:.2f}-{silent['evicted_max_s']:.2f} s (30-31)"
        )
        found.append(f"{silent['lost']} others")
    if "paused" in result:
        found.append(f"{result['paused']['n'] - result['paused']['in']} removed by a pause (0)")
    return found
