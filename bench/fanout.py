"""S1, S2, S5: one message to many members, beside the same number of sends by a C program.

S1  a cold room: one send per message, 10,000 and 1,000 members                          >= 0.93 of F0
S2  a hot room: 5,000 members x 200 messages/s x 128 bytes at budgets of 20 and 100 ms,
    x 40 messages/s at 5 ms                                    >= 0.90 of Fk at the same k and members
    1,000 members, 20 messages a send: below 0.25 µs CPU per delivery, where the floor is below it
S5  both over TLS 1.3                                                                    >= 0.80 of T0

The server is the node's hub, listener and fan-out on uvloop (fanout_node.py) on core 0, the clients are
floor.c on core 1. Floor and server are told the same in turns, and the figure is the median of the ratios of
neighbours: what else the machine does hits both. In S1 a message is published when everybody has the one
before, so no send meets a full buffer, and CPU counts from publish until everybody is written to. S2 is paced
and CPU counts whole; the floor sends what the server has just sent: as many batches, as large, in that time.

A row is void unless everybody is still connected, nothing was skipped, refused or closed, everything arrived,
and (paced) the client was idle for a third of its time, so that it could take 1.5 times as much.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bench import facts, floors
from bench.floors import CLIENT_CPU, SERVER_CPU, BenchError, Child, Memo
from bench.server import free_ports

FRAME_BYTES: Final = 132
SLACK: Final = 0.85
"""In the short form a ratio may be so much of its gate: other work runs beside CI."""
BUSY_LIMIT: Final = 0.67
NOTE: Final = "one machine, loopback; compare plain with plain and one send per message with one"


class Row(msgspec.Struct, frozen=True):
    """One measurement: how many members, messages per send, and how it is paced."""

    name: str
    members: int
    k: int
    gate: float
    """Of the floor."""
    most_us: float = 0.0
    """CPU per delivery, unless the floor itself is above it; 0: no gate."""
    pause_us: int = 0
    """Between two batches; 0: each when the one before has arrived."""
    budget_ms: int = 0
    tls: bool = False

    def command(self, scale: float) -> str:
        """A second's work or two."""
        if self.pause_us:
            rounds = max(4, int(2e6 * scale) // self.pause_us)
            return f"paced {rounds} {self.k} {self.pause_us} {self.budget_ms}"
        return f"rounds {min(400, max(4, int(200_000 * scale) // self.members))} {self.k}"

    def floors(self, scale: float, done: dict[str, Any]) -> str:
        """The same for the floor, once the server has answered."""
        if not self.pause_us:
            return self.command(scale)
        batches = done["batches"]
        return f"paced {batches} {max(1, round(done['k']))} {int(done['wall_s'] * 1e6 / batches)}"


def rows(*, tls: bool, short: bool) -> list[Row]:
    many, some, few = (1_000, 500, 200) if short else (10_000, 5_000, 1_000)
    cold, hot = (0.80, 0.80) if tls else (0.93, 0.90)
    name = "S5 " if tls else ""
    return [
        Row(f"{name}S1", many, 1, cold, tls=tls),
        Row(f"{name}S1", few, 1, cold, tls=tls),
        Row(f"{name}S2 20 ms", some, 4, hot, pause_us=20_000, budget_ms=20, tls=tls),
        Row(f"{name}S2 100 ms", some, 20, hot, 0.55 if tls else 0, 100_000, 100, tls),
        Row(f"{name}S2 5 ms", some, 1, hot, pause_us=25_000, budget_ms=5, tls=tls),
        Row(f"{name}S2 k=20", few, 20, hot, 0.55 if tls else 0.25, tls=tls),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("plain", "tls"), help="only these sockets")
    parser.add_argument("--pairs", type=int, default=7, help="measurements of floor and server per row")
    parser.add_argument("--short", action="store_true", help="1,000 members at most, 3 pairs, 15 % slack")
    parser.add_argument("--json", type=Path, help="write the result here")


@contextlib.contextmanager
def side(command: Sequence[str], port: int, members: int, memo: Memo, *, tls: bool) -> Iterator[Child]:
    """A server of fan-outs and the client that reads what it sends."""
    with Child(command, cpu=SERVER_CPU) as server:
        words = (port, members, memo.path, *(("tls",) if tls else ()))
        with floors.floor("drain", *words, cpu=CLIENT_CPU):
            server.read()
            yield server
        if memo["lost"]:
            raise BenchError(f"{memo['lost']} of {members} connections were lost")


def measure(
    members: int, todo: list[Row], pair: tuple[str, str] | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one number of members, on two servers that stay."""
    ports, memos = free_ports(2), (Memo(), Memo())
    words = [
        [str(port), str(members), str(FRAME_BYTES), str(memo.path), *(pair or ())]
        for port, memo in zip(ports, memos, strict=True)
    ]
    program = str(floors.build()[0])
    ours = [sys.executable, "-m", "bench.fanout_node", *words[1]]
    tls = pair is not None
    try:
        with (
            side([program, "fanout", *words[0]], ports[0], members, memos[0], tls=tls) as floor,
            side(ours, ports[1], members, memos[1], tls=tls) as server,
        ):
            return [compare(row, floor, server, memos, args) for row in todo]
    finally:
        for memo in memos:
            memo.close()


def compare(
    row: Row, floor: Child, server: Child, memos: tuple[Memo, Memo], args: argparse.Namespace
) -> dict[str, Any]:
    """In turns."""
    scale = 0.25 if args.short else 1.0
    floor.ask(row.floors(scale, server.ask(row.command(scale / 10))))

    def timed(child: Child, memo: Memo, command: str) -> dict[str, Any]:
        busy_ns = memo["busy_ns"]
        answer = child.ask(command)
        return answer | {"client_busy": round((memo["busy_ns"] - busy_ns) / 1e9 / answer["wall_s"], 3)}

    found: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    for _ in range(args.pairs):
        found.append(timed(server, memos[1], row.command(scale)))
        beside.append(timed(floor, memos[0], row.floors(scale, found[-1])))
    return judged(row, beside, found, short=args.short)


def judged(
    row: Row, floor: list[dict[str, Any]], server: list[dict[str, Any]], *, short: bool
) -> dict[str, Any]:
    """The figures of a row, and why it fails or is void."""
    # Per send: the floor's batches hold whole numbers of messages.
    ratios = sorted(a["cpu_us_per_send"] / b["cpu_us_per_send"] for a, b in zip(floor, server, strict=True))
    result = msgspec.to_builtins(row) | {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "floor_us": round(statistics.median(a["cpu_us_per_delivery"] for a in floor), 4),
        "server_us": round(statistics.median(b["cpu_us_per_delivery"] for b in server), 4),
        "floor_us_per_send": round(statistics.median(a["cpu_us_per_send"] for a in floor), 4),
        "server_us_per_send": round(statistics.median(b["cpu_us_per_send"] for b in server), 4),
        "server_k": round(statistics.median(b["k"] for b in server), 3),
        "sends_per_delivery": round(1 / statistics.median(b["k"] for b in server), 4),
        "floor_p50_p99_ms": [statistics.median(a[name] for a in floor) for name in ("p50_ms", "p99_ms")],
        "server_p50_p99_ms": [statistics.median(b[name] for b in server) for name in ("p50_ms", "p99_ms")],
        "client_busy": max(answer["client_busy"] for answer in (*floor, *server)),
        "behind": [sum(a["behind"] for a in floor), sum(b["behind"] for b in server)],
    }
    result["failures"] = failures(row, result, floor, server, short=short)
    return result


def failures(
    row: Row,
    result: dict[str, Any],
    floor: list[dict[str, Any]],
    server: list[dict[str, Any]],
    *,
    short: bool,
) -> list[str]:
    found = []
    gate = row.gate * (SLACK if short else 1.0)
    if result["ratio"] < gate:
        found.append(f"{result['ratio']:.3f} of the floor; gate {gate:.3f}")
    if row.most_us and not short and result["server_us"] > row.most_us >= result["floor_us"]:
        found.append(f"{result['server_us']:.3f} µs per delivery; gate {row.most_us}")
    if not all(answer["drained"] for answer in (*floor, *server)):
        found.append("void: not everything arrived")
    if any(answer["missed"] for answer in server):
        found.append("void: something was skipped, refused or closed")
    if any(answer["members"] != row.members for answer in server):
        found.append(f"void: not all of {row.members} members were there at the end")
    if row.pause_us and result["client_busy"] > BUSY_LIMIT:
        found.append(f"void: the client was busy {result['client_busy']:.0%}; limit {BUSY_LIMIT:.0%}")
    return found


def run(args: argparse.Namespace) -> int:
    if args.short:
        args.pairs = min(args.pairs, 3)
    result: dict[str, Any] = {"bench": "fanout", "short": args.short, **facts.gather(), "note": NOTE}
    found, void = [], []
    modes = [False, True] if args.only is None else [args.only == "tls"]
    with tempfile.TemporaryDirectory(prefix="fastim-fanout-") as directory:
        for tls in modes:
            if tls and not floors.build()[1]:
                void.append("S5: OpenSSL's headers were not found, so there is no T0 to compare with")
                continue
            pair = floors.certificate(Path(directory)) if tls else None
            todo = rows(tls=tls, short=args.short)
            for members in dict.fromkeys(row.members for row in todo):
                found += measure(members, [row for row in todo if row.members == members], pair, args)
    result["rows"] = found
    result["failures"] = [
        f"{row['name']}, {row['members']}: {text}" for row in found for text in row["failures"]
    ]
    result["void"] = void
    result["good"] = not result["failures"] and (not void or args.short)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["good"] else 1


def show(result: dict[str, Any]) -> None:
    print(
        f"fanout: {FRAME_BYTES}-byte frames; commit {result['commit']}, {result['cpu']},"
        f" load {result['load_before']}"
    )
    print(
        f"{'':14}{'members':>8}{'k':>6}{'sends/dlv':>11}{'floor µs':>10}{'server µs':>11}{'per send':>16}"
        f"{'p50/p99 ms':>16}{'of floor':>10}{'gate':>7}"
    )
    for row in result["rows"]:
        per_send = f"{row['floor_us_per_send']:.2f} / {row['server_us_per_send']:.2f}"
        late = "{:.1f} / {:.1f}".format(*row["server_p50_p99_ms"]) if not row["pause_us"] else "-"
        print(
            f"{row['name']:14}{row['members']:>8}{row['server_k']:>6.1f}{row['sends_per_delivery']:>11.3f}"
            f"{row['floor_us']:>10.3f}{row['server_us']:>11.3f}{per_send:>16}{late:>16}{row['ratio']:>10.3f}"
            f"{row['gate']:>7.2f}"
        )
    for text in result["void"]:
        print(f"VOID: {text}")
    for text in result["failures"]:
        print(f"FAILED: {text}")
