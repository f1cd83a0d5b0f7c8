"""A user's conversations: what changed, what he is behind in, what he has not read.

They lie where the conversations do, so every question goes to all databases at once, after each has brought
its change index up to date (projection.py), and the answers are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fastim.model import Flag
from fastim.store.base import Behind, BehindPage, ConvPage, ConvState
from fastim.store.postgres.databases import Database, Row, gather
from fastim.store.postgres.order import Order
from fastim.store.postgres.projection import Projector, level
from fastim.store.postgres.rows import COLUMNS, message
from fastim.store.postgres.unread import COUNTED, PROJECTED

_MENTION_ALL: Final = int(Flag.MENTION_ALL)
_MOST_MENTIONS: Final = 100
_MOST_RECENT: Final = 100

_STANDS: Final = (
    "SELECT h.newest, h.upto, r.* FROM (SELECT"
    " (SELECT max(u.version) FROM user_conv u WHERE u.user_id = $1) AS newest,"
    " (SELECT min(p.upto) FROM projection p) AS upto) h"
)
_CURSOR: Final = (
    "coalesce((SELECT c.seq FROM cursor c WHERE c.shard = u.shard AND c.conv = u.conv"
    " AND c.user_id = u.user_id AND c.device = $2), 0)"
)
_EPOCH: Final = "(SELECT k.epoch FROM conv k WHERE k.shard = u.shard AND k.conv = u.conv)"
_MENTION: Final = (
    "coalesce((SELECT m.seq FROM (SELECT m.seq, m.flags, m.mentions FROM message m WHERE m.shard = u.shard"
    " AND m.conv = u.conv AND m.seq > u.read_seq AND m.mentions IS NOT NULL AND m.sender <> u.user_id"
    " AND NOT m.recalled AND (m.loss_time_ms = 0 OR m.loss_time_ms >= $5)"
    f" ORDER BY m.seq DESC LIMIT {_MOST_MENTIONS}) m"
    f" WHERE m.flags & {_MENTION_ALL} <> 0 OR u.user_id = ANY(string_to_array(m.mentions, E'\\n'))"
    " ORDER BY m.seq DESC LIMIT 1), 0)"
)
"""The newest seq above the read mark, among the newest 100 mentions, that names the user or all."""
_LAST: Final = (
    f"SELECT {COLUMNS} FROM (SELECT * FROM message m WHERE m.shard = u.shard AND m.conv = u.conv"
    f" ORDER BY m.seq DESC LIMIT {_MOST_RECENT}) m WHERE m.kind < 32 AND NOT m.recalled"
    " AND (m.loss_time_ms = 0 OR m.loss_time_ms >= $5)"
    " AND (left(u.conv, 1) <> 'g' OR EXISTS (SELECT FROM member b WHERE b.shard = u.shard"
    " AND b.conv = u.conv AND b.user_id = u.user_id AND b.join_seq <= m.seq"
    " AND (b.leave_seq = 0 OR m.seq < b.leave_seq))) ORDER BY m.seq DESC LIMIT 1"
)
"""The newest of the last 100 that is no control event and visible."""

VERSION: Final = _STANDS.replace(", r.*", "")
BEHIND: Final = (
    f"{_STANDS} LEFT JOIN LATERAL (SELECT u.* FROM (SELECT u.version, u.conv, u.head, {_CURSOR} AS cursor,"
    f" {_EPOCH} AS epoch FROM user_conv u WHERE u.user_id = $1 AND u.version > $3) u WHERE u.head > u.cursor"
    " ORDER BY u.version LIMIT $4) r ON TRUE ORDER BY r.version"
)
CONVERSATIONS: Final = (
    f"{_STANDS} LEFT JOIN LATERAL (SELECT u.version, u.conv, u.head, {_EPOCH} AS epoch, u.read_seq,"
    f" {PROJECTED} AS unread, {_MENTION} AS mention, {_CURSOR} AS cursor, t.* FROM (SELECT u.*"
    " FROM user_conv u WHERE u.user_id = $1 AND u.version > $3 ORDER BY u.version LIMIT $4) u"
    f" LEFT JOIN LATERAL ({_LAST}) t ON TRUE) r ON TRUE ORDER BY r.version"
)
UNREAD: Final = (
    f"SELECT u.conv, {PROJECTED} FROM user_conv u WHERE u.user_id = $1"
    " AND u.cseq - u.read_cseq - u.own + u.read_own > 0"
)
BADGES: Final = (
    f"SELECT u.user_id, sum({PROJECTED})::bigint FROM user_conv u WHERE u.user_id = ANY($1::text[])"
    " AND u.cseq - u.read_cseq - u.own + u.read_own > 0 GROUP BY u.user_id"
)
RECOUNT: Final = f"SELECT u.conv, {PROJECTED}, {COUNTED} FROM user_conv u WHERE u.user_id = $1"


class Lists:
    """Reads of the change index of all databases."""

    def __init__(
        self, databases: Sequence[Database], projectors: dict[Database, Projector], order: Order
    ) -> None:
        self._databases = databases
        self._projectors = projectors
        self._order = order

    async def _level(self, databases: Sequence[Database]) -> None:
        await level([self._projectors[database] for database in databases])

    async def _read(self, sql: str, *args: object) -> tuple[list[Row], int]:
        """Rows of all databases by version, and the version up to which they are complete (C2).

        A row: (newest version of the user, lowest mark, version, ...).
        """
        answers: dict[Database, list[Row]] = {}
        wanted = list(self._databases)
        horizon = 0
        while wanted:
            await self._level(wanted)
            found = await gather([database.fetch(sql, *args) for database in wanted])
            answers.update(zip(wanted, found, strict=True))
            newest = max(rows[0][0] or 0 for rows in answers.values())
            if horizon:
                break
            horizon = newest
            wanted = [
                database
                for database, rows in answers.items()
                if rows[0][1] < newest and not database.read_only
            ]
            await self._order.seal(wanted, newest)
        lowest = min(rows[0][1] for rows in answers.values())
        rows = [row for rows in answers.values() for row in rows if len(row) > 2 and row[2] is not None]
        rows.sort(key=lambda row: row[2])
        return rows, min(newest, lowest)

    async def version(self, user: str) -> int:
        _, newest = await self._read(VERSION, user)
        return newest

    async def behind(self, user: str, device: str, since: int, limit: int) -> BehindPage:
        limit = max(limit, 1)
        rows, version = await self._read(BEHIND, user, device, since, limit + 1)
        more = len(rows) > limit
        items = tuple(
            Behind(conv, cursor, head, epoch) for _, _, _, conv, head, cursor, epoch in rows[:limit]
        )
        return BehindPage(items, min(rows[limit - 1][2], version) if more else version, more)

    async def conversations(self, user: str, device: str, since: int, limit: int, now_ms: int) -> ConvPage:
        limit = max(limit, 1)
        rows, version = await self._read(CONVERSATIONS, user, device, since, limit + 1, now_ms)
        more = len(rows) > limit
        items = tuple(_state(row[2:]) for row in rows[:limit])
        return ConvPage(items, min(rows[limit - 1][2], version) if more else version, more)

    async def unread(self, user: str, conv: str | None) -> tuple[int, list[tuple[str, int]]]:
        await self._level(self._databases)
        answers = await gather([database.fetch(UNREAD, user) for database in self._databases])
        found = sorted((name, count) for rows in answers for name, count in rows if count > 0)
        badge = sum(count for _, count in found)
        return badge, found if conv is None else [item for item in found if item[0] == conv]

    async def badges(self, users: Sequence[str]) -> dict[str, int]:
        """The sum of unread for each."""
        badges = dict.fromkeys(users, 0)
        if badges:
            await self._level(self._databases)
            for rows in await gather([database.fetch(BADGES, list(badges)) for database in self._databases]):
                for user, count in rows:
                    badges[user] += count
        return badges

    async def recount(self, user: str) -> list[tuple[str, int, int]]:
        await self._level(self._databases)
        answers = await gather([database.fetch(RECOUNT, user) for database in self._databases])
        return sorted(
            (conv, stored, counted) for rows in answers for conv, stored, counted in rows if stored != counted
        )


def _state(row: Row) -> ConvState:
    version, conv, head, epoch, read, unread, mention, cursor, *last = row
    return ConvState(
        conv,
        version,
        head,
        epoch,
        read,
        unread,
        mention,
        cursor,
        message(last) if last[0] is not None else None,
    )
