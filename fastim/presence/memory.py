"""Presence inside one process: who is attached where, with leases by the monotonic clock.

Hides when what has ended is forgotten. Every call first drops the leases that have ended, each with all its
attachments and room places (P1, P3), so nothing is ever read that a sweep would have removed; there is no
timer, so a watcher is told of an ended lease by the next call of anybody (a node renews every 2 s).
`Location`s are kept ready-made: a locate of n users is n dict look-ups (P5).

Generations start at `first_generation`, which must be above all that any earlier process used; the app passes
boot << 32 (P2 across restarts).

I1  an attachment stands only under a live lease      tests/contract/presence.py
I2  a user without attachments or grace, and a room without members, takes no memory
                                                      tests/contract/test_presence_memory.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastim.clock import Clock
from fastim.errors import PresenceUnavailable, UsageError
from fastim.presence.base import Attachment, Location, RoomNode, Watcher
from fastim.presence.changes import Box, Interest, subjects_of


class _Lease:
    """What one node's lease carries."""

    __slots__ = ("boot", "devices", "ends_mono_ms", "rooms")

    def __init__(self, boot: int, ends_mono_ms: int) -> None:
        self.boot = boot
        self.ends_mono_ms = ends_mono_ms
        self.devices: set[tuple[str, str]] = set()
        """(user, device)"""
        self.rooms: set[str] = set()


