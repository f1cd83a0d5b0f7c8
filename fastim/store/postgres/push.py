"""The push outbox of one database: one row per (user, conv) that a phone is to be told about.

 park ─▶ WAITING until ready_ms ─claim─▶ OUT ─finish─▶ idle until the collapse window has passed ─▶ gone
            ▲                             ├─ retry ─▶ WAITING under the same push_id
            └── asked again since OUT ────┘

A push inside the collapse window after the last one waits for its end. Whether something is still pending is
asked at the claim, so a push is dropped only because nothing is. A push that was OUT once may have rung, and
a vendor rings once per push_id: what is parked after that gets a push of its own. The rules are those of
fastim/store/sqlite/push.py.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from fastim.store.base import Park, PushRow
from fastim.store.postgres.databases import Database
from fastim.store.postgres.owed import ALIVE, CLOSED, FURTHEST, MINE, SHOWN, Pair, columns

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

MOST_PENDING: Final = 1_000
"""How many of the newest messages a claim looks through, so that `pending` counts at most as many."""
_REMEMBER_MS: Final = 60_000
"""How much longer than its window a finished push is remembered: the clock may step back."""
_FORGET: Final = 100
"""Idle rows that one claim removes."""

LOCK_PUSH: Final = (
    "SELECT p.conv, p.user_id, p.serial, p.ready_ms, p.again_ms, p.last_ms, p.idle_ms, p.collapse_ms,"
    " p.attempt, p.holder FROM unnest($1::smallint[], $2::text[], $3::text[]) AS w(shard, conv, user_id)"
    " JOIN push p ON p.shard = w.shard AND p.conv = w.conv AND p.user_id = w.user_id"
    " ORDER BY p.conv, p.user_id FOR UPDATE OF p"
)
ADD_PUSH: Final = (
    "INSERT INTO push (shard, conv, user_id, serial, ready_ms, collapse_ms)"
    " SELECT * FROM unnest($1::smallint[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[])"
    " ON CONFLICT DO NOTHING RETURNING conv, user_id"
)
CHANGE_PUSH: Final = (
    "UPDATE push p SET serial = w.serial, ready_ms = w.ready_ms, again_ms = w.again_ms, last_ms = w.last_ms,"
    " idle_ms = w.idle_ms, collapse_ms = w.collapse_ms, attempt = w.attempt, holder = w.holder"
    " FROM unnest($1::smallint[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[],"
    " $7::bigint[], $8::bigint[], $9::bigint[], $10::int[], $11::text[]) AS w(shard, conv, user_id, serial,"
    " ready_ms, again_ms, last_ms, idle_ms, collapse_ms, attempt, holder)"
    " WHERE p.shard = w.shard AND p.conv = w.conv AND p.user_id = w.user_id"
)
FORGET_IDLE: Final = (
    "DELETE FROM push p USING (SELECT i.conv, i.user_id, i.shard FROM push i WHERE i.ready_ms IS NULL"
    f" AND i.idle_ms < $1 ORDER BY i.idle_ms LIMIT {_FORGET} FOR UPDATE SKIP LOCKED) w"
    " WHERE p.shard = w.shard AND p.conv = w.conv AND p.user_id = w.user_id"
)
READY_PUSH: Final = (
    "SELECT p.conv, p.user_id, p.serial, p.ready_ms, p.again_ms, p.last_ms, p.idle_ms, p.collapse_ms,"
    " p.attempt, p.holder FROM push p WHERE p.ready_ms <= $1"
    " ORDER BY p.ready_ms, p.conv, p.user_id LIMIT $2 FOR UPDATE SKIP LOCKED"
)
PENDING: Final = (
    "SELECT w.conv, w.user_id, m.msg_id, q.pending, m.sender, m.kind, m.flags, m.body, m.loss_time_ms"
    f" FROM (SELECT w.*, {FURTHEST} AS floor FROM unnest($1::smallint[], $2::text[], $3::text[])"
    " AS w(shard, conv, user_id)) w"
    " CROSS JOIN LATERAL (SELECT max(m.msg_id) AS newest, count(*) AS pending FROM (SELECT m.msg_id, m.seq,"
    f" m.loss_time_ms FROM message m WHERE {MINE} AND m.seq > w.floor ORDER BY m.seq DESC"
    f" LIMIT {MOST_PENDING}) m WHERE {ALIVE} AND {SHOWN} AND NOT {CLOSED}) q"
    " JOIN message m ON m.shard = w.shard AND m.msg_id = q.newest"
)
NEXT_PUSH: Final = "SELECT p.ready_ms FROM push p WHERE p.ready_ms IS NOT NULL ORDER BY p.ready_ms LIMIT 1"


class _Push:
    """A push row that this transaction has locked."""

    __slots__ = (
        "again_ms", "attempt", "collapse_ms", "holder", "idle_ms", "last_ms", "ready_ms", "serial",
    )  # fmt: skip

    def __init__(
        self,
        serial: int,
        ready_ms: int | None,
        again_ms: int,
        last_ms: int,
        idle_ms: int,
        collapse_ms: int,
        attempt: int,
        holder: str | None,
    ) -> None:
        self.serial = serial
        self.ready_ms = ready_ms
        self.again_ms = again_ms
        self.last_ms = last_ms
        self.idle_ms = idle_ms
        self.collapse_ms = collapse_ms
        self.attempt = attempt
        self.holder = holder

    def ask(self, park: Park, now_ms: int) -> None:
        at_ms = park.push_at_ms
        if self.last_ms:
            # A clock that went back must not keep a phone silent. But a caller that waited, for a bus that is
            # away say, is no clock that went back.
            began_ms = self.last_ms if self.last_ms <= now_ms + park.collapse_ms else now_ms
            at_ms = max(at_ms, began_ms + park.collapse_ms)
        if self.ready_ms is None:
            self.serial += 1
            self.ready_ms, self.attempt, self.collapse_ms = at_ms, 0, park.collapse_ms
        elif self.holder is not None or self.attempt:
            self.again_ms, self.collapse_ms = at_ms, park.collapse_ms
        else:
            self.ready_ms = min(self.ready_ms, at_ms)

    def rest(self, now_ms: int) -> None:
        """Nothing to push: the row only remembers the last one until its window has passed."""
        self.holder, self.attempt, self.again_ms, self.ready_ms = None, 0, 0, None
        self.idle_ms = min(self.last_ms, now_ms) + self.collapse_ms + _REMEMBER_MS


class PushBox:
    """The push rows of one database."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def ask(self, conn: Connection, parks: dict[Pair, Park], now_ms: int) -> None:
        """Something was parked: have a push not before park.push_at_ms and outside the collapse window."""
        wanted = sorted(parks)
        while wanted:
            rows = await _lock_push(conn, wanted)
            for pair, row in rows.items():
                row.ask(parks[pair], now_ms)
            await _change(conn, rows)
            wanted = [pair for pair in wanted if pair not in rows]
            if not wanted:
                return
            # The serial starts at the moment: a row that was forgotten must not give its push_ids out again,
            # or the vendor takes the new push for a repeat and no phone rings.
            found = [parks[pair] for pair in wanted]
            added = await conn.fetch(
                ADD_PUSH, *columns(wanted), [now_ms] * len(found), [park.push_at_ms for park in found],
                [park.collapse_ms for park in found],
            )  # fmt: skip
            done = {(conv, user) for conv, user in added}
            wanted = [pair for pair in wanted if pair not in done]

    async def next_ms(self) -> int:
        row = await self._db.row(NEXT_PUSH)
        return 0 if row is None else int(row[0])

    async def claim(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[PushRow]:
        """The claimed rows, their badge still 0: it is counted over all databases."""

        async def work(conn: Connection) -> list[PushRow]:
            await conn.execute(FORGET_IDLE, now_ms)
            rows = {
                (conv, user): _Push(*rest)
                for conv, user, *rest in await conn.fetch(READY_PUSH, now_ms, limit)
            }
            if not rows:
                return []
            pending = {
                (conv, user): rest for conv, user, *rest in await conn.fetch(PENDING, *columns(rows), now_ms)
            }
            found = []
            for pair, row in rows.items():
                if pair not in pending:
                    row.rest(now_ms)
                    continue
                row.holder, row.ready_ms = holder, now_ms + claim_ms
                msg_id, count, sender, kind, flags, body, loss_ms = pending[pair]
                conv, user = pair
                found.append(
                    PushRow(
                        user, conv, msg_id, sender, kind, flags, body, count, 0, loss_ms, row.attempt,
                        push_id(pair, row.serial),
                    )
                )  # fmt: skip
            await _change(conn, rows)
            return found

        return await self._db.transact(work)

    async def finish(self, holder: str, push: PushRow, now_ms: int, retry_at_ms: int) -> None:
        """Only the holder of this very push may; anybody else comes too late."""
        pair = (push.conv, push.user)

        async def work(conn: Connection) -> None:
            row = (await _lock_push(conn, [pair])).get(pair)
            if row is None or row.holder != holder or push_id(pair, row.serial) != push.push_id:
                return
            if retry_at_ms:
                row.holder, row.ready_ms = None, retry_at_ms
                row.attempt += 1
            else:
                row.last_ms = now_ms
                if row.again_ms:
                    row.serial += 1
                    row.holder, row.attempt = None, 0
                    row.ready_ms, row.again_ms = max(row.again_ms, now_ms + row.collapse_ms), 0
                else:
                    row.rest(now_ms)
            await _change(conn, {pair: row})

        await self._db.transact(work)


def push_id(pair: Pair, serial: int) -> str:
    """One per push, the same for every attempt; names no user to the vendor."""
    return f"{blake2b(chr(0).join(pair).encode(), digest_size=12).hexdigest()}.{serial:x}"


async def _lock_push(conn: Connection, pairs: list[Pair]) -> dict[Pair, _Push]:
    rows = await conn.fetch(LOCK_PUSH, *columns(pairs))
    return {(conv, user): _Push(*rest) for conv, user, *rest in rows}


async def _change(conn: Connection, rows: dict[Pair, _Push]) -> None:
    if rows:
        found = rows.values()
        await conn.execute(
            CHANGE_PUSH, *columns(rows), [row.serial for row in found], [row.ready_ms for row in found],
            [row.again_ms for row in found], [row.last_ms for row in found], [row.idle_ms for row in found],
            [row.collapse_ms for row in found], [row.attempt for row in found], [row.holder for row in found],
        )  # fmt: skip
