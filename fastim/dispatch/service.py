"""One dispatcher: its parts, its tasks, its start and its end.

NEW ──start()──▶ recover ──▶ READY ──stop()──▶ batch in hand finished ──▶ STOPPED
                              └── a task dies ──▶ on_fatal(error): the app drains the process
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence

from fastim.bus.base import DISPATCH_GROUP, SUBMIT, UNDELIVERED, Bus
from fastim.clock import Clock
from fastim.dispatch.adoption import Adopter
from fastim.dispatch.checkpoints import Checkpoints
from fastim.dispatch.due import DueLoop
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Intake, Patience
from fastim.dispatch.push import PushLoop
from fastim.dispatch.router import Router
from fastim.dispatch.settled import SettledMark
from fastim.dispatch.worker import SubmitWorker
from fastim.errors import InternalError, UsageError
from fastim.model import DEFAULT_KINDS, KindRule
from fastim.presence.base import PresenceStore
from fastim.push.base import PushVendor
from fastim.store.base import MessageStore


class Dispatch:
    """The dispatch tier of one process.

    holder   names this dispatcher in claims; unique among the dispatchers of one store
    on_fatal called once, on the loop, with the error that ended a task; what was in hand stays unsettled

    The parts are public so that a test can turn them step by step.
    """

    def __init__(
        self,
        store: MessageStore,
        bus: Bus,
        presence: PresenceStore,
        vendors: Sequence[PushVendor] = (),
        *,
        clock: Clock,
        rng: random.Random,
        limits: DispatchLimits | None = None,
        kinds: Mapping[int, KindRule] = DEFAULT_KINDS,
        holder: str = "dispatch",
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.limits = limits = limits or DispatchLimits()
        self.flows = flows = Flows()
        self._bus = bus
        self._clock = clock
        self._on_fatal = on_fatal
        self.patience = patience = Patience(limits, rng)
        self.router = router = Router(bus, presence, clock, limits, patience, flows)
        self.mark = SettledMark(store, bus, clock, limits, patience, flows, holder)
        self.worker = SubmitWorker(store, router, self.mark, kinds, clock, limits, patience, flows, holder)
        self.due = DueLoop(store, router, clock, rng, limits, patience, flows, holder)
        self.push = PushLoop(store, vendors, kinds, clock, rng, limits, patience, flows, holder)
        self.adopter = Adopter(store, bus, presence, clock, limits, patience, flows, holder, self.due.wake)
        self.checkpoints = Checkpoints(store, bus, limits, patience, flows)
        self._intakes: list[Intake] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._failed: BaseException | None = None

    @property
    def ready(self) -> bool:
        """Recovered, taking sends, and every task alive."""
        return bool(self._tasks) and not self.patience.stopping and self._failed is None

    async def start(self) -> None:
        """Recover, then take sends. Raises StoreUnavailable, BusUnavailable."""
        if self._tasks or self.patience.stopping:
            raise UsageError("a Dispatch starts once")
        limits = self.limits
        await self._bus.ensure(SUBMIT, limits.submit_partitions)
        await self._bus.ensure(UNDELIVERED, limits.undelivered_partitions)
        if limits.mark_interval_ms and await self.mark.recover():
            self.router.hold_push_until_ms = self._clock.wall_ms() + limits.reconnect_window_ms
        submit, undelivered = self._intakes = [self.intake(SUBMIT), self.intake(UNDELIVERED)]
        self._spawn("submit", self.worker.run(submit))
        self._spawn("undelivered", self.due.run_undelivered(undelivered))
        self._spawn("due", self.due.run())
        self._spawn("push", self.push.run())
        if limits.mark_interval_ms:
            self._spawn("mark", self.mark.run())
        else:
            # The bus outlives its processes, and so do the inboxes of dead nodes.
            self._spawn("adoption", self.adopter.run())
            self._spawn("checkpoints", self.checkpoints.run())

    async def stop(self) -> None:
        """Finish the batch in hand and end. Start nothing new; safe to call twice."""
        self.patience.stop()
        self.due.wake()
        for intake in self._intakes:
            await intake.end_wait()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self.limits.stop_ms / 1000)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._tasks = []

    async def move_mark(self) -> None:
        """Move the settled mark once more: after the nodes of this process have flushed and closed."""
        if self.limits.mark_interval_ms and self._failed is None:
            await self.mark.advance()

    def intake(self, topic: str) -> Intake:
        """Join dispatch's group on one of its two topics."""
        reader = self._bus.reader(topic, DISPATCH_GROUP, max_unsettled=self.limits.max_unsettled)
        return Intake(reader, self.limits.batch_records, self.patience)

    def _spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        self._tasks.append(asyncio.create_task(self._guard(work), name=f"dispatch.{name}"))

    async def _guard(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
            if not self.patience.stopping:
                raise InternalError("a task of dispatch ended by itself")
        except Exception as error:
            # Whatever it died of: nobody would take its work up again.
            if self._failed is None:
                self._failed = error
                self._on_fatal(error)
