"""Groups, devices, and the nodes' boots and fences.

A group lives with its conversation, a device in the shard of its user, a boot and a fence in the shard of
their node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from fastim.errors import PeerError
from fastim.model import MAX_GROUP_MEMBERS, Kind, Role
from fastim.store.base import Device, Leveled, Member, OpenBoot, shard_of
from fastim.store.postgres.databases import Database, gather
from fastim.store.postgres.minting import Clock, following, ms_of
from fastim.store.postgres.timeline import APPEND, MAKE_CONVS, lock
from fastim.store.rules import named_members

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

_EVENT = msgspec.msgpack.Encoder()
_KNOWN_USERS: Final = 262_144
"""Names of users who have a device, and of devices, that a process remembers; both are for ever."""

ALL_MEMBERS: Final = (
    "SELECT b.user_id, b.role, b.join_seq, b.leave_seq FROM member b WHERE b.shard = $1 AND b.conv = $2"
    " ORDER BY b.number"
)
ADD_MEMBERS: Final = (
    "INSERT INTO member (shard, conv, number, user_id, role, join_seq, leave_seq)"
    " SELECT $1, $2, w.number - 1, w.user_id, w.role, 1, 0"
    " FROM unnest($3::text[], $4::smallint[]) WITH ORDINALITY AS w(user_id, role, number)"
)

DEVICES: Final = (
    "SELECT d.device, d.class, d.first_seen_ms, d.last_seen_ms, d.level FROM device d"
    " WHERE d.shard = $1 AND d.user_id = $2 ORDER BY d.number"
)
SEE_DEVICE: Final = (
    "UPDATE device SET class = $4, last_seen_ms = greatest(last_seen_ms, $5)"
    " WHERE shard = $1 AND user_id = $2 AND device = $3"
    " RETURNING class, first_seen_ms, last_seen_ms, level"
)
ADD_DEVICES: Final = (
    "INSERT INTO device (shard, user_id, device, class, first_seen_ms, last_seen_ms)"
    " SELECT w.shard, w.user_id, w.device, $4, $5, $5"
    " FROM unnest($1::smallint[], $2::text[], $3::text[]) AS w(shard, user_id, device) ON CONFLICT DO NOTHING"
)
WHO_IS_KNOWN: Final = (
    "SELECT w.user_id FROM unnest($1::smallint[], $2::text[]) AS w(shard, user_id)"
    " WHERE EXISTS (SELECT FROM device d WHERE d.shard = w.shard AND d.user_id = w.user_id)"
)
START_CURSORS: Final = (
    "INSERT INTO cursor (shard, conv, user_id, device, seq)"
    " SELECT u.shard, u.conv, u.user_id, $2, max(c.seq) FROM user_conv u JOIN cursor c"
    " ON c.shard = u.shard AND c.conv = u.conv AND c.user_id = u.user_id"
    " WHERE u.user_id = $1 GROUP BY u.shard, u.conv, u.user_id ON CONFLICT DO NOTHING"
)
RAISE_LEVELS: Final = (
    "UPDATE device d SET level = greatest(d.level, w.level)"
    " FROM unnest($1::smallint[], $2::text[], $3::text[], $4::bigint[]) AS w(shard, user_id, device, level)"
    " WHERE d.shard = w.shard AND d.user_id = w.user_id AND d.device = w.device"
)
NEXT_BOOT: Final = (
    "INSERT INTO boot (shard, node, boot) VALUES ($1, $2, 1)"
    " ON CONFLICT (node, shard) DO UPDATE SET boot = boot.boot + 1 RETURNING boot"
)
FENCE: Final = (
    "INSERT INTO fence (shard, node, boot, holder, claim_until_ms) VALUES ($1, $2, $3, $4, $5)"
    " ON CONFLICT (node, boot, shard) DO UPDATE SET holder = excluded.holder,"
    " claim_until_ms = excluded.claim_until_ms"
    " WHERE fence.holder = excluded.holder OR fence.claim_until_ms <= $6 RETURNING boot"
)
OPEN_BOOT: Final = "INSERT INTO open_boot (shard, node, boot) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
OPEN_BOOTS: Final = (
    "SELECT o.node, o.boot, EXISTS (SELECT FROM fence f WHERE f.shard = o.shard AND f.node = o.node"
    " AND f.boot = o.boot) FROM open_boot o"
)
END_BOOT: Final = "DELETE FROM open_boot o WHERE o.shard = $1 AND o.node = $2 AND o.boot = $3"
FENCED: Final = "SELECT 1 FROM fence f WHERE f.shard = $1 AND f.node = $2 AND f.boot = $3"


class Groups:
    """Groups of one database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._db = database
        self._clock = clock

    async def members(self, conv: str) -> list[Member]:
        """All memberships ever, in join order."""
        named = named_members(conv)
        if named is not None:
            return [Member(user, Role.MEMBER, 1, 0) for user in named]
        return [Member(*row) for row in await self._db.fetch(ALL_MEMBERS, shard_of(conv), conv)]

    async def create(self, group: str, owner: str, members: Sequence[str], now_ms: int) -> int:
        conv = f"g:{group}"
        users = list(dict.fromkeys((owner, *members)))
        if len(users) > MAX_GROUP_MEMBERS:
            raise PeerError(
                "too_big", f"{conv} would have {len(users):,} members; limit {MAX_GROUP_MEMBERS:,}"
            )
        return await self._db.transact(lambda conn: self._create(conn, conv, owner, users, now_ms))

    async def _create(self, conn: Connection, conv: str, owner: str, users: list[str], now_ms: int) -> int:
        shard = shard_of(conv)
        ((_, last, turn),) = await lock(conn, self._db, [shard])
        known = [Member(*row) for row in await conn.fetch(ALL_MEMBERS, shard, conv)]
        if known:
            owners = {member.user for member in known if member.role == Role.OWNER}
            if owners == {owner} and {member.user for member in known} == set(users):
                return known[0].join_seq
            raise PeerError("conflict", f"{conv} exists with another owner or other members")
        roles = [int(Role.OWNER if user == owner else Role.MEMBER) for user in users]
        await conn.execute(ADD_MEMBERS, shard, conv, users, roles)
        count = len(users)
        await conn.execute(MAKE_CONVS, [shard], [conv], [shard] * count, [conv] * count, users)
        msg_id = following(max(last, self._clock.before(now_ms)), shard)
        body = _EVENT.encode({"event": "created", "by": owner, "members": users})
        event = (
            shard, msg_id, conv, 1, 0, owner, msg_id.to_bytes(16, "big"), int(Kind.MEMBER), 0, False,
            now_ms, 0, b"", None, body,
        )  # fmt: skip
        columns = [[value] for value in event]
        await conn.execute(APPEND, [shard], [msg_id], [ms_of(msg_id) - now_ms], turn + 1, *columns)
        self._clock.met(msg_id)
        return 1


