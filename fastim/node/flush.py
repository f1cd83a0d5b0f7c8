"""Commit what devices settled and what has to be tried again, then settle the inbox records.

Hides batching and patience: all that happens within flush_interval_ms becomes one store.flush, at most one is
under way, and a store that is away is asked again until it answers. An inbox record is settled only
after the flush that holds the last of its ends has committed.

F1  settle() is called once per record, after the commit                tests/system/test_delivery.py
F2  a failed flush loses nothing: the same rows go with the next try     same
Source: semantics, "Deliver and ack" and "Retry"; architecture, Store.S13.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from fastim import observe
from fastim.bus.base import UNDELIVERED, Bus, Outgoing, Reader
from fastim.bus.records import Undelivered
from fastim.clock import Clock
from fastim.errors import BusUnavailable, StoreUnavailable
from fastim.model import Fate
from fastim.node.limits import NodeLimits
from fastim.node.session import Entry, Parcel
from fastim.store.base import Behind, DueRequest, Flush, Leveled, MessageStore, Settled

_ONLY_CURSOR: Final = 0
"""In place of a fate: the range moves the cursor and writes no fate row."""
_FATES: Final = {int(fate): fate for fate in Fate} | {_ONLY_CURSOR: Fate.ACKED}
_ACKED: Final = int(Fate.ACKED)
_EXPIRED: Final = int(Fate.EXPIRED)


class _Pending:
    """What the next transaction will hold."""

    __slots__ = ("due", "entries", "levels", "runs", "settled", "undelivered")

    def __init__(self) -> None:
        self.settled: dict[tuple[str, str, str], list[list[int]]] = {}
        """(user, device, conv) -> [from_seq, to_seq, fate] in the order of the acks."""
        self.runs = 0
        self.due: dict[tuple[str, str], DueRequest] = {}
        self.entries: list[Entry] = []
        self.levels: dict[tuple[str, str], int] = {}
        self.undelivered: list[Outgoing] = []

    def __bool__(self) -> bool:
        return bool(self.settled or self.due or self.entries or self.levels or self.undelivered)

    def rows(self) -> tuple[Settled, ...]:
        """The settled ranges, merged where the acks came out of order."""
        rows = []
        for (user, device, conv), runs in self.settled.items():
            if len(runs) > 1:
                runs.sort()
                runs = _merged(runs)
            for from_seq, to_seq, fate in runs:
                rows.append(Settled(user, device, conv, from_seq, to_seq, _FATES[fate], fate == _ONLY_CURSOR))
        return tuple(rows)


def _merged(runs: list[list[int]]) -> list[list[int]]:
    out: list[list[int]] = []
    for run in runs:
        last = out[-1] if out else None
        if last is not None and last[2] == run[2] and run[0] <= last[1] + 1:
            last[1] = max(last[1], run[1])
        else:
            out.append(run)
    return out


class Flusher:
    """The node's only writer of cursors, fate rows and due rows."""

    def __init__(
        self,
        node: str,
        store: MessageStore,
        bus: Bus,
        clock: Clock,
        rng: random.Random,
        limits: NodeLimits,
        on_gap: Callable[[str, str, Behind], None],
    ) -> None:
        self._node = node
        self._store = store
        self._bus = bus
        self._clock = clock
        self._rng = rng
        self._limits = limits
        self._on_gap = on_gap
        self._pending = _Pending()
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stopping = False
        self._committing = asyncio.Lock()
        self.reader: Reader | None = None
        """The inbox whose records are settled."""
        self.acked = 0
        self.expired = 0
        self.due_requests = 0
        self.flushes = 0
        self.store_failures = 0
        self.bus_failures = 0

    # -- what happened

    def settled(self, parcel: Parcel) -> None:
        """A device has what the parcel holds."""
        session, conv, pending = parcel.session, parcel.conv, self._pending
        if conv:
            key = (session.user, session.device, conv)
            first, last = parcel.from_seq, parcel.to_seq
            fate: int = parcel.fate or _ONLY_CURSOR
            runs = pending.settled.get(key)
            if runs is None:
                pending.settled[key] = [[first, last, fate]]
            else:
                run = runs[-1]
                if run[1] + 1 == first and run[2] == fate:
                    run[1] = last
                else:
                    runs.append([first, last, fate])
            if fate == _ACKED:
                self.acked += last - first + 1
            elif fate == _EXPIRED:
                self.expired += last - first + 1
            pending.runs += 1
        elif parcel.version:
            device = (session.user, session.device)
            pending.levels[device] = max(parcel.version, pending.levels.get(device, 0))
        if parcel.entry is not None:
            pending.entries.append(parcel.entry)
            parcel.entry = None

    def wake(self) -> None:
        """After settled(): once for all that was acknowledged together."""
        if self._pending.runs >= self._limits.flush_settled:
            self._hurry.set()
        self._wake.set()

    def release(self, entry: Entry) -> None:
        """One of the ends that the record waited for is in the next transaction."""
        self._pending.entries.append(entry)
        self._wake.set()

    def ask_due(self, user: str, conv: str, from_seq: int, due_at_ms: int, *, urgent: bool = False) -> None:
        """See that the conversation is tried again; the store writes a row only if something is open."""
        key = (user, conv)
        known = self._pending.due.get(key)
        if known is not None:
            from_seq, due_at_ms = min(known.from_seq, from_seq), min(known.due_at_ms, due_at_ms)
            urgent = urgent or known.urgent
        self._pending.due[key] = DueRequest(user, conv, from_seq, due_at_ms, urgent)
        self._wake.set()

    def tell_undelivered(self, user: str, device: str, conv: str, from_seq: int, reason: str) -> None:
        """Wake dispatch once the due row is durable."""
        observe.UNDELIVERED.labels(reason).inc()
        record = Undelivered(user, device, conv, from_seq, 1, reason)
        self._pending.undelivered.append(Outgoing(UNDELIVERED, user, record))
        self._wake.set()

    # -- the loop

    async def run(self) -> None:
        """Until stop()."""
        while not self._stopping:
            await self._wake.wait()
            self._wake.clear()
            if not self._stopping and not self._hurry.is_set():
                await self._pause(self._limits.flush_interval_ms)
            self._hurry.clear()
            await self._commit()

    async def _pause(self, ms: float) -> None:
        try:
            async with asyncio.timeout(ms / 1000):
                await self._hurry.wait()
        except TimeoutError:
            pass

    async def stop(self, deadline_ms: int) -> bool:
        """Commit what is left. False: the store did not answer in time; the records stay unsettled."""
        self._stopping = True
        self._wake.set()
        self._hurry.set()
        try:
            async with asyncio.timeout(deadline_ms / 1000):
                await self._commit()
        except TimeoutError:
            return False
        return True

    async def _commit(self) -> None:
        async with self._committing:
            if self._pending:
                await self._commit_pending()

    async def _commit_pending(self) -> None:
        hand, self._pending = self._pending, _Pending()
        due = tuple(hand.due.values())
        rows = hand.rows()
        levels = tuple(Leveled(*device, version) for device, version in hand.levels.items())
        self.due_requests += len(due)
        if rows or due or levels:
            await self._flush(rows, due, levels)
        ended = []
        for entry in hand.entries:
            entry.holds -= 1
            if entry.holds == 0:
                ended.append(entry.record)
        if ended and self.reader is not None:
            self.reader.settle_all(ended)
        if hand.undelivered:
            try:
                await self._bus.publish(hand.undelivered)
            except BusUnavailable:
                # The due rows are durable and fire by themselves, a poll later.
                self.bus_failures += 1

    async def _flush(
        self, rows: tuple[Settled, ...], due: tuple[DueRequest, ...], levels: tuple[Leveled, ...]
    ) -> None:
        tried = 0
        while True:
            try:
                with observe.FLUSH_SECONDS.time():
                    now_ms = self._clock.wall_ms()
                    result = await self._store.flush(Flush(rows, due, self._node, now_ms, levels))
                break
            except StoreUnavailable as error:
                if not error.temporary:
                    raise
            self.store_failures += 1
            longest = min(self._limits.retry_first_ms << min(tried, 20), self._limits.retry_most_ms)
            tried += 1
            await asyncio.sleep(longest * (0.5 + self._rng.random() / 2) / 1000)
        self.flushes += 1
        for user, device, behind in result.gaps:
            self._on_gap(user, device, behind)
