"""The presence port: who is attached where, right now. A hint, never the truth.

An attachment is valid only while the lease of its node lives. tests/contract/presence.py proves:

P1  locate returns every live attachment and none of a node whose lease ended
P2  generations fence: a late detach or attach never removes or changes a newer attachment
P3  without renew, all entries of a node vanish together within one lease
P5  locate(n users) is one round trip per shard
Rooms (P4) and watching (P6) join the port with their features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class Attachment(msgspec.Struct, frozen=True, gc=False):
    """One session's presence entry. A higher generation is newer, cluster-wide and across restarts."""

    user: str
    device: str
    device_class: str
    node: str
    boot: int
    session: str
    generation: int
    since_ms: int


class Location(msgspec.Struct, frozen=True, gc=False):
    """Where a user is. Empty attachments and grace_until_ms in the future: just left in good order."""

    attachments: tuple[Attachment, ...] = ()
    grace_until_ms: int = 0


NOWHERE = Location()


class PresenceStore(Protocol):
    """Attachments and node leases. Any method raises PresenceUnavailable; nobody is offline because of it."""

    async def open_lease(self, node: str, boot: int, ttl_ms: int) -> None:
        """Create or re-create the node's lease."""
        ...

    async def renew(self, node: str, boot: int, ttl_ms: int) -> bool:
        """Lengthen the lease. False: it is missing, so register again (open_lease, attach all, sync all)."""
        ...

    async def end_lease(self, node: str, boot: int) -> None:
        """Orderly end: the node's attachments vanish now."""
        ...

    async def attach(
        self, user: str, device: str, device_class: str, node: str, boot: int, session: str
    ) -> tuple[Attachment, tuple[Attachment, ...]]:
        """Register a session. Returns it and what it replaced (the same device elsewhere).

        Raises PresenceUnavailable(temporary) when the node has no live lease.
        """
        ...

    async def detach(self, user: str, device: str, generation: int, grace_until_ms: int = 0) -> bool:
        """Remove exactly this generation; False if a newer one (or none) stands there.

        grace_until_ms > 0 (wall clock): an orderly leave; the user gets this grace before vendor push.
        """
        ...

    async def locate(self, users: Sequence[str]) -> dict[str, Location]:
        """Every asked user's live attachments; users that are nowhere may be missing from the result."""
        ...

    async def nodes(self) -> list[tuple[str, int]]:
        """(node, boot) of every live lease."""
        ...
