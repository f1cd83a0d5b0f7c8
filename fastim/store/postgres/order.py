"""One order over all shards of all databases, for who reads them as one timeline.

Within a shard ids are committed in order (minting.py); between shards a lower id may still be on its way when
a higher one is read. So a page in id order is given out only when every shard is past its end, by itself or
because it was sealed there.

R1  a page never passes an id that is committed later      tests/contract/test_store_postgres.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from fastim.model import MAX_SAFE_INT
from fastim.store.base import SHARDS
from fastim.store.postgres.databases import Database, Row, gather

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

SEAL: Final = (
    "WITH lagging AS (SELECT shard FROM shard WHERE last < $1 ORDER BY shard FOR UPDATE)"
    " UPDATE shard s SET last = greatest(s.last, $1) FROM lagging l WHERE s.shard = l.shard"
)
PAGE: Final = (
    "SELECT s.shard, s.last, p.* FROM shard s LEFT JOIN LATERAL (SELECT m.msg_id AS id, {columns}"
    " FROM message m WHERE m.shard = s.shard AND m.msg_id > $1 AND m.msg_id <= $2"
    " ORDER BY m.msg_id LIMIT $3) p ON TRUE"
)
NEWEST: Final = "SELECT max(newest), min(last) FROM shard"


async def seal(conn: Connection, upto: int) -> None:
    """Nothing at or below `upto` is committed in this database any more, once this transaction is."""
    await conn.execute(SEAL, upto)


class Order:
    """All databases as one timeline."""

    def __init__(self, databases: Sequence[Database]) -> None:
        self._databases = databases

    async def seal(self, databases: Sequence[Database], upto: int) -> None:
        """upto: an id that exists. Waits for whoever appends at the moment."""
        wanted = [database for database in databases if not database.read_only]
        await gather([database.transact(lambda conn: seal(conn, upto)) for database in wanted])

    async def head(self) -> int:
        """The newest message, 0 if there is none."""
        rows = await gather([database.row(NEWEST) for database in self._databases])
        return max(row[0] or 0 for row in rows)

    async def page(self, columns: str, after: int, limit: int) -> list[tuple[Database, Row]]:
        """The next messages in id order, each with its database; row[3:] are the columns. Empty = the end."""
        upto = MAX_SAFE_INT
        while True:
            found, lasts = await self._read(columns, after, upto, limit)
            if not found:
                return []
            upto = found[-1][1][2]
            lagging = [database for database, last in lasts.items() if last < upto]
            if all(database.read_only for database in lagging):
                return found
            await self.seal(lagging, upto)

    async def _read(
        self, columns: str, after: int, upto: int, limit: int
    ) -> tuple[list[tuple[Database, Row]], dict[Database, int]]:
        """A page, and up to which id each database was complete when it was read.

        Each shard gives its share of the page; where one is cut off, the page ends for now and goes on from
        there with larger shares.
        """
        sql = PAGE.format(columns=columns)
        each = max(2 * limit // SHARDS, 16)
        found: list[tuple[Database, Row]] = []
        lasts: dict[Database, int] = {}
        while len(found) < limit and after < upto:
            answers = await gather([database.fetch(sql, after, upto, each) for database in self._databases])
            fresh: list[tuple[Database, Row]] = []
            bound = upto
            for database, rows in zip(self._databases, answers, strict=True):
                last = min(row[1] for row in rows)
                lasts[database] = min(lasts.get(database, last), last)
                counts: dict[int, int] = {}
                for row in rows:
                    if row[2] is not None:
                        fresh.append((database, row))
                        counts[row[0]] = counts.get(row[0], 0) + 1
                        if counts[row[0]] == each:
                            bound = min(bound, row[2])
            fresh = [item for item in fresh if item[1][2] <= bound]
            fresh.sort(key=lambda item: item[1][2])
            found += fresh
            after = bound
            each = min(2 * each, limit)
        return found[:limit], lasts
