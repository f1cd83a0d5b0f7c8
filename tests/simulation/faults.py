"""Ports that can fail for a while, around the real ones, and the phone vendor of a run.

The wrappers sit where a network would sit in a cluster; the code above cannot tell the difference.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

from fastim.bus.base import Outgoing
from fastim.bus.memory import MemoryBus
from fastim.clock import Clock
from fastim.errors import BusUnavailable, PresenceUnavailable
from fastim.presence.memory import MemoryPresence
from fastim.push.base import Notification, PushOutcome, PushResult
from tests.simulation.checkers import Rang


class FlakyBus(MemoryBus):
    """Bus.B7: publish may raise, and the records may exist all the same."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self.away = False

    async def publish(self, records: Sequence[Outgoing]) -> None:
        if self.away and self._rng.random() < 0.8:
            if self._rng.random() < 0.3:
                await super().publish(records)
            elif len(records) > 1 and self._rng.random() < 0.5:
                await super().publish(records[: self._rng.randrange(len(records))])
            raise BusUnavailable("away, by the nemesis")
        await super().publish(records)


class FlakyPresence(MemoryPresence):
    """Presence that can be away, be slow, or forget everything (a flushed server)."""

    def __init__(self, clock: Clock, first_generation: int, pause: Callable[[], Any]) -> None:
        super().__init__(clock, first_generation)
        self.away = False
        self.delay_s = 0.0
        self._pause = pause

    async def _gate(self) -> None:
        await self._pause()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.away:
            raise PresenceUnavailable("away, by the nemesis")

    async def open_lease(self, node: str, boot: int, ttl_ms: int) -> None:
        await self._gate()
        await super().open_lease(node, boot, ttl_ms)

    async def renew(self, node: str, boot: int, ttl_ms: int) -> bool:
        await self._gate()
        return await super().renew(node, boot, ttl_ms)

    async def attach(self, *args: Any) -> Any:
        await self._gate()
        found = await super().attach(*args)
        await self._pause()
        return found

    async def detach(self, *args: Any, **kwargs: Any) -> bool:
        await self._gate()
        return await super().detach(*args, **kwargs)

    async def locate(self, users: Sequence[str]) -> Any:
        await self._gate()
        found = await super().locate(users)
        await self._pause()
        return found


class RecordingVendor:
    """Rings and remembers; idempotent by push_id as the port says. Outside the server: it survives kills."""

    name = "recording"

    def __init__(self, clock: Clock, rng: random.Random, pause: Callable[[], Any]) -> None:
        self._clock = clock
        self._rng = rng
        self._pause = pause
        self.rang: list[Rang] = []
        self._known: set[str] = set()

    async def send(self, batch: Sequence[Notification]) -> list[PushResult]:
        await self._pause()
        results = []
        for item in batch:
            if self._rng.random() < 0.05:
                results.append(PushResult(PushOutcome.RETRY))
                continue
            if item.push_id not in self._known:
                self._known.add(item.push_id)
                self.rang.append(Rang(item.push_id, item.user, item.conv, item.msg_id, self._clock.wall_ms()))
            results.append(PushResult(PushOutcome.OK))
        await self._pause()
        return results

    async def close(self) -> None:
        pass
