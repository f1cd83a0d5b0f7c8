"""The settled mark over a durable bus that processes share: below it each obligation has a fate or a due row.

One dispatcher cannot know it of its own batches alone: others store too, with ids in between. So it is read
off the bus, by whoever looks, and is true whoever stored and whoever died meanwhile:

 1 head := the newest message; scan to it: nothing is stored below any more (Store.S10)
 2 every partition of `submit`: what has been published; a message up to head was stored from a record there
 3 once all that is settled: its Delivers are in inboxes, its due rows and parks are durable (worker.W1)
 4 every open boot, and what its inbox holds by now
 5 once all that is settled, or the boot has ended (its adopter wrote due rows): settle(head)

Each step waits for the next look, so a checkpoint takes some looks and no task; the mark lags by seconds.
Several dispatchers do the same, and the mark only moves forward: no claim is needed.

What it is for: `fastim audit` can tell a lost obligation from one that is under way, and when Kafka deleted
records of an inbox before they were read, everything above the mark gets due rows (settled.ask_due_above).

K1  the mark never passes a message whose record or Deliver is not settled   tests/system/test_checkpoints.py
K2  a boot that ended holds nothing up                                       same
Source: docs/adr/0100; architecture, "Embedded durability".
"""

from __future__ import annotations

from fastim.bus.base import DISPATCH_GROUP, NODE_GROUP, SUBMIT, Bus, inbox_topic
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Patience
from fastim.errors import BusUnavailable, StoreUnavailable
from fastim.store.base import MessageStore

Ends = dict[str, tuple[int, ...]]
"""topic -> the end of each partition."""


class Checkpoints:
    """Moves the mark of one store behind a durable bus."""

    def __init__(
        self,
        store: MessageStore,
        bus: Bus,
        limits: DispatchLimits,
        patience: Patience,
        flows: Flows,
    ) -> None:
        self._store = store
        self._bus = bus
        self._limits = limits
        self._patience = patience
        self._flows = flows
        self._head = 0
        """Of the checkpoint under way; 0: none."""
        self._submitted: tuple[int, ...] = ()
        self._inboxes: Ends | None = None
        """None: step 3 still waits."""

    async def run(self) -> None:
        """Until dispatch stops."""
        while not self._patience.stopping:
            await self._patience.pause(self._limits.checkpoint_ms)
            try:
                await self.look()
            except StoreUnavailable as error:
                if not error.temporary:
                    raise
                self._flows.store_failures += 1
            except BusUnavailable:
                self._flows.bus_failures += 1

    async def look(self) -> None:
        """Go as far as the bus allows."""
        if not self._head:
            await self._begin()
        if not self._head:
            return
        if self._inboxes is None:
            if not await self._bus.passed(SUBMIT, DISPATCH_GROUP, self._submitted):
                return
            self._inboxes = await self._ends_of_inboxes()
        waiting = {
            topic: ends for topic, ends in self._inboxes.items() if not await self._passed(topic, ends)
        }
        if waiting:
            # An adopter settles nothing before the end; then the boot is ended, and its due rows are durable.
            still_open = set(await self._open_inboxes())
            waiting = {topic: ends for topic, ends in waiting.items() if topic in still_open}
        self._inboxes = waiting
        if waiting:
            return
        await self._store.settle(self._head)
        self._head, self._inboxes = 0, None

    async def _begin(self) -> None:
        head = await self._store.head_msg_id()
        if head <= await self._store.settled_mark():
            return
        if await self._store.scan(head - 1, 1):
            self._submitted = await self._bus.ends(SUBMIT)
            self._head = head

    async def _passed(self, topic: str, ends: tuple[int, ...]) -> bool:
        return await self._bus.passed(topic, NODE_GROUP, ends)

    async def _open_inboxes(self) -> list[str]:
        return [inbox_topic(boot.node, boot.boot) for boot in await self._store.open_boots()]

    async def _ends_of_inboxes(self) -> Ends:
        return {topic: await self._bus.ends(topic) for topic in await self._open_inboxes()}
