"""fastim.app.supervisor, with small programs in place of nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastim.app import supervisor
from fastim.app.supervisor import as_worker
from fastim.config import load
from fastim.errors import UsageError
from tests.system.served import environment

_PROGRAM = """
import sys
from fastim.app import supervisor
from fastim.config import load
supervisor.BACKOFF_FIRST_S = 0.01
config = load({{"dev": True, "data_dir": "data", "node": {{"workers": {workers}, "listen": "127.0.0.1:0"}}}})
worker = [sys.executable, "-c", {worker!r}]
sys.exit(supervisor.supervise(config, lambda number, address: [*worker, str(number), address]))
"""
WAITS = """
import os, signal, sys, threading
log = open("log", "a", buffering=1)
def note(word):
    log.write(f"{sys.argv[1]} {word} {os.getpid()} {sys.argv[2]}\\n")
done = threading.Event()
def end(number, frame):
    note(f"got-{number}")
    done.set()
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGHUP, lambda number, frame: note("hup"))
def watch():
    sys.stdin.read()
    note("orphaned")
    done.set()
threading.Thread(target=watch, daemon=True).start()
note("up")
done.wait()
"""


class Run:
    def __init__(self, directory: Path, worker: str, workers: int = 2) -> None:
        self.path = directory / "log"
        self.errors = directory / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(workers=workers, worker=worker)],
                cwd=directory, stderr=errors, env=environment(),
            )  # fmt: skip

    def lines(self, word: str) -> list[list[str]]:
        text = self.path.read_text() if self.path.exists() else ""
        return [line.split() for line in text.splitlines() if line.split()[1] == word]

    def wait_for(self, word: str, count: int) -> list[list[str]]:
        deadline = time.monotonic() + 20
        while len(found := self.lines(word)) < count:
            assert time.monotonic() < deadline, (self.path.read_text(), self.errors.read_text())
            time.sleep(0.02)
        return found


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, WAITS)
    yield run
    if run.process.poll() is None:
        run.process.kill()
        run.process.wait()


def test_worker_that_ends_is_started_again_under_its_own_name(waiting: Run) -> None:
    first = waiting.wait_for("up", 2)
    assert sorted(line[0] for line in first) == ["1", "2"]
    os.kill(int(first[0][2]), signal.SIGKILL)
    again = waiting.wait_for("up", 3)[2]
    assert again[0] == first[0][0]
    waiting.process.send_signal(signal.SIGTERM)
    assert waiting.process.wait(20) == 0


def test_all_workers_are_given_one_address_with_a_port(waiting: Run) -> None:
    addresses = {line[3] for line in waiting.wait_for("up", 2)}
    assert len(addresses) == 1
    assert not addresses.pop().endswith(":0")


def test_signals_reach_every_worker_once(waiting: Run) -> None:
    waiting.wait_for("up", 2)
    waiting.process.send_signal(signal.SIGHUP)
    assert len(waiting.wait_for("hup", 2)) == 2
    waiting.process.send_signal(signal.SIGINT)
    assert waiting.process.wait(20) == 0
    assert sorted(line[0] for line in waiting.lines(f"got-{int(signal.SIGTERM)}")) == ["1", "2"]


def test_no_worker_outlives_its_supervisor(waiting: Run) -> None:
    waiting.wait_for("up", 2)
    waiting.process.kill()
    waiting.process.wait()
    assert len(waiting.wait_for("orphaned", 2)) == 2


def test_worker_that_keeps_ending_ends_all_loudly(tmp_path: Path) -> None:
    run = Run(tmp_path, f"import sys\nif sys.argv[1] == '2': sys.exit(3)\n{WAITS}")
    assert run.process.wait(20) == 1
    assert "giving up: worker 2 ended 5 times" in run.errors.read_text()
    assert len(run.lines(f"got-{int(signal.SIGTERM)}")) == 1


def test_worker_that_cannot_start_is_not_tried_again(tmp_path: Path) -> None:
    run = Run(tmp_path, f"import sys\nif sys.argv[1] == '1': sys.exit(2)\n{WAITS}")
    assert run.process.wait(20) == 1
    assert "worker 1 cannot start" in run.errors.read_text()
    assert run.errors.read_text().count("worker 1 ended") == 1


def test_second_signal_ends_workers_that_do_not_leave(tmp_path: Path) -> None:
    run = Run(tmp_path, WAITS.replace("done.set()", "pass"))
    run.wait_for("up", 2)
    run.process.send_signal(signal.SIGTERM)
    run.wait_for(f"got-{int(signal.SIGTERM)}", 2)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(20) == 128 + signal.SIGTERM


def test_address_that_somebody_has_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        listen = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(UsageError, match="cannot listen"):
            supervisor.supervise(
                load({"dev": True, "data_dir": str(tmp_path), "node": {"workers": 2, "listen": listen}}),
                lambda number, address: [],
            )


def test_each_worker_has_a_name_and_a_status_port_of_its_own() -> None:
    config = load({"dev": True, "node": {"workers": 3, "status_listen": "127.0.0.1:9100"}})
    workers = [as_worker(config, number).node for number in (1, 3)]
    assert [(node.name, node.status_listen) for node in workers] == [
        ("n1-1", "127.0.0.1:9100"), ("n1-3", "127.0.0.1:9102"),
    ]  # fmt: skip
