"""Every number of the node, with its default. The configuration builds one of these."""

from __future__ import annotations

import msgspec


class NodeLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Times are milliseconds."""

    heartbeat_ms: int = 10_000
    idle_ms: int = 30_000
    resume_ttl_ms: int = 120_000
    window_messages: int = 128
    window_bytes: int = 262_144
    probe_ms: int = 3_000
    ack_timeout_ms: int = 8_000
    slow_ms: int = 10_000
    grace_ms: int = 4_000
    flush_interval_ms: int = 20
    rate_per_s: int = 20
    rate_burst: int = 60
    devices_per_user: int = 5
    drain_window_ms: int = 5_000
    lease_ms: int = 6_000
    renew_ms: int = 2_000

    rekey_least_ms: int = 1_000
    """A client that asks for new keys more often is closed: three X25519 are as dear as three messages."""
    login_ms: int = 5_000
    """From AUTH to HELLO; then the client is asked to come again later."""
    sweep_ms: int = 250
    stall_ms: int = 1_000
    """A sweep that comes later than this after the last one means that this process stood still."""
    reset_due_ms: int = 1_000
    """First retry after a connection that ended without a goodbye."""
    max_unsettled: int = 65_536
    """Inbox records in hand: what the windows of all sessions hold for up to ack_timeout_ms."""
    inbox_batch: int = 1_024
    flush_settled: int = 2_048
    """So many settled ranges are flushed without waiting for flush_interval_ms."""
    retry_first_ms: int = 20
    retry_most_ms: int = 1_000
    catchup_workers: int = 8
    page_messages: int = 64
    page_bytes: int = 65_536
    page_conversations: int = 100
    page_backlog_bytes: int = 65_536
    """A list page waits until less than this is unwritten."""
    requests_per_session: int = 8
    """History, list, read and refresh requests under way at once."""
    pulls_waiting: int = 1_024
    """Above so many conversations that are BEHIND, a PULL of another one is told to come again."""
    max_publish: int = 1_024
    """Sends handed to the bus at once."""
    backoff_ms: tuple[int, ...] = (1_000, 2_000, 4_000, 8_000, 16_000, 30_000)
    """Between the repeats for a device that does not acknowledge while another device of its user does."""
