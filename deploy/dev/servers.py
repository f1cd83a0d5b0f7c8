"""Start and stop the servers that development and tests need, without a container engine.

    deploy/dev/servers start NAME...     prepare what is new, wait until it answers; again is harmless
    deploy/dev/servers stop [NAME...]    gracefully; the data stay, nothing of it runs afterwards
    deploy/dev/servers wipe [NAME...]    stop, and forget the data
    deploy/dev/servers status            one line a process
    deploy/dev/servers env               the URLs of what runs: eval "$(deploy/dev/servers env)"
    deploy/dev/servers kill|pause|resume NAME...    kill -9, SIGSTOP, SIGCONT

NAME is a kind (kafka, kafka3, postgres, redis, valkey) or one of its members: kafka3.2 is the second broker,
valkey.1 the first node. `all` is one of each, without kafka3. --dir DIR: where data, logs and pids are
(default .dev in the checkout); every directory is a world of its own. --port BASE: the first of its 26 ports
(default 27100; 0: any that are free), remembered in DIR. DIR/kafka.properties adds to the brokers' settings.
Exit code 1: it did not work; 3: a program is not installed.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kinds import HOST, KINDS, PORTS_USED, ROOT, Kind
from process import STOP_S, Process, Trouble

DEFAULT_DIR = ROOT / ".dev"
DEFAULT_PORT = 27100
ALL = ("kafka", "postgres", "redis", "valkey")


class World:
    """The servers of one directory."""

    def __init__(self, directory: Path, port: int | None) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._remember = directory / "port"
        base = self._base(port)
        self.kinds = {kind.name: kind(directory, base) for kind in KINDS}

    def _base(self, asked: int | None) -> int:
        try:
            known = int(self._remember.read_text())
        except (OSError, ValueError):
            known = None
        if known is not None:
            if asked not in (None, 0, known):
                raise Trouble(f"the servers in {self.directory} have the ports from {known}; wipe them first")
            return known
        base = DEFAULT_PORT if asked is None else asked or free_base()
        self._remember.write_text(f"{base}\n")
        return base

    def chosen(self, names: list[str]) -> list[tuple[Kind, list[int]]]:
        """Kinds with the numbers of the members that `names` means; everything when there are none."""
        wanted: dict[str, set[int]] = {}
        for name in names or list(self.kinds):
            for each in ALL if name == "all" else (name,):
                family, _, member = each.partition(".")
                kind = self.kinds.get(family)
                numbers = range(kind.count) if kind is not None else range(0)
                if member:
                    numbers = [n for n in numbers if str(n + 1) == member]  # type: ignore[assignment]
                if not numbers:
                    known = ", ".join(m.name for k in self.kinds.values() for m in k.members)
                    raise Trouble(f"there is no server {each}; there are {known}")
                wanted.setdefault(family, set()).update(numbers)
        return [(self.kinds[name], sorted(numbers)) for name, numbers in wanted.items()]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One start, stop or wipe at a time in this directory."""
        with (self.directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def start(self, chosen: list[tuple[Kind, list[int]]]) -> None:
        absent = [text for kind, _ in chosen if (text := kind.missing())]
        if absent:
            raise Trouble("; ".join(absent), missing=True)
        for kind, numbers in chosen:
            for number in numbers:
                kind.launch(number)
        for kind, numbers in chosen:
            for number in numbers:
                kind.await_answer(number)
            if len(numbers) == kind.count:
                kind.join()

    def stop(self, chosen: list[tuple[Kind, list[int]]]) -> None:
        members: list[Process] = []
        for kind, numbers in chosen:
            for number in numbers:
                kind.members[number].ask_to_stop(kind.stop_signal)
                members.append(kind.members[number])
        deadline = time.monotonic() + STOP_S
        for member in members:
            if not member.await_stop(deadline):
                print(f"{member.name} did not stop within {STOP_S:.0f} s and was killed", file=sys.stderr)

    def wipe(self, chosen: list[tuple[Kind, list[int]]]) -> None:
        self.stop(chosen)
        for kind, numbers in chosen:
            for number in numbers:
                shutil.rmtree(kind.members[number].directory, ignore_errors=True)
            if kind.home() != self.directory and not any(kind.home().iterdir()):
                kind.home().rmdir()
        if not any(m.directory.exists() for kind in self.kinds.values() for m in kind.members):
            self._remember.unlink(missing_ok=True)


def free_base() -> int:
    """A base below the kernel's own range with all its ports free now."""
    while True:
        base = random.SystemRandom().randrange(15000, 32000, 50)
        try:
            for port in range(base, base + PORTS_USED):
                with socket.socket() as probe:
                    probe.bind((HOST, port))
        except OSError:
            continue
        return base


def signalled(chosen: list[tuple[Kind, list[int]]], verb: str) -> None:
    for kind, numbers in chosen:
        for number in numbers:
            member = kind.members[number]
            number_sent = {"pause": signal.SIGSTOP, "resume": signal.SIGCONT}.get(verb)
            reached = member.kill() if number_sent is None else member.send(number_sent)
            if not reached:
                raise Trouble(f"{member.name} does not run")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="deploy/dev/servers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("start", "stop", "wipe", "status", "env", "kill", "pause", "resume"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--port", type=int)
    asked = parser.parse_intermixed_args()
    if not asked.names and asked.verb in ("start", "kill", "pause", "resume"):
        parser.error(f"{asked.verb} which?")
    os.umask(0o022)
    try:
        world = World(asked.dir.resolve(), asked.port)
        chosen = world.chosen(asked.names)
        if asked.verb == "status":
            for kind, numbers in chosen:
                for member in (kind.members[number] for number in numbers):
                    print(f"{member.name:<10} {member.state():<8} {member.pid or '-':<8} {member.log}")
        elif asked.verb == "env":
            for kind, _ in chosen:
                if all(member.pid is not None for member in kind.members):
                    print("\n".join(f"export {name}={url}" for name, url in kind.urls().items()))
        elif asked.verb in ("kill", "pause", "resume"):
            signalled(chosen, asked.verb)
        else:
            with world.locked():
                getattr(world, asked.verb)(chosen)
    except Trouble as trouble:
        print(f"servers: {trouble}", file=sys.stderr)
        return 3 if trouble.missing else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
