"""Names as small integers: persons, devices, conversations; and what is remembered of a conversation.

Each connection has its own `Names`, so the two threads share nothing. The writer's also creates, and forgets
what it learned in a call that was rolled back. All caches are bounded.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

from fastim.model import Role
from fastim.store.base import Member
from fastim.store.rules import EPOCH, FOREVER, WHOLE, Span, named_members
from fastim.store.sqlite.files import Sql

K = TypeVar("K")
V = TypeVar("V")

CACHED_NAMES: Final = 32_768
CACHED_CONVS: Final = 32_768
"""A group counts as one more for every 16 members."""


class Cache(Generic[K, V]):
    """A bounded dict: what was not asked for while `capacity` others came in may be gone.

    Two generations instead of an ordered dict: a hit in the young one costs one look-up and no write.
    """

    __slots__ = ("_capacity", "_old", "_room", "young")

    def __init__(self, capacity: int) -> None:
        self._capacity = self._room = capacity
        self.young: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def get(self, key: K) -> V | None:
        found = self.young.get(key)
        if found is None:
            found = self._old.get(key)
            if found is not None:
                del self._old[key]
                self.put(key, found)
        return found

    def put(self, key: K, value: V, weight: int = 1) -> None:
        if self._room < weight and self.young:
            self._old = self.young
            self.young = {}
            self._room = self._capacity
        self._room -= weight
        self.young[key] = value

    def drop(self, key: K) -> None:
        self.young.pop(key, None)
        self._old.pop(key, None)

    def clear(self) -> None:
        self.young.clear()
        self._old.clear()

    def __len__(self) -> int:
        return len(self.young) + len(self._old)


class Conv:
    """A conversation as the writer knows it. seq and cseq are its head, seq -1 = not read yet.

    people: who may send now, name -> person id; for s: only the owner, though services send.
    """

    __slots__ = ("cseq", "epoch", "id", "known", "members", "name", "people", "seq", "type")

    def __init__(self, conv_id: int, name: str, epoch: int, people: dict[str, int]) -> None:
        self.id = conv_id
        self.name = name
        self.type = name[0]
        self.epoch = epoch
        self.people = people
        self.members = tuple(people)
        self.seq = -1
        self.cseq = 0
        self.known = self.type == "g"
        """Every member has a device; once true, for ever. Who is put into a group need not have one."""


class Names:
    """Integer ids of one connection."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self._persons: Cache[str, int] = Cache(CACHED_NAMES)
        self._person_names: Cache[int, str] = Cache(CACHED_NAMES)
        self._devices: Cache[tuple[int, str], int] = Cache(CACHED_NAMES)
        self.owners: Cache[tuple[str, str], tuple[int, int]] = Cache(CACHED_NAMES)
        """(user, device) -> their ids, for callers that cannot pay a method call"""
        self.conv_ids: Cache[str, int] = Cache(CACHED_NAMES)
        self.convs: Cache[str, Conv] = Cache(CACHED_CONVS)
        self._conv_names: Cache[int, str] = Cache(CACHED_NAMES)
        self._named: Cache[int, tuple[int, ...]] = Cache(CACHED_NAMES)
        """conv -> the members of p: and s:; (0,) for every other type"""
        self._fresh = 0

    # ----------------------------------------------------------------------------------------- looking up

    def person(self, name: str) -> int:
        """Its id, 0 for a name that was never stored."""
        found = self._persons.get(name)
        if found is None:
            found = self._sql.value("SELECT id FROM person WHERE name = ?", (name,))
            if found is None:
                return 0
            self._persons.put(name, found)
        return found

    def person_name(self, person: int) -> str:
        found = self._person_names.get(person)
        if found is None:
            found = str(self._sql.value("SELECT name FROM person WHERE id = ?", (person,)))
            self._person_names.put(person, found)
        return found

    def device(self, person: int, name: str) -> int:
        """Its id, 0 if it was never registered."""
        found = self._devices.get((person, name))
        if found is None:
            found = self._sql.value("SELECT id FROM device WHERE person = ? AND name = ?", (person, name))
            if found is None:
                return 0
            self._devices.put((person, name), found)
        return found

    def device_name(self, device: int) -> str:
        if device == 0:
            return ""
        return str(self._sql.value("SELECT name FROM device WHERE id = ?", (device,)))

    def conv_id(self, name: str) -> int:
        """Its id, 0 for one that holds nothing."""
        found = self.conv_ids.get(name)
        if found is None:
            found = int(self._sql.value("SELECT id FROM conv WHERE name = ?", (name,)) or 0)
            if found:
                self.conv_ids.put(name, found)
        return found

    def conv_name(self, conv: int) -> str:
        found = self._conv_names.get(conv)
        if found is None:
            found = str(self._sql.value("SELECT name FROM conv WHERE id = ?", (conv,)))
            self._conv_names.put(conv, found)
        return found

    def named(self, conv: int) -> tuple[int, ...] | None:
        """The members of p: and s:, None for every other type."""
        found = self._named.get(conv)
        if found is None:
            named = named_members(self.conv_name(conv))
            found = (0,) if named is None else tuple(self.person(user) for user in named)
            self._named.put(conv, found)
        return None if found == (0,) else found

    def epoch(self, conv: int) -> int:
        return int(self._sql.value("SELECT epoch FROM conv WHERE id = ?", (conv,)) or EPOCH)

    def spans(self, user: str, conv: str) -> tuple[Span, ...]:
        """What the user may see of a conversation; () for a stranger. Read afresh each time (Store.S8)."""
        named = named_members(conv)
        if named is not None:
            return WHOLE if user in named else ()
        rows = self._sql.rows(
            "SELECT join_seq, leave_seq FROM member JOIN conv ON conv.id = member.conv"
            " WHERE conv.name = ? AND person = (SELECT id FROM person WHERE name = ?) ORDER BY join_seq",
            (conv, user),
        )
        return tuple(Span(join, leave - 1 if leave else FOREVER) for join, leave in rows)

    def members(self, conv: str) -> list[Member]:
        """All memberships ever, in join order."""
        named = named_members(conv)
        if named is not None:
            return [Member(user, Role.MEMBER, 1, 0) for user in named]
        rows = self._sql.rows(
            "SELECT person.name, role, join_seq, leave_seq FROM member JOIN conv ON conv.id = member.conv"
            " JOIN person ON person.id = member.person WHERE conv.name = ? ORDER BY number",
            (conv,),
        )
        return [Member(*row) for row in rows]

    # ------------------------------------------------------------------------------------ writer: creating

    def make_person(self, name: str) -> int:
        found = self.person(name)
        if not found:
            found = int(self._sql.value("INSERT INTO person (name) VALUES (?) RETURNING id", (name,)))
            self._persons.put(name, found)
            self._fresh += 1
        return found

    def make_device(self, person: int, name: str, device_class: str, now_ms: int) -> int:
        """Register the device if it is new."""
        found = self.device(person, name)
        if not found:
            found = int(
                self._sql.value(
                    "INSERT INTO device (person, name, class, first_seen_ms, last_seen_ms)"
                    " VALUES (?, ?, ?, ?, ?) RETURNING id",
                    (person, name, device_class, now_ms, now_ms),
                )
            )
            self._devices.put((person, name), found)
            self._fresh += 1
        return found

    def owner(self, user: str, device: str, now_ms: int) -> tuple[int, int]:
        """The ids of a device and its user, registered if need be."""
        found = self.owners.get((user, device))
        if found is None:
            person = self.make_person(user)
            found = (person, self.make_device(person, device, "", now_ms))
            self.owners.put((user, device), found)
        return found

    def conv(self, name: str) -> Conv | None:
        """The conversation as the writer uses it, None if it holds nothing."""
        found = self.convs.get(name)
        if found is not None:
            return found
        row = self._sql.row("SELECT id, epoch FROM conv WHERE name = ?", (name,))
        if row is None:
            return None
        named = named_members(name)
        if named is not None:
            people = {user: self.make_person(user) for user in named}
        else:
            people = dict(
                self._sql.rows(
                    "SELECT person.name, person.id FROM member JOIN person ON person.id = member.person"
                    " WHERE conv = ? AND leave_seq = 0 ORDER BY number",
                    (row[0],),
                )
            )
        found = Conv(row[0], name, row[1], people)
        self.convs.put(name, found, 1 + len(people) // 16)
        return found

    def open_conv(self, name: str) -> Conv:
        """The same for p: and s:, created if need be."""
        found = self.conv(name)
        if found is None:
            self.make_conv(name)
            found = self.conv(name)
            assert found is not None
        return found

    def make_conv(self, name: str) -> int:
        self._fresh += 1
        return int(
            self._sql.value("INSERT INTO conv (name, epoch) VALUES (?, ?) RETURNING id", (name, EPOCH))
        )

    # -------------------------------------------------------------------------------- writer: transactions

    @property
    def fresh(self) -> int:
        """How many names were created since the last commit."""
        return self._fresh

    def kept(self) -> None:
        """What was created is committed."""
        self._fresh = 0

    def undo(self, fresh: int) -> None:
        """A call was rolled back that began at `fresh`. Ids that it created may be given to others."""
        if self._fresh > fresh:
            self.forget()
            self._fresh = fresh

    def forget(self) -> None:
        for cache in (
            self._persons, self._person_names, self._devices, self.owners,
            self.convs, self.conv_ids, self._conv_names, self._named,
        ):  # fmt: skip
            cache.clear()
