"""Many clients that log in and then only beat, on the real server: what `bench idle` and `bench storm` share.

The clients are floor.c's `sit`, in several processes (a process may have 20,000 descriptors) and from
several addresses (failures are limited per address). They acknowledge what is tagged, so nothing is sent to
them twice.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bench import floors
from bench.floors import BenchError, Child
from bench.server import Server
from fastim.protocol import Auth, encode

SOURCES: Final = 16
WINDOW: Final = 500
"""Handshakes under way at once, per process."""


class SatServer(Server):
    """`fastim serve` in plain or TLS mode; both are asked for their health."""

    def __init__(
        self, directory: Path, *, tls: bool, settings: dict[str, Any] | None = None, cpu: int | None = None
    ):
        self.tls = tls
        own = {"node": {"plain": not tls, **(settings or {}).get("node", {})}}
        super().__init__(directory, {**(settings or {}), **own}, cpu=cpu)

    def listens(self) -> bool:
        if not self.tls:
            return super().listens()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        url = f"https://127.0.0.1:{self.ws_port}/health"
        try:
            with urllib.request.urlopen(url, timeout=2, context=context) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def write_plan(self, path: Path, clients: int, *, name: str = "s", talk: bool = False) -> None:
        """AUTH of every client without its end, which `sit` writes: session, tag, cursor.

        talk: every other one writes to the one behind.
        """
        lines = []
        for number in range(clients):
            user, neighbour = f"{name}{number:06d}", f"{name}{number + 1:06d}"
            frame = encode(Auth(1, 1, self.token(user), "d0", "app"))
            speaks = talk and number % 2 == 0 and number + 1 < clients
            lines.append(frame[1:-4].hex() + (f" p:{user}:{neighbour}" if speaks else ""))
        path.write_text("\n".join(lines) + "\n")


class Sitters:
    """`clients` of them in `processes`; told together, answers added up."""

    def __init__(
        self, port: int, plan: Path, clients: int, processes: int, *, tls: bool, echo: bool = False,
        first: int = 0, beat_ms: int = 10_000, window: int = WINDOW, cpu: int | None = floors.CLIENT_CPU,
        env: dict[str, str] | None = None,
    ):  # fmt: skip
        self.clients = clients
        words = [word for word, wanted in (("tls", tls), ("echo", echo)) if wanted]
        counts = [clients // processes + (number < clients % processes) for number in range(processes)]
        self.children: list[Child] = []
        self.unheard = 0
        """Messages that were spoken and have not arrived, by all reports so far."""
        for count in counts:
            self.children.append(
                floors.floor(
                    "sit", port, plan, first, count, beat_ms, SOURCES, window, *words, cpu=cpu, env=env
                )
            )
            first += count
        for child in self.children:
            child.read()

    def ask(self, command: str) -> list[dict[str, Any]]:
        for child in self.children:
            child.tell(command)
        return [child.read() for child in self.children]

    def connect(self) -> dict[str, Any]:
        """Returns when everybody is in, or a minute later; whoever is not is missing from "in"."""
        answers = self.ask("connect")
        sums = {
            name: sum(answer[name] for answer in answers)
            for name in ("in", "of", "retries", "fresh", "hot", "cold")
        }
        worst = {name: max(answer[name] for answer in answers) for name in ("seconds", "p50_s", "p99_s")}
        return sums | worst

    def silence(self, count: int) -> None:
        """The first `count`, spread over the processes."""
        share = -(-count // len(self.children))
        self.ask(f"silence {share}")

    def report(self) -> dict[str, Any]:
        answers = self.ask("report")
        added = (
            "in", "of", "silent", "beats", "pongs", "probes", "errors", "evicted", "lost", "cpu_s",
            "spoken", "heard",
        )  # fmt: skip
        worst = ("rtt_p50_ms", "rtt_p99_ms", "rtt_max_ms", "msg_p50_ms", "msg_p99_ms", "msg_max_ms")
        evicted = [answer for answer in answers if answer["evicted"]]
        self.unheard += sum(answer["spoken"] - answer["heard"] for answer in answers)
        return {name: sum(answer[name] for answer in answers) for name in added} | {
            "evicted_min_s": min((answer["evicted_min_s"] for answer in evicted), default=0.0),
            "evicted_max_s": max((answer["evicted_max_s"] for answer in evicted), default=0.0),
            **{name: max(answer[name] for answer in answers) for name in worst},
        }

    def talk(self, per_s: int) -> None:
        """From now on so many messages a second, all processes together; 0: none."""
        self.ask(f"talk {per_s // len(self.children)}")

    def nice(self, level: int) -> None:
        """Let others of the same core run first."""
        for child in self.children:
            os.setpriority(os.PRIO_PROCESS, child.process.pid, level)

    def drop(self) -> None:
        self.ask("drop")

    def end(self) -> None:
        for child in self.children:
            child.end()


@contextlib.contextmanager
def sitters(*arguments: Any, **options: Any) -> Iterator[Sitters]:
    found = Sitters(*arguments, **options)
    try:
        yield found
    finally:
        found.end()


def need_tls() -> str:
    """Why TLS cannot be measured; "" when it can."""
    return "" if floors.build()[1] else "OpenSSL's headers were not found, so there is no TLS client"


def memory_kb(pid: int) -> dict[str, int]:
    """Rss, and what of it is no file's. (Pss changes with what other processes of the same libraries do.)"""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Anonymous"):
            found[name.lower()] = int(rest.split()[0])
    return found


def quiet(read: Any, deadline_s: float = 30.0, least_s: float = 0.05) -> None:
    """Until the server's CPU time stands still for half a second: whatever was left to do is done.

    least_s: what passes for standing still.
    """
    deadline = time.monotonic() + deadline_s
    before = read()
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = read()
        if now - before <= least_s:
            return
        before = now
    raise BenchError(f"the server was still busy after {deadline_s:.0f} s")
