"""The presence port: who is attached where, right now. A hint, never the truth.

An attachment, and a node's place in a room, is valid only while the lease of its node lives: a lease that
ended takes them along for good, one that is opened again begins empty. tests/contract/presence.py proves:

P1  locate returns every live attachment and none of a node whose lease ended
P2  generations fence: a late detach or attach never removes or changes a newer attachment
P3  without renew, all entries of a node vanish together within one lease
P4  an empty room does not exist
P5  locate(n users) is one round trip per shard
P6  a watcher is told of every change at least once, and to look again (`resync`) after a gap

A newer boot of a node takes the lease over; an older one neither opens nor renews it then. Client heartbeats
never come here: writes are O(connects + nodes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


class RoomNode(msgspec.Struct, frozen=True, gc=False):
    """A node that holds members of a room, and how many."""

    node: str
    boot: int
    members: int


class Change(msgspec.Struct, frozen=True, gc=False):
    """Who and which rooms may look different now; what they look like is for locate and room_nodes to say.

    resync: some changes may have been missed, of anything watched: look at all of it again.
    """

    users: frozenset[str] = frozenset()
    rooms: frozenset[str] = frozenset()
    resync: bool = False


class Watcher(Protocol):
    """What one watcher is told. A reader that is late gets the union of what it missed, never a backlog."""

    async def watch(self, users: Iterable[str] = (), rooms: Iterable[str] = ()) -> None:
        """Every change from the return of this call on is told. So watch first, then look.

        Raises PresenceUnavailable; it may be called again.
        """
        ...

    def forget(self, users: Iterable[str] = (), rooms: Iterable[str] = ()) -> None:
        """Nothing more of these, not even what has happened already."""
        ...

    async def changes(self) -> Change:
        """Wait for something to change. Raises PresenceUnavailable once the watcher or presence is closed."""
        ...

    def close(self) -> None:
        """Watch nothing any more."""
        ...


class PresenceStore(Protocol):
    """Attachments, room places and node leases.

    Any method that waits raises PresenceUnavailable and nothing else; nobody is offline because of it.
    """

    async def open_lease(self, node: str, boot: int, ttl_ms: int) -> None:
        """Create the node's lease, or go on with it. Raises PresenceUnavailable when a newer boot has it."""
        ...

    async def renew(self, node: str, boot: int, ttl_ms: int) -> bool:
        """Lengthen the lease. False: it, or what it carried, is lost: open_lease, attach all, sync all."""
        ...

    async def end_lease(self, node: str, boot: int) -> None:
        """Orderly end: what the node's lease carried vanishes now."""
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

    async def enter(self, room: str, node: str, boot: int, members: int) -> None:
        """The node now holds so many members (at least 1) of the room; the newest word counts.

        One call at a time for a room. Raises PresenceUnavailable(temporary) when the node has no live lease,
        UsageError for members < 1.
        """
        ...

    async def leave(self, room: str, node: str, boot: int) -> None:
        """The node holds no member of the room any more; a newer boot's place stays."""
        ...

    async def room_nodes(self, rooms: Sequence[str]) -> dict[str, tuple[RoomNode, ...]]:
        """The live nodes that hold members of each asked room; a room without any is missing."""
        ...

    def watch(self) -> Watcher:
        """A new watcher, which watches nothing yet."""
        ...

    async def close(self) -> None:
        """Let go of what the backend holds in this process. Leases and entries stay until they end."""
        ...
