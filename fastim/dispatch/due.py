"""Due rows: claim what is due, read presence now, and nudge, park or wait.

    undelivered ─▶ due row again (idempotent) ─▶ settle ─▶ wake
    next due ─▶ claim ─▶ one locate ─▶ decide() ─▶ fire_due ─▶ Nudges │ park ─▶ presence again ─▶ Nudges

A claim ends by itself: rows that were claimed when the store or the process went away are claimed again.

D1  both branches of the seed's 是否离线, and a user whose state flips in between
D2  race A: who comes while he is parked is nudged
D3  presence away is never offline
    all in tests/system/test_dispatch_due.py
"""

from __future__ import annotations

import asyncio
import random

from fastim.bus.base import Outgoing, Record
from fastim.bus.records import MALFORMED, decode_undelivered
from fastim.clock import Clock
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Intake, Patience, Stopped
from fastim.dispatch.policy import Decision, Nudge, Wait, decide
from fastim.dispatch.router import Router, nudges
from fastim.errors import StoreUnavailable
from fastim.model import MAX_SAFE_INT
from fastim.presence.base import NOWHERE
from fastim.store.base import DueFiring, DueRequest, DueRow, Flush, MessageStore, Park


class DueLoop:
    """The dispatcher's clockwork."""

    def __init__(
        self,
        store: MessageStore,
        router: Router,
        clock: Clock,
        rng: random.Random,
        limits: DispatchLimits,
        patience: Patience,
        flows: Flows,
        holder: str,
    ) -> None:
        self._store = store
        self._router = router
        self._clock = clock
        self._rng = rng
        self._limits = limits
        self._patience = patience
        self._flows = flows
        self._holder = holder
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look now: a due row was written, or dispatch stops."""
        self._wake.set()

    # ------------------------------------------------------------------------------------- undelivered

    async def run_undelivered(self, intake: Intake) -> None:
        """Until the intake ends, or dispatch stops while the store is away."""
        try:
            while batch := await intake.next():
                await self.fold(batch)
                intake.settle(batch)
                self.wake()
        except Stopped:
            pass
        finally:
            await intake.close()

    async def fold(self, batch: list[Record]) -> None:
        """Due rows for a batch of `undelivered`. The node has committed them before it published; asking
        again changes nothing then."""
        now_ms = self._clock.wall_ms()
        due: dict[tuple[str, str], DueRequest] = {}
        for record in batch:
            try:
                found = decode_undelivered(record.value)
            except MALFORMED:
                self._flows.malformed += 1
                continue
            pair = (found.user, found.conv)
            from_seq = min(found.from_seq, due[pair].from_seq) if pair in due else found.from_seq
            due[pair] = DueRequest(*pair, from_seq, now_ms + self._limits.first_due_ms)
        if due:
            self._flows.due_requests += len(due)
            flush = Flush((), tuple(due.values()), self._holder, now_ms)
            await self._patience.persist(self._store.flush, flush)

    # -------------------------------------------------------------------------------------------- firing

    async def run(self) -> None:
        """Until dispatch stops."""
        while not self._patience.stopping:
            self._wake.clear()
            try:
                await self._router.nudge_owed()
                wait_ms = await self.fire()
            except StoreUnavailable as error:
                if not error.temporary:
                    raise
                self._flows.store_failures += 1
                wait_ms = self._limits.due_poll_ms
            if wait_ms and not self._patience.stopping:
                try:
                    async with asyncio.timeout(wait_ms / 1000):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def fire(self) -> int:
        """Claim a batch of due rows and see them through. Returns after how many ms to look again."""
        limits = self._limits
        now_ms = self._clock.wall_ms()
        next_ms = await self._store.next_due_ms()
        if not next_ms:
            return limits.due_poll_ms
        if now_ms < next_ms <= now_ms + limits.implausible_ms:
            return min(limits.due_poll_ms, next_ms - now_ms)
        rows = await self._store.claim_due(self._holder, now_ms, limits.due_claim_ms, limits.due_batch)
        if not rows:
            # Cleared on the way, or somebody else was faster.
            return 1 if next_ms <= now_ms else limits.due_poll_ms
        located = await self._router.locate({row.user for row in rows})
        now_ms = self._clock.wall_ms()
        decisions: list[Decision]
        if located is None:
            decisions = [Wait(now_ms + limits.first_due_ms)] * len(rows)
        else:
            hold_ms = self._router.hold_push_until_ms
            rand = self._rng.random
            decisions = [
                decide(row, located.get(row.user, NOWHERE), now_ms, hold_ms, limits, rand) for row in rows
            ]
        await self._fire(rows, decisions, now_ms)
        await self._park(rows, decisions, now_ms)
        return 0

    async def _fire(self, rows: list[DueRow], decisions: list[Decision], now_ms: int) -> None:
        firings: list[DueFiring] = []
        nodes: list[tuple[tuple[str, int], ...]] = []
        for row, decision in zip(rows, decisions, strict=True):
            if isinstance(decision, Nudge):
                firings.append(DueFiring(row.user, row.conv, decision.attempt, decision.next_due_ms))
                nodes.append(decision.nodes)
            elif isinstance(decision, Wait):
                firings.append(DueFiring(row.user, row.conv, row.attempt, decision.until_ms))
                nodes.append(())
                self._flows.waits += 1
        if not firings:
            return
        open_still = await self._store.fire_due(self._holder, firings, now_ms)
        records: list[Outgoing] = []
        for firing, where, is_open in zip(firings, nodes, open_still, strict=True):
            if is_open:
                records += nudges(firing.user, firing.conv, where, firing.attempt)
        self._flows.nudges += len(records)
        # A Nudge that no inbox takes is not repeated: the row fires again, and presence is read then.
        await self._router.publish(records)

    async def _park(self, rows: list[DueRow], decisions: list[Decision], now_ms: int) -> None:
        parks: list[Park] = []
        generations: list[int] = []
        for row, decision in zip(rows, decisions, strict=True):
            if isinstance(decision, Nudge | Wait):
                continue
            collapse_ms = self._limits.push_collapse_ms
            push_at_ms = decision.push_at_ms
            parks.append(
                Park(
                    row.user, row.conv, row.from_seq, MAX_SAFE_INT, True, push_at_ms, collapse_ms, row.attempt
                )
            )
            generations.append(decision.newest_generation)
        if not parks:
            return
        parked = await self._store.park(parks, now_ms)
        self._flows.parked += sum(parked)
        await self._router.nudge_arrived(
            [
                (park.user, park.conv, generation)
                for park, generation, done in zip(parks, generations, parked, strict=True)
                if done
            ]
        )
