"""The change index: which conversations of a user changed, in version order.

A conversation's version is the msg_id of its newest message, or the id that a read mark minted. An append
does not write the rows of user_conv, one for every member; a **round** does, for many messages at once: it
scans each shard from its durable mark and moves the mark in the same transaction, so a crash loses no row
and counts nothing twice. Whoever reads the index first has what is committed projected, together with all who
wait at that moment; between readers a background round follows the appends, so nobody waits for long.

    append ─▶ timeline ─(round: by a reader, or 0.5 s after an append)─▶ user_conv + mark

C1  a reader sees every change that was committed before it asked      tests/contract/store.py (S8)
C2  no answer claims a version below which something may still be committed: it is at most the lowest mark of
    all shards; shards that are behind the user's newest change are sealed there first (minting.py)
    tests/contract/test_store_postgres.py
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from fastim.errors import StoreUnavailable
from fastim.store.postgres.databases import Database, gather

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

ROUND_MESSAGES: Final = 2_000
"""Of one shard."""
FOLLOW_S: Final = 0.5
"""How long after an append a background round begins."""

SETTINGS: Final = (
    "SET LOCAL synchronous_commit = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off"
)
"""The commit need not wait for the disk: what a crash takes away, mark and rows, is projected again. And the
planner cannot know that few of many rows are met: it would read user_conv whole."""
BEHIND: Final = (
    "SELECT EXISTS (SELECT FROM shard s JOIN projection p ON p.shard = s.shard WHERE s.last > p.upto)"
)
LOCK: Final = (
    "SELECT p.shard FROM projection p JOIN shard s ON s.shard = p.shard WHERE s.last > p.upto"
    " ORDER BY p.shard FOR UPDATE OF p"
)
PROJECT: Final = (
    "WITH wanted AS MATERIALIZED (SELECT p.shard, p.upto, s.last FROM projection p"
    " JOIN shard s ON s.shard = p.shard WHERE p.shard = ANY($1::smallint[])),"
    " tail AS MATERIALIZED (SELECT t.* FROM wanted w CROSS JOIN LATERAL ("
    "SELECT m.shard, m.msg_id, m.conv, m.seq, m.cseq, m.sender, m.countable FROM message m"
    " WHERE m.shard = w.shard AND m.msg_id > w.upto AND m.msg_id <= w.last ORDER BY m.msg_id LIMIT $2) t),"
    " sums AS MATERIALIZED (SELECT shard, conv, sender, max(msg_id) AS version, max(seq) AS head,"
    " max(cseq) AS cseq, count(*) FILTER (WHERE countable) AS own FROM tail GROUP BY shard, conv, sender),"
    " heads AS MATERIALIZED (SELECT shard, conv, max(version) AS version, max(head) AS head,"
    " max(cseq) AS cseq, array_agg(sender) AS senders, array_agg(own) AS owns FROM sums"
    " GROUP BY shard, conv ORDER BY conv),"
    " locked AS MATERIALIZED (SELECT u.user_id FROM heads h CROSS JOIN LATERAL (SELECT u.user_id"
    " FROM user_conv u WHERE u.shard = h.shard AND u.conv = h.conv ORDER BY u.user_id FOR UPDATE) u),"
    " moved AS (UPDATE user_conv u SET version = greatest(u.version, h.version), head = h.head,"
    " cseq = h.cseq, own = u.own + coalesce((SELECT o.own FROM unnest(h.senders, h.owns) AS o(sender, own)"
    " WHERE o.sender = u.user_id), 0) FROM heads h WHERE u.shard = h.shard AND u.conv = h.conv"
    " AND (SELECT count(*) FROM locked) > 0)"
    " UPDATE projection p SET upto = CASE WHEN t.number = $2 THEN t.top ELSE w.last END FROM wanted w"
    " LEFT JOIN (SELECT shard, count(*) AS number, max(msg_id) AS top FROM tail GROUP BY shard) t"
    " ON t.shard = w.shard WHERE p.shard = w.shard RETURNING p.upto < w.last"
)


class Projector:
    """Projects one database. Its tasks end by themselves; stop() ends them sooner."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._waiting: list[asyncio.Future[None]] = []
        self._rounds: asyncio.Task[None] | None = None
        self._follow: asyncio.Task[None] | None = None

    async def level(self) -> None:
        """Everything that was committed before this call is in the index. Raises StoreUnavailable.

        Callers that come while a round runs share the next one: theirs must begin after they asked.
        """
        if self._db.read_only:
            return
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append(future)
        if self._rounds is None:
            self._rounds = loop.create_task(self._turn(), name=f"store.projector.{self._db.number}")
        await future

    def appended(self) -> None:
        """Something was appended: follow it within FOLLOW_S even if nobody reads."""
        if self._follow is None:
            self._follow = asyncio.get_running_loop().create_task(
                self._after_a_while(), name=f"store.follow.{self._db.number}"
            )

    async def stop(self) -> None:
        """Nobody waits any more: the background stops."""
        if self._follow is not None:
            self._follow.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follow
        if self._rounds is not None:
            await asyncio.wait([self._rounds])

    async def _turn(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                error: Exception | None = None
                try:
                    await self._round()
                except Exception as raised:
                    error = raised
                for future in waiting:
                    if future.done():
                        continue
                    if error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(error)
        finally:
            self._rounds = None

    async def _after_a_while(self) -> None:
        """What cannot be projected now is projected by the next reader or append."""
        try:
            await asyncio.sleep(FOLLOW_S)
            with contextlib.suppress(StoreUnavailable):
                await self.level()
        finally:
            self._follow = None

    async def _round(self) -> None:
        ((behind,),) = await self._db.fetch(BEHIND)
        while behind:
            behind = await self._db.transact(project)


async def project(conn: Connection) -> bool:
    """One round. Returns whether something is left."""
    await conn.execute(SETTINGS)
    shards = [shard for (shard,) in await conn.fetch(LOCK)]
    if not shards:
        return False
    return any(left for (left,) in await conn.fetch(PROJECT, shards, ROUND_MESSAGES))


async def level(projectors: Sequence[Projector]) -> None:
    """All databases at once."""
    await gather([projector.level() for projector in projectors])
