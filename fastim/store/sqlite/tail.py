"""The change index: which conversations of a user changed, in version order.

A conversation's version is the msg_id of its newest message, or the id that a read mark minted. Rows of
user_conv are not written with each message: a commit only notes the conversation here, in memory, and the
projector writes the rows of many commits at once, a slice per transaction. The tail is what is not projected
yet; every read of the index reads both. A durable mark says from where on the timeline must be scanned to
have the tail again after a start, so a crash loses no row.

    commit ─▶ Tail (conv: head, newest id, own counts) ─▶ Projector: user_conv, slice by slice ─▶ mark

C1  a reader takes the tail first and its SQL snapshot second: what moves from one to the other in between is
    seen twice, never not at all; and no page claims a version that was committed after the tail was taken
C2  a projected row counts exactly the messages up to its `head`: a round that was cut off is taken up again
    row by row
    tests/contract/store.py (S8), tests/property/test_store_oracle.py, tests/contract/test_store_sqlite.py
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable
from typing import Final

import apsw

from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.names import Conv, Names
from fastim.store.sqlite.unread import count_own, refresh_base

PROJECT_MESSAGES: Final = 50_000
"""A round begins when so many messages are not projected: what a start has to scan."""
PROJECT_ROWS: Final = 65_536
"""Or so many rows would be written: the memory of the tail."""
SLICE_ROWS: Final = 512
"""Rows of user_conv that one transaction takes along, a few ms."""


class Dirty:
    """A conversation that changed since it was last projected: up to seq `start`."""

    __slots__ = ("conv", "cseq", "group", "head", "own", "people", "start", "version")

    def __init__(self, conv: int, group: bool, people: Iterable[int], start: int) -> None:
        self.conv = conv
        self.group = group
        self.people = tuple(people)
        self.start = start
        self.head = start
        self.cseq = 0
        self.version = 0
        self.own: dict[int, int] = {}
        """person -> own countable messages among the new ones"""


class Changed:
    """One conversation of one user in the tail."""

    __slots__ = ("conv", "head", "version")

    def __init__(self, conv: int, version: int, head: int) -> None:
        self.conv = conv
        self.version = version
        self.head = head


class Tail:
    """Shared by the writer's thread, which fills it after each commit, and the reader's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[tuple[Conv, int, int, int, int, int, int]] = []
        self.dirty: dict[int, Dirty] = {}
        self.messages = 0
        self.rows = 0
        """Rows of user_conv that wait."""
        self._by_person: dict[int, set[int]] = {}
        self._groups: set[int] = set()
        self.clock = 0
        """The newest id that is committed."""

    # -------------------------------------------------------------------------------------- the writer's

    @property
    def pending(self) -> int:
        return len(self._pending)

    def add(self, conv: Conv, before: int, sender: int, version: int, own: int) -> None:
        """One frame was stored above seq `before`; own: how many of its messages count as unread."""
        self._pending.append((conv, before, sender, version, own, conv.seq, conv.cseq))

    def undo(self, pending: int) -> None:
        del self._pending[pending:]

    def committed(self, clock: int, projected: Iterable[Dirty]) -> None:
        """The transaction is durable: drop what it projected, then add what it appended."""
        with self._lock:
            for done in projected:
                self._drop(done)
            dirty = self.dirty
            for conv, before, sender, version, own, seq, cseq in self._pending:
                entry = dirty.get(conv.id)
                if entry is None:
                    entry = self._enter(Dirty(conv.id, conv.type == "g", conv.people.values(), before))
                self.messages += seq - entry.head
                entry.head = seq
                entry.cseq = cseq
                entry.version = version
                if own:
                    counts = entry.own
                    counts[sender] = counts.get(sender, 0) + own
            self.clock = clock
        self._pending.clear()

    def _enter(self, entry: Dirty) -> Dirty:
        self.dirty[entry.conv] = entry
        self.rows += len(entry.people)
        if entry.group:
            self._groups.add(entry.conv)
        else:
            for person in entry.people:
                self._by_person.setdefault(person, set()).add(entry.conv)
        return entry

    def _drop(self, entry: Dirty) -> None:
        del self.dirty[entry.conv]
        self.rows -= len(entry.people)
        if entry.group:
            self._groups.discard(entry.conv)
            return
        for person in entry.people:
            convs = self._by_person[person]
            convs.discard(entry.conv)
            if not convs:
                del self._by_person[person]

    def load(self, sql: Sql, names: Names, mark: int, clock: int) -> None:
        """Scan the timeline above the mark. O(messages above it), bodies untouched."""
        rows = sql.rows(
            "SELECT conv, sender, min(seq), max(seq), max(cseq), max(msg_id), sum(countable), count(*)"
            " FROM message WHERE msg_id > ? GROUP BY conv, sender",
            (mark,),
        )
        for conv, sender, first, head, cseq, version, own, count in rows:
            entry = self.dirty.get(conv)
            if entry is None:
                name = names.conv_name(conv)
                people = [names.person(member.user) for member in names.members(name)]
                entry = self._enter(Dirty(conv, name[0] == "g", people, first - 1))
            entry.start = min(entry.start, first - 1)
            entry.head = max(entry.head, head)
            entry.cseq = max(entry.cseq, cseq)
            entry.version = max(entry.version, version)
            if own:
                entry.own[sender] = own
            self.messages += count
        self.clock = clock

    # ---------------------------------------------------------------------------------------- the readers'

    def of(self, person: int, sql: Sql) -> tuple[list[Changed], int]:
        """The user's conversations in the tail, and the clock. Before the read's SQL snapshot (C1)."""
        groups = self._groups_of(person, sql) if self._groups else ()
        with self._lock:
            convs = [*self._by_person.get(person, ()), *self._groups.intersection(groups)]
            found = [Changed(conv, self.dirty[conv].version, self.dirty[conv].head) for conv in convs]
            return found, self.clock

    def inside(self, person: int, sql: Sql) -> set[int]:
        """The same for the writer within a transaction: what it has appended itself counts too."""
        groups = self._groups_of(person, sql) if self._groups or self._pending else ()
        convs = self._by_person.get(person, set()) | self._groups.intersection(groups)
        return convs | {conv.id for conv, *_ in self._pending if person in conv.people.values()}

    def _groups_of(self, person: int, sql: Sql) -> set[int]:
        return {conv for (conv,) in sql.rows("SELECT conv FROM member WHERE person = ?", (person,))}


