"""Rows of the timeline of one database as messages, in seq order; what one user may see of them."""

from __future__ import annotations

from typing import Final

from fastim.model import Message, SkipReason
from fastim.store.base import Behind, StreamPage, shard_of
from fastim.store.postgres.databases import Database, Row
from fastim.store.postgres.minting import MS_SHIFT, floor_at
from fastim.store.rules import EPOCH, FOREVER, WHOLE, Page, Span, forbidden, named_members

MOST_READ: Final = 1_000
"""Rows of one page of history or scan, whatever is asked for."""

_FIELDS: Final = (
    "m.sender, m.client_id, m.kind, m.flags, m.ts_ms, m.loss_time_ms, m.body, m.mentions, m.recalled"
)
COLUMNS: Final = (
    "m.conv, m.seq, m.msg_id, m.cseq,"
    " (SELECT k.epoch FROM conv k WHERE k.shard = m.shard AND k.conv = m.conv) AS epoch, " + _FIELDS
)
"""What message() takes, in its order."""

SPANS: Final = (
    "SELECT b.join_seq, b.leave_seq FROM member b WHERE b.shard = $1 AND b.conv = $2 AND b.user_id = $3"
    " ORDER BY b.join_seq"
)
_SIZE: Final = (
    "CASE WHEN m.recalled OR (m.loss_time_ms <> 0 AND m.loss_time_ms < $7) THEN 0"
    " ELSE octet_length(m.body) END"
)
STREAM: Final = (
    "SELECT k.epoch, coalesce(h.seq, 0), p.* FROM conv k LEFT JOIN LATERAL (SELECT m.seq FROM message m"
    " WHERE m.shard = k.shard AND m.conv = k.conv ORDER BY m.seq DESC LIMIT 1) h ON TRUE"
    " LEFT JOIN LATERAL (SELECT m.conv, m.seq, m.msg_id, m.cseq, k.epoch, m.sender, m.client_id, m.kind,"
    " m.flags, m.ts_ms, m.loss_time_ms, m.body, m.mentions, m.recalled FROM ("
    f"SELECT m.*, coalesce(sum({_SIZE}) OVER"
    " (ORDER BY m.seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS bytes_before"
    " FROM message m WHERE m.shard = $1 AND m.conv = $2 AND m.seq > $3 AND m.seq <= $4"
    " ORDER BY m.seq LIMIT $5) m WHERE m.bytes_before < $6) p ON TRUE"
    " WHERE k.shard = $1 AND k.conv = $2 ORDER BY p.seq"
)
"""(epoch, head, the columns of a message or NULLs). Bodies that would not fit are not sent."""
POSITION: Final = (
    "SELECT k.epoch, (SELECT coalesce(max(m.seq), 0) FROM message m WHERE m.shard = $1 AND m.conv = $2),"
    " coalesce((SELECT c.seq FROM cursor c WHERE c.shard = $1 AND c.conv = $2 AND c.user_id = $3"
    " AND c.device = $4), 0) FROM conv k WHERE k.shard = $1 AND k.conv = $2"
)
SEQ_AT: Final = (
    "WITH RECURSIVE search(low, high) AS (SELECT 1::bigint, coalesce(max(m.seq), 0) + 1 FROM message m"
    " WHERE m.shard = $1 AND m.conv = $2 UNION ALL"
    " SELECT CASE WHEN m.msg_id < $3 THEN s.middle + 1 ELSE s.low END,"
    " CASE WHEN m.msg_id < $3 THEN s.high ELSE s.middle END"
    " FROM (SELECT low, high, (low + high) / 2 AS middle FROM search WHERE low < high) s"
    " JOIN message m ON m.shard = $1 AND m.conv = $2 AND m.seq = s.middle)"
    " SELECT low FROM search WHERE low >= high"
)
"""The first seq whose id is at or above $3. O(log messages)."""
AHEAD: Final = "SELECT ahead_ms FROM shard WHERE shard = $1"
_HISTORY: Final = (
    f"SELECT {COLUMNS} FROM message m WHERE m.shard = $1 AND m.conv = $2 AND m.seq >= $3 AND m.seq < $4"
    " AND m.ts_ms BETWEEN $5 AND $6 AND NOT m.recalled AND (m.loss_time_ms = 0 OR m.loss_time_ms >= $7)"
    " AND EXISTS (SELECT FROM unnest($8::bigint[], $9::bigint[]) AS s(first, last)"
    " WHERE m.seq BETWEEN s.first AND s.last) ORDER BY m.seq {order} LIMIT $10"
)
RISING: Final = _HISTORY.format(order="ASC")
FALLING: Final = _HISTORY.format(order="DESC")
BY_ID: Final = f"SELECT {COLUMNS} FROM message m WHERE m.shard = $1 AND m.msg_id = $2"
BY_ID_ANYWHERE: Final = f"SELECT {COLUMNS} FROM shard s JOIN message m ON m.shard = s.shard AND m.msg_id = $1"
"""For ids of an embedded store, whose shard bits say nothing."""
BY_CLIENT: Final = f"SELECT {COLUMNS} FROM message m WHERE m.client_id = $1 ORDER BY m.msg_id DESC LIMIT 1"
BY_CLIENT_AND_SENDER: Final = (
    f"SELECT {COLUMNS} FROM message m WHERE m.client_id = $1 AND m.sender = $2 ORDER BY m.msg_id DESC LIMIT 1"
)


