"""make kill: kill -9 the real server again and again under real clients, then account for every message.

One server process (`fastim serve`), every client in this process: SDK clients with a durable local store,
two devices for some users, a group, pairs, REST callers, clients which are offline, deaf or mute for spells,
some restarted. Everybody keeps a log (log.py). The server is killed at K moments drawn from the seed, spread
over M messages, some of them while it still recovers from the last kill. Then the faults stop, everything
must become level, and check.py decides from the logs; `fastim audit` on the stopped store must agree id by
id. Once, right after a kill that left due rows, one due row is deleted from a copy of the data: `fastim
audit` must fail on it.

--quick has short timeouts (ack 2 s, a tenth of the retry table, 3 s until push after a start), so that a few
kills and the rest afterwards take less than a minute.

Last line: lost=0 duplicates=0 inversions=0 ledger=0 kills=K in_flight_at_kill>=1 for N kills
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from bench import facts
from bench.server import Server, ServerError
from tests.kill import check, people
from tests.kill.caller import Caller
from tests.kill.devices import Device, make
from tests.kill.ledger import Sabotage, due_rows, read_audit, server_settings
from tests.kill.log import DeviceRecord, read_logs, wall_ms
from tests.kill.until import until
from tests.kill.vendor import WebhookServer
from tests.leaks import planted

LEVEL_DEADLINE_S = 180.0
REST_DEADLINE_S = 150.0
SECRET = planted("webhook")
RATE_LIMITS = (20.0, 400.0)
SECONDS_PER_KILL = 4.0
QUICK: dict[str, Any] = {
    "node": {"ack_timeout_ms": 2_000, "probe_ms": 1_000, "grace_ms": 1_000, "drain_window_ms": 500},
    "dispatch": {
        "backoff_ms": [100, 200, 400, 800, 1_600, 3_000],
        "first_due_ms": 200,
        "reconnect_window_ms": 3_000,
    },
}


@dataclass
class Kill:
    """One kill -9, by what the logs said at that moment."""

    at_s: float
    accepted: int
    in_flight: int
    """Obligations of accepted messages that no device of their user had stored."""
    to_connected: int
    """Those among them whose user was connected: on their way, not parked."""
    back_s: float = 0.0
    due: int = -1


@dataclass
class Run:
    """The state of one run."""

    server: Server
    cast: people.Cast
    devices: list[Device]
    callers: list[Caller]
    rng: random.Random
    messages: int
    kills_wanted: int
    kills: list[Kill] = field(default_factory=list)
    offered: int = 0
    start: float = field(default_factory=time.monotonic)
    background: list[asyncio.Task[None]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=facts.gather)

    @property
    def records(self) -> list[DeviceRecord]:
        return [device.log.record for device in self.devices] + [caller.log.record for caller in self.callers]

    def accepted(self) -> int:
        return sum(1 for record in self.records for sub in record.submitted.values() if sub.msg_id)

    def away(self) -> list[tuple[str, str]]:
        """Devices that come back and have no connection now."""
        return [device.key for device in self.devices if device.comes_back and not device.connected]

    def level_keys(self) -> list[tuple[str, str]]:
        return [device.key for device in self.devices if device.comes_back]


def in_flight(run: Run) -> tuple[int, int]:
    """(obligations accepted and on no screen of their user, those of connected users)."""
    shown: set[tuple[int, str]] = set()
    for record in run.records:
        shown.update((seen.msg_id, record.user) for seen in record.shown)
    connected = {device.plan.user for device in run.devices if device.connected}
    everybody = reachable = 0
    for msg_id, sub in check.accepted(run.records).items():
        for user in run.cast.members[sub.conv]:
            if user != sub.sender and (msg_id, user) not in shown:
                everybody += 1
                reachable += user in connected
    return everybody, reachable


async def talk(run: Run) -> None:
    """Offer the messages, paced so that every kill falls among traffic."""
    rate = min(
        max(run.messages / (max(run.kills_wanted, 1) * SECONDS_PER_KILL), RATE_LIMITS[0]), RATE_LIMITS[1]
    )
    while run.offered < run.messages:
        behind = (time.monotonic() - run.start) * rate - run.offered
        some = min(int(behind), 50, run.messages - run.offered)
        # Each has its number before it waits for its phone's disk, so all of them may wait at once.
        run.offered += sum(await asyncio.gather(*(offer(run) for _ in range(some))))
        await asyncio.sleep(0.005)


def draw_deadline(rng: random.Random) -> int:
    """85 % never expire; the rest are past already, or end soon, or much later."""
    dice = rng.random()
    if dice < 0.85:
        return 0
    if dice < 0.88:
        return wall_ms() - 1_000
    if dice < 0.96:
        return wall_ms() + rng.randint(50, 4_000)
    return wall_ms() + 3_600_000


async def offer(run: Run) -> bool:
    """One message by somebody whose app is open."""
    if run.callers and run.rng.random() < 0.15:
        caller = run.rng.choice(run.callers)
        return caller.offer(run.rng.choice(caller.convs), draw_deadline(run.rng))
    device = run.rng.choice(run.devices)
    if device.phone is None:
        return False
    conv = run.rng.choice(run.cast.convs_of(device.plan.user))
    return await device.send(conv, draw_deadline(run.rng))


async def kill_all(run: Run, sabotage: Sabotage) -> None:
    """The kills, each when so many messages have been offered."""
    share = run.messages / (run.kills_wanted + 0.5)
    for number in range(run.kills_wanted):
        moment = (number + run.rng.uniform(0.3, 1.0)) * share
        await until(lambda moment=moment: run.offered >= moment, 600)  # type: ignore[misc]
        if run.rng.random() < 0.2 and number:
            await asyncio.sleep(run.rng.uniform(0.0, 0.3))  # while it starts or recovers
        else:
            await asyncio.to_thread(run.server.wait_ready)
            before = run.accepted()
            await until(lambda before=before: run.accepted() > before, 10, every_s=0.001)  # type: ignore[misc]
            await asyncio.sleep(run.rng.uniform(0.0, 0.2))
        kill = Kill(time.monotonic() - run.start, run.accepted(), *in_flight(run))
        run.server.kill()
        run.kills.append(kill)
        kill.due = due_rows(run.server.data)
        if not sabotage.done and number >= 1 and kill.due:
            await asyncio.to_thread(sabotage.attempt, run.server)
        await asyncio.sleep(run.rng.choice((0.0, 0.0, 0.2, 1.0)))
        run.server.spawn()
        run.background.append(asyncio.create_task(note_return(run, kill), name=f"return {number}"))
        print(
            f"kill {number + 1:3}/{run.kills_wanted} at {kill.at_s:6.1f} s: {kill.accepted:6} accepted, "
            f"{kill.in_flight:5} not acked ({kill.to_connected} for connected clients), {kill.due} due rows",
            flush=True,
        )


async def note_return(run: Run, kill: Kill) -> None:
    """How long the server took to listen again, unless the next kill came first."""
    since, start = time.monotonic(), run.server.starts
    while run.server.starts == start and time.monotonic() < since + 60:
        if await asyncio.to_thread(run.server.listens):
            kill.back_s = time.monotonic() - since
            return
        await asyncio.sleep(0.02)


async def become_level(run: Run) -> list[str]:
    """After the faults: until nothing waits in an outbox and nothing is missing. Why not, at the deadline."""
    deadline = time.monotonic() + LEVEL_DEADLINE_S
    while True:
        waiting = {
            f"{record.user}/{record.device}": n
            for record in run.records
            if (n := sum(1 for sub in record.submitted.values() if not sub.msg_id and not sub.refused))
        }
        offline = run.away()
        verdict = check.judge(run.records, run.cast.members, run.level_keys(), wall_ms())
        if not waiting and not offline and not verdict.count("lost"):
            return []
        if time.monotonic() > deadline:
            return [
                f"not level after {LEVEL_DEADLINE_S:.0f} s: outboxes {waiting}, not connected {offline}, "
                f"{verdict.count('lost')} not shown, e.g. {verdict.found['lost'][:3]}"
            ]
        await asyncio.sleep(0.5)


async def come_to_rest(run: Run) -> list[str]:
    """Until no due row is left, bounded."""
    deadline = time.monotonic() + REST_DEADLINE_S
    while left := await asyncio.to_thread(due_rows, run.server.data):
        if time.monotonic() > deadline:
            return [f"{left} due rows are left {REST_DEADLINE_S:.0f} s after everybody was level"]
        await asyncio.sleep(0.5)
    await asyncio.sleep(2.0)  # the settled mark follows, and a pending cursor flush
    return []


async def live(args: argparse.Namespace, directory: Path) -> int:
    rng = random.Random(args.seed)
    cast = people.draw(rng)
    logs, stores = directory / "logs", directory / "stores"
    logs.mkdir()
    stores.mkdir()
    problems: list[str] = []
    async with WebhookServer(SECRET.encode()) as vendor:
        server = Server(directory, server_settings(vendor.url, SECRET, QUICK if args.quick else {}))
        try:
            await asyncio.to_thread(server.start)
            devices = make(server, cast, logs, stores, rng)
            callers = [Caller(server, name, cast, logs) for name in cast.callers]
            run = Run(server, cast, devices, callers, rng, args.messages, args.kills)
            await everybody_arrives(run)
            sabotage = Sabotage(directory / "copy")
            run.start = time.monotonic()
            for device in devices:
                device.live()
            for caller in callers:
                caller.live()
            await asyncio.gather(talk(run), kill_all(run, sabotage))
            print(f"{run.offered} messages offered in {time.monotonic() - run.start:.0f} s; the faults stop")
            await asyncio.gather(*(device.calm() for device in devices if device.plan.manner != "mute"))
            problems += await become_level(run)
            await asyncio.gather(*(device.calm() for device in devices))
            problems += await come_to_rest(run)
            end_ms = wall_ms()
            for caller in callers:
                await caller.end()
            await asyncio.gather(*(device.end() for device in devices))
            code = await asyncio.to_thread(server.stop)
            if code:
                problems.append(f"the server ended with {code} after SIGTERM:\n{server.log_tail(10)}")
            return report(run, sabotage, vendor, logs, end_ms, problems, args)
        finally:
            server.end()


async def everybody_arrives(run: Run) -> None:
    """Each device connects once, so that the server knows every user; then the group is made."""
    for device in run.devices:
        if device.comes_back:
            await device.open()
        else:
            await device.appear()
    if not await until(lambda: not run.away(), 20):
        raise SystemExit(f"never connected: {run.away()}\n{run.server.log_tail()}")
    await run.callers[0].create_group(people.GROUP, run.cast.members[people.GROUP])


def report(
    run: Run,
    sabotage: Sabotage,
    vendor: WebhookServer,
    logs: Path,
    end_ms: int,
    problems: list[str],
    args: argparse.Namespace,
) -> int:
    records = read_logs(logs)
    verdict = check.judge(records, run.cast.members, run.level_keys(), end_ms)
    audit_code, totals, lines = read_audit(run.server, logs.parent / "audit.jsonl")
    ledger = check.compare_audit(lines, records, run.cast.members, run.level_keys(), end_ms)
    if audit_code:
        problems.append(f"fastim audit ended with {audit_code}: {totals}")
    if not sabotage.done:
        problems.append(f"no due row could be deleted: {sabotage.why_not}")
    elif not sabotage.seen:
        problems.append(f"fastim audit did not see a deleted due row: {sabotage.why_not}")
    if vendor.bad:
        problems.append(f"{len(vendor.bad)} calls of the vendor had a wrong signature")
    result = figures(run, verdict, ledger, totals, vendor, sabotage, args)
    for kind, sentences in [*verdict.found.items(), *ledger.found.items()]:
        for sentence in sentences[:5]:
            print(f"{kind.upper()}: {sentence}")
        if len(sentences) > 5:
            print(f"{kind.upper()}: ... and {len(sentences) - 5} more")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    busy = sum(1 for kill in run.kills if kill.in_flight)
    print(
        f"lost={verdict.count('lost')} duplicates={verdict.count('duplicates')} "
        f"inversions={verdict.count('inversions')} ledger={ledger.count('ledger')} kills={len(run.kills)} "
        f"in_flight_at_kill>=1 for {busy} kills"
    )
    good = verdict.good and ledger.good and not problems and busy == len(run.kills) == run.kills_wanted
    result["found"] = {kind: len(found) for kind, found in [*verdict.found.items(), *ledger.found.items()]}
    result |= {"problems": problems, "good": good}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if good else 1


def figures(
    run: Run,
    verdict: check.Verdict,
    ledger: check.Verdict,
    totals: dict[str, object],
    vendor: WebhookServer,
    sabotage: Sabotage,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Print the sizes of the run; returns them for --json."""

    def rows(sizes: Sequence[tuple[str, object]]) -> None:
        for name, value in sizes:
            print(f"  {name:44} {value}")

    backs = sorted(kill.back_s for kill in run.kills if kill.back_s)
    print("clients' logs")
    rows(sorted(verdict.sizes.items()))
    print("obligations, by the audit's state")
    rows(sorted(ledger.sizes.items()))
    rows([("audit totals", totals)])
    print("server")
    rows(
        [
            ("kills", len(run.kills)),
            ("not acked at a kill, least / most", _range([kill.in_flight for kill in run.kills])),
            ("of connected clients, least / most", _range([kill.to_connected for kill in run.kills])),
            ("kills with some for connected clients", sum(1 for kill in run.kills if kill.to_connected)),
            ("due rows at a kill, least / most", _range([kill.due for kill in run.kills])),
            ("back after a kill, s, median / most", _range(backs, middle=True)),
            ("vendor calls", len(vendor.calls)),
            ("audit of a copy without one due row", sabotage.text),
        ]
    )
    return {
        "bench": "kill",
        **run.about,
        "n": args.messages,
        "seed": args.seed,
        "quick": args.quick,
        "logs": dict(verdict.sizes),
        "obligations": dict(ledger.sizes),
        "audit": totals,
        "kills": [asdict(kill) for kill in run.kills],
        "vendor_calls": len(vendor.calls),
        "sabotage": sabotage.text,
    }


def _range(values: Sequence[float], *, middle: bool = False) -> str:
    if not values:
        return "-"
    low = sorted(values)[len(values) // 2] if middle else min(values)
    return f"{low:.4g} / {max(values):.4g}"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="0: a new one, printed")
    parser.add_argument("--quick", action="store_true", help="short timeouts, for a few kills")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--keep", action="store_true", help="keep logs and data, and say where they are")
    args = parser.parse_args(words)
    args.seed = args.seed or random.SystemRandom().randrange(1, 1 << 31)
    return args


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    print(f"seed {args.seed}: {args.messages} messages, {args.kills} kills", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="fastim-kill-"))
    code = 1
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(live(args, directory))
    except ServerError as error:
        print(f"PROBLEM: {error}")
    finally:
        if args.keep or code:
            print(f"kept {directory}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