class Devices:
    """Who has which devices."""

    def __init__(self, databases: Sequence[Database], homes: Sequence[Database]) -> None:
        self._databases = databases
        self._homes = homes
        """The database of each shard."""
        self._known: set[str] = set()
        self._registered: set[tuple[str, str]] = set()

    async def of(self, user: str) -> list[Device]:
        shard = shard_of(user)
        return [Device(user, *row) for row in await self._homes[shard].fetch(DEVICES, shard, user)]

    async def register(self, user: str, device: str, device_class: str, now_ms: int) -> Device:
        """A new device starts at the furthest cursors of the user's others.

        They are copied before the device exists: should one database fail, it is new again the next time.
        """
        shard = shard_of(user)
        home = self._homes[shard]
        seen = (shard, user, device, device_class, now_ms)
        row = await home.row(SEE_DEVICE, *seen)
        if row is None:
            if await self.of(user):
                await gather([database.fetch(START_CURSORS, user, device) for database in self._databases])
            await home.fetch(ADD_DEVICES, [shard], [user], [device], device_class, now_ms)
            row = await home.row(SEE_DEVICE, *seen)
        return Device(user, device, *row)

    async def unknown(self, users: Iterable[str]) -> frozenset[str]:
        """Who of them has never registered a device."""
        wanted = set(users) - self._known
        if not wanted:
            return frozenset()
        by_home: dict[Database, list[str]] = {}
        for user in wanted:
            by_home.setdefault(self._homes[shard_of(user)], []).append(user)
        answers = await gather(
            [home.fetch(WHO_IS_KNOWN, [*map(shard_of, names)], names) for home, names in by_home.items()]
        )
        found = {user for rows in answers for (user,) in rows}
        if len(self._known) + len(found) > _KNOWN_USERS:
            self._known.clear()
        self._known |= found
        return frozenset(wanted - found)

    async def ensure(self, owners: Iterable[tuple[str, str]], now_ms: int) -> None:
        """Register devices that acknowledge without ever having said hello."""
        wanted = set(owners) - self._registered
        if not wanted:
            return
        by_home: dict[Database, list[tuple[str, str]]] = {}
        for owner in sorted(wanted):
            by_home.setdefault(self._homes[shard_of(owner[0])], []).append(owner)
        calls = []
        for home, found in by_home.items():
            users, devices = [user for user, _ in found], [device for _, device in found]
            calls.append(home.fetch(ADD_DEVICES, [*map(shard_of, users)], users, devices, "", now_ms))
        await gather(calls)
        if len(self._registered) + len(wanted) > _KNOWN_USERS:
            self._registered.clear()
        self._registered |= wanted

    async def raise_levels(self, levels: Sequence[Leveled]) -> None:
        """Only forward; a device that is not registered stays so."""
        by_home: dict[Database, dict[tuple[str, str], int]] = {}
        for one in levels:
            found = by_home.setdefault(self._homes[shard_of(one.user)], {})
            key = (one.user, one.device)
            found[key] = max(found.get(key, 0), one.version)
        calls = []
        for home, found in by_home.items():
            keys = sorted(found)
            users, devices = [user for user, _ in keys], [device for _, device in keys]
            versions = [found[key] for key in keys]
            calls.append(home.fetch(RAISE_LEVELS, [*map(shard_of, users)], users, devices, versions))
        await gather(calls)


