"""Tell phones: claim push rows, hand them to the vendors, remember the outcome.

A push is never the delivery: whatever a vendor answers, the message stays parked until a device acks it. The
collapse window and "nothing pending any more" are the store's; here are the words, the deadline and the
retries. Without any vendor a push is counted and dropped.

V1  a push is sent while something that may ring waits, at least once   tests/system/test_dispatch_push.py
V2  never after an ack, never after the deadline                        same
V3  a vendor that fails in any way costs a retry, nothing else          same
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from fastim.clock import Clock
from fastim.dispatch.ledger import Flows
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.patience import Patience
from fastim.errors import StoreUnavailable, Unavailable
from fastim.model import Flag, KindRule, is_expired, preview
from fastim.push.base import Notification, PushOutcome, PushResult, PushVendor
from fastim.store.base import MessageStore, PushRow

_log = logging.getLogger("fastim.dispatch.push")

_RETRY: Final = PushResult(PushOutcome.RETRY)
_LOOKED_AT: Final = 200
"""How far back a row whose newest message may not ring is searched for one that may."""


def may_ring(kind: int, flags: int, kinds: Mapping[int, KindRule]) -> bool:
    """Whether kind and flags allow a phone to ring."""
    rule = kinds.get(kind)
    return rule is not None and rule.push and not flags & Flag.NO_PUSH


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
        if not next_ms or now_ms < next_ms <= now_ms + limits.implausible_ms:
            return False
        rows = await self._store.claim_push(self._holder, now_ms, limits.push_claim_ms, limits.push_batch)
        now_ms = self._clock.wall_ms()
        loud = [found for row in rows if (found := await self._loud(row, now_ms)) is not None]
        results = await self._send(loud) if loud else []
        retry_at = dict.fromkeys((row.push_id for row in rows), 0)
        now_ms = self._clock.wall_ms()
        for row, result in zip(loud, results, strict=True):
            retry_at[row.push_id] = self._retry_at_ms(row, result, now_ms)
        finished = await asyncio.gather(
            *(
                self._store.finish_push(self._holder, row, now_ms, retry_at_ms=retry_at[row.push_id])
                for row in rows
            ),
            return_exceptions=True,
        )
        for error in finished:
            if error is not None:
                raise error
        return len(rows) == limits.push_batch

    async def _loud(self, row: PushRow, now_ms: int) -> PushRow | None:
        """The row as it may be shown; None: nothing of it may ring now."""
        if not self._vendors:
            self._flows.push_no_vendor += 1
        elif is_expired(row.expires_ms, now_ms):
            self._flows.push_expired += 1
        elif may_ring(row.kind, row.flags, self._kinds):
            return row
        elif row.pending > 1 and (older := await self._older_loud(row, now_ms)) is not None:
            return older
        else:
            self._flows.push_silent += 1
        return None

    async def _older_loud(self, row: PushRow, now_ms: int) -> PushRow | None:
        """The newest message that waits and may ring, behind a newest one that may not."""
        messages, _ = await self._store.history(
            row.user, row.conv, before_seq=0, after_seq=0, from_ms=0, to_ms=0, limit=_LOOKED_AT, now_ms=now_ms
        )
        left = row.pending
        for message in reversed(messages):
            if message.sender == row.user or message.msg_id > row.msg_id:
                continue  # stored after the claim: not among the pending ones that are counted down here
            if left == 0:
                break
            left -= 1
            if may_ring(message.kind, message.flags, self._kinds):
                return msgspec.structs.replace(
                    row, msg_id=message.msg_id, sender=message.sender, kind=message.kind,
                    flags=message.flags, body=message.body, expires_ms=message.loss_time_ms,
                )  # fmt: skip
        return None

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
        except Exception:
            # A vendor is a plug-in: its bug may cost notifications, never the dispatcher.
            _log.exception("push vendor %s failed", vendor.name)
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
