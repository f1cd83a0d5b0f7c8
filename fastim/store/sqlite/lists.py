"""A user's conversations: what changed, what he is behind in, what he has not read.

Rows of user_conv and the tail (tail.py), joined; where both know a conversation, the timeline decides.
"""

from __future__ import annotations

from typing import Final

from fastim.model import Flag
from fastim.store.base import Behind, BehindPage, ConvPage, ConvState
from fastim.store.rules import EPOCH, forbidden
from fastim.store.sqlite.fates import LOW, spans_of
from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.names import Names
from fastim.store.sqlite.rows import Rows
from fastim.store.sqlite.tail import Changed, Tail
from fastim.store.sqlite.unread import Row, count_unread, head_of, row_of, unread_of

_MENTION_ALL: Final = int(Flag.MENTION_ALL)
_MOST_MENTIONS: Final = 100


class Lists:
    """Reads of the change index on one connection."""

    def __init__(self, sql: Sql, names: Names, tail: Tail) -> None:
        self._sql = sql
        self._names = names
        self._tail = tail
        self._rows = Rows(sql, names)

    # ---------------------------------------------------------------------------------------- what changed

    def tail_of(self, user: str) -> tuple[list[Changed], int]:
        """To be called before the SQL snapshot of the same read is taken."""
        person = self._names.person(user)
        return self._tail.of(person, self._sql) if person else ([], self._tail.clock)

    def version(self, user: str, tail: tuple[list[Changed], int]) -> int:
        changed, clock = tail
        person = self._names.person(user)
        newest = self._sql.value("SELECT max(version) FROM user_conv WHERE person = ?", (person,)) or 0
        return min(max([newest, *(entry.version for entry in changed)]), clock)

    def behind(
        self, user: str, device: str, since: int, limit: int, tail: tuple[list[Changed], int]
    ) -> BehindPage:
        sql, names = self._sql, self._names
        person = names.person(user)
        device_id = names.device(person, device)
        changed, clock = tail
        found: list[tuple[int, int, int, int]] = []
        """(version, conv, head, cursor)"""
        for entry in changed:
            cursor = self._cursor(device_id, entry.conv)
            version = max(entry.version, row_of(sql, person << 32 | entry.conv).version)
            if version > since and entry.head > cursor:
                found.append((version, entry.conv, entry.head, cursor))
        in_tail = {entry.conv for entry in changed}
        rows = sql.rows(
            "SELECT version, u.pair & 0xFFFFFFFF, head, coalesce(c.seq, 0) FROM user_conv u"
            " LEFT JOIN cursor c ON c.spot = (u.pair & 0xFFFFFFFF) << 32 | ?"
            " WHERE person = ? AND version > ? AND head > coalesce(c.seq, 0) ORDER BY version LIMIT ?",
            (device_id, person, since, limit + 1 + len(in_tail)),
        )
        found += [row for row in rows if row[1] not in in_tail]
        found.sort()
        more = len(found) > limit
        found = found[:limit]
        items = tuple(
            Behind(names.conv_name(conv), cursor, head, names.epoch(conv)) for _, conv, head, cursor in found
        )
        return BehindPage(items, min(found[-1][0], clock) if more else self.version(user, tail), more)

    def conversations(
        self, user: str, device: str, since: int, limit: int, now_ms: int, tail: tuple[list[Changed], int]
    ) -> ConvPage:
        sql, names = self._sql, self._names
        person = names.person(user)
        device_id = names.device(person, device)
        changed, clock = tail
        found = [
            (version, entry.conv)
            for entry in changed
            if (version := max(entry.version, row_of(sql, person << 32 | entry.conv).version)) > since
        ]
        in_tail = {entry.conv for entry in changed}
        rows = sql.rows(
            "SELECT version, pair & 0xFFFFFFFF FROM user_conv WHERE person = ? AND version > ?"
            " ORDER BY version LIMIT ?",
            (person, since, limit + 1 + len(in_tail)),
        )
        found += [row for row in rows if row[1] not in in_tail]
        found.sort()
        more = len(found) > limit
        found = found[:limit]
        items = tuple(self._state(user, person, device_id, conv, version, now_ms) for version, conv in found)
        return ConvPage(items, min(found[-1][0], clock) if more else self.version(user, tail), more)

    def position(self, user: str, device: str, conv: str) -> Behind:
        names = self._names
        if not names.spans(user, conv):
            raise forbidden(user, conv)
        conv_id = names.conv_id(conv)
        if not conv_id:
            return Behind(conv, 0, 0, EPOCH)
        device_id = names.device(names.person(user), device)
        return Behind(conv, self._cursor(device_id, conv_id), self._rows.head(conv_id), names.epoch(conv_id))

    def _cursor(self, device: int, conv: int) -> int:
        return int(self._sql.value("SELECT seq FROM cursor WHERE spot = ?", (conv << 32 | device,)) or 0)

    def _state(self, user: str, person: int, device: int, conv: int, version: int, now_ms: int) -> ConvState:
        sql, names = self._sql, self._names
        row = row_of(sql, person << 32 | conv)
        head = head_of(sql, conv)
        spans = spans_of(sql, names, person, conv)
        unread = unread_of(sql, conv, person, row, head, spans)
        return ConvState(
            names.conv_name(conv), version, head[0], names.epoch(conv), row.read_seq, unread,
            self._mention(user, person, conv, row.read_seq, now_ms), self._cursor(device, conv),
            self._rows.newest(conv, spans, now_ms),
        )  # fmt: skip

    def _mention(self, user: str, person: int, conv: int, mark: int, now_ms: int) -> int:
        """The newest seq above the read mark, among the newest 100 mentions, that names the user or all."""
        for seq, flags, mentions in self._sql.rows(
            "SELECT seq, flags, mentions FROM message WHERE conv = ? AND seq > ? AND mentions IS NOT NULL"
            " AND sender <> ? AND NOT recalled AND (loss_time_ms = 0 OR loss_time_ms >= ?)"
            " ORDER BY seq DESC LIMIT ?",
            (conv, mark, person, now_ms, _MOST_MENTIONS),
        ):
            if flags & _MENTION_ALL or user in mentions.split("\n"):
                return int(seq)
        return 0

    # ---------------------------------------------------------------------------------------------- unread

    def unread(
        self, user: str, conv: str | None, tail: tuple[list[Changed], int]
    ) -> tuple[int, list[tuple[str, int]]]:
        person = self._names.person(user)
        counts = self._unread(person, {entry.conv for entry in tail[0]})
        found = sorted((self._names.conv_name(conv_id), count) for conv_id, count in counts if count > 0)
        if conv is not None:
            found = [item for item in found if item[0] == conv]
        return sum(count for _, count in counts), found

    def badge(self, person: int) -> int:
        """For the writer, inside its transaction."""
        return sum(count for _, count in self._unread(person, self._tail.inside(person, self._sql)))

    def _unread(self, person: int, in_tail: set[int]) -> list[tuple[int, int]]:
        """(conv, unread) of every conversation of the user. Those not in the tail cost no look-up each."""
        sql, names = self._sql, self._names
        found = []
        for pair, *rest in sql.rows(
            "SELECT pair, version, head, cseq, own, read_seq, base_seq, base_cseq, base_own"
            " FROM user_conv WHERE person = ? AND pair BETWEEN ? AND ?",
            (person, person << 32, person << 32 | LOW),
        ):
            conv = pair & LOW
            if conv in in_tail:
                continue
            row = Row(*rest)
            spans = spans_of(sql, names, person, conv)
            found.append((conv, unread_of(sql, conv, person, row, (row.head, row.cseq), spans)))
        for conv in sorted(in_tail):
            row = row_of(sql, person << 32 | conv)
            spans = spans_of(sql, names, person, conv)
            found.append((conv, unread_of(sql, conv, person, row, head_of(sql, conv), spans)))
        return found

    def recount(self, user: str, tail: tuple[list[Changed], int]) -> list[tuple[str, int, int]]:
        sql, names = self._sql, self._names
        person = names.person(user)
        wrong = []
        for conv, stored in self._unread(person, {entry.conv for entry in tail[0]}):
            mark = row_of(sql, person << 32 | conv).read_seq
            counted = count_unread(sql, conv, person, mark, spans_of(sql, names, person, conv))
            if stored != counted:
                wrong.append((names.conv_name(conv), stored, counted))
        return sorted(wrong)
