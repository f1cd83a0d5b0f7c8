"""A push vendor that remembers what it was given, and fails when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastim.push.base import Notification, PushOutcome, PushResult

OK = PushResult(PushOutcome.OK)


class RecordingVendor:
    """Answers with `plan` first, one result per notification, then OK."""

    name = "recording"

    def __init__(self, plan: Sequence[PushResult] = ()) -> None:
        self.sent: list[Notification] = []
        """Everything that was handed over, repeats included."""
        self.accepted: dict[str, Notification] = {}
        """By push_id: what a phone would show."""
        self.plan = list(plan)
        self.error: Exception | None = None
        """Raised by send() while set."""
        self.hangs = False
        self.answers_too_few = False
        self.closed = False

    async def send(self, batch: Sequence[Notification]) -> list[PushResult]:
        self.sent += batch
        if self.error is not None:
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()
        if self.answers_too_few:
            return []
        results = [self.plan.pop(0) if self.plan else OK for _ in batch]
        for notification, result in zip(batch, results, strict=True):
            if result.outcome is PushOutcome.OK:
                self.accepted[notification.push_id] = notification
        return results

    async def close(self) -> None:
        self.closed = True