class Nodes:
    """Starts of nodes, and their ends."""

    def __init__(self, databases: Sequence[Database], homes: Sequence[Database]) -> None:
        self._databases = databases
        self._homes = homes

    async def next_boot(self, node: str) -> int:
        shard = shard_of(node)
        return int((await self._homes[shard].row(NEXT_BOOT, shard, node))[0])

    async def open_boot(self, node: str, boot: int) -> None:
        shard = shard_of(node)
        await self._homes[shard].fetch(OPEN_BOOT, shard, node, boot)

    async def open_boots(self) -> list[OpenBoot]:
        answers = await gather([database.fetch(OPEN_BOOTS) for database in self._databases])
        return sorted(
            (OpenBoot(*row) for rows in answers for row in rows), key=lambda one: (one.node, one.boot)
        )

    async def end_boot(self, node: str, boot: int) -> None:
        shard = shard_of(node)
        await self._homes[shard].fetch(END_BOOT, shard, node, boot)

    async def fence(self, node: str, boot: int, holder: str, now_ms: int, claim_ms: int) -> bool:
        """The row is for ever; its claim is its holder's until it ends."""
        shard = shard_of(node)
        taken = await self._homes[shard].row(FENCE, shard, node, boot, holder, now_ms + claim_ms, now_ms)
        return taken is not None

    async def fenced(self, node: str, boot: int) -> bool:
        shard = shard_of(node)
        return await self._homes[shard].row(FENCED, shard, node, boot) is not None
