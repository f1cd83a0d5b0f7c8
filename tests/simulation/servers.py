"""The servers of a cluster run: one store, one presence, and the lines by which processes reach them.

Each is the real embedded port on a loop of its own that nothing kills; a `Line` is one process's connection.
A call takes a drawn time each way. A process that dies in between has been heard or not; one that is stopped
gets the answer when it continues. A server that is away answers nobody, and what it was asked may be done
all the same (presence, bus), or not (the store: its contract says that nothing is stored then).
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastim.errors import FastimError
from tests.simulation.loop import SimLoop

T = TypeVar("T")


class Outage:
    """What the nemesis does to one server."""

    def __init__(self, error: Callable[[str], FastimError], *, may_be_done: bool) -> None:
        self.error = error
        self.may_be_done = may_be_done
        self.away = False
        self.delay_s = 0.0
        self.rough_until_s = 0.0
        """Until then somebody may have suffered from it."""

    def calm(self) -> None:
        self.away = False
        self.delay_s = 0.0


class Line:
    """Calls of one process to one server."""

    def __init__(self, client: SimLoop, server: SimLoop, outage: Outage, rng: random.Random) -> None:
        self.client = client
        self.server = server
        self.outage = outage
        self.rng = rng

    def trip_s(self) -> float:
        return self.rng.choice((0.0003, 0.0005, 0.001, 0.004)) + self.outage.delay_s / 2

    async def call(self, work: Callable[[], Awaitable[T]], *, late: bool = True) -> T:
        """Have the server do it. Raises what the work raises, and the outage's error.

        late: what is done though the answer was an error may be done seconds later.
        """
        done: asyncio.Future[T] = self.client.create_future()
        outage, rng = self.outage, self.rng
        if outage.away:
            if outage.may_be_done and rng.random() < 0.3:
                after_s = self.trip_s() * (rng.choice((1, 1, 500)) if late else 1)
                self.server.call_later(after_s, self._begin, work, None)
            await asyncio.sleep(self.trip_s())
            raise outage.error("away, by the nemesis")
        self.server.call_later(self.trip_s(), self._begin, work, done)
        return await done

    def _begin(self, work: Callable[[], Awaitable[T]], done: asyncio.Future[T] | None) -> None:
        self.server.spawn(self._work(work, done), "call")

    async def _work(self, work: Callable[[], Awaitable[T]], done: asyncio.Future[T] | None) -> None:
        try:
            result = await work()
        except FastimError as error:
            self.answer(done, functools.partial(_refuse, error=error))
        else:
            self.answer(done, functools.partial(_resolve, result=result))

    def answer(self, done: Any, how: Callable[[Any], None]) -> None:
        if done is None or self.client.dead:
            return
        if self.outage.away:
            how = functools.partial(_refuse, error=self.outage.error("went away, by the nemesis"))
            if not self.outage.may_be_done:
                # It is stored: the contract leaves no room for "perhaps", so the answer only comes late.
                self.server.call_later(0.05, self.answer, done, how)
                return
        self.client.call_later(self.trip_s(), how, done)


def _resolve(done: asyncio.Future[Any], result: Any) -> None:
    if not done.done():
        done.set_result(result)


def _refuse(done: asyncio.Future[Any], error: FastimError) -> None:
    if not done.done():
        done.set_exception(error)


class Remote:
    """A port at the other end of a line. Methods that are no coroutines are not for this use."""

    def __init__(self, inner: Any, line: Line) -> None:
        self._inner = inner
        self._line = line

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        call = self._line.call

        async def remote(*args: Any, **kwargs: Any) -> Any:
            return await call(lambda: method(*args, **kwargs))

        self.__dict__[name] = remote
        return remote
