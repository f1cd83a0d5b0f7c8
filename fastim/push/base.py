"""The vendor port: hand a notification to a phone vendor's push service when the user is away.

A push tells a phone that something waits; it is never the delivery. Implementations are safe to call again
with the same `push_id`. tests/contract/push.py.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import msgspec


class PushOutcome(enum.IntEnum):
    """What a vendor said about one notification."""

    OK = 1
    GONE = 2
    """The token or target will never work again."""
    RETRY = 3


class Notification(msgspec.Struct, frozen=True, gc=False):
    """One notification for one user about one conversation."""

    push_id: str
    user: str
    conv: str
    msg_id: int
    sender: str
    preview: str
    badge: int
    pending: int
    """Messages of the conversation that wait for this user."""
    expires_ms: int
    """Wall clock; 0 = keep. The vendor's own time to live is set from it."""


class PushResult(msgspec.Struct, frozen=True, gc=False):
    """Outcome for the notification at the same index; retry_after_ms 0 = the caller's own back-off."""

    outcome: PushOutcome
    retry_after_ms: int = 0
    detail: str = ""


class PushVendor(Protocol):
    """A vendor."""

    name: str

    async def send(self, batch: Sequence[Notification]) -> list[PushResult]:
        """One result per item; never raises for a single item. Bounded by the configured deadline."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...
