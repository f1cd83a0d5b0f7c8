"""`fastim serve --dev` in a process of its own, and the commands that go with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import fastim
from bench.server import KEPT_LOGS, free_ports, keep

ROOT = Path(fastim.__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """Ours, without the product's own settings, and with this source tree."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTIM_")}
    path = os.environ.get("PYTHONPATH", "")
    return {**kept, "PYTHONPATH": f"{path}:{ROOT}" if path else str(ROOT), "COLUMNS": "120", **more}


def run_command(
    *arguments: str, cwd: Path | None = None, code: int = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `fastim` to its end; no traceback, and this exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "fastim", *arguments],
        capture_output=True, text=True, timeout=60, env=environment(**more), cwd=cwd,
    )  # fmt: skip
    note(done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def note(errors: str) -> None:
    """Among the logs in which the tests search for secrets; what goes to standard output was asked for."""
    directory = os.environ.get(KEPT_LOGS)
    if directory:
        with (Path(directory) / "commands.log").open("a") as file:
            file.write(errors)


class Served:
    """A development server on two free ports."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.data = directory / "data"
        self.ws_port, self.http_port = free_ports(2)
        keep(directory / "server.log")
        self.log = (directory / "server.log").open("w+")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "fastim", "serve", "--dev", "--data", str(self.data),
                "--listen", f"127.0.0.1:{self.ws_port}", "--api-listen", f"127.0.0.1:{self.http_port}",
                *arguments,
            ],
            stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=directory, env=environment(),
        )  # fmt: skip

    @property
    def rest(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def announced(self, last: str = "chat bob") -> str:
        """What it printed, up to the line that holds `last`: then it listens."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if last in line:
                return "".join(lines)
        raise AssertionError(f"ended: {''.join(lines)}\n{self.logged()}")

    def logged(self) -> str:
        return Path(self.log.name).read_text()

    def signal(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(40)

    def health(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.rest}/health", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def send(self, to: str, text: str, sender: str) -> dict[str, Any]:
        """By REST, as a service."""
        done = run_command(
            "send",
            to,
            text,
            "--as",
            sender,
            "--service",
            "--data",
            str(self.data),
            "--url",
            self.rest,
            "--json",
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()
