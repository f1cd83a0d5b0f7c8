"""Virtual time: event loops that never sleep, and the scheduler that turns them.

Hides how time passes. Each simulated machine (the server process; everything outside it) has an event loop of
its own, all on one virtual clock and one thread. A loop runs one callback at a time under the scheduler's
eye, so a process can be killed between any two callbacks (kill -9 at any await: its tasks never run again,
not even their `finally`), or stopped and continued (SIGSTOP: the clock goes on, its timers come late and
all at once). Time moves only when no loop has anything ready; then it jumps to the earliest timer, what a
selector would have slept is added to the clock. Real sockets, threads and sub-processes are refused.

L1  the same seed gives the same trace                    tests/simulation/test_simulation.py
L2  a killed loop runs nothing any more                   same
L3  nothing ready and no timer anywhere is an error (Stuck), never a hang; so is a loop that does not rest
Source: promises.md, "Fault tools"; docs/adr/0060.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from asyncio import events
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn

WALL_START_MS: Final = 1_790_000_000_000
"""Where the wall clock of a run starts (2026-09)."""
MAX_CALLBACKS_PER_INSTANT: Final = 50_000
"""A loop that runs this many callbacks without time passing is taken for a live-lock."""


class Stuck(AssertionError):
    """Nothing is ready and no timer is set, or callbacks run for ever in one instant."""


class RealWorld(RuntimeError):
    """Code under simulation asked for a real socket, thread or process."""


class SimLoop(asyncio.BaseEventLoop):
    """One machine's event loop. Only its Scheduler runs it."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.name = name
        self.paused = False
        self.dead = False
        self.timers: list[tuple[float, int, events.TimerHandle]] = []
        self.failures: list[str] = []
        """What reached the loop's exception handler; each is a failure of the run."""
        self._timer_count = 0
        self._grave: list[Any] = []

    def time(self) -> float:
        return self.scheduler.now

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> events.TimerHandle:
        handle = events.TimerHandle(when, callback, args, self, context)
        self._timer_count += 1
        heapq.heappush(self.timers, (when, self._timer_count, handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> events.TimerHandle:
        return self.call_at(self.scheduler.now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: events.TimerHandle) -> None:
        """Cancelled timers are dropped when they come up."""

    def call_soon_threadsafe(
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> events.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.dead:
            return
        error = context.get("exception")
        text = f"{self.name}: {context.get('message')}: {error!r}"
        self.failures.append(text)
        self.scheduler.on_failure(text, error)

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """Start a task on this loop from outside it."""
        return asyncio.Task(coro, loop=self, name=name or None)

    def next_timer(self) -> float | None:
        timers = self.timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def collect_due(self, now: float) -> None:
        timers = self.timers
        while timers and timers[0][0] <= now:
            handle = heapq.heappop(timers)[2]
            if not handle._cancelled:
                self._ready.append(handle)

    def kill(self) -> None:
        """kill -9: nothing of this loop runs again. Its tasks are kept, unrun, until `bury`."""
        self.dead = True
        self._grave = [*asyncio.all_tasks(self), self._ready.copy(), self.timers]
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._ready.clear()
        self.timers = []

    def bury(self) -> None:
        """Let the killed tasks be collected; their `finally` blocks meet a dead disk and a dead network."""
        self._grave = []

    def __del__(self, _warn: object = None) -> None:
        pass

    # -- the real world is refused

    def _write_to_self(self) -> None:
        pass

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RealWorld(f"{self.name}: real I/O in the simulation: {args!r}")

    run_in_executor = _refuse
    getaddrinfo = _refuse
    sock_connect = _refuse
    sock_recv = _refuse
    sock_sendall = _refuse
    create_connection = _refuse
    create_server = _refuse
    create_datagram_endpoint = _refuse
    subprocess_exec = _refuse
    subprocess_shell = _refuse
    add_reader = _refuse
    add_writer = _refuse
    add_signal_handler = _refuse
    run_forever = _refuse
    run_until_complete = _refuse


class Scheduler:
    """Turns the loops; owns the virtual time (`now`, seconds since the start of the run)."""

    def __init__(self, rng: random.Random) -> None:
        self.now = 0.0
        self.rng = rng
        self.loops: list[SimLoop] = []
        self.callbacks = 0
        self.before_callback: Callable[[SimLoop], None] | None = None
        """Called before each callback; may kill or pause the loop that is about to run."""
        self.on_failure: Callable[[str, BaseException | None], None] = lambda text, error: None

    def loop(self, name: str) -> SimLoop:
        loop = SimLoop(self, name)
        self.loops.append(loop)
        return loop

    def kill(self, loop: SimLoop) -> None:
        loop.kill()
        if loop in self.loops:
            self.loops.remove(loop)

    def run(self, main: asyncio.Task[Any], limit_s: float) -> Any:
        """Turn the loops until `main` is done; its result. Raises Stuck after limit_s virtual seconds."""
        instant = 0
        while not main.done():
            busy = False
            for loop in tuple(self.loops):
                if loop.paused or loop.dead:
                    continue
                loop.collect_due(self.now)
                if loop._ready:
                    busy = True
                    instant += self._turn(loop)
            if busy:
                if instant > MAX_CALLBACKS_PER_INSTANT:
                    raise Stuck(f"{instant:,} callbacks at virtual second {self.now:.3f}: somebody spins")
                continue
            instant = 0
            following = [when for x in self.loops if not x.paused and (when := x.next_timer()) is not None]
            if not following:
                raise Stuck(f"nothing is ready and no timer is set at virtual second {self.now:.3f}")
            self.now = max(self.now, min(following))
            if self.now > limit_s:
                raise Stuck(f"not finished after {limit_s} virtual seconds")
        return main.result()

    def _turn(self, loop: SimLoop) -> int:
        """One tick of a loop: the callbacks that are ready now, in order, as asyncio runs them."""
        ready = loop._ready
        count = len(ready)
        hook = self.before_callback
        events._set_running_loop(loop)
        try:
            for ran in range(count):
                if hook is not None:
                    hook(loop)
                    if loop.dead or loop.paused:
                        return ran
                if not ready:
                    return ran
                handle = ready.popleft()
                if not handle._cancelled:
                    self.callbacks += 1
                    handle._run()
                if loop.dead or loop.paused:
                    return ran + 1
        finally:
            events._set_running_loop(None)
        return count


class SimClock:
    """fastim.clock.Clock over the virtual time. `jump_ms` moves only the wall clock (P18)."""

    def __init__(self, scheduler: Scheduler, mono_start_ms: int = 5_000_000) -> None:
        self._scheduler = scheduler
        self._mono_start_ms = mono_start_ms
        self.jump_ms = 0

    def mono_ms(self) -> int:
        return self._mono_start_ms + int(self._scheduler.now * 1000)

    def wall_ms(self) -> int:
        return WALL_START_MS + self.jump_ms + int(self._scheduler.now * 1000)
