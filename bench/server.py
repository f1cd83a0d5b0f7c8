"""`fastim serve` as a child process: started with a configuration, killed, stopped, audited, measured.

Everything that a harness must know about the command line and the configuration file is here.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fastim.auth import Scope, SigningKey, create_dev_key, mint

ROOT = Path(__file__).resolve().parent.parent
AUDIENCE = "fastim"
KEPT_LOGS: Final = "TESTS_KEEP_LOGS"
"""The variable that names the directory of `keep`; see tests/leaks.py."""
_TICKS = os.sysconf("SC_CLK_TCK")


class ServerError(Exception):
    """The server did not start, stop or answer as it must; the text holds the end of its log."""


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on now.

    Below the ephemeral range: while a server is killed its clients keep connecting, and the kernel could give
    one of them the very port it connects to; it would then talk to itself, and the server could not return.
    """
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            with contextlib.suppress(OSError):
                sockets.append(socket.create_server(("127.0.0.1", random.randint(low // 2, low - 1))))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def to_toml(table: Mapping[str, Any], name: str = "") -> str:
    """Values first, then the tables below; enough for what a configuration holds."""
    values = [
        f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)
    ]
    parts = ([f"[{name}]"] if name and values else []) + values
    below = [
        to_toml(value, f"{name}.{key}" if name else key)
        for key, value in table.items()
        if isinstance(value, Mapping)
    ]
    return "\n".join([*parts, *below]) + "\n"


def laid_over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` in which the tables of `changes` are laid over its own, table by table."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = (
            laid_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def keep(log: Path) -> None:
    """Make `log` a link to a file that outlives its directory, where tests search all logs in the end."""
    directory = os.environ.get(KEPT_LOGS)
    if directory and not log.exists():
        test = re.sub(r"\W+", "-", os.environ.get("PYTEST_CURRENT_TEST", ""))[:100]
        descriptor, name = tempfile.mkstemp(".log", f"{test}-", directory)
        os.close(descriptor)
        log.unlink(missing_ok=True)
        log.symlink_to(name)


def _environment() -> dict[str, str]:
    """Ours without the product's own settings: only the file counts."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTIM_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


class Server:
    """One data directory, its ports, and the process that serves it.

    settings: the configuration file's tables, laid over what this class needs itself.
    cpu: the core the process is bound to, None for any.
    """

    def __init__(self, directory: Path, settings: dict[str, Any] | None = None, *, cpu: int | None = None):
        self.directory = directory
        self.data = directory / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self.ws_port, self.http_port = free_ports(2)
        self.log = directory / "server.log"
        self.config = directory / "fastim.toml"
        self.cpu = cpu
        self.process: subprocess.Popen[bytes] | None = None
        self.key: SigningKey = create_dev_key(self.data)
        self.starts = 0
        self.environment: dict[str, str] = {}
        """Laid over the process's: another build of the core."""
        self._write_config(settings or {})

    def _write_config(self, settings: dict[str, Any]) -> None:
        own = {
            "data_dir": str(self.data),
            "node": {"listen": f"127.0.0.1:{self.ws_port}", "plain": True},
            "api": {"listen": f"127.0.0.1:{self.http_port}"},
        }
        self.config.write_text(to_toml(laid_over(own, settings)))

    @property
    def pid(self) -> int:
        if self.process is None:
            raise ServerError("the server was not started")
        return self.process.pid

    def token(self, user: str, *scopes: str, ttl_s: int = 86_400) -> str:
        """A token that this server believes."""
        return mint(
            self.key, user, scopes or (Scope.CLIENT,), audience=AUDIENCE, ttl_s=ttl_s, now_s=int(time.time())
        )

    # -------------------------------------------------------------------------------------- life

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "fastim", *arguments]

    def spawn(self) -> None:
        """Start the process and return at once."""
        if self.process is not None and self.process.poll() is None:
            raise ServerError("the server runs already")
        keep(self.log)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("serve", "--dev", "--config", str(self.config)),
                stdout=log, stderr=subprocess.STDOUT, cwd=self.directory,
                env=_environment() | self.environment,
            )  # fmt: skip
        if self.cpu is not None:
            os.sched_setaffinity(self.process.pid, {self.cpu})
        self.starts += 1

    def wait_ready(self, deadline_s: float = 30.0) -> float:
        """Until it takes WebSocket connections; returns how long this took."""
        start = time.monotonic()
        while time.monotonic() < start + deadline_s:
            if self.process is None or self.process.poll() is not None:
                raise ServerError(f"the server ended by itself:\n{self.log_tail()}")
            if self.listens():
                return time.monotonic() - start
            time.sleep(0.02)
        raise ServerError(f"the server did not listen within {deadline_s} s:\n{self.log_tail()}")

    def listens(self) -> bool:
        """Whether /health on the WebSocket port answers 200."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ws_port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def start(self) -> float:
        self.spawn()
        return self.wait_ready()

    def kill(self) -> None:
        """kill -9, and wait until the process is gone."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, deadline_s: float = 40.0) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                self.kill()
                raise ServerError(f"SIGTERM took longer than {deadline_s} s:\n{self.log_tail()}") from None
        return self.process.returncode

    def end(self) -> None:
        """Leave no process behind, whatever happened."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def log_tail(self, lines: int = 30) -> str:
        """The last log lines, without what `serve --dev` says about tokens and what to type next."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        kept = [line for line in text.splitlines() if not line.startswith("  ") and line]
        return "\n".join(kept[-lines:])

    # ------------------------------------------------------------------------------------- facts

    def cpu_s(self) -> float:
        """utime + stime of all threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory_kb(self) -> dict[str, int]:
        """VmRSS and VmHWM (the peak)."""
        wanted = {}
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                wanted[name] = int(rest.split()[0])
        return wanted

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def audit(self, data: Path | None = None, ids: Path | None = None) -> tuple[int, dict[str, Any]]:
        """`fastim audit` on a stopped data directory: (exit code, its JSON report)."""
        arguments = ["audit", "--data", str(data or self.data), "--json"]
        if ids is not None:
            arguments += ["--ids", str(ids)]
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=300,
            env=_environment(), cwd=self.directory,
        )  # fmt: skip
        try:
            return done.returncode, json.loads(done.stdout)
        except ValueError:
            raise ServerError(
                f"audit: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            ) from None
