"""A cluster for tests: real servers, and every part of fastim a process of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bench.server import free_ports
from fastim.auth import create_dev_key, mint
from fastim.client import Client, Event, MemoryLocalStore, Message
from tests.servers import Servers
from tests.system.served import ROOT, environment
from tests.unit.client_script import Hurry

START_S = 40.0


class Part:
    """`fastim node`, `dispatch` or `api`. announces: how many lines it prints until it is up."""

    def __init__(self, name: str, command: list[str], announces: int, directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self._command = command
        self._announces = announces
        self._lines: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Part:
        """Returns once it is up."""
        self.launch()
        deadline = time.monotonic() + START_S
        while len(self._lines) < self._announces:
            assert self.process is not None
            assert self.process.poll() is None, f"{self.name} ended: {self.logged()}"
            assert time.monotonic() < deadline, f"{self.name} is not up: {self.logged()}"
            time.sleep(0.02)
        return self

    def launch(self) -> None:
        self._lines = []
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment()
            )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._lines.append(line)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Returns its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(40)

    def logged(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[int]:
        """The processes of a supervisor."""
        assert self.process is not None
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


class Cluster:
    """Three servers, a configuration, and the parts that were started. `close` leaves nothing behind."""

    def __init__(self, directory: Path, servers: Servers) -> None:
        self.directory = directory
        self.servers = servers
        self.data = directory / "data"
        self.data.mkdir()
        self.config = directory / "fastim.toml"
        self.ports = dict(zip(("a", "b", "api", "status"), free_ports(4), strict=True))
        self.parts: dict[str, Part] = {}
        self._key = create_dev_key(self.data)
        self.configure(servers.start("kafka", "redis", "postgres"))

    def configure(self, urls: dict[str, str]) -> None:
        self.config.write_text(
            f"dev = true\ndata_dir = {json.dumps(str(self.data))}\n"
            f"[store]\nurl = {json.dumps([urls['FASTIM_POSTGRES'], urls['FASTIM_POSTGRES2']])}\n"
            f"[bus]\nurl = {json.dumps(urls['FASTIM_KAFKA'])}\nsubmit_partitions = 4\n"
            f"undelivered_partitions = 2\n"
            f"[presence]\nurl = {json.dumps(urls['FASTIM_REDIS'])}\n"
            f'[api]\nlisten = "127.0.0.1:{self.ports["api"]}"\nreply_timeout_ms = 1500\n'
            "[node]\nplain = true\nmax_connections = 200\ndrain_window_ms = 200\n"
            "rate_per_s = 100000\nrate_burst = 100000\n"
        )

    # -- parts

    def node(self, name: str, workers: int = 1) -> Part:
        arguments = ["node", "--name", name, "--listen", f"127.0.0.1:{self.ports[name]}"]
        if workers > 1:
            arguments += ["--workers", str(workers)]
        return self._part(f"node-{name}", arguments, workers)

    def dispatcher(self, number: int) -> Part:
        arguments = ["dispatch", "--name", f"d{number}"]
        if number == 1:
            arguments += ["--status-listen", f"127.0.0.1:{self.ports['status']}"]
        return self._part(f"dispatch-{number}", arguments, 1)

    def api(self) -> Part:
        return self._part("api", ["api"], 1)

    def _part(self, name: str, arguments: list[str], announces: int) -> Part:
        command = [sys.executable, "-m", "fastim", *arguments, "--config", str(self.config)]
        part = self.parts[name] = Part(name, command, announces, self.directory)
        return part.start()

    def close(self) -> None:
        for part in self.parts.values():
            part.send(signal.SIGCONT) if part.process and part.process.poll() is None else None
            part.end(signal.SIGTERM)

    # -- clients

    def token(self, user: str, scope: str = "client") -> str:
        return mint(self._key, user, [scope], audience="fastim", ttl_s=600, now_s=int(time.time()))

    def url(self, node: str) -> str:
        return f"ws://127.0.0.1:{self.ports[node]}"

    def person(self, user: str, node: str, device: str = "d0") -> Person:
        return Person(self, user, node, device)

    async def rest(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """As a service, and as an admin for what services may not."""
        headers = {"authorization": f"Bearer {self.token('shop', 'service')}"}
        async with httpx.AsyncClient(trust_env=False, timeout=20.0) as client:
            url = f"http://127.0.0.1:{self.ports['api']}{path}"
            return await client.request(method, url, json=body, headers=headers)

    async def trace(self, message: int | str) -> dict[str, Any]:
        answer = await self.rest("GET", f"/v1/messages/{message}/trace")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def state(self, message: int | str, user: str) -> str:
        """Of the obligation of this message towards the user."""
        trace = await self.trace(message)
        (one,) = [one for one in trace["obligations"] if one["user"] == user]
        return str(one["state"])

    async def until_state(self, message: int | str, user: str, state: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while (found := await self.state(message, user)) != state:
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)

    async def until_traced(self, path: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while (answer := await self.rest("GET", path)).status_code != 200:
            assert time.monotonic() < deadline, answer.text
            await asyncio.sleep(0.05)


class Person:
    """A user on the SDK, and what was shown to him."""

    def __init__(self, cluster: Cluster, user: str, node: str, device: str) -> None:
        self.user = user
        self.shown: list[tuple[str, int, str]] = []
        """(conversation, seq, text), of others"""
        self.client = Client(
            cluster.url(node), cluster.token(user), device, store=MemoryLocalStore(),
            on_event=self._on_event, rng=Hurry(),
        )  # fmt: skip

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Message) and event.sender != self.user:
            self.shown.append((event.conv, event.seq, event.text))

    def texts(self, conv: str) -> list[str]:
        return [text for where, _, text in self.shown if where == conv]

    async def __aenter__(self) -> Person:
        await self.client.start()
        await eventually(lambda: self.client.connected)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def say(self, conv: str, *texts: str) -> list[int]:
        """Returns their msg_ids once all are accepted."""
        going = [await self.client.send(conv, text) for text in texts]
        return [(await one.accepted()).msg_id for one in going]


async def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)
