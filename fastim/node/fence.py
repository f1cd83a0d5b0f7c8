"""Whether a dispatcher has adopted this start of ours, and what may not be done before that is known.

A fence is written into the store by whoever adopts the inbox, and is for ever; a process that slept learns of
it by asking. It is asked every renew interval, whether its lease lives or not, and again after each creation
of a lease, before anybody is attached under it: so no lease that was created after the fence ever carries an
attachment, and an adopter that has seen the lease missing after the fence has seen its end.

    begin() ──▶ inbox ──▶ open_lease ──▶ clear_lease() ──▶ may attach ──lease missing──▶ lost_lease() ─┐
                              └───────────────────────────────────────────────────────────────────────┘

In one process nobody adopts (the bus dies with the process): then nothing is asked and nothing is written.

Z1  nobody is attached under a lease that was not cleared        tests/system/test_fence.py
Z2  an adopted start says so within one renew interval           same
Source: semantics, "Presence"; docs/adr/0105.
"""

from __future__ import annotations

from fastim.errors import Fenced, PresenceUnavailable
from fastim.store.base import MessageStore


class Fence:
    """Of one start of a node, or of an api with an inbox of its own."""

    def __init__(self, store: MessageStore, node: str, boot: int, *, adoptable: bool) -> None:
        self._store = store
        self._node = node
        self._boot = boot
        self.adoptable = adoptable
        self._clear = not adoptable

    async def begin(self) -> None:
        """Before the inbox is created: from now on somebody adopts it. Raises StoreUnavailable."""
        if self.adoptable:
            await self._store.open_boot(self._node, self._boot)

    async def ask(self) -> None:
        """Every renew interval, and before a lease is created anew. Raises Fenced, StoreUnavailable."""
        if self.adoptable and await self._store.fenced(self._node, self._boot):
            self._clear = False
            raise Fenced(f"boot {self._boot} of {self._node} was adopted; it takes a new one")

    async def clear_lease(self) -> None:
        """After the lease was created, before anybody is attached. Raises Fenced, StoreUnavailable."""
        await self.ask()
        self._clear = True

    def lost_lease(self) -> None:
        """The lease is missing: nobody is attached until the next one is cleared."""
        self._clear = not self.adoptable

    def require_clear(self) -> None:
        """Raises PresenceUnavailable when nobody may be attached now."""
        if not self._clear:
            raise PresenceUnavailable(f"{self._node} boot {self._boot} is registering again")
