"""S7: 10,000 clients come back at once, to the real server, while others talk.

hot    the connections were cut, the sessions are still there: upgrade, AUTH, resume without the store
cold   the server was restarted: upgrade, AUTH, a new session, what changed since is read from the store
fresh  (no gate) the first time that these devices come
cpu    of all the server's threads per connection, until everybody is in and a second longer, less what the
       talkers cost in the seconds before: 300 us plain, 800 us TLS, hot and cold
p99    of the talkers' messages meanwhile, from the moment a message was meant to leave until another client
       has it, stored and fsynced on the way: 20 ms, or twice what it was before

Beside it A0, in the same run: the C floor accepts, upgrades (and shakes hands) and echoes AUTH to as many who
come at once. Server and floor on core 0, clients (floor.c) on core 1, those of the storm with lower priority,
so that the talkers' latency is the server's. All dial at once, without the jitter that clients have.

A run is void when a client did not come in, a message was lost, or the server did not end well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from bench import facts, floors
from bench.floors import SERVER_CPU, BenchError
from bench.sitting import SatServer, Sitters, need_tls, quiet, sitters

CPU_US: Final = {"plain": 300.0, "tls": 800.0}
P99_MS: Final = 20.0
P99_TIMES: Final = 2.0
SLACK: Final = 1.15
UNTUNED: Final = {"FLOOR_CONGESTION": ""}
PROCESSES: Final = 2
LOW: Final = 10
"""Priority of the clients of the storm."""
BEFORE_S: Final = 5.0
AFTER_S: Final = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("plain", "tls"), help="only these sockets")
    parser.add_argument("--clients", type=int, default=10_000, help="who come back")
    parser.add_argument("--talkers", type=int, default=1_000, help="who are here all the time")
    parser.add_argument("--rate", type=int, default=250, help="their messages a second, all together")
    parser.add_argument("--short", action="store_true", help="1,000 clients, 15 %% slack, plain only")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> int:
    if args.short:
        args.clients, args.talkers = min(args.clients, 1_000), min(args.talkers, 200)
        args.only = args.only or "plain"
    result: dict[str, Any] = {
        "bench": "storm", "short": args.short, **facts.gather(),
        "n": args.clients, "talkers": args.talkers, "messages_per_s": args.rate,
    }  # fmt: skip
    failures, void = [], []
    for mode in ("plain", "tls"):
        if args.only not in (None, mode):
            continue
        if mode == "tls" and need_tls():
            void.append(f"tls: {need_tls()}")
            continue
        try:
            found = result[mode] = storm(mode, args)
            failures += [f"{mode}: {text}" for text in missed(mode, found, short=args.short)]
        except BenchError as error:
            failures.append(f"{mode}: void: {error}")
    result |= {"failures": failures, "void": void, "good": not failures and (not void or args.short)}
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["good"] else 1


def storm(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """One server: who comes, is cut off and comes back, finds it restarted and comes back."""
    tls = mode == "tls"
    window = -(-args.clients // PROCESSES)
    directory = Path(tempfile.mkdtemp(prefix="fastim-storm-"))
    server = SatServer(directory, tls=tls, cpu=SERVER_CPU)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(server.end)
        server.start()
        plan, talk = directory / "plan", directory / "talk"
        server.write_plan(plan, args.clients)
        server.write_plan(talk, args.talkers, name="t", talk=True)
        found: dict[str, Any] = {"of": args.clients}
        found["floor_us"] = floor_us(plan, args.clients, window, directory, tls=tls)
        talkers = stack.enter_context(sitters(server.ws_port, talk, args.talkers, 1, tls=tls))
        crowd = stack.enter_context(
            sitters(server.ws_port, plan, args.clients, PROCESSES, tls=tls, window=window)
        )
        crowd.nice(LOW)
        everybody(talkers.connect())
        talkers.talk(args.rate)
        time.sleep(1)
        found["fresh"] = wave(server, crowd, talkers)
        before_s = server.cpu_s()
        crowd.drop()
        time.sleep(AFTER_S)
        quiet(server.cpu_s, least_s=0.1)
        found["drop_us"] = round((server.cpu_s() - before_s) / args.clients * 1e6, 1)
        found["hot"] = wave(server, crowd, talkers)
        hush(talkers)
        restart(server)
        everybody(talkers.connect())
        talkers.talk(args.rate)
        time.sleep(1)
        found["cold"] = wave(server, crowd, talkers)
        hush(talkers)
        found["exit_code"] = server.stop()
    for name in ("fresh", "hot", "cold"):
        found[name]["of_floor"] = round(found[name]["cpu_us"] / found["floor_us"], 2)
    return found


def everybody(answer: dict[str, Any]) -> dict[str, Any]:
    if answer["in"] != answer["of"]:
        raise BenchError(f"{answer['in']} of {answer['of']} clients came in")
    return answer


def floor_us(plan: Path, clients: int, window: int, directory: Path, *, tls: bool) -> float:
    """A0, and the echo of one AUTH."""
    server = floors.EchoServer(floors.certificate(directory) if tls else None, env=UNTUNED)
    with (
        server.child,
        sitters(
            server.port, plan, clients, PROCESSES, tls=tls, echo=True, window=window, env=UNTUNED
        ) as crowd,
    ):
        crowd.nice(LOW)
        before = server.counted()
        everybody(crowd.connect())
        after = server.counted()
    spent_s: float = after["cpu_s"] - before["cpu_s"]
    return round(spent_s / (after["upgraded"] - before["upgraded"]) * 1e6, 1)


def wave(server: SatServer, crowd: Sitters, talkers: Sitters) -> dict[str, Any]:
    """Everybody of the crowd dials; the talkers go on."""
    talkers.report()
    start, start_s = time.monotonic(), server.cpu_s()
    time.sleep(BEFORE_S)
    base = (server.cpu_s() - start_s) / (time.monotonic() - start)
    before = talkers.report()
    start, start_s = time.monotonic(), server.cpu_s()
    answer = everybody(crowd.connect())
    during = talkers.report()
    time.sleep(AFTER_S)
    spent_s = server.cpu_s() - start_s - base * (time.monotonic() - start)
    for report in (before, during):
        if report["lost"] or report["errors"] or report["in"] != report["of"]:
            raise BenchError(f"{report['lost']} talkers were lost, {report['errors']} errors came")
    return {
        "cpu_us": round(spent_s / answer["of"] * 1e6, 1),
        **{name: answer[name] for name in ("seconds", "p50_s", "p99_s", "retries", "fresh", "hot", "cold")},
        "base_cores": round(base, 3),
        "before": kept(before),
        "during": kept(during),
    }


def kept(report: dict[str, Any]) -> dict[str, Any]:
    names = ("spoken", "heard", "msg_p50_ms", "msg_p99_ms", "msg_max_ms", "rtt_p99_ms")
    return {name: report[name] for name in names}


def hush(talkers: Sitters) -> None:
    """Nothing is under way afterwards."""
    talkers.talk(0)
    time.sleep(1)
    talkers.report()
    if talkers.unheard:
        raise BenchError(f"{talkers.unheard} messages were lost")


def restart(server: SatServer) -> None:
    code = server.stop()
    if code:
        raise BenchError(f"the server ended with {code} after SIGTERM")
    server.start()


def missed(mode: str, found: dict[str, Any], *, short: bool) -> list[str]:
    slack = SLACK if short else 1.0
    failures = []
    for name in ("hot", "cold"):
        wave = found[name]
        if wave["cpu_us"] > CPU_US[mode] * slack:
            failures.append(
                f"{name}: {wave['cpu_us']:.0f} µs CPU per connection; gate {CPU_US[mode] * slack:.0f}"
            )
        gate_ms = max(P99_MS, P99_TIMES * wave["before"]["msg_p99_ms"]) * slack
        if wave["during"]["msg_p99_ms"] > gate_ms:
            failures.append(
                f"{name}: p99 of the talkers {wave['during']['msg_p99_ms']:.1f} ms; gate {gate_ms:.1f}"
            )
        if wave[name] != found["of"]:
            failures.append(f"void: {wave[name]} of {found['of']} resumes were {name}")
    if found["exit_code"]:
        failures.append(f"void: the server ended with {found['exit_code']} after SIGTERM")
    return failures


def show(result: dict[str, Any]) -> None:
    print(
        f"storm: {result['n']} clients at once beside {result['talkers']} talkers,"
        f" {result['messages_per_s']} messages/s; commit {result['commit']}, load {result['load_before']}"
    )
    print(
        f"{'':14}{'µs CPU':>8}{'of A0':>7}{'all in s':>10}{'again':>7}"
        f"{'talkers p99 ms: before':>25}{'during':>8}"
    )
    for mode in ("plain", "tls"):
        found = result.get(mode)
        if found is None:
            continue
        print(f"{mode:6}{'A0':8}{found['floor_us']:>8.1f}")
        for name in ("fresh", "hot", "cold"):
            wave = found[name]
            print(
                f"{mode:6}{name:8}{wave['cpu_us']:>8.1f}{wave['of_floor']:>7.2f}{wave['seconds']:>10.2f}"
                f"{wave['retries']:>7}{wave['before']['msg_p99_ms']:>25.1f}{wave['during']['msg_p99_ms']:>8.1f}"
            )
        print(f"{mode:6}{'cut':8}{found['drop_us']:>8.1f}")
    for text in result["void"]:
        print(f"VOID: {text}")
    for text in result["failures"]:
        print(f"FAILED: {text}")
    print(f"storm: {'good' if result['good'] else 'failed'}: {'; '.join(figures(result))}")


def figures(result: dict[str, Any]) -> list[str]:
    """Everything that has a gate, with it."""
    found = []
    for mode in ("plain", "tls"):
        if mode in result:
            waves = [result[mode][name] for name in ("hot", "cold")]
            cpu, p99 = max(w["cpu_us"] for w in waves), max(w["during"]["msg_p99_ms"] for w in waves)
            found.append(
                f"{mode} {cpu:.0f} µs (<= {CPU_US[mode]:.0f}), talkers' p99 {p99:.1f} ms (<= {P99_MS:.0f})"
            )
    return found
