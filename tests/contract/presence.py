"""What every PresenceStore must keep (promises P1-P6 of fastim.presence.base).

A backend's test module inherits PresenceContract and gives `presence()`, `peer()`, `wall_ms()` and
`advance(ms)`, which makes that much time pass: by a fake clock, or a real sleep where a server has the time.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fastim.errors import PresenceUnavailable, UsageError
from fastim.presence.base import NOWHERE, Change, Location, PresenceStore, RoomNode, Watcher

_NAMES = itertools.count(1)
_TOLD_S = 10.0
_QUIET_S = 0.1
"""How long a watcher that must not be told is watched; too short can only hide a fault, never invent one."""


def fresh(what: str) -> str:
    """A name no other test uses, so that one real server may serve the whole suite."""
    return f"{what}{os.getpid()}-{next(_NAMES)}"


async def locate(presence: PresenceStore, user: str) -> Location:
    return (await presence.locate([user])).get(user, NOWHERE)


async def sessions(presence: PresenceStore, user: str) -> set[str]:
    return {attachment.session for attachment in (await locate(presence, user)).attachments}


async def places(presence: PresenceStore, room: str) -> set[RoomNode]:
    return set((await presence.room_nodes([room])).get(room, ()))


async def told(watcher: Watcher, *, user: str = "", room: str = "") -> Change:
    """Wait until the watcher is told of the user or the room, or to look at everything again."""
    async with asyncio.timeout(_TOLD_S):
        while True:
            change = await watcher.changes()
            if user in change.users or room in change.rooms or change.resync:
                return change


async def quiet(watcher: Watcher) -> bool:
    """Whether the watcher is told of nothing."""
    try:
        async with asyncio.timeout(_QUIET_S):
            await watcher.changes()
    except TimeoutError:
        return True
    return False


class PresenceContract:
    """Inherit, and give `presence()`, `peer()`, `advance()` and `wall_ms()`."""

    ttl_ms = 6_000
    grace_ms = 4_000

    def presence(self) -> PresenceStore:
        raise NotImplementedError

    def peer(self, presence: PresenceStore) -> PresenceStore:
        """Another process's view of the same presence."""
        raise NotImplementedError

    async def advance(self, ms: int) -> None:
        raise NotImplementedError

    def wall_ms(self) -> int:
        raise NotImplementedError

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[PresenceStore]:
        presence = self.presence()
        try:
            yield presence
        finally:
            await presence.close()

    @asynccontextmanager
    async def both(self) -> AsyncIterator[tuple[PresenceStore, PresenceStore]]:
        """Presence as two processes see it."""
        here = self.presence()
        there = self.peer(here)
        try:
            yield here, there
        finally:
            await there.close()
            await here.close()

    # ----------------------------------------------------------------------------------------- P1: locate

    async def test_locate_returns_every_live_attachment(self) -> None:
        async with self.both() as (presence, there):
            user, n1, n2 = fresh("u"), fresh("n"), fresh("n")
            await presence.open_lease(n1, 1, self.ttl_ms)
            await there.open_lease(n2, 4, self.ttl_ms)
            phone, _ = await presence.attach(user, "phone", "app", n1, 1, "s1")
            laptop, _ = await there.attach(user, "laptop", "desktop", n2, 4, "s2")
            assert set((await locate(presence, user)).attachments) == {phone, laptop}
            assert (phone.user, phone.device, phone.device_class, phone.node, phone.boot, phone.session) == (
                user, "phone", "app", n1, 1, "s1",
            )  # fmt: skip

    async def test_locate_answers_for_many_users_at_once(self) -> None:
        async with self.opened() as presence:
            node = fresh("n")
            users = [fresh("u") for _ in range(5)]
            await presence.open_lease(node, 1, self.ttl_ms)
            for user in users[:3]:
                await presence.attach(user, "phone", "app", node, 1, f"s-{user}")
            found = await presence.locate(users)
            assert {user: {a.session for a in found.get(user, NOWHERE).attachments} for user in users} == {
                user: ({f"s-{user}"} if user in users[:3] else set()) for user in users
            }

    async def test_locate_of_nobody_is_empty(self) -> None:
        async with self.opened() as presence:
            assert await presence.locate([]) == {}

    async def test_attach_without_a_live_lease_is_unavailable(self) -> None:
        async with self.opened() as presence:
            node = fresh("n")
            with pytest.raises(PresenceUnavailable) as error:
                await presence.attach(fresh("u"), "phone", "app", node, 1, "s1")
            assert error.value.temporary

    async def test_the_lease_of_another_boot_does_not_carry_an_attachment(self) -> None:
        async with self.opened() as presence:
            node = fresh("n")
            await presence.open_lease(node, 2, self.ttl_ms)
            with pytest.raises(PresenceUnavailable):
                await presence.attach(fresh("u"), "phone", "app", node, 1, "s1")

    async def test_nodes_lists_every_live_lease(self) -> None:
        async with self.both() as (presence, there):
            n1, n2 = fresh("n"), fresh("n")
            await presence.open_lease(n1, 1, self.ttl_ms)
            await there.open_lease(n2, 7, 2 * self.ttl_ms)
            await self.advance(self.ttl_ms + 1)
            await presence.open_lease(n1, 2, self.ttl_ms)
            nodes = await presence.nodes()
            assert {(n1, 2), (n2, 7)} <= set(nodes)
            assert (n1, 1) not in nodes

    # ------------------------------------------------------------------------------------ P2: generations

    async def test_generations_grow_with_every_attach(self) -> None:
        async with self.opened() as presence:
            node = fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            taken = [
                (await presence.attach(fresh("u"), "d", "app", node, 1, "s"))[0].generation for _ in "12345"
            ]
            assert taken == sorted(set(taken))

    async def test_the_same_device_replaces_its_older_attachment(self) -> None:
        async with self.both() as (presence, there):
            user, n1, n2 = fresh("u"), fresh("n"), fresh("n")
            await presence.open_lease(n1, 1, self.ttl_ms)
            await there.open_lease(n2, 1, self.ttl_ms)
            old, replaced_by_old = await presence.attach(user, "phone", "app", n1, 1, "s1")
            new, replaced = await there.attach(user, "phone", "app", n2, 1, "s2")
            assert replaced_by_old == ()
            assert replaced == (old,)
            assert (await locate(presence, user)).attachments == (new,)
            assert new.generation > old.generation

    async def test_another_device_replaces_nothing(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            await presence.attach(user, "phone", "app", node, 1, "s1")
            _, replaced = await presence.attach(user, "pad", "pad", node, 1, "s2")
            assert replaced == ()
            assert await sessions(presence, user) == {"s1", "s2"}

    async def test_stale_detach_does_not_remove_newer_attach(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            old, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
            await presence.attach(user, "phone", "app", node, 1, "s2")
            assert not await presence.detach(user, "phone", old.generation)
            assert await sessions(presence, user) == {"s2"}

    async def test_detach_removes_its_own_generation_once(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            attachment, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
            assert await presence.detach(user, "phone", attachment.generation)
            assert not await presence.detach(user, "phone", attachment.generation)
            assert await locate(presence, user) == NOWHERE

    async def test_detach_leaves_the_other_devices(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            phone, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
            await presence.attach(user, "pad", "pad", node, 1, "s2")
            assert await presence.detach(user, "phone", phone.generation, self.wall_ms() + self.grace_ms)
            assert await sessions(presence, user) == {"s2"}

    async def test_racing_attaches_of_a_device_replace_each_other_in_a_chain(self) -> None:
        async with self.both() as (presence, there):
            user, n1, n2 = fresh("u"), fresh("n"), fresh("n")
            await presence.open_lease(n1, 1, 10 * self.ttl_ms)
            await there.open_lease(n2, 1, 10 * self.ttl_ms)
            attached = await asyncio.gather(
                *(presence.attach(user, "phone", "app", n1, 1, f"here{n}") for n in range(10)),
                *(there.attach(user, "phone", "app", n2, 1, f"there{n}") for n in range(10)),
            )
            generations = sorted(new.generation for new, _ in attached)
            assert len(set(generations)) == 20
            replaced = sorted(old.generation for _, olds in attached for old in olds)
            assert replaced == generations[:-1]
            assert all(old.generation < new.generation for new, olds in attached for old in olds)
            assert [a.generation for a in (await locate(there, user)).attachments] == generations[-1:]

    # ----------------------------------------------------------------------------------------- P3: leases

    async def test_without_renew_all_entries_of_a_node_vanish_together(self) -> None:
        async with self.both() as (presence, there):
            n1, n2 = fresh("n"), fresh("n")
            users = [fresh("u") for _ in range(4)]
            await presence.open_lease(n1, 1, self.ttl_ms)
            await there.open_lease(n2, 1, 10 * self.ttl_ms)
            for user in users:
                await presence.attach(user, "phone", "app", n1, 1, "s1")
            await there.attach(users[0], "pad", "pad", n2, 1, "s2")
            await self.advance(self.ttl_ms + 1)
            found = await presence.locate(users)
            assert [{a.session for a in found.get(user, NOWHERE).attachments} for user in users] == [
                {"s2"}, set(), set(), set(),
            ]  # fmt: skip

    async def test_renew_keeps_the_entries(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            await presence.attach(user, "phone", "app", node, 1, "s1")
            for _ in range(4):
                await self.advance(self.ttl_ms // 2)
                assert await presence.renew(node, 1, self.ttl_ms)
            assert await sessions(presence, user) == {"s1"}

    async def test_renewing_a_missing_lease_says_so(self) -> None:
        async with self.opened() as presence:
            node = fresh("n")
            assert not await presence.renew(node, 1, self.ttl_ms)
            await presence.open_lease(node, 1, self.ttl_ms)
            assert not await presence.renew(node, 2, self.ttl_ms)
            await self.advance(self.ttl_ms + 1)
            assert not await presence.renew(node, 1, self.ttl_ms)

    async def test_a_lease_opened_again_does_not_bring_back_what_it_carried(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            old, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
            await self.advance(self.ttl_ms + 1)
            await presence.open_lease(node, 1, self.ttl_ms)
            assert await locate(presence, user) == NOWHERE
            assert not await presence.detach(user, "phone", old.generation)

    async def test_opening_a_live_lease_again_keeps_the_entries(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            await presence.attach(user, "phone", "app", node, 1, "s1")
            await presence.open_lease(node, 1, self.ttl_ms)
            assert await sessions(presence, user) == {"s1"}

    async def test_an_ended_lease_takes_its_entries_away_now(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            await presence.attach(user, "phone", "app", node, 1, "s1")
            await presence.end_lease(node, 1)
            assert await locate(presence, user) == NOWHERE
            assert (node, 1) not in await presence.nodes()

    async def test_ending_one_boot_leaves_the_next(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 2, self.ttl_ms)
            await presence.attach(user, "phone", "app", node, 2, "s1")
            await presence.end_lease(node, 1)
            assert await sessions(presence, user) == {"s1"}

    async def test_a_newer_boot_takes_the_lease_and_what_the_older_carried_is_gone(self) -> None:
        async with self.both() as (old, new):
            user, room, node = fresh("u"), fresh("r"), fresh("n")
            await old.open_lease(node, 1, self.ttl_ms)
            await old.attach(user, "phone", "app", node, 1, "s1")
            await old.enter(room, node, 1, 3)
            await new.open_lease(node, 2, self.ttl_ms)
            assert await locate(new, user) == NOWHERE
            assert await places(new, room) == set()
            assert not await old.renew(node, 1, self.ttl_ms)

    async def test_an_older_boot_does_not_get_the_lease_back(self) -> None:
        async with self.both() as (old, new):
            user, node = fresh("u"), fresh("n")
            await old.open_lease(node, 1, self.ttl_ms)
            await new.open_lease(node, 2, self.ttl_ms)
            await new.attach(user, "phone", "app", node, 2, "s2")
            with pytest.raises(PresenceUnavailable):
                await old.open_lease(node, 1, self.ttl_ms)
            with pytest.raises(PresenceUnavailable):
                await old.attach(user, "phone", "app", node, 1, "s1")
            await old.end_lease(node, 1)
            assert await sessions(new, user) == {"s2"}

    async def test_what_a_dead_lease_carried_is_not_replaced(self) -> None:
        async with self.both() as (presence, there):
            user, n1, n2 = fresh("u"), fresh("n"), fresh("n")
            await presence.open_lease(n1, 1, self.ttl_ms)
            await presence.attach(user, "phone", "app", n1, 1, "s1")
            await self.advance(self.ttl_ms + 1)
            await there.open_lease(n2, 1, self.ttl_ms)
            _, replaced = await there.attach(user, "phone", "app", n2, 1, "s2")
            assert replaced == ()

    # ------------------------------------------------------------------------------------------ the grace

    async def test_an_orderly_leave_shows_its_grace(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, 10 * self.ttl_ms)
            attachment, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
            until_ms = self.wall_ms() + self.grace_ms
            await presence.detach(user, "phone", attachment.generation, until_ms)
            assert await locate(presence, user) == Location((), until_ms)

    async def test_a_grace_ends_by_itself(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, 10 * self.ttl_ms)
            attachment, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
            await presence.detach(user, "phone", attachment.generation, self.wall_ms() + self.grace_ms)
            await self.advance(self.grace_ms + 1)
            location = await locate(presence, user)
            assert not location.attachments
            assert location.grace_until_ms <= self.wall_ms()

    async def test_coming_back_ends_the_grace(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, 10 * self.ttl_ms)
            first, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
            await presence.detach(user, "phone", first.generation, self.wall_ms() + self.grace_ms)
            second, _ = await presence.attach(user, "phone", "app", node, 1, "s2")
            assert await sessions(presence, user) == {"s2"}
            await presence.detach(user, "phone", second.generation)
            assert (await locate(presence, user)).grace_until_ms == 0

    async def test_the_longest_grace_of_a_users_devices_counts(self) -> None:
        async with self.opened() as presence:
            user, node = fresh("u"), fresh("n")
            await presence.open_lease(node, 1, 10 * self.ttl_ms)
            phone, _ = await presence.attach(user, "phone", "app", node, 1, "s1")
            pad, _ = await presence.attach(user, "pad", "pad", node, 1, "s2")
            until_ms = self.wall_ms() + self.grace_ms
            await presence.detach(user, "phone", phone.generation, until_ms)
            await presence.detach(user, "pad", pad.generation)
            assert await locate(presence, user) == Location((), until_ms)

    # -------------------------------------------------------------------------------------- P4: rooms

    async def test_a_room_is_on_the_nodes_that_entered_it(self) -> None:
        async with self.both() as (presence, there):
            room, n1, n2 = fresh("r"), fresh("n"), fresh("n")
            await presence.open_lease(n1, 1, self.ttl_ms)
            await there.open_lease(n2, 4, self.ttl_ms)
            await presence.enter(room, n1, 1, 1)
            await there.enter(room, n2, 4, 250)
            assert await places(presence, room) == {RoomNode(n1, 1, 1), RoomNode(n2, 4, 250)}

    async def test_entering_again_says_how_many_members_there_are_now(self) -> None:
        async with self.opened() as presence:
            room, node = fresh("r"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            for members in (1, 7, 7, 2):
                await presence.enter(room, node, 1, members)
                assert await places(presence, room) == {RoomNode(node, 1, members)}

    async def test_room_nodes_answers_for_many_rooms_at_once(self) -> None:
        async with self.opened() as presence:
            rooms, node = [fresh("r") for _ in range(5)], fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            for room in rooms[:3]:
                await presence.enter(room, node, 1, 2)
            found = await presence.room_nodes(rooms)
            assert found == dict.fromkeys(rooms[:3], (RoomNode(node, 1, 2),))
            assert await presence.room_nodes([]) == {}

    async def test_an_empty_room_does_not_exist(self) -> None:
        async with self.both() as (presence, there):
            room, n1, n2 = fresh("r"), fresh("n"), fresh("n")
            await presence.open_lease(n1, 1, self.ttl_ms)
            await there.open_lease(n2, 1, self.ttl_ms)
            assert room not in await presence.room_nodes([room])
            await presence.enter(room, n1, 1, 2)
            await there.enter(room, n2, 1, 2)
            await presence.leave(room, n1, 1)
            assert await places(presence, room) == {RoomNode(n2, 1, 2)}
            await there.leave(room, n2, 1)
            assert room not in await presence.room_nodes([room])
            await there.leave(room, n2, 1)

    async def test_entering_needs_a_live_lease(self) -> None:
        async with self.opened() as presence:
            room, node = fresh("r"), fresh("n")
            with pytest.raises(PresenceUnavailable) as error:
                await presence.enter(room, node, 1, 1)
            assert error.value.temporary
            await presence.open_lease(node, 2, self.ttl_ms)
            with pytest.raises(PresenceUnavailable):
                await presence.enter(room, node, 1, 1)
            await self.advance(self.ttl_ms + 1)
            with pytest.raises(PresenceUnavailable):
                await presence.enter(room, node, 2, 1)
            assert await presence.room_nodes([room]) == {}

    async def test_nobody_enters_with_no_members(self) -> None:
        async with self.opened() as presence:
            room, node = fresh("r"), fresh("n")
            await presence.open_lease(node, 1, self.ttl_ms)
            with pytest.raises(UsageError, match="members is 0"):
                await presence.enter(room, node, 1, 0)

    async def test_a_node_whose_lease_ended_is_in_no_room(self) -> None:
        async with self.both() as (presence, there):
            rooms, n1, n2 = [fresh("r"), fresh("r")], fresh("n"), fresh("n")
            await presence.open_lease(n1, 1, self.ttl_ms)
            await there.open_lease(n2, 1, 10 * self.ttl_ms)
            for room in rooms:
                await presence.enter(room, n1, 1, 1)
            await there.enter(rooms[0], n2, 1, 5)
            await self.advance(self.ttl_ms + 1)
            assert await there.room_nodes(rooms) == {rooms[0]: (RoomNode(n2, 1, 5),)}
            await presence.open_lease(n1, 1, self.ttl_ms)
            assert await there.room_nodes(rooms) == {rooms[0]: (RoomNode(n2, 1, 5),)}

    async def test_a_late_leave_of_an_older_boot_does_not_take_the_newer_out(self) -> None:
        async with self.both() as (old, new):
            room, node = fresh("r"), fresh("n")
            await old.open_lease(node, 1, self.ttl_ms)
            await old.enter(room, node, 1, 1)
            await new.open_lease(node, 2, self.ttl_ms)
            await new.enter(room, node, 2, 6)
            await old.leave(room, node, 1)
            assert await places(new, room) == {RoomNode(node, 2, 6)}

    # ------------------------------------------------------------------------------------- P6: watching

    async def test_a_watcher_is_told_of_attach_replace_and_detach(self) -> None:
        async with self.both() as (presence, there):
            user, node = fresh("u"), fresh("n")
            await there.open_lease(node, 1, 10 * self.ttl_ms)
            watcher = presence.watch()
            await watcher.watch([user])
            await there.attach(user, "phone", "app", node, 1, "s1")
            await told(watcher, user=user)
            assert await sessions(presence, user) == {"s1"}
            newer, _ = await there.attach(user, "phone", "app", node, 1, "s2")
            await told(watcher, user=user)
            assert await sessions(presence, user) == {"s2"}
            await there.detach(user, "phone", newer.generation, self.wall_ms() + self.grace_ms)
            await told(watcher, user=user)
            assert await sessions(presence, user) == set()

    async def test_a_watcher_is_told_of_a_room_that_fills_and_empties(self) -> None:
        async with self.both() as (presence, there):
            room, node = fresh("r"), fresh("n")
            await there.open_lease(node, 1, 10 * self.ttl_ms)
            watcher = presence.watch()
            await watcher.watch(rooms=[room])
            await there.enter(room, node, 1, 1)
            await told(watcher, room=room)
            await there.enter(room, node, 1, 2)
            await told(watcher, room=room)
            assert await places(presence, room) == {RoomNode(node, 1, 2)}
            await there.leave(room, node, 1)
            await told(watcher, room=room)
            assert await places(presence, room) == set()

    async def test_a_watcher_is_told_when_a_lease_ends(self) -> None:
        async with self.both() as (presence, there):
            user, room, node = fresh("u"), fresh("r"), fresh("n")
            await there.open_lease(node, 1, self.ttl_ms)
            await there.attach(user, "phone", "app", node, 1, "s1")
            await there.enter(room, node, 1, 1)
            by_user, by_room = presence.watch(), presence.watch()
            await by_user.watch([user])
            await by_room.watch(rooms=[room])
            await self.advance(self.ttl_ms + 1)
            await presence.nodes()
            await told(by_user, user=user)
            await told(by_room, room=room)
            assert await locate(presence, user) == NOWHERE

    async def test_a_watcher_is_told_when_a_node_goes_in_good_order(self) -> None:
        async with self.both() as (presence, there):
            user, node = fresh("u"), fresh("n")
            await there.open_lease(node, 1, 10 * self.ttl_ms)
            await there.attach(user, "phone", "app", node, 1, "s1")
            watcher = presence.watch()
            await watcher.watch([user])
            await there.end_lease(node, 1)
            await told(watcher, user=user)
            assert await locate(presence, user) == NOWHERE

    async def test_every_watcher_is_told(self) -> None:
        async with self.both() as (presence, there):
            user, node = fresh("u"), fresh("n")
            await there.open_lease(node, 1, 10 * self.ttl_ms)
            watchers = [presence.watch(), presence.watch(), there.watch()]
            for watcher in watchers:
                await watcher.watch([user])
            await there.attach(user, "phone", "app", node, 1, "s1")
            for watcher in watchers:
                await told(watcher, user=user)

    async def test_a_watcher_is_told_only_of_what_it_watches(self) -> None:
        async with self.both() as (presence, there):
            mine, other, node = fresh("u"), fresh("u"), fresh("n")
            await there.open_lease(node, 1, 10 * self.ttl_ms)
            watcher, second = presence.watch(), presence.watch()
            await watcher.watch([mine])
            await second.watch([other])
            await there.attach(other, "phone", "app", node, 1, "s1")
            await told(second, user=other)
            assert await quiet(watcher)

    async def test_what_is_forgotten_is_not_told(self) -> None:
        async with self.both() as (presence, there):
            left, kept, node = fresh("u"), fresh("u"), fresh("n")
            await there.open_lease(node, 1, 10 * self.ttl_ms)
            watcher = presence.watch()
            await watcher.watch([left, kept])
            watcher.forget([left])
            await there.attach(left, "phone", "app", node, 1, "s1")
            await there.attach(kept, "phone", "app", node, 1, "s2")
            assert left not in (await told(watcher, user=kept)).users
            await watcher.watch([left])
            await there.attach(left, "phone", "app", node, 1, "s3")
            await told(watcher, user=left)

    async def test_a_late_reader_is_told_each_name_once(self) -> None:
        async with self.both() as (presence, there):
            users, last, node = [fresh("u"), fresh("u")], fresh("u"), fresh("n")
            await there.open_lease(node, 1, 10 * self.ttl_ms)
            late, prompt = presence.watch(), presence.watch()
            await late.watch([*users, last])
            await prompt.watch([last])
            for number in range(20):
                await there.attach(users[number % 2], "phone", "app", node, 1, f"s{number}")
            await there.attach(last, "phone", "app", node, 1, "s")
            await told(prompt, user=last)
            assert await late.changes() == Change(frozenset([*users, last]))
            assert await quiet(late)

    async def test_a_closed_watcher_says_so(self) -> None:
        async with self.opened() as presence:
            user, watcher = fresh("u"), presence.watch()
            await watcher.watch([user])
            waiting = asyncio.create_task(watcher.changes())
            await asyncio.sleep(0)
            watcher.close()
            with pytest.raises(PresenceUnavailable):
                await waiting
            with pytest.raises(PresenceUnavailable):
                await watcher.watch([user])

    async def test_closing_presence_closes_its_watchers(self) -> None:
        presence = self.presence()
        watcher = presence.watch()
        await watcher.watch([fresh("u")])
        await presence.close()
        with pytest.raises(PresenceUnavailable):
            await watcher.changes()
