"""Every number of dispatch, with its default. The configuration builds one of these."""

from __future__ import annotations

import msgspec


class DispatchLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times are milliseconds."""

    submit_partitions: int = 1
    undelivered_partitions: int = 1
    batch_records: int = 512
    """Records of `submit` that become one store transaction."""
    linger_ms: int = 2
    """From one small batch to the next at least."""
    linger_below: int = 64
    """A batch of at least so many records is followed by the next at once."""
    max_unsettled: int = 4_096

    store_patience_ms: int = 5_000
    """How long a batch waits for a store that is away before its senders are refused."""
    most_owed: int = 65_536
    """(user, conv) pairs that wait for presence or the bus, so that all devices are told."""
    bus_patience_ms: int = 2_000
    """How long a publish is tried again before due rows take over."""
    retry_first_ms: int = 20
    retry_most_ms: int = 1_000
    unavailable_retry_ms: int = 2_000
    """retry_after_ms of an `unavailable` refusal, before jitter."""

    backoff_ms: tuple[int, ...] = (1_000, 2_000, 4_000, 8_000, 16_000, 30_000)
    """From one firing of a due row to the next; one firing more than entries parks."""
    backoff_jitter: float = 0.2
    first_due_ms: int = 1_000
    """First firing of a due row that dispatch itself asks for."""
    due_poll_ms: int = 250
    implausible_ms: int = 1_800_000
    """A due row or push that waits for longer was written by a clock that has been set back since. The store
    follows such a clock when it is told the time, so it is asked for a claim all the same."""
    due_claim_ms: int = 10_000
    due_batch: int = 256

    reconnect_window_ms: int = 20_000
    """After a start: due rows wait for it, and no vendor push leaves before its end."""
    recover_batch: int = 2_000
    """Due rows per transaction of the recovery."""
    mark_interval_ms: int = 500
    """How often the settled mark moves behind a bus in memory; 0: the bus itself is durable (adoption.py,
    checkpoints.py)."""
    checkpoint_ms: int = 2_000
    """How often a durable bus is looked at to move the mark; it takes some looks."""

    push_collapse_ms: int = 10_000
    push_claim_ms: int = 30_000
    push_batch: int = 100
    push_deadline_ms: int = 10_000
    push_backoff_first_ms: int = 2_000
    push_backoff_most_ms: int = 300_000
    push_attempts: int = 10
    """After so many RETRY outcomes a notification is given up; the message stays parked."""
    push_preview_chars: int = 80
    """0: notifications never show text."""

    publish_window_ms: int = 4_000
    """From the question where users are to the end of the publish; after it due rows are asked for, too."""
    adopt_look_ms: int = 500
    """How often open boots and live leases are compared."""
    adopt_gap_ms: int = 2_000
    """A look that comes later than this after the last one does not continue it."""
    adopt_after_ms: int = 4_000
    """A lease that was missing so long, at every look, belongs to a node that is dead."""
    adopt_wait_ms: int = 5_000
    """An adopted inbox is read for at least so long; above publish_window_ms."""
    adopt_claim_ms: int = 10_000
    adopt_unsettled: int = 1_000_000
    """Records of one adopted inbox that are held unsettled at most."""

    stop_ms: int = 10_000
    """The longest stop() waits for the batch in hand."""

    refuse_unknown: bool = True
    """Refuse a client's message to a user nobody has ever seen; False: park it, as for services."""
