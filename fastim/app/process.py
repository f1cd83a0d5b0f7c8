"""The process around the App: its loop, its signals, its end.

 START ──▶ RUNNING ──SIGTERM, SIGINT──▶ DRAINING ──▶ exit 0      a second signal: at once
   │           └──────fatal error──────▶ DRAINING ──▶ exit 1      later than 29 s: at once
   └─ cannot start ──▶ UsageError (exit 2), Unavailable (exit 1)

A fatal error is a task that died, an InternalError, or anything that reached the loop's exception handler
but the failure of one socket: what a peer can cause must not end the process. Everything accepted is in the
store, so leaving at once loses nothing; it only costs the clients a repeat.

E1  SIGTERM ends in exit 0 within 30 s, a second one at once           tests/system/test_app.py
E2  a fatal error is logged, /health answers 503, and the exit is 1    same
E3  a failing socket is not fatal                                      same
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

import uvloop

from fastim import observe
from fastim.app.compose import App
from fastim.config import Config, Role
from fastim.errors import FastimError

_log = logging.getLogger("fastim.app")

TICK_MS: Final = 250
STOP_DEADLINE_S: Final = 29.0
FATAL_WINDOW_MS: Final = 1_000
"""After a fatal error clients are closed within this time: the process is not to be trusted for longer."""
SWITCH_S: Final = 0.0005
"""The store's threads give up the interpreter at each step of SQLite; by default they wait 5 ms to get it
back from a busy loop, and a batch of 256 took 82 ms instead of 1.4."""
GC_THRESHOLDS: Final = (50_000, 20, 100)
"""What is under way lives until its ack, some 200 ms, and is freed by its count. At Python's own 700 objects
each of it was looked at up to three times before that."""
FORGET_TICKS: Final = 40
"""Addresses that no longer owe failures are forgotten every so many ticks."""


def run(
    config: Config,
    announce: Callable[[App], None] = lambda app: None,
    role: Role = "serve",
    *,
    supervised: bool = False,
) -> int:
    """Serve until a signal or a fatal error; returns the exit code.

    supervised: the end of standard input, which is the end of the supervisor, is as good as SIGTERM.

    announce is called once everything listens. Raises UsageError and Unavailable when it cannot start.
    """
    observe.set_up_logging(config.log.level, as_json=config.log.as_json)
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Process(config, announce, role, supervised=supervised).main())


class Process:
    """One run."""

    def __init__(
        self,
        config: Config,
        announce: Callable[[App], None],
        role: Role = "serve",
        *,
        supervised: bool = False,
    ) -> None:
        self._announce = announce
        self._supervised = supervised
        self._ended = asyncio.Event()
        self._reason = ""
        self._failed = False
        self.app = App(config, on_fatal=self.fatal, role=role)

    async def main(self) -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self.app.reload_certificates)
        if self._supervised:
            loop.add_reader(sys.stdin.fileno(), self._on_supervisor)
        await self.app.start()
        _log.info("started", extra={"role": self.app.role, "who": self.app.name, "boot": self.app.boot})
        self._announce(self.app)
        # What lives until the end is not worth looking at in every collection.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        ticking = asyncio.create_task(self._tick(), name="app.tick")
        await self._ended.wait()
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        return await self._stop()

    async def _stop(self) -> int:
        _log.info("stopping", extra={"reason": self._reason})
        watchdog = threading.Timer(STOP_DEADLINE_S, _leave, ["the stop took too long", 1])
        watchdog.daemon = True
        watchdog.start()
        good = await self.app.stop(self._reason, window_ms=FATAL_WINDOW_MS if self._failed else None)
        watchdog.cancel()
        _log.info("stopped", extra={"clean": good and not self._failed})
        return 0 if good and not self._failed else 1

    def fatal(self, error: BaseException) -> None:
        """Somebody cannot go on. The process drains and ends with 1."""
        _log.critical("fatal: %s", type(error).__name__, exc_info=error)
        self._failed = True
        self._end("internal error" if not isinstance(error, FastimError) else str(error))

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self.app.status.draining = self._reason
        self._ended.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._ended.is_set():
            _leave(f"{number.name} again", 128 + number)
        self._end(f"restart ({number.name})")

    def _on_supervisor(self) -> None:
        """It never writes: this is the end of the pipe."""
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        self._end("the supervisor is gone")

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and not {"task", "future"} & context.keys():
            # One socket failed: a peer that is unreachable, a broken TLS record, no file descriptor left.
            _log.warning("socket: %s", context.get("message", ""), extra={"reason": str(error)})
            return
        self.fatal(error or RuntimeError(str(context.get("message", "event loop error"))))

    async def _tick(self) -> None:
        """How late the loop is."""
        loop = asyncio.get_running_loop()
        count = 0
        while True:
            due = loop.time() + TICK_MS / 1000
            await asyncio.sleep(TICK_MS / 1000)
            observe.LOOP_LAG.observe(max(0.0, loop.time() - due))
            count += 1
            if count % FORGET_TICKS == 0:
                self.app.ground.failures.forget()


def _leave(reason: str, code: int) -> None:
    """End the process now. Nothing is lost: what was accepted is in the store."""
    _log.error("leaving at once: %s", reason)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)
