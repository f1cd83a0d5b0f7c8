"""What became of every obligation: the audit over the store, and the flows of this process.

The law: obligations = acked + recalled + expired + undeliverable + parked + in flight (due or unsettled),
each counted from the store itself and nothing computed as a remainder. An obligation in none of these states
is LOST, and the audit fails. Source: docs/design.md, "Audit".
"""

from __future__ import annotations

from typing import Final

import msgspec

from fastim.store.base import MessageStore, Obligation, ObligationState

_MOST_LISTED: Final = 100


class AuditReport(msgspec.Struct, frozen=True):
    """The sum over all obligations."""

    obligations: int
    states: dict[str, int]
    """Count by state, every state present."""
    lost: tuple[Obligation, ...]
    """The first of the lost ones."""
    repeated: int
    """Obligations that the store reported twice: a fault of the store's own derivation."""
    settled_mark: int
    head_msg_id: int

    @property
    def in_flight(self) -> int:
        return self.states["due"] + self.states["unsettled"]

    @property
    def violations(self) -> tuple[str, ...]:
        """Sentences, empty when all is well."""
        found = []
        if self.states["lost"]:
            found.append(f"{self.states['lost']:,} obligations are lost")
        if self.repeated:
            found.append(f"{self.repeated:,} obligations are counted twice")
        if self.settled_mark > self.head_msg_id:
            found.append(f"the settled mark {self.settled_mark} is above the head {self.head_msg_id}")
        accounted = sum(self.states[state.name.lower()] for state in ACCOUNTED)
        if accounted != self.obligations:
            found.append(f"{self.obligations:,} obligations, {accounted:,} accounted for")
        return tuple(found)

    @property
    def ok(self) -> bool:
        return not self.violations


ACCOUNTED: Final = (
    ObligationState.ACKED, ObligationState.RECALLED, ObligationState.EXPIRED, ObligationState.UNDELIVERABLE,
    ObligationState.PARKED, ObligationState.DUE, ObligationState.UNSETTLED,
)  # fmt: skip


async def audit(store: MessageStore, now_ms: int, page_messages: int = 1_000) -> AuditReport:
    """Fold every obligation of the store. O(messages), a page at a time."""
    states = {state.name.lower(): 0 for state in ObligationState}
    lost: list[Obligation] = []
    total = repeated = after = 0
    settled_mark = await store.settled_mark()
    while True:
        page, reached = await store.obligations(after, page_messages, now_ms)
        seen = {(obligation.msg_id, obligation.user) for obligation in page}
        repeated += len(page) - len(seen)
        total += len(page)
        for obligation in page:
            states[obligation.state.name.lower()] += 1
            if obligation.state is ObligationState.LOST and len(lost) < _MOST_LISTED:
                lost.append(obligation)
        if not reached:
            break
        after = reached
    head = await store.head_msg_id()
    return AuditReport(total, states, tuple(lost), repeated, settled_mark, head)


class Flows:
    """Counters of this process, only ever added to. The app exports them."""

    __slots__ = (
        "adopted",
        "batches",
        "bus_failures",
        "created",
        "delivers",
        "due_requests",
        "expired_early",
        "malformed",
        "marks",
        "moved",
        "nudges",
        "parked",
        "presence_failures",
        "push_expired",
        "push_gave_up",
        "push_gone",
        "push_no_vendor",
        "push_ok",
        "push_retry",
        "push_silent",
        "recovered",
        "refused",
        "repeated",
        "store_failures",
        "stored",
        "taken_over",
        "waits",
    )

    def __init__(self) -> None:
        self.batches = 0
        self.stored = 0
        """Messages."""
        self.repeated = 0
        self.created = 0
        """Obligations."""
        self.refused: dict[str, int] = {}
        """Messages by code."""
        self.malformed = 0
        """Records that no version of ours could have written."""
        self.delivers = 0
        """Deliver records: one per message and node."""
        self.moved = 0
        """Records for an inbox that was gone or away."""
        self.parked = 0
        """(user, conv) pairs."""
        self.due_requests = 0
        self.expired_early = 0
        """Obligations that expired between append and publish."""
        self.nudges = 0
        self.waits = 0
        """Firings put off by a grace, a hold or presence being away."""
        self.marks = 0
        self.recovered = 0
        """(user, conv) pairs that a start took up again."""
        self.adopted = 0
        """Inboxes of dead nodes that were read to their end and deleted."""
        self.taken_over = 0
        """Records read from them."""
        self.push_ok = 0
        self.push_gone = 0
        self.push_retry = 0
        self.push_gave_up = 0
        self.push_expired = 0
        self.push_no_vendor = 0
        self.push_silent = 0
        """Pushes dropped because kind or flags say so."""
        self.store_failures = 0
        self.bus_failures = 0
        self.presence_failures = 0

    def as_dict(self) -> dict[str, int]:
        """Every counter by name; refusals as refused.<code>."""
        counts: dict[str, int] = {name: getattr(self, name) for name in self.__slots__ if name != "refused"}
        return counts | {f"refused.{code}": count for code, count in self.refused.items()}
