"""The settled mark: below it every obligation has a fate row or a due row; and the recovery above it.

The embedded bus forgets what it held when the process dies. So the mark moves to the position of a batch
(its newest msg_id) only when every inbox that took its Delivers has committed up to what was published then:
a Deliver is settled by its node when it is acked and flushed, or covered by a due row. Parks and due rows of
the batch are committed before its position is noted here.

 routed(position, topics) ─▶ every mark_interval_ms a checkpoint (position, {inbox: published})
                          ─▶ inboxes committed that far, oldest checkpoint first ─▶ store.settle(position)

M1  the mark never passes a message whose Deliver is not settled
M2  an inbox that vanished with unsettled records holds nothing up: due rows
M3  recovery takes up what lies above the mark and nothing else
    all in tests/system/test_dispatch_mark.py
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from fastim.bus.base import NODE_GROUP, Bus
from fastim.clock import Clock
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Patience
from fastim.errors import StoreUnavailable
from fastim.store.base import DueRequest, Flush, MessageStore


class _Checkpoint(msgspec.Struct, frozen=True, gc=False):
    """The mark may move to `position` once each inbox has committed the offset."""

    position: int
    offsets: dict[str, int]


class SettledMark:
    """Moves the mark of one store behind the inboxes of one embedded bus."""

    def __init__(
        self,
        store: MessageStore,
        bus: Bus,
        clock: Clock,
        limits: DispatchLimits,
        patience: Patience,
        flows: Flows,
        holder: str,
    ) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock
        self._limits = limits
        self._patience = patience
        self._flows = flows
        self._holder = holder
        self._position = 0
        self._topics: set[str] = set()
        self._checkpoints: deque[_Checkpoint] = deque()
        self._reached = 0
        self._stored = 0

    def routed(self, position: int, topics: Iterable[str]) -> None:
        """Everything up to `position` is parked, has a due row, or went into these inboxes. Synchronous."""
        self._position = max(self._position, position)
        self._topics.update(topics)

    async def run(self) -> None:
        """Until dispatch stops; the app calls advance() once more when the nodes have flushed."""
        while not self._patience.stopping:
            await self._patience.pause(self._limits.mark_interval_ms)
            try:
                await self.advance()
            except StoreUnavailable as error:
                if not error.temporary:
                    raise
                self._flows.store_failures += 1

    async def advance(self) -> None:
        """Move the mark as far as the inboxes allow."""
        self._take_checkpoint()
        while self._checkpoints:
            first = self._checkpoints[0]
            if any(self._bus.published(topic) < offset for topic, offset in first.offsets.items()):
                await self._settle()
                await self._ask_due(first.position, self._clock.wall_ms() + self._limits.first_due_ms)
            elif not all(
                self._bus.committed(topic, NODE_GROUP) >= offset for topic, offset in first.offsets.items()
            ):
                break
            self._checkpoints.popleft()
            self._reached = first.position
        await self._settle()

    async def recover(self) -> bool:
        """Take up what an earlier process left above the mark. True if the store had any message at all.

        The due rows wait for the reconnect window: who comes back syncs by himself, which clears them.
        """
        head = await self._store.head_msg_id()
        if not head:
            return False
        before = self._flows.recovered
        await self._ask_due(head, self._clock.wall_ms() + self._limits.reconnect_window_ms)
        if self._flows.recovered != before or await self._store.settled_mark() < head:
            await self._store.settle(head)
        self._reached = self._stored = self._position = head
        return True

    def _take_checkpoint(self) -> None:
        newest = self._checkpoints[-1].position if self._checkpoints else self._reached
        if self._position > newest:
            offsets = {topic: self._bus.published(topic) for topic in self._topics}
            self._checkpoints.append(_Checkpoint(self._position, offsets))
            self._topics.clear()

    async def _settle(self) -> None:
        if self._reached > self._stored:
            await self._store.settle(self._reached)
            self._stored = self._reached

    async def _ask_due(self, upto_msg_id: int, due_at_ms: int) -> None:
        now_ms = self._clock.wall_ms()
        self._flows.recovered += await ask_due_above(
            self._store, upto_msg_id, due_at_ms, now_ms, self._holder, self._limits.recover_batch
        )


async def ask_due_above(
    store: MessageStore, upto_msg_id: int, due_at_ms: int, now_ms: int, holder: str, batch: int
) -> int:
    """A due row for every (user, conv) between the mark and upto_msg_id in which something is open.

    Returns how many were asked for. batch: due rows of one transaction.
    """
    wanted = [
        DueRequest(user, found.conv, found.from_seq, due_at_ms)
        for found in await store.unsettled(upto_msg_id)
        for user in found.members
    ]
    for start in range(0, len(wanted), batch):
        await store.flush(Flush((), tuple(wanted[start : start + batch]), holder, now_ms))
    return len(wanted)
