"""What every PresenceStore must keep (promises P1-P5 of fastim.presence.base).

A backend's test module inherits PresenceContract and gives `presence(first_generation)` and `advance(ms)`:
make that much time pass for its leases (a fake clock, or a real sleep where a server keeps the time).
"""

from __future__ import annotations

import itertools

import pytest

from fastim.errors import PresenceUnavailable
from fastim.presence.base import NOWHERE, Location, PresenceStore

_NAMES = itertools.count(1)
TTL_MS = 6_000


def fresh(what: str) -> str:
    """A name no other test uses, so that one real server may serve the whole suite."""
    return f"{what}{next(_NAMES)}"


async def locate(presence: PresenceStore, user: str) -> Location:
    return (await presence.locate([user])).get(user, NOWHERE)


async def sessions(presence: PresenceStore, user: str) -> set[str]:
    return {attachment.session for attachment in (await locate(presence, user)).attachments}


class PresenceContract:
    """Inherit, and give `presence()`, `advance()` and `wall_ms()`."""

    def presence(self, first_generation: int = 1) -> PresenceStore:
        raise NotImplementedError

    async def advance(self, ms: int) -> None:
        raise NotImplementedError

    def wall_ms(self) -> int:
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------- P1: locate

    async def test_locate_returns_every_live_attachment(self) -> None:
        presence, user, n1, n2 = self.presence(), fresh("u"), fresh("n"), fresh("n")
        await presence.open_lease(n1, 1, TTL_MS)
        await presence.open_lease(n2, 4, TTL_MS)
        phone, _ = await presence.attach(user, "phone", "app", n1, 1, "s1")
        laptop, _ = await presence.attach(user, "laptop", "desktop", n2, 4, "s2")
        assert set((await locate(presence, user)).attachments) == {phone, laptop}
        assert (phone.user, phone.device, phone.device_class, phone.node, phone.boot, phone.session) == (
            user, "phone", "app", n1, 1, "s1",
        )  # fmt: skip

    async def test_locate_answers_for_many_users_at_once(self) -> None:
        presence, node = self.presence(), fresh("n")
        users = [fresh("u") for _ in range(5)]
        await presence.open_lease(node, 1, TTL_MS)
        for user in users[:3]:
            await presence.attach(user, "phone", "app", node, 1, f"s-{user}")
        found = await presence.locate(users)
        assert {user: {a.session for a in found.get(user, NOWHERE).attachments} for user in users} == {
            user: ({f"s-{user}"} if user in users[:3] else set()) for user in users
        }

    async def test_locate_of_nobody_is_empty(self) -> None:
        assert await self.presence().locate([]) == {}

    async def test_attach_without_a_live_lease_is_unavailable(self) -> None:
        presence, node = self.presence(), fresh("n")
        with pytest.raises(PresenceUnavailable) as error:
            await presence.attach(fresh("u"), "phone", "app", node, 1, "s1")
        assert error.value.temporary

    async def test_the_lease_of_another_boot_does_not_carry_an_attachment(self) -> None:
        presence, node = self.presence(), fresh("n")
        await presence.open_lease(node, 2, TTL_MS)
        with pytest.raises(PresenceUnavailable):
            await presence.attach(fresh("u"), "phone", "app", node, 1, "s1")

    async def test_nodes_lists_every_live_lease(self) -> None:
        presence, n1, n2 = self.presence(), fresh("n"), fresh("n")
        await presence.open_lease(n1, 1, TTL_MS)
        await presence.open_lease(n2, 7, 2 * TTL_MS)
        await self.advance(TTL_MS + 1)
        await presence.open_lease(n1, 2, TTL_MS)
        nodes = await presence.nodes()
        assert {(n1, 2), (n2, 7)} <= set(nodes)
        assert (n1, 1) not in nodes

    # ------------------------------------------------------------------------------------ P2: generations

    async def test_generations_grow_with_every_attach(self) -> None:
        presence, node = self.presence(), fresh("n")
        await presence.open_lease(node, 1, TTL_MS)
        taken = [(await presence.attach(fresh("u"), "d", "app", node, 1, "s"))[0].generation for _ in "12345"]
        assert taken == sorted(set(taken))

    async def test_the_same_device_replaces_its_older_attachment(self) -> None:
        presence, user, n1, n2 = self.presence(), fresh("u"), fresh("n"), fresh("n")
        await presence.open_lease(n1, 1, TTL_MS)
        await presence.open_lease(n2, 1, TTL_MS)
        old, replaced_by_old = await presence.attach(user, "phone", "app", n1, 1, "s1")
        new, replaced = await presence.attach(user, "phone", "app", n2, 1, "s2")
        assert replaced_by_old == ()
        assert replaced == (old,)
        assert (await locate(presence, user)).attachments == (new,)
        assert new.generation > old.generation

    async def test_another_device_replaces_nothing(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, TTL_MS)
        await presence.attach(user, "phone", "app", node, 1, "s1")
        _, replaced = await presence.attach(user, "pad", "pad", node, 1, "s2")
        assert replaced == ()
        assert await sessions(presence, user) == {"s1", "s2"}

    async def test_stale_detach_does_not_remove_newer_attach(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, TTL_MS)
        old, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
        await presence.attach(user, "phone", "app", node, 1, "s2")
        assert not await presence.detach(user, "phone", old.generation)
        assert await sessions(presence, user) == {"s2"}

    async def test_detach_removes_its_own_generation_once(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, TTL_MS)
        attachment, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
        assert await presence.detach(user, "phone", attachment.generation)
        assert not await presence.detach(user, "phone", attachment.generation)
        assert await locate(presence, user) == NOWHERE

    async def test_detach_leaves_the_other_devices(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, TTL_MS)
        phone, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
        await presence.attach(user, "pad", "pad", node, 1, "s2")
        assert await presence.detach(user, "phone", phone.generation, self.wall_ms() + 4_000)
        assert await sessions(presence, user) == {"s2"}

    # ----------------------------------------------------------------------------------------- P3: leases

    async def test_without_renew_all_entries_of_a_node_vanish_together(self) -> None:
        presence, n1, n2 = self.presence(), fresh("n"), fresh("n")
        users = [fresh("u") for _ in range(4)]
        await presence.open_lease(n1, 1, TTL_MS)
        await presence.open_lease(n2, 1, 10 * TTL_MS)
        for user in users:
            await presence.attach(user, "phone", "app", n1, 1, "s1")
        await presence.attach(users[0], "pad", "pad", n2, 1, "s2")
        await self.advance(TTL_MS + 1)
        found = await presence.locate(users)
        assert [{a.session for a in found.get(user, NOWHERE).attachments} for user in users] == [
            {"s2"}, set(), set(), set(),
        ]  # fmt: skip

    async def test_renew_keeps_the_entries(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, TTL_MS)
        await presence.attach(user, "phone", "app", node, 1, "s1")
        for _ in range(4):
            await self.advance(TTL_MS // 2)
            assert await presence.renew(node, 1, TTL_MS)
        assert await sessions(presence, user) == {"s1"}

    async def test_renewing_a_missing_lease_says_so(self) -> None:
        presence, node = self.presence(), fresh("n")
        assert not await presence.renew(node, 1, TTL_MS)
        await presence.open_lease(node, 1, TTL_MS)
        assert not await presence.renew(node, 2, TTL_MS)
        await self.advance(TTL_MS + 1)
        assert not await presence.renew(node, 1, TTL_MS)

    async def test_a_lease_opened_again_does_not_bring_back_what_it_carried(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, TTL_MS)
        old, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
        await self.advance(TTL_MS + 1)
        await presence.open_lease(node, 1, TTL_MS)
        assert await locate(presence, user) == NOWHERE
        assert not await presence.detach(user, "phone", old.generation)

    async def test_opening_a_live_lease_again_keeps_the_entries(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, TTL_MS)
        await presence.attach(user, "phone", "app", node, 1, "s1")
        await presence.open_lease(node, 1, TTL_MS)
        assert await sessions(presence, user) == {"s1"}

    async def test_an_ended_lease_takes_its_entries_away_now(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, TTL_MS)
        await presence.attach(user, "phone", "app", node, 1, "s1")
        await presence.end_lease(node, 1)
        assert await locate(presence, user) == NOWHERE
        assert (node, 1) not in await presence.nodes()

    async def test_ending_one_boot_leaves_the_next(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 2, TTL_MS)
        await presence.attach(user, "phone", "app", node, 2, "s1")
        await presence.end_lease(node, 1)
        assert await sessions(presence, user) == {"s1"}

    # ------------------------------------------------------------------------------------------ the grace

    async def test_an_orderly_leave_shows_its_grace(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, 10 * TTL_MS)
        attachment, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
        until_ms = self.wall_ms() + 4_000
        await presence.detach(user, "phone", attachment.generation, until_ms)
        assert await locate(presence, user) == Location((), until_ms)

    async def test_a_grace_ends_by_itself(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, 10 * TTL_MS)
        attachment, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
        await presence.detach(user, "phone", attachment.generation, self.wall_ms() + 4_000)
        await self.advance(4_001)
        location = await locate(presence, user)
        assert not location.attachments
        assert location.grace_until_ms <= self.wall_ms()

    async def test_coming_back_ends_the_grace(self) -> None:
        presence, user, node = self.presence(), fresh("u"), fresh("n")
        await presence.open_lease(node, 1, 10 * TTL_MS)
        first, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
        await presence.detach(user, "phone", first.generation, self.wall_ms() + 4_000)
        second, _ = await presence.attach(user, "phone", "app", node, 1, "s2")
        assert await sessions(presence, user) == {"s2"}
        await presence.detach(user, "phone", second.generation)
        assert (await locate(presence, user)).grace_until_ms == 0
