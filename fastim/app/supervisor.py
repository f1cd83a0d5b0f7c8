"""Several nodes on one address of one machine: a process for each, held up by one that serves nobody.

 START ─▶ a worker each ─▶ WATCHING ──SIGTERM, SIGINT──▶ SIGTERM to all ─▶ exit 0, or 1 if one ended badly
                             │  └── a worker ended: again after 0.5 s, 1 s … 10 s
                             ├── it cannot start (exit 2), or ended 5 times within 30 s each: all down, exit 1
                             └── a second signal: SIGKILL to all

The kernel spreads new connections over the sockets that listen on the address (SO_REUSEPORT). The supervisor
binds it too, without listening: so port 0 becomes one port for all, and nobody else takes it while a worker
is away. A worker whose supervisor is gone ends itself: it sees the end of its standard input.

V1  a worker that ends is started again, under its own name    tests/system/test_supervisor.py
V2  a worker that keeps ending ends all, loudly                same
V3  signals reach every worker, each once                      same
V4  no worker outlives its supervisor                          same
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Final

import uvloop

from fastim import observe
from fastim.app.access import prepare_development
from fastim.config import Config, split_address
from fastim.errors import UsageError

_log = logging.getLogger("fastim.app")

BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MOST_S: Final = 10.0
SHORT_LIFE_S: Final = 30.0
"""Who ends earlier has ended at once."""
MOST_SHORT_LIVES: Final = 5
"""In a row; then something is wrong that a start does not mend."""
STOP_S: Final = 32.0
"""A worker leaves by itself within 30 s of SIGTERM."""

Command = Callable[[int, str], Sequence[str]]
"""(number of the worker from 1, the address) -> what to execute."""


def supervise(config: Config, command: Command) -> int:
    """Keep node.workers workers running until a signal; returns the exit code. Raises UsageError."""
    observe.set_up_logging(config.log.level, as_json=config.log.as_json)
    prepare_development(config)
    held, address = _hold(config.node.listen)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(Supervisor(config.node.workers, lambda n: command(n, address)).main())
    finally:
        held.close()


def as_worker(config: Config, number: int) -> Config:
    """The configuration of one of the nodes."""
    node = config.node
    changes = {"name": f"{node.name}-{number}"}
    if node.status_listen:
        host, _, port = node.status_listen.rpartition(":")
        changes["status_listen"] = f"{host}:{int(port) + number - 1}"
    return config.model_copy(update={"node": node.model_copy(update=changes)})


def _hold(listen: str) -> tuple[socket.socket, str]:
    """Bind the address without listening, and say which it is."""
    host, port = split_address(listen)
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"node.listen is {listen!r}: {error.strerror}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    port = sock.getsockname()[1]
    return sock, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Supervisor:
    """command: what to execute for the worker of a number from 1 on."""

    def __init__(self, workers: int, command: Callable[[int], Sequence[str]]) -> None:
        self._workers = workers
        self._command = command
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._code = 0

    async def main(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._send, signal.SIGHUP)
        _log.info("supervising", extra={"workers": self._workers})
        await asyncio.gather(*(self._keep(number) for number in range(1, self._workers + 1)))
        _log.info("all workers have ended", extra={"clean": self._code == 0})
        return self._code

    async def _keep(self, number: int) -> None:
        """One worker, again and again, until all stop."""
        loop = asyncio.get_running_loop()
        short_lives = 0
        while not self._stopping.is_set():
            began_s = loop.time()
            code = await self._run(number)
            lived_s = loop.time() - began_s
            if self._stopping.is_set():
                if code:
                    _log.error("worker %d did not end well", number, extra={"code": code})
                    self._code = self._code or 1
                return
            short_lives = short_lives + 1 if lived_s < SHORT_LIFE_S else 1
            _log.error("worker %d ended", number, extra={"code": code, "lived_s": round(lived_s, 1)})
            if code == 2:
                self._give_up(f"worker {number} cannot start; what it wrote above says why")
            elif short_lives >= MOST_SHORT_LIVES:
                self._give_up(f"worker {number} ended {short_lives} times, each within {SHORT_LIFE_S:.0f} s")
            else:
                await self._pause(min(BACKOFF_FIRST_S * 2 ** (short_lives - 1), BACKOFF_MOST_S))

    async def _run(self, number: int) -> int:
        # A session of its own: a terminal's Ctrl-C comes once, through us.
        process = await asyncio.create_subprocess_exec(
            *self._command(number), stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        self._running[number] = process
        if self._stopping.is_set():  # the signal came while it was made
            process.terminate()
        try:
            return await self._ended(process)
        finally:
            del self._running[number]
            if process.stdin is not None:
                process.stdin.close()

    async def _ended(self, process: asyncio.subprocess.Process) -> int:
        waiting = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not waiting.done():
            await asyncio.wait((waiting,), timeout=STOP_S)
        if not waiting.done():
            _log.error("a worker did not leave within %.0f s and is killed", STOP_S)
            process.kill()
        return await waiting

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _give_up(self, reason: str) -> None:
        _log.critical("giving up: %s", reason)
        self._code = 1
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._send(signal.SIGTERM)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            self._code = 128 + number
            self._send(signal.SIGKILL)
        else:
            _log.info("stopping", extra={"reason": number.name})
            self._stop()

    def _send(self, number: signal.Signals) -> None:
        for process in self._running.values():
            if process.returncode is None:
                process.send_signal(number)
