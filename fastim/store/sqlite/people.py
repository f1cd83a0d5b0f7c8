"""Groups, devices, and the nodes' boots and fences."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fastim.errors import PeerError
from fastim.model import MAX_GROUP_MEMBERS, Kind, Role
from fastim.store.base import Device, OpenBoot
from fastim.store.sqlite.fates import LOW
from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.minting import Minter
from fastim.store.sqlite.names import Names
from fastim.store.sqlite.tail import Tail

_EVENT = msgspec.msgpack.Encoder()


class Groups:
    """The writer's."""

    def __init__(self, sql: Sql, names: Names, minter: Minter, tail: Tail) -> None:
        self._sql = sql
        self._names = names
        self._minter = minter
        self._tail = tail

    def create(self, group: str, owner: str, members: Sequence[str], now_ms: int) -> int:
        name = f"g:{group}"
        users = list(dict.fromkeys((owner, *members)))
        if len(users) > MAX_GROUP_MEMBERS:
            raise PeerError(
                "too_big", f"{name} would have {len(users):,} members; limit {MAX_GROUP_MEMBERS:,}"
            )
        known = self._names.members(name)
        if known:
            owners = {member.user for member in known if member.role == Role.OWNER}
            if owners == {owner} and {member.user for member in known} == set(users):
                return known[0].join_seq
            raise PeerError("conflict", f"{name} exists with another owner or other members")
        conv_id = self._names.make_conv(name)
        self._sql.many(
            "INSERT INTO member VALUES (?, ?, ?, ?, 1, 0)",
            [
                (conv_id, number, self._names.make_person(user), Role.OWNER if user == owner else Role.MEMBER)
                for number, user in enumerate(users)
            ],
        )
        conv = self._names.conv(name)
        assert conv is not None
        msg_id = self._minter.mint(now_ms)
        body = _EVENT.encode({"event": "created", "by": owner, "members": users})
        self._sql.run(
            "INSERT INTO message VALUES (?, ?, 1, 0, ?, ?, ?, 0, 0, 0, ?, 0, X'', NULL, ?)",
            (msg_id, conv_id, conv.people[owner], msg_id.to_bytes(16, "big"), Kind.MEMBER, now_ms, body),
        )
        self._minter.note_ahead(self._sql, now_ms)
        conv.seq, conv.cseq = 1, 0
        self._tail.add(conv, 0, conv.people[owner], msg_id, 0)
        return 1


class Devices:
    """Who has which devices."""

    def __init__(self, sql: Sql, names: Names, tail: Tail) -> None:
        self._sql = sql
        self._names = names
        self._tail = tail

    def of(self, user: str) -> list[Device]:
        rows = self._sql.rows(
            "SELECT name, class, first_seen_ms, last_seen_ms, level FROM device"
            " WHERE person = (SELECT id FROM person WHERE name = ?) ORDER BY id",
            (user,),
        )
        return [Device(user, *row) for row in rows]

    def register(self, user: str, device: str, device_class: str, now_ms: int) -> Device:
        """The writer's. A new device starts at the furthest cursors of the user's others."""
        sql, names = self._sql, self._names
        person = names.make_person(user)
        if names.device(person, device):
            sql.run(
                "UPDATE device SET class = ?, last_seen_ms = max(last_seen_ms, ?)"
                " WHERE person = ? AND name = ?",
                (device_class, now_ms, person, device),
            )
        else:
            new = names.make_device(person, device, device_class, now_ms)
            sql.many(
                "INSERT INTO cursor SELECT ?1 << 32 | ?2, max(seq) FROM device JOIN cursor"
                " ON spot = ?1 << 32 | id WHERE person = ?3 AND id <> ?2 HAVING max(seq) > 0",
                [(conv, new, person) for conv in self._convs(person)],
            )
        row = sql.row(
            "SELECT class, first_seen_ms, last_seen_ms, level FROM device WHERE person = ? AND name = ?",
            (person, device),
        )
        return Device(user, device, *row)

    def _convs(self, person: int) -> set[int]:
        rows = self._sql.rows("SELECT pair & ? FROM user_conv WHERE person = ?", (LOW, person))
        return self._tail.inside(person, self._sql).union(conv for (conv,) in rows)


class Nodes:
    """Starts of nodes, and their ends."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql

    def next_boot(self, node: str) -> int:
        """The writer's."""
        return int(
            self._sql.value(
                "INSERT INTO boot VALUES (?, 1) ON CONFLICT (node) DO UPDATE SET boot = boot + 1"
                " RETURNING boot",
                (node,),
            )
        )

    def open_boot(self, node: str, boot: int) -> None:
        """The writer's."""
        self._sql.run("INSERT INTO open_boot VALUES (?, ?) ON CONFLICT DO NOTHING", (node, boot))

    def open_boots(self) -> list[OpenBoot]:
        rows = self._sql.rows(
            "SELECT o.node, o.boot, f.boot IS NOT NULL FROM open_boot o"
            " LEFT JOIN fence f ON f.node = o.node AND f.boot = o.boot ORDER BY o.node, o.boot"
        )
        return [OpenBoot(node, boot, bool(fenced)) for node, boot, fenced in rows]

    def end_boot(self, node: str, boot: int) -> None:
        """The writer's."""
        self._sql.run("DELETE FROM open_boot WHERE node = ? AND boot = ?", (node, boot))

    def fence(self, node: str, boot: int, holder: str, now_ms: int, claim_ms: int) -> bool:
        """The writer's. The row is for ever; its claim is its holder's until it ends."""
        taken = self._sql.row(
            "INSERT INTO fence VALUES (?, ?, ?, ?) ON CONFLICT (node, boot) DO UPDATE SET"
            " holder = excluded.holder, claim_until_ms = excluded.claim_until_ms"
            " WHERE holder = excluded.holder OR claim_until_ms <= ? RETURNING boot",
            (node, boot, holder, now_ms + claim_ms, now_ms),
        )
        return taken is not None

    def fenced(self, node: str, boot: int) -> bool:
        return self._sql.row("SELECT 1 FROM fence WHERE node = ? AND boot = ?", (node, boot)) is not None
