"""Take over what a dead node left in its inbox, and only that of a dead node.

            presence answered, and the lease was missing at every look for adopt_after_ms
 open boot ───────────────────────────────────────────────────────────────────────────────▶ fence (for ever)
 fenced, open, nobody's claim lives ──▶ claim, renewed ──▶ read from the committed offset: due rows
     ──▶ lease missing for adopt_wait_ms since, all read and settled ──▶ delete the topic ──▶ boot ended

`Vigil` decides, on looks and their times alone; `Adopter` acts. The boots come from the store, so that a
flush of presence hides no dead node. Nothing is settled before the end: an adopter that dies has moved no
offset, the next one reads all again and asks for the same due rows, and a zombie that commits late moves
nothing back.

A Deliver becomes due rows: a reference, and the stream from the cursor keeps the order. A Reply is dropped
(the sender repeats and gets the first result), a Nudge too (its due row fires again), and a Mark or a Kick is
for sockets that are gone. The last record can come publish_window_ms after the last locate that saw the
node; whoever takes longer asks for due rows himself (Router.deliver). Hence adopt_wait_ms above it.

A1  no boot is fenced whose lease was seen, or could not be looked at, within adopt_after_ms
                                                            tests/property/test_vigil_oracle.py
A2  every obligation of the inbox has a due row before its topic is deleted    tests/system/test_adoption.py
A3  one adopter at a time; another finishes what it left    same, and the cluster simulation
Source: semantics, "Presence"; architecture, "Processes"; docs/adr/0105.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence

from fastim.bus.base import NODE_GROUP, Bus, Reader, Record, inbox_topic
from fastim.bus.records import MALFORMED, Deliver, decode_inbox
from fastim.clock import Clock
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Patience, Stopped
from fastim.errors import BusUnavailable, PresenceUnavailable, StoreUnavailable
from fastim.presence.base import PresenceStore
from fastim.store.base import DueRequest, Flush, MessageStore, OpenBoot

_log = logging.getLogger("fastim.dispatch.adoption")

Start = tuple[str, int]
"""(node, boot)"""


class Vigil:
    """For how long each open boot has been without a lease, as this dispatcher has seen it itself."""

    def __init__(self, limits: DispatchLimits) -> None:
        self._limits = limits
        self._missing: dict[Start, int] = {}
        """When the answer came that first showed the lease missing."""
        self._asked_mono_ms = 0
        self._answered_mono_ms: int | None = None

    def look(
        self,
        asked_mono_ms: int,
        answered_mono_ms: int,
        boots: Sequence[OpenBoot],
        live: Collection[Start] | None,
    ) -> list[Start]:
        """One look: the open boots, then (asked, answered) the live leases; None: presence did not answer.

        Returns the boots that may be fenced now, and those that are and are still open. An answer is true of
        some moment between the two times, so a run lasts from the first answer to the newest question. A
        look that comes late begins every run anew: nobody knows what was there in between.
        """
        last = self._answered_mono_ms
        self._asked_mono_ms, self._answered_mono_ms = asked_mono_ms, answered_mono_ms
        unbroken = last is not None and asked_mono_ms - last <= self._limits.adopt_gap_ms
        before = self._missing if unbroken else {}
        missing: dict[Start, int] = {}
        found = []
        for boot in boots:
            start = (boot.node, boot.boot)
            if live is not None and start not in live:
                missing[start] = before.get(start, answered_mono_ms)
            if boot.fenced or self._run_ms(missing.get(start)) >= self._limits.adopt_after_ms:
                found.append(start)
        self._missing = missing
        return found

    def missing_ms(self, start: Start) -> int:
        """How long the lease has been missing without a break, -1 when it is not."""
        return self._run_ms(self._missing.get(start))

    def begin_again(self, start: Start) -> None:
        """Count from the next look on: something changed what the earlier ones mean."""
        self._missing.pop(start, None)

    def _run_ms(self, since_mono_ms: int | None) -> int:
        return -1 if since_mono_ms is None else max(0, self._asked_mono_ms - since_mono_ms)


class Adopter:
    """The adoptions of one dispatcher. `wake`: due rows were written."""

    def __init__(
        self,
        store: MessageStore,
        bus: Bus,
        presence: PresenceStore,
        clock: Clock,
        limits: DispatchLimits,
        patience: Patience,
        flows: Flows,
        holder: str,
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._bus = bus
        self._presence = presence
        self._clock = clock
        self._limits = limits
        self._patience = patience
        self._flows = flows
        self._holder = holder
        self._wake = wake
        self.vigil = Vigil(limits)
        self._under_way: dict[Start, asyncio.Task[None]] = {}
        self._not_before_mono_ms: dict[Start, int] = {}
        """Boots that another dispatcher works on."""

    async def run(self) -> None:
        """Until dispatch stops. Raises what an adoption died of."""
        try:
            while not self._patience.stopping:
                try:
                    await self.look()
                except StoreUnavailable as error:
                    if not error.temporary:
                        raise
                    self._flows.store_failures += 1
                await self._patience.pause(self._limits.adopt_look_ms)
        finally:
            await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    async def look(self) -> None:
        """Look once, and begin what may begin."""
        self._reap()
        boots = await self._store.open_boots()
        asked_mono_ms = self._clock.mono_ms()
        live: set[Start] | None
        try:
            live = set(await self._presence.nodes())
        except PresenceUnavailable:
            self._flows.presence_failures += 1
            live = None
        answered_mono_ms = self._clock.mono_ms()
        for start in self.vigil.look(asked_mono_ms, answered_mono_ms, boots, live):
            if start not in self._under_way and self._clock.mono_ms() >= self._not_before_mono_ms.get(
                start, 0
            ):
                await self._claim(start)

    def _reap(self) -> None:
        for start in [start for start, task in self._under_way.items() if task.done()]:
            self._under_way.pop(start).result()

    async def _claim(self, start: Start) -> None:
        adoption = _Adoption(
            start, self.vigil, self._store, self._bus, self._clock, self._limits, self._patience, self._flows,
            self._holder, self._wake,
        )  # fmt: skip
        if not await adoption.claim():
            self._not_before_mono_ms[start] = self._clock.mono_ms() + self._limits.adopt_claim_ms // 4
            return
        self._not_before_mono_ms.pop(start, None)
        # Publishers that saw the lease until now have adopt_wait_ms from the next look on.
        self.vigil.begin_again(start)
        _log.warning("adopting the inbox of a node that is gone", extra={"node": start[0], "boot": start[1]})
        name = f"dispatch.adopt {start[0]}.{start[1]}"
        self._under_way[start] = asyncio.create_task(adoption.run(), name=name)


class _Adoption:
    """One boot in this dispatcher's hands, for as long as its claim lives."""

    def __init__(
        self,
        start: Start,
        vigil: Vigil,
        store: MessageStore,
        bus: Bus,
        clock: Clock,
        limits: DispatchLimits,
        patience: Patience,
        flows: Flows,
        holder: str,
        wake: Callable[[], None],
    ) -> None:
        self._start = start
        self._topic = inbox_topic(*start)
        self._vigil = vigil
        self._store = store
        self._bus = bus
        self._clock = clock
        self._limits = limits
        self._patience = patience
        self._flows = flows
        self._holder = holder
        self._wake = wake
        self._claimed_mono_ms = 0

    async def claim(self) -> bool:
        """Fence the boot, or take the claim up, or lengthen it. Raises StoreUnavailable."""
        asked_mono_ms = self._clock.mono_ms()
        now_ms, claim_ms = self._clock.wall_ms(), self._limits.adopt_claim_ms
        if not await self._store.fence(*self._start, self._holder, now_ms, claim_ms):
            return False
        self._claimed_mono_ms = asked_mono_ms
        return True

    async def run(self) -> None:
        """Until the inbox is gone, the claim is lost or dispatch stops; somebody else finishes then."""
        limits = self._limits
        try:
            while not self._patience.stopping and await self._hold():
                try:
                    gone = await self._read_through()
                except BusUnavailable:
                    self._flows.bus_failures += 1
                    gone = False
                if gone and self._vigil.missing_ms(self._start) >= limits.adopt_wait_ms:
                    # Twice, adopt_wait_ms apart: a broker that has just started may not know its topics yet.
                    await self._patience.persist(self._store.end_boot, *self._start)
                    self._flows.adopted += 1
                    return
                await self._patience.pause(limits.adopt_look_ms)
        except Stopped:
            pass

    async def _hold(self) -> bool:
        """Whether the claim is still ours; a third of it before its end it is renewed."""
        claim_ms = self._limits.adopt_claim_ms
        age_ms = self._clock.mono_ms() - self._claimed_mono_ms
        if age_ms < claim_ms // 3:
            return True
        try:
            return await self.claim()
        except StoreUnavailable as error:
            if not error.temporary:
                raise
            self._flows.store_failures += 1
            return self._clock.mono_ms() - self._claimed_mono_ms < claim_ms

    async def _read_through(self) -> bool:
        """Due rows for all in the inbox; then delete it. False: lost, stopped, or to be read again."""
        limits = self._limits
        if not await self._bus.ends(self._topic):
            return True
        reader = self._bus.reader(self._topic, NODE_GROUP, max_unsettled=limits.adopt_unsettled)
        reading = asyncio.create_task(reader.read(limits.batch_records), name=f"read {self._topic}")
        held: list[Record] = []
        idle_looks = 0
        try:
            while not self._patience.stopping and await self._hold():
                if not reading.done():
                    await asyncio.wait({reading}, timeout=limits.adopt_look_ms / 1000)
                if reading.done():
                    records = reading.result()
                    if not records:
                        return False
                    await self._fold(records)
                    held += records
                    if len(held) * 2 > limits.adopt_unsettled:
                        self._settle(reader, held)
                    reading = asyncio.create_task(
                        reader.read(limits.batch_records), name=f"read {self._topic}"
                    )
                    idle_looks = 0
                elif self._vigil.missing_ms(self._start) >= limits.adopt_wait_ms:
                    self._settle(reader, held)
                    if await self._bus.lag(self._topic, NODE_GROUP) == 0 and await self._hold():
                        await self._bus.delete(self._topic)
                        return True
                    # Settled and committed lower by somebody who woke up: the next reader sees it all.
                    idle_looks += 1
                    if idle_looks * limits.adopt_look_ms >= limits.adopt_wait_ms:
                        return False
            return False
        finally:
            await reader.close()
            await asyncio.gather(reading, return_exceptions=True)

    def _settle(self, reader: Reader, held: list[Record]) -> None:
        if held:
            reader.settle_all(held)
            held.clear()

    async def _fold(self, records: list[Record]) -> None:
        """Due rows, at once, for the obligations of Delivers. A (user, conv) once, from its lowest seq.

        Nothing is owed to the sender's other devices: those of this node sync when they come back.
        """
        now_ms = self._clock.wall_ms()
        due: dict[tuple[str, str], DueRequest] = {}
        for record in records:
            try:
                found = decode_inbox(record.value)
            except MALFORMED:
                self._flows.malformed += 1
                continue
            if type(found) is not Deliver:
                continue
            for user in found.users:
                pair = (user, found.conv)
                known = due.get(pair)
                if user != found.sender and (known is None or found.seq < known.from_seq):
                    due[pair] = DueRequest(user, found.conv, found.seq, now_ms, urgent=True)
        if due:
            self._flows.due_requests += len(due)
            flush = Flush((), tuple(due.values()), self._holder, now_ms)
            await self._patience.persist(self._store.flush, flush)
            self._wake()
        self._flows.taken_over += len(records)
