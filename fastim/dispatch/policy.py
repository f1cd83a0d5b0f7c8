"""What to do with a due row: pure.

 attempt 0..5, live        Nudge, next firing after 1, 2, 4, 8, 16, 30 s ± 20 %
 attempt 6, live           Park: the peer does not ack; push
 nowhere, in grace         Wait until the grace ends
 nowhere, push held        Wait until the reconnect window after a start ends
 nowhere                   Park and push

Source: seed, "消息可达性" ("是否离线"); semantics, "Retry". Table in tests/unit/test_policy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from fastim.dispatch.limits import DispatchLimits
from fastim.presence.base import Attachment, Location
from fastim.store.base import DueRow


class Nudge(msgspec.Struct, frozen=True, gc=False):
    """Have these nodes stream the conversation; fire again at next_due_ms unless cleared before."""

    nodes: tuple[tuple[str, int], ...]
    """(node, boot)"""
    attempt: int
    next_due_ms: int


class ParkIt(msgspec.Struct, frozen=True, gc=False):
    """It stays in the timeline; a phone is told at push_at_ms.

    newest_generation: of the sessions that used up the attempts, 0 if there was none.
    """

    push_at_ms: int
    newest_generation: int


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Look again at until_ms; no attempt is counted."""

    until_ms: int


Decision = Nudge | ParkIt | Wait

_LONGEST_GRACE_MS: Final = 600_000


def nodes_of(attachments: tuple[Attachment, ...], above_generation: int = 0) -> tuple[tuple[str, int], ...]:
    """The distinct (node, boot) of the attachments newer than a generation."""
    found = dict.fromkeys((a.node, a.boot) for a in attachments if a.generation > above_generation)
    return tuple(found)


def absent_until_ms(location: Location, now_ms: int, hold_push_until_ms: int) -> int:
    """For a user who is nowhere: the moment before which nothing is parked, 0 if that has passed."""
    grace_until_ms = location.grace_until_ms
    if grace_until_ms > now_ms + _LONGEST_GRACE_MS:
        grace_until_ms = 0  # of a clock that has been set back since
    until_ms = max(grace_until_ms, hold_push_until_ms)
    return until_ms if until_ms > now_ms else 0


def decide(
    row: DueRow,
    location: Location,
    now_ms: int,
    hold_push_until_ms: int,
    limits: DispatchLimits,
    rand: Callable[[], float],
) -> Decision:
    """rand: uniform in [0, 1)."""
    attachments = location.attachments
    if not attachments:
        until_ms = absent_until_ms(location, now_ms, hold_push_until_ms)
        return Wait(until_ms) if until_ms else ParkIt(now_ms, 0)
    if row.attempt >= len(limits.backoff_ms):
        return ParkIt(max(now_ms, hold_push_until_ms), max(a.generation for a in attachments))
    spread = 1.0 + limits.backoff_jitter * (2.0 * rand() - 1.0)
    next_due_ms = now_ms + round(limits.backoff_ms[row.attempt] * spread)
    return Nudge(nodes_of(attachments), row.attempt + 1, next_due_ms)
