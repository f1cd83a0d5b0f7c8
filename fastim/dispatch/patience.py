"""How long dispatch waits for a backend that is away, and how every wait ends when dispatch stops.

Nothing else in dispatch sleeps: all waiting goes through `Patience.pause`, so stop() never has to cancel a
task in the middle of a transaction.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from fastim.bus.base import Reader, Record
from fastim.dispatch.limits import DispatchLimits
from fastim.errors import StoreUnavailable

P = ParamSpec("P")
T = TypeVar("T")


class Stopped(Exception):
    """Dispatch stops while a backend is away: what is in hand stays unsettled, the next start takes it up."""


class Patience:
    """The waits of one Dispatch."""

    def __init__(self, limits: DispatchLimits, rng: random.Random) -> None:
        self._limits = limits
        self._rng = rng
        self._stop = asyncio.Event()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """End every pause, now and later."""
        self._stop.set()

    async def pause(self, ms: float) -> None:
        """Wait, or return at once when stopping."""
        if ms > 0 and not self._stop.is_set():
            try:
                async with asyncio.timeout(ms / 1000):
                    await self._stop.wait()
            except TimeoutError:
                pass

    async def back_off(self, tried: int) -> None:
        """The pause after the tried-th failure in a row. Raises Stopped."""
        limits = self._limits
        longest = min(limits.retry_first_ms << min(tried - 1, 20), limits.retry_most_ms)
        await self.pause(longest * (0.5 + self._rng.random() / 2))
        if self._stop.is_set():
            raise Stopped

    async def persist(self, transaction: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a store transaction until it commits: nothing is settled before.

        Raises Stopped, and StoreUnavailable for a store that will not come back.
        """
        tried = 0
        while True:
            try:
                return await transaction(*args, **kwargs)
            except StoreUnavailable as error:
                if not error.temporary:
                    raise
            tried += 1
            await self.back_off(tried)


class Intake:
    """A bus reader that ends between batches, never inside one."""

    def __init__(self, reader: Reader, batch_records: int, patience: Patience) -> None:
        self._reader = reader
        self._batch_records = batch_records
        self._patience = patience
        self._waiting = False

    async def next(self) -> list[Record]:
        """The next batch; [] at the end."""
        if self._patience.stopping:
            return []
        self._waiting = True
        try:
            return await self._reader.read(self._batch_records)
        finally:
            self._waiting = False

    def settle(self, batch: list[Record]) -> None:
        self._reader.settle_all(batch)

    async def end_wait(self) -> None:
        """Let a next() that waits return; a batch in hand is left to its worker."""
        if self._waiting:
            await self._reader.close()

    async def close(self) -> None:
        """What was not settled goes back to the group."""
        await self._reader.close()
