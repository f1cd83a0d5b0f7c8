"""Presence inside one process: who is attached where, with leases by the monotonic clock.

Hides when what has ended is forgotten. Every call first drops the leases that have ended, each with all its
attachments (P1, P3), so nothing is ever read that a sweep would have removed; there is no timer. `Location`s
are kept ready-made: a locate of n users is n dict look-ups (P5).

Generations start at `first_generation`, which must be above all that any earlier process used; the app passes
boot << 32 (P2 across restarts).

I1  an attachment stands only under a live lease      tests/contract/presence.py
I2  a user without attachments or grace takes no memory      tests/contract/test_presence_memory.py
"""

from __future__ import annotations

from collections.abc import Sequence

from fastim.clock import Clock
from fastim.errors import PresenceUnavailable
from fastim.presence.base import Attachment, Location

_Lease = tuple[str, int]
"""(node, boot)"""


class MemoryPresence:
    """The embedded PresenceStore. All calls come from one event loop."""

    def __init__(self, clock: Clock, first_generation: int = 1) -> None:
        self._clock = clock
        self._generation = first_generation - 1
        self._lease_ends: dict[_Lease, int] = {}
        """Monotonic ms."""
        self._next_end_mono_ms = 0
        """No lease or grace ends before this moment; 0 = there is none."""
        self._by_lease: dict[_Lease, set[tuple[str, str]]] = {}
        self._by_user: dict[str, dict[str, Attachment]] = {}
        self._locations: dict[str, Location] = {}
        self._grace_ends: dict[str, int] = {}
        """Monotonic ms at which the grace of a user who is nowhere is forgotten."""

    async def open_lease(self, node: str, boot: int, ttl_ms: int) -> None:
        self._forget_ended()
        self._lease_ends[node, boot] = self._ends(ttl_ms)
        self._by_lease.setdefault((node, boot), set())

    async def renew(self, node: str, boot: int, ttl_ms: int) -> bool:
        self._forget_ended()
        if (node, boot) not in self._lease_ends:
            return False
        self._lease_ends[node, boot] = self._ends(ttl_ms)
        return True

    async def end_lease(self, node: str, boot: int) -> None:
        self._forget_ended()
        self._drop_lease((node, boot))

    async def attach(
        self, user: str, device: str, device_class: str, node: str, boot: int, session: str
    ) -> tuple[Attachment, tuple[Attachment, ...]]:
        self._forget_ended()
        held = self._by_lease.get((node, boot))
        if held is None:
            raise PresenceUnavailable(f"{node} boot {boot} has no live lease")
        devices = self._by_user.setdefault(user, {})
        old = devices.pop(device, None)
        if old is not None:
            self._by_lease[old.node, old.boot].discard((user, device))
        self._generation += 1
        new = Attachment(
            user, device, device_class, node, boot, session, self._generation, self._clock.wall_ms()
        )
        devices[device] = new
        held.add((user, device))
        self._grace_ends.pop(user, None)
        self._locations[user] = Location(tuple(devices.values()))
        return new, () if old is None else (old,)

    async def detach(self, user: str, device: str, generation: int, grace_until_ms: int = 0) -> bool:
        self._forget_ended()
        devices = self._by_user.get(user)
        found = None if devices is None else devices.get(device)
        if found is None or found.generation != generation:
            return False
        self._by_lease[found.node, found.boot].discard((user, device))
        self._remove(user, device, grace_until_ms)
        return True

    async def locate(self, users: Sequence[str]) -> dict[str, Location]:
        self._forget_ended()
        locations = self._locations
        return {user: locations[user] for user in users if user in locations}

    async def nodes(self) -> list[tuple[str, int]]:
        self._forget_ended()
        return list(self._lease_ends)

    def counts(self) -> tuple[int, int]:
        """(users who are somewhere, attachments)."""
        self._forget_ended()
        return len(self._by_user), sum(map(len, self._by_lease.values()))

    def _ends(self, after_ms: int) -> int:
        ends_mono_ms = self._clock.mono_ms() + after_ms
        if not self._next_end_mono_ms or ends_mono_ms < self._next_end_mono_ms:
            self._next_end_mono_ms = ends_mono_ms
        return ends_mono_ms

    def _forget_ended(self) -> None:
        """O(1) until something ends; then O(leases + graces + the attachments that go)."""
        if not self._next_end_mono_ms:
            return
        mono_ms = self._clock.mono_ms()
        if mono_ms < self._next_end_mono_ms:
            return
        for lease in [lease for lease, ends in self._lease_ends.items() if ends <= mono_ms]:
            self._drop_lease(lease)
        for user in [user for user, ends in self._grace_ends.items() if ends <= mono_ms]:
            del self._grace_ends[user]
            if user not in self._by_user:
                del self._locations[user]
        self._next_end_mono_ms = min((*self._lease_ends.values(), *self._grace_ends.values()), default=0)

    def _drop_lease(self, lease: _Lease) -> None:
        self._lease_ends.pop(lease, None)
        for user, device in self._by_lease.pop(lease, ()):
            self._remove(user, device, 0)

    def _remove(self, user: str, device: str, grace_until_ms: int) -> None:
        """Take the attachment away; with a grace, remember it for as long as it lasts (wall clock)."""
        devices = self._by_user[user]
        del devices[device]
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
