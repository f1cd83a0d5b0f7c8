"""Real servers for tests: those the environment names, else started by deploy/dev/servers.

The fixtures `kafka`, `postgres`, `redis_server` and `valkey` (tests/conftest.py) give URLs of servers that
the whole session shares: name topics, databases and keys so that no other test minds. A test that kills or
stops a server takes `own_servers`, a world of its own: `own_servers.start("kafka3")`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import pytest

from bench.server import KEPT_LOGS

SCRIPT: Final = Path(__file__).resolve().parents[1] / "deploy" / "dev" / "servers"
_NOT_INSTALLED: Final = 3
_DEADLINE_S: Final = 110.0


class Servers:
    """The servers of one directory, with ports that were free. `close` leaves nothing behind."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fastim-servers-"))
        self.directory.chmod(0o755)  # PostgreSQL may run as another user
        self.urls: dict[str, str] = {}

    def start(self, *names: str) -> dict[str, str]:
        """Start or restart servers, and wait until they answer. Returns the URLs by variable name.

        Skips the test when a program is not installed, fails it when FASTIM_REQUIRE names the server.
        """
        done = self._run("start", "--port", "0", *names)
        if done.returncode == _NOT_INSTALLED:
            families = {name.partition(".")[0] for name in names} | {name.rstrip("3") for name in names}
            if families & set(os.environ.get("FASTIM_REQUIRE", "").split(",")):
                pytest.fail(f"{' '.join(names)} is required (FASTIM_REQUIRE). {done.stderr}")
            pytest.skip(done.stderr.strip())
        self._check(done)
        self.urls = {}
        for line in self._do("env").splitlines():
            name, _, url = shlex.split(line)[1].partition("=")
            self.urls[name] = url
        return self.urls

    def stop(self, *names: str) -> None:
        """Gracefully; data and ports stay."""
        self._do("stop", *names)

    def kill(self, *names: str) -> None:
        """kill -9."""
        self._do("kill", *names)

    def pause(self, *names: str) -> None:
        """SIGSTOP."""
        self._do("pause", *names)

    def resume(self, *names: str) -> None:
        """SIGCONT."""
        self._do("resume", *names)

    def close(self) -> None:
        if kept := os.environ.get(KEPT_LOGS):  # where the suite searches all logs in the end
            for log in self.directory.glob("*/log"):
                shutil.copyfile(log, Path(kept) / f"{self.directory.name}-{log.parent.name}.log")
        self._do("wipe")
        shutil.rmtree(self.directory)

    def _do(self, *arguments: str) -> str:
        done = self._run(*arguments)
        self._check(done)
        return done.stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPT), *arguments, "--dir", str(self.directory)]
        return subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S)

    @staticmethod
    def _check(done: subprocess.CompletedProcess[str]) -> None:
        if done.returncode:
            raise AssertionError(f"{shlex.join(map(str, done.args))} failed: {done.stdout}{done.stderr}")


class SharedServers:
    """The session's servers, each started when the first test asks for it."""

    def __init__(self) -> None:
        self._started: Servers | None = None

    def url(self, kind: str) -> str:
        """kind: kafka, postgres, redis or valkey. From FASTIM_KAFKA and its like when they are set."""
        name = f"FASTIM_{kind.upper()}"
        if name in os.environ:
            return os.environ[name]
        if self._started is None:
            self._started = Servers()
        if name not in self._started.urls:
            self._started.start(kind)
        return self._started.urls[name]

    def close(self) -> None:
        if self._started is not None:
            self._started.close()
