"""Tell phones: claim push rows, hand them to the vendors, remember the outcome.

A push is never the delivery: whatever a vendor answers, the message stays parked until a device acks it. The
collapse window and "nothing pending any more" are the store's; here are the words, the deadline and the
retries. Without any vendor a push is counted and dropped.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence

from fastim.clock import Clock
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Patience
from fastim.errors import StoreUnavailable, Unavailable
from fastim.model import Flag, KindRule, is_expired, preview
from fastim.push.base import Notification, PushOutcome, PushResult, PushVendor
from fastim.store.base import MessageStore, PushRow

_RETRY = PushResult(PushOutcome.RETRY)


def is_silent(row: PushRow, kinds: Mapping[int, KindRule]) -> bool:
    """Whether nothing that waits here may ring: the newest may not, and it waits alone."""
    rule = kinds.get(row.kind)
    may_ring = rule is not None and rule.push and not row.flags & Flag.NO_PUSH
    return not may_ring and row.pending <= 1


class PushLoop:
    """Push rows to vendors. Every vendor gets every notification; one RETRY repeats it for all (push_id)."""

    def __init__(
        self,
        store: MessageStore,
        vendors: Sequence[PushVendor],
        kinds: Mapping[int, KindRule],
        clock: Clock,
        rng: random.Random,
        limits: DispatchLimits,
        patience: Patience,
        flows: Flows,
        holder: str,
    ) -> None:
        self._store = store
        self._vendors = vendors
        self._kinds = kinds
        self._clock = clock
        self._rng = rng
        self._limits = limits
        self._patience = patience
        self._flows = flows
        self._holder = holder

    async def run(self) -> None:
        """Until dispatch stops."""
        while not self._patience.stopping:
            try:
                more = await self.push()
            except StoreUnavailable as error:
                if not error.temporary:
                    raise
                self._flows.store_failures += 1
                more = False
            if not more:
                await self._patience.pause(self._limits.due_poll_ms)

    async def push(self) -> bool:
        """Claim a batch and see it through. True: there may be more at this moment."""
        limits = self._limits
        now_ms = self._clock.wall_ms()
        next_ms = await self._store.next_push_ms()
        if not next_ms or next_ms > now_ms:
            return False
        rows = await self._store.claim_push(self._holder, now_ms, limits.push_claim_ms, limits.push_batch)
        loud = [row for row in rows if self._may_send(row, now_ms)]
        results = await self._send(loud) if loud else []
        retry_at = dict.fromkeys((row.push_id for row in rows), 0)
        now_ms = self._clock.wall_ms()
        for row, result in zip(loud, results, strict=True):
            retry_at[row.push_id] = self._retry_at_ms(row, result, now_ms)
        await asyncio.gather(
            *(
                self._store.finish_push(self._holder, row, now_ms, retry_at_ms=retry_at[row.push_id])
                for row in rows
            )
        )
        return len(rows) == limits.push_batch

    def _may_send(self, row: PushRow, now_ms: int) -> bool:
        if not self._vendors:
            self._flows.push_no_vendor += 1
        elif is_expired(row.expires_ms, now_ms):
            self._flows.push_expired += 1
        elif is_silent(row, self._kinds):
            self._flows.push_silent += 1
        else:
            return True
        return False

    async def _send(self, rows: list[PushRow]) -> list[PushResult]:
        """The worst outcome per row over the vendors: RETRY, then OK, then GONE."""
        most_chars = self._limits.push_preview_chars
        batch = [
            Notification(
                row.push_id, row.user, row.conv, row.msg_id, row.sender,
                preview(row.kind, row.flags, row.body, self._kinds, most_chars),
                row.badge, row.pending, row.expires_ms,
            )
            for row in rows
        ]  # fmt: skip
        found = [await self._send_to(vendor, batch) for vendor in self._vendors]
        return [
            min(of_row, key=lambda result: (result.outcome != PushOutcome.RETRY, result.outcome))
            for of_row in zip(*found, strict=True)
        ]

    async def _send_to(self, vendor: PushVendor, batch: list[Notification]) -> list[PushResult]:
        try:
            async with asyncio.timeout(self._limits.push_deadline_ms / 1000):
                results = await vendor.send(batch)
        except (TimeoutError, Unavailable):
            return [_RETRY] * len(batch)
        return results if len(results) == len(batch) else [_RETRY] * len(batch)

    def _retry_at_ms(self, row: PushRow, result: PushResult, now_ms: int) -> int:
        flows, limits = self._flows, self._limits
        if result.outcome is PushOutcome.OK:
            flows.push_ok += 1
            return 0
        if result.outcome is PushOutcome.GONE:
            flows.push_gone += 1
            return 0
        if row.attempt + 1 >= limits.push_attempts:
            flows.push_gave_up += 1
            return 0
        flows.push_retry += 1
        longest = min(limits.push_backoff_first_ms << min(row.attempt, 20), limits.push_backoff_most_ms)
        back_off_ms = round(longest * (0.5 + self._rng.random() / 2))
        return now_ms + max(1, result.retry_after_ms or back_off_ms)
