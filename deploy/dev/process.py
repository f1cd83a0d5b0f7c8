"""One server process that outlives the command that started it.

Hides pid files, log files and signals. A pid file holds the pid and the kernel's start time of the process,
so that a number used again by something else is never taken for ours. Signals reach the whole tree:
PostgreSQL's backends have sessions of their own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

STOP_S = 25.0
"""What SIGTERM may take before SIGKILL."""


class Trouble(Exception):
    """What a person has to read; `missing`: a program is not installed, nothing is broken."""

    def __init__(self, text: str, *, missing: bool = False) -> None:
        super().__init__(text)
        self.missing = missing


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent, start time); None when there is no such process or only its corpse."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else (fields[0], int(fields[1]), int(fields[19]))


class Process:
    """A process with its directory: `pid`, `log`, and what the server itself writes there."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.log = directory / "log"
        self._pid_file = directory / "pid"

    @property
    def pid(self) -> int | None:
        """None when it does not run."""
        try:
            pid, started = map(int, self._pid_file.read_text().split())
        except (OSError, ValueError):
            return None
        found = _stat(pid)
        return pid if found is not None and found[2] == started else None

    def state(self) -> str:
        """running, paused, stopped (by `stop`, or never started) or dead (it went away by itself)."""
        pid = self.pid
        if pid is None:
            return "dead" if self._pid_file.exists() else "stopped"
        found = _stat(pid)
        return "paused" if found is not None and found[0] in "Tt" else "running"

    def start(self, command: list[str], user: int | None, group: int | None, environ: dict[str, str]) -> None:
        """Detached from this terminal. With user and group, as them (only root may)."""
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, user=user, group=group,
                extra_groups=[] if user is not None else None, env={**os.environ, **environ},
            )  # fmt: skip
        child.returncode = 0  # it is not waited for: no warning about that
        found = _stat(child.pid)
        self._pid_file.write_text(f"{child.pid} {found[2] if found else 0}\n")

    def wait_for(self, answers: Callable[[], bool], seconds: float) -> None:
        """Until `answers` says yes. Trouble, with the end of the log, when the process ends or time is up."""
        deadline = time.monotonic() + seconds
        while not answers():
            if self.pid is None:
                raise Trouble(f"{self.name} ended while it started; its log says:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise Trouble(f"{self.name} gave no answer in {seconds:.0f} s; its log says:\n{self.tail()}")
            time.sleep(0.05)

    def tail(self, lines: int = 25) -> str:
        try:
            text = self.log.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"  ({error})"
        return "\n".join(f"  {line}" for line in text[-lines:])

    def send(self, number: int) -> bool:
        """To the process first, so that it starts nothing anew, then to its descendants."""
        pid = self.pid
        if pid is None:
            return False
        for each in (pid, *_descendants(pid)):
            try:
                os.kill(each, number)
            except ProcessLookupError:
                continue
        return True

    def ask_to_stop(self, number: int) -> None:
        pid = self.pid
        if pid is None:
            self._pid_file.unlink(missing_ok=True)
            return
        os.kill(pid, number)
        self.send(signal.SIGCONT)

    def await_stop(self, deadline: float) -> bool:
        """Whether it ended by itself; past the deadline (monotonic) it is killed."""
        willing = True
        while self.pid is not None:
            if time.monotonic() > deadline:
                willing = False
                self.send(signal.SIGKILL)
                deadline = time.monotonic() + STOP_S
            time.sleep(0.02)
        self._pid_file.unlink(missing_ok=True)
        return willing

    def kill(self) -> bool:
        """kill -9, and wait until the kernel has taken it away."""
        killed = self.send(signal.SIGKILL)
        while self.pid is not None:
            time.sleep(0.005)
        return killed


def _descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (found := _stat(int(entry))) is not None:
            parents.setdefault(found[1], []).append(int(entry))
    found_all: list[int] = []
    ring = [pid]
    while ring:
        ring = [child for each in ring for child in parents.get(each, [])]
        found_all += ring
    return found_all
