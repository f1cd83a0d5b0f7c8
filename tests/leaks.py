"""Secrets that tests plant, and the search for them in everything that was logged meanwhile (promise P21).

A token, key, password or body that holds MARK is planted; it is found as text, in hex and in base64, wherever
it begins. Beside it every token and every private key counts as planted. A plugin of pytest, registered by
conftest.py: when the tests are over it searches

- what loggers of this process wrote, as `fastim serve` would have written it;
- every log in the temporary directories of the tests: output of the servers that they started;
- the logs that bench.server.keep has linked: their directories are gone by then.

One leak makes the run fail, and its logs are kept. tests/system/test_logs.py shows that each kind is found.
"""

from __future__ import annotations

import base64
import copy
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from bench.server import KEPT_LOGS
from fastim import observe

MARK: Final = "pl4nt3d-s3cret"
LOGS: Final = ("*.log", "log", "errors")
_IN_PROCESS: Final = "in-process.log"
_SHOWN: Final = 20


def planted(what: str) -> str:
    """A secret that is found wherever it is logged; hard enough for a signing key."""
    return f"{MARK}-{what}-{secrets.token_hex(24)}"


def _spellings(secret: bytes) -> Iterator[bytes]:
    yield secret
    yield secret.hex().encode()
    for before in range(3):  # in base64: the characters that depend on nothing but `secret`
        encoded = base64.b64encode(bytes(before) + secret)
        yield encoded[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]


_PLANTED: Final = re.compile(b"|".join(map(re.escape, _spellings(MARK.encode()))), re.IGNORECASE)
_KINDS: Final = {
    "a planted secret": _PLANTED,
    "a token": re.compile(rb"eyJ[A-Za-z0-9_-]{10,}|bearer +[A-Za-z0-9._~-]{12,}", re.IGNORECASE),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY"),
}
_MEANT: Final = re.compile(rb"  (?:alice|bob) +eyJ[A-Za-z0-9_.-]+\Z")
"""What `serve --dev` prints for the people in front of it."""


class Leak(NamedTuple):
    """Where something is that must not be."""

    file: Path
    line: int
    kind: str
    start: str
    """Of the line, up to the secret."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind} behind {self.start!r}"


class Found(NamedTuple):
    """The outcome of a search."""

    files: int
    lines: int
    leaks: list[Leak]

    def __str__(self) -> str:
        return f"{self.lines:,} lines of {self.files} logs, {len(self.leaks)} leaks"


def search(files: Iterable[Path]) -> Found:
    """All lines of all files."""
    leaks: list[Leak] = []
    count = lines = 0
    for file in files:
        count += 1
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                lines += 1
                leaks += [Leak(file, number, *hit) for hit in _look(line.rstrip(b"\r\n"))]
    return Found(count, lines, leaks)


def _look(line: bytes) -> Iterator[tuple[str, str]]:
    for kind, pattern in _KINDS.items():
        hit = pattern.search(line)
        if hit is not None and not (kind == "a token" and _MEANT.match(line)):
            yield kind, line[max(0, hit.start() - _SHOWN) : hit.start()].decode(errors="replace")


class _Collector(logging.FileHandler):
    """Writes what the product would; the record stays as it was for whoever else looks at it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.addFilter(observe.RedactingFilter())
        self.setFormatter(observe.KeyValueFormatter())

    def handle(self, record: logging.LogRecord) -> bool:
        return bool(super().handle(copy.copy(record)))

    def attach(self) -> None:
        """Again and again: a test may set up logging itself."""
        root = logging.getLogger()
        if self not in root.handlers:
            root.addHandler(self)
        logging.getLogger("fastim").setLevel(logging.DEBUG)


class LeakSearch:
    """The plugin."""

    def __init__(self) -> None:
        self._kept = Path(tempfile.mkdtemp(prefix="fastim-logs-"))
        self._outer = os.environ.get(KEPT_LOGS)
        self._collector = _Collector(self._kept / _IN_PROCESS)
        self.temporary: Path | None = None
        """Where the tests have their directories."""
        self._found = Found(0, 0, [])
        os.environ[KEPT_LOGS] = str(self._kept)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        self._collector.attach()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        logging.getLogger().removeHandler(self._collector)
        self._collector.close()
        self._found = search(self._files())
        if self._found.leaks and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _files(self) -> Iterator[Path]:
        for directory in (self._kept, self.temporary):
            for pattern in LOGS if directory is not None else ():
                found = sorted(directory.rglob(pattern))  # type: ignore[union-attr]
                yield from (path for path in found if path.is_file() and not path.is_symlink())

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_sep("=", f"secrets in logs: {self._found}")
        for leak in self._found.leaks[:50]:
            terminalreporter.write_line(f"LEAK {leak}")

    def pytest_unconfigure(self) -> None:
        if self._outer is None:
            os.environ.pop(KEPT_LOGS, None)
        else:
            os.environ[KEPT_LOGS] = self._outer
        if not self._found.leaks:
            shutil.rmtree(self._kept, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        config.pluginmanager.register(LeakSearch(), "leak-search")


@pytest.fixture(scope="session", autouse=True)
def logs_are_searched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    request.config.pluginmanager.get_plugin("leak-search").temporary = tmp_path_factory.getbasetemp()