class Projector:
    """Moves the tail into user_conv. The writer's."""

    def __init__(self, sql: Sql, tail: Tail) -> None:
        self._sql = sql
        self._tail = tail
        self._queue: list[int] = []
        self._round_clock = 0
        self._round_messages = 0

    def wanted(self) -> bool:
        """Whether the next transaction should take a slice along."""
        tail = self._tail
        return bool(self._queue) or tail.messages >= PROJECT_MESSAGES or tail.rows >= PROJECT_ROWS

    def slice(self) -> list[Dirty]:
        """Write the rows of some conversations. Nothing is forgotten before done()."""
        tail = self._tail
        if not self._queue:
            self._queue = list(tail.dirty)
            self._queue.reverse()
            self._round_clock, self._round_messages = tail.clock, tail.messages
        taken: list[Dirty] = []
        rows = 0
        for conv in reversed(self._queue):
            if rows >= SLICE_ROWS:
                break
            entry = tail.dirty[conv]
            taken.append(entry)
            rows += len(entry.people)
        if rows:
            self._project(taken)
        if len(taken) == len(self._queue):
            self._sql.run("UPDATE meta SET value = ? WHERE name = 'projected'", (self._round_clock,))
        return taken

    def done(self, taken: list[Dirty]) -> None:
        """The slice is committed."""
        if taken:
            del self._queue[-len(taken) :]
            if not self._queue:
                self._tail.messages -= self._round_messages

    def _project(self, taken: list[Dirty]) -> None:
        sql = self._sql
        pairs = array("q", [person << 32 | entry.conv for entry in taken for person in entry.people])
        found = apsw.carray(pairs)
        heads = dict(
            sql.rows("SELECT pair, head FROM carray(?) CROSS JOIN user_conv ON pair = value", (found,))
        )
        rows = []
        for entry in taken:
            for person in entry.people:
                pair = person << 32 | entry.conv
                head = heads.get(pair, 0)
                if head == entry.start:
                    own = entry.own.get(person, 0)
                else:
                    own = count_own(sql, entry.conv, person, head, entry.head)
                rows.append((pair, person, entry.version, entry.head, entry.cseq, own))
        sql.many(
            "INSERT INTO user_conv VALUES (?, ?, ?, ?, ?, ?, 0, 0, 0, 0) ON CONFLICT (pair) DO UPDATE SET"
            " version = max(version, excluded.version), head = excluded.head, cseq = excluded.cseq,"
            " own = own + excluded.own",
            rows,
        )
        lagging = sql.rows(
            "SELECT pair FROM carray(?) CROSS JOIN user_conv ON pair = value WHERE read_seq > base_seq",
            (found,),
        )
        for (pair,) in lagging:
            refresh_base(sql, pair)