def message(row: Row) -> Message:
    """A row of COLUMNS."""
    return Message(
        row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9], row[10], row[11],
        tuple(row[12].split("\n")) if row[12] else (), row[13],
    )  # fmt: skip


class Rows:
    """Reads of conversations that live in one database."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def spans(self, user: str, conv: str) -> tuple[Span, ...]:
        """What the user may see. Read afresh each time (Store.S8). Raises PeerError("forbidden")."""
        named = named_members(conv)
        found: tuple[Span, ...]
        if named is not None:
            found = WHOLE if user in named else ()
        else:
            rows = await self._db.fetch(SPANS, shard_of(conv), conv, user)
            found = tuple(Span(join, leave - 1 if leave else FOREVER) for join, leave in rows)
        if not found:
            raise forbidden(user, conv)
        return found

    async def position(self, user: str, device: str, conv: str) -> Behind:
        await self.spans(user, conv)
        row = await self._db.row(POSITION, shard_of(conv), conv, user, device)
        if row is None:
            return Behind(conv, 0, 0, EPOCH)
        epoch, head, cursor = row
        return Behind(conv, cursor, head, epoch)

    async def stream(
        self, user: str, conv: str, after_seq: int, now_ms: int, limit: int, max_bytes: int
    ) -> StreamPage:
        """At most `limit` seqs: messages as they are, runs of what is never shown as one Gap each."""
        spans = await self.spans(user, conv)
        left, after_seq = max(limit, 1), max(after_seq, 0)
        whole = len(spans) == 1 and spans[0].first <= 1 and spans[0].last == FOREVER
        shard = shard_of(conv)
        rows = await self._db.fetch(
            STREAM, shard, conv, after_seq, FOREVER, left if whole else 0, max(max_bytes, 1), now_ms
        )
        if not rows:
            return StreamPage((), 0, 0, EPOCH)
        epoch, head = rows[0][0], rows[0][1]
        page = Page(conv, min(after_seq, head), max_bytes)
        if whole:
            _fill(page, rows, now_ms)
            return StreamPage(tuple(page.entries), page.position, head, epoch)
        while page.position < head and left > 0:
            span = next((span for span in spans if span.last > page.position), None)
            if span is None or span.first > page.position + 1:
                page.skip(min(span.first - 1, head) if span else head, SkipReason.NOT_MEMBER)
                left -= 1
                continue
            before, upto = page.position, min(span.last, head)
            rows = await self._db.fetch(STREAM, shard, conv, before, upto, left, max(max_bytes, 1), now_ms)
            if not _fill(page, rows, now_ms) or page.position == before:
                break
            left -= page.position - before
        return StreamPage(tuple(page.entries), page.position, head, epoch)

    async def history(
        self,
        user: str,
        conv: str,
        before_seq: int,
        after_seq: int,
        from_ms: int,
        to_ms: int,
        limit: int,
        now_ms: int,
    ) -> tuple[list[Message], bool]:
        """Oldest first above after_seq if only that is given, else newest first below before_seq."""
        spans = await self.spans(user, conv)
        shard = shard_of(conv)
        rising = bool(after_seq) and not before_seq
        limit = min(max(limit, 1), MOST_READ)
        first, end = max(after_seq, 0) + 1, before_seq or FOREVER
        if from_ms:
            first = max(first, await self._seq_at(shard, conv, from_ms))
        if to_ms:
            (ahead_ms,) = await self._db.row(AHEAD, shard)
            end = min(end, await self._seq_at(shard, conv, to_ms + ahead_ms + 1))
        rows = await self._db.fetch(
            RISING if rising else FALLING, shard, conv, first, end, from_ms, to_ms or FOREVER, now_ms,
            [span.first for span in spans], [span.last for span in spans], limit + 1,
        )  # fmt: skip
        found = [message(row) for row in rows[:limit]]
        return (found if rising else found[::-1]), len(rows) > limit

    async def _seq_at(self, shard: int, conv: str, wall_ms: int) -> int:
        """The first seq whose id was given at wall_ms or later. The time in an id is never before ts_ms, and
        at most `ahead` after it, so both ends of a time range are found without reading what lies outside."""
        row = await self._db.row(SEQ_AT, shard, conv, floor_at(min(wall_ms, _LAST_MS)))
        return int(row[0]) if row is not None else 1


_LAST_MS: Final = (((1 << 53) - 1) >> MS_SHIFT) + 1_577_836_800_000


def _fill(page: Page, rows: list[Row], now_ms: int) -> bool:
    """False when the page is full."""
    return all(page.take(message(row[2:]), now_ms) for row in rows if row[2] is not None)