class MemoryPresence:
    """The embedded PresenceStore. All calls come from one event loop."""

    def __init__(self, clock: Clock, first_generation: int = 1) -> None:
        self._clock = clock
        self._generation = first_generation - 1
        self._leases: dict[str, _Lease] = {}
        """By node."""
        self._next_end_mono_ms = 0
        """No lease or grace ends before this moment; 0 = there is none."""
        self._by_user: dict[str, dict[str, Attachment]] = {}
        self._locations: dict[str, Location] = {}
        self._grace_ends: dict[str, int] = {}
        """Monotonic ms at which the grace of a user who is nowhere is forgotten."""
        self._rooms: dict[str, dict[str, RoomNode]] = {}
        """Room -> node -> its place."""
        self._interest = Interest()

    # ------------------------------------------------------------------------------------------- leases

    async def open_lease(self, node: str, boot: int, ttl_ms: int) -> None:
        self._forget_ended()
        held = self._leases.get(node)
        if held is not None and held.boot > boot:
            raise PresenceUnavailable(f"{node} boot {held.boot} has the lease; this is boot {boot}")
        if held is not None and held.boot < boot:
            self._drop_lease(node)
            held = None
        ends_mono_ms = self._ends(ttl_ms)
        if held is None:
            self._leases[node] = _Lease(boot, ends_mono_ms)
        else:
            held.ends_mono_ms = ends_mono_ms

    async def renew(self, node: str, boot: int, ttl_ms: int) -> bool:
        held = self._live(node, boot)
        if held is None:
            return False
        held.ends_mono_ms = self._ends(ttl_ms)
        return True

    async def end_lease(self, node: str, boot: int) -> None:
        if self._live(node, boot) is not None:
            self._drop_lease(node)

    async def nodes(self) -> list[tuple[str, int]]:
        self._forget_ended()
        return [(node, lease.boot) for node, lease in self._leases.items()]

    def _live(self, node: str, boot: int) -> _Lease | None:
        self._forget_ended()
        held = self._leases.get(node)
        return held if held is not None and held.boot == boot else None

    # -------------------------------------------------------------------------------------- attachments

    async def attach(
        self, user: str, device: str, device_class: str, node: str, boot: int, session: str
    ) -> tuple[Attachment, tuple[Attachment, ...]]:
        held = self._live(node, boot)
        if held is None:
            raise PresenceUnavailable(f"{node} boot {boot} has no live lease")
        devices = self._by_user.setdefault(user, {})
        old = devices.pop(device, None)
        if old is not None:
            self._leases[old.node].devices.discard((user, device))
        self._generation += 1
        new = Attachment(
            user, device, device_class, node, boot, session, self._generation, self._clock.wall_ms()
        )
        devices[device] = new
        held.devices.add((user, device))
        self._grace_ends.pop(user, None)
        self._locations[user] = Location(tuple(devices.values()))
        self._interest.changed("user", user)
        return new, () if old is None else (old,)

    async def detach(self, user: str, device: str, generation: int, grace_until_ms: int = 0) -> bool:
        self._forget_ended()
        devices = self._by_user.get(user)
        found = None if devices is None else devices.get(device)
        if found is None or found.generation != generation:
            return False
        self._leases[found.node].devices.discard((user, device))
        self._remove(user, device, grace_until_ms)
        return True

    async def locate(self, users: Sequence[str]) -> dict[str, Location]:
        self._forget_ended()
        locations = self._locations
        return {user: locations[user] for user in users if user in locations}

    # -------------------------------------------------------------------------------------------- rooms

    async def enter(self, room: str, node: str, boot: int, members: int) -> None:
        if members < 1:
            raise UsageError(f"members is {members}; at least 1, else leave")
        held = self._live(node, boot)
        if held is None:
            raise PresenceUnavailable(f"{node} boot {boot} has no live lease")
        place = RoomNode(node, boot, members)
        places = self._rooms.setdefault(room, {})
        if places.get(node) != place:
            places[node] = place
            held.rooms.add(room)
            self._interest.changed("room", room)

    async def leave(self, room: str, node: str, boot: int) -> None:
        held = self._live(node, boot)
        if held is not None and room in held.rooms:
            held.rooms.discard(room)
            self._leave(room, node)

    async def room_nodes(self, rooms: Sequence[str]) -> dict[str, tuple[RoomNode, ...]]:
        self._forget_ended()
        return {room: tuple(self._rooms[room].values()) for room in rooms if room in self._rooms}

    def _leave(self, room: str, node: str) -> None:
        places = self._rooms[room]
        del places[node]
        if not places:
            del self._rooms[room]
        self._interest.changed("room", room)

    # ----------------------------------------------------------------------------------------- watching

    def watch(self) -> Watcher:
        return _MemoryWatcher(self._interest)

    async def close(self) -> None:
        self._interest.close()

    def flush(self) -> None:
        """Lose everything, as a server of its own that is flushed or restarted does. For the simulation."""
        for node in list(self._leases):
            self._drop_lease(node)

    def counts(self) -> tuple[int, int, int]:
        """(users who are somewhere, attachments, rooms)."""
        self._forget_ended()
        attachments = sum(len(lease.devices) for lease in self._leases.values())
        return len(self._by_user), attachments, len(self._rooms)

    # -------------------------------------------------------------------------------------- what ends

    def _ends(self, after_ms: int) -> int:
        ends_mono_ms = self._clock.mono_ms() + after_ms
        if not self._next_end_mono_ms or ends_mono_ms < self._next_end_mono_ms:
            self._next_end_mono_ms = ends_mono_ms
        return ends_mono_ms

    def _forget_ended(self) -> None:
        """O(1) until something ends; then O(leases + graces + the entries that go)."""
        if not self._next_end_mono_ms:
            return
        mono_ms = self._clock.mono_ms()
        if mono_ms < self._next_end_mono_ms:
            return
        for node in [node for node, lease in self._leases.items() if lease.ends_mono_ms <= mono_ms]:
            self._drop_lease(node)
        for user in [user for user, ends in self._grace_ends.items() if ends <= mono_ms]:
            del self._grace_ends[user]
            if user not in self._by_user:
                del self._locations[user]
        ends_mono_ms = [lease.ends_mono_ms for lease in self._leases.values()]
        self._next_end_mono_ms = min((*ends_mono_ms, *self._grace_ends.values()), default=0)

    def _drop_lease(self, node: str) -> None:
        lease = self._leases.pop(node)
        for user, device in lease.devices:
            self._remove(user, device, 0)
        for room in lease.rooms:
            self._leave(room, node)

    def _remove(self, user: str, device: str, grace_until_ms: int) -> None:
        """Take the attachment away; with a grace, remember it for as long as it lasts (wall clock)."""
        devices = self._by_user[user]
        del devices[device]
        self._interest.changed("user", user)
        before = self._locations[user].grace_until_ms
        grace_until_ms = max(before, grace_until_ms)
        left_ms = grace_until_ms - self._clock.wall_ms()
        if left_ms > 0:
            self._grace_ends[user] = self._ends(left_ms)
        else:
            grace_until_ms = 0
            self._grace_ends.pop(user, None)
        if not devices:
            del self._by_user[user]
            if not grace_until_ms:
                del self._locations[user]
                return
        self._locations[user] = Location(tuple(devices.values()), grace_until_ms)


class _MemoryWatcher(Box):
    async def watch(self, users: Iterable[str] = (), rooms: Iterable[str] = ()) -> None:
        self.add(subjects_of(users, rooms))
