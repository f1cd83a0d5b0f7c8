"""The message store of a cluster: several PostgreSQL databases, each with its share of the 64 shards.

Hides placement. What belongs to a conversation lies in the database of shard_of(conv): timeline, fates,
cursors, due rows, pushes, and each member's row of the change index; so every promise about one (user, conv)
is kept by one transaction in one database. A user's devices lie in the database of shard_of(user), a node's
boots and fences in that of shard_of(node). What asks about all of a user's conversations asks all databases.

A call that writes to several databases is one transaction in each. If one of them fails the call raises
StoreUnavailable although others may have committed: the same call again finds what it did (append by
client_id, flush by its ranges), so callers repeat it, as they do for a reply that got lost.

docs/adr/0095; held by tests/contract/test_store_postgres.py and test_store_postgres_faults.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from fastim import model
from fastim.errors import StoreUnavailable, UsageError
from fastim.store import base
from fastim.store.base import shard_of
from fastim.store.postgres import schema
from fastim.store.postgres.databases import Database, Deadlines, gather
from fastim.store.postgres.duties import Duties
from fastim.store.postgres.ledger import Ledger
from fastim.store.postgres.lists import Lists
from fastim.store.postgres.minting import Clock, following, shard_in
from fastim.store.postgres.order import NEWEST, Order
from fastim.store.postgres.people import Devices, Groups, Nodes
from fastim.store.postgres.projection import Projector
from fastim.store.postgres.push import PushBox
from fastim.store.postgres.rows import (
    BY_CLIENT,
    BY_CLIENT_AND_SENDER,
    BY_ID,
    BY_ID_ANYWHERE,
    COLUMNS,
    MOST_READ,
    Rows,
    message,
)
from fastim.store.postgres.timeline import MOVE_CLOCK, Timeline, lock
from fastim.store.postgres.unread import LIVE, MOVE_MARKS

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

POOL_SIZE: Final = 8
"""Connections per database and process."""


class _Part:
    """One database with all that works on it."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.db = database
        self.timeline = Timeline(database, clock)
        self.rows = Rows(database)
        self.push = PushBox(database)
        self.duties = Duties(database, self.push)
        self.groups = Groups(database, clock)
        self.projector = Projector(database)


class PostgresStore:
    """MessageStore on PostgreSQL. Made by open()."""

    def __init__(self, databases: Sequence[Database], homes: Sequence[Database]) -> None:
        """homes: the database of each shard."""
        self._clock = Clock()
        self._parts = [_Part(database, self._clock) for database in databases]
        by_database = {part.db: part for part in self._parts}
        self._homes = [by_database[home] for home in homes]
        self._order = Order(databases)
        self._devices = Devices(databases, homes)
        self._nodes = Nodes(databases, homes)
        projectors = {part.db: part.projector for part in self._parts}
        self._lists = Lists(databases, projectors, self._order)
        self._ledger = Ledger(databases, self._order, self._devices)
        self._read_only = databases[0].read_only
        self._turn = 0
        self._closed = False
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def open(
        cls,
        urls: Sequence[str],
        *,
        deadlines: Deadlines | None = None,
        pool_size: int = POOL_SIZE,
        read_only: bool = False,
    ) -> PostgresStore:
        """Connect to all databases of the cluster and take their schemas to the newest version.

        urls: one per database; their order matters only while all are empty. read_only: beside whoever runs.
        Raises UsageError (no store of ours, a newer fastim's, shards missing or doubled), StoreUnavailable.
        """
        if not urls:
            raise UsageError("no database is given (store.urls)")
        late = deadlines or Deadlines()
        databases = [Database(number, url, late, pool_size, read_only) for number, url in enumerate(urls, 1)]
        try:
            await gather([database.connect() for database in databases])
            if read_only:
                await gather([schema.check(database) for database in databases])
            else:
                # One after the other: the same order in every process.
                for database in databases:
                    await schema.migrate(database)
            homes = await schema.place(databases, deal=not read_only)
            # One that waits for its first shard is asked nothing.
            used = [database for database in databases if database in homes]
            await gather([database.close() for database in databases if database not in used])
            store = cls(used, homes)
            rows = await gather([database.row(NEWEST) for database in used])
            for newest, _ in rows:
                store._clock.met(newest or 0)
        except BaseException:
            await gather([database.close() for database in databases])
            raise
        return store

    async def close(self) -> None:
        """Finish what was taken, then close. Twice is once."""
        if self._closed:
            return
        self._closed = True
        await self._idle.wait()
        for part in self._parts:
            await part.projector.stop()
        await gather([part.db.close() for part in self._parts])

    @asynccontextmanager
    async def _call(self, *, writes: bool = False) -> AsyncIterator[None]:
        if self._closed:
            raise StoreUnavailable("it is closed", temporary=False)
        if writes and self._read_only:
            raise UsageError("the store was opened read-only")
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def _home(self, conv: str) -> _Part:
        return self._homes[shard_of(conv)]

    # ----------------------------------------------------------------------------------------------- timeline

    async def append(self, frames: Sequence[base.AppendFrame], now_ms: int) -> list[base.AppendedFrame]:
        async with self._call(writes=True):
            before = self._clock.before(now_ms)
            unknown = await self._devices.unknown(_recipients(frames))
            shares: dict[_Part, list[int]] = {}
            for number, frame in enumerate(frames):
                shares.setdefault(self._home(frame.conv), []).append(number)
            answers = await gather(
                [
                    part.timeline.append([frames[number] for number in numbers], unknown, now_ms, before)
                    for part, numbers in shares.items()
                ]
            )
            results: dict[int, base.AppendedFrame] = {}
            for (part, numbers), found in zip(shares.items(), answers, strict=True):
                results.update(zip(numbers, found, strict=True))
                part.projector.appended()
            return [results[number] for number in range(len(frames))]

    async def stream(
        self, user: str, conv: str, after_seq: int, now_ms: int, *, limit: int, max_bytes: int
    ) -> base.StreamPage:
        async with self._call():
            return await self._home(conv).rows.stream(user, conv, after_seq, now_ms, limit, max_bytes)

    async def history(
        self,
        user: str,
        conv: str,
        *,
        before_seq: int,
        after_seq: int,
        from_ms: int,
        to_ms: int,
        limit: int,
        now_ms: int,
    ) -> tuple[list[model.Message], bool]:
        async with self._call():
            return await self._home(conv).rows.history(
                user, conv, before_seq, after_seq, from_ms, to_ms, limit, now_ms
            )

    async def find(
        self, *, msg_id: int = 0, client_id: bytes = b"", sender: str = ""
    ) -> model.Message | None:
        async with self._call():
            if msg_id:
                found = await self._find(msg_id)
                return None if found is None else found[1]
            sql, args = (BY_CLIENT_AND_SENDER, (client_id, sender)) if sender else (BY_CLIENT, (client_id,))
            rows = await gather([part.db.row(sql, *args) for part in self._parts])
            messages = [message(row) for row in rows if row is not None]
            return max(messages, key=lambda one: one.msg_id, default=None)

    async def _find(self, msg_id: int) -> tuple[_Part, model.Message] | None:
        shard = shard_in(msg_id)
        part = self._homes[shard]
        row = await part.db.row(BY_ID, shard, msg_id)
        if row is not None:
            return part, message(row)
        if shard == 0:
            rows = await gather([part.db.row(BY_ID_ANYWHERE, msg_id) for part in self._parts])
            for part, row in zip(self._parts, rows, strict=True):
                if row is not None:
                    return part, message(row)
        return None

    async def scan(self, after_msg_id: int, limit: int) -> list[model.Message]:
        async with self._call():
            page = await self._order.page(COLUMNS, after_msg_id, min(max(limit, 1), MOST_READ))
            return [message(row[3:]) for _, row in page]

    # -------------------------------------------------------------------------------------------- catching up

    async def behind(self, user: str, device: str, since_version: int, limit: int) -> base.BehindPage:
        async with self._call():
            return await self._lists.behind(user, device, since_version, limit)

    async def position(self, user: str, device: str, conv: str) -> base.Behind:
        async with self._call():
            return await self._home(conv).rows.position(user, device, conv)

    async def conversations(
        self, user: str, device: str, since_version: int, limit: int, now_ms: int
    ) -> base.ConvPage:
        async with self._call():
            return await self._lists.conversations(user, device, since_version, limit, now_ms)

    async def version(self, user: str) -> int:
        async with self._call():
            return await self._lists.version(user)

    # ---------------------------------------------------------------------------------------- marks and fates

    async def flush(self, flush: base.Flush) -> base.FlushResult:
        """Levels move when all that they stand for is committed."""
        async with self._call(writes=True):
            shares: dict[_Part, tuple[list[base.Settled], list[base.DueRequest]]] = {}
            for one in flush.settled:
                if one.from_seq <= one.to_seq:
                    shares.setdefault(self._home(one.conv), ([], []))[0].append(one)
            for request in flush.due:
                shares.setdefault(self._home(request.conv), ([], []))[1].append(request)
            answers = await gather(
                [self._flush(part, settled, due, flush) for part, (settled, due) in shares.items()]
            )
            if flush.levels:
                await self._devices.raise_levels(flush.levels)
            return base.FlushResult(tuple(gap for gaps in answers for gap in gaps))

    async def _flush(
        self,
        part: _Part,
        settled: list[base.Settled],
        due: list[base.DueRequest],
        flush: base.Flush,
    ) -> list[tuple[str, str, base.Behind]]:
        if settled:
            existing = await part.duties.existing({one.conv for one in settled})
            settled = [one for one in settled if one.conv in existing]
            await self._devices.ensure({(one.user, one.device) for one in settled}, flush.now_ms)
        if not settled and not due:
            return []
        return await part.duties.flush(settled, due, flush.node, flush.now_ms)

    async def read(self, user: str, conv: str, seq: int, now_ms: int) -> tuple[int, int]:
        async with self._call(writes=True):
            part = self._home(conv)
            where = await part.rows.position(user, "", conv)
            if not where.head:
                return 0, 0
            shard, mark = shard_of(conv), min(seq, where.head)
            row = await part.db.row(LIVE, shard, conv, user)
            if row is not None and mark > row[0]:
                await part.db.transact(lambda conn: self._move_mark(conn, part, user, conv, mark, now_ms))
                row = await part.db.row(LIVE, shard, conv, user)
            return (0, 0) if row is None else (row[0], row[1])

    async def _move_mark(
        self, conn: Connection, part: _Part, user: str, conv: str, mark: int, now_ms: int
    ) -> None:
        """With a version of its own, given like a message's id."""
        shard = shard_of(conv)
        ((_, last, _),) = await lock(conn, part.db, [shard])
        version = following(max(last, self._clock.before(now_ms)), shard)
        if await conn.fetch(MOVE_MARKS + " RETURNING u.version", [shard], [conv], [user], [mark], [version]):
            await conn.execute(MOVE_CLOCK, shard, version)
            self._clock.met(version)

    async def unread(self, user: str, conv: str | None = None) -> tuple[int, list[tuple[str, int]]]:
        async with self._call():
            return await self._lists.unread(user, conv)

    async def recount(self, user: str) -> list[tuple[str, int, int]]:
        async with self._call():
            return await self._lists.recount(user)

    # -------------------------------------------------------------------------------------- due rows and push

    async def next_due_ms(self) -> int:
        async with self._call():
            found = await gather([part.duties.next_ms() for part in self._parts])
            return min((ms for ms in found if ms), default=0)

    async def claim_due(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[base.DueRow]:
        async with self._call(writes=True):
            found: list[base.DueRow] = []
            for part in self._rotated():
                if len(found) < limit:
                    found += await part.duties.claim(holder, now_ms, claim_ms, limit - len(found))
            return found

    def _rotated(self) -> list[_Part]:
        """All of them, each time another one first: none is starved by a limit."""
        self._turn = (self._turn + 1) % len(self._parts)
        return self._parts[self._turn :] + self._parts[: self._turn]

    async def fire_due(self, holder: str, firings: Sequence[base.DueFiring], now_ms: int) -> list[bool]:
        async with self._call(writes=True):
            shares: dict[_Part, list[int]] = {}
            for number, firing in enumerate(firings):
                shares.setdefault(self._home(firing.conv), []).append(number)
            answers = await gather(
                [
                    part.duties.fire(holder, [firings[number] for number in numbers], now_ms)
                    for part, numbers in shares.items()
                ]
            )
            return _in_order(len(firings), shares, answers)

    async def park(self, parks: Sequence[base.Park], now_ms: int) -> list[bool]:
        async with self._call(writes=True):
            shares: dict[_Part, list[int]] = {}
            for number, park in enumerate(parks):
                shares.setdefault(self._home(park.conv), []).append(number)
            answers = await gather(
                [
                    part.duties.park([parks[number] for number in numbers], now_ms)
                    for part, numbers in shares.items()
                ]
            )
            return _in_order(len(parks), shares, answers)

    async def next_push_ms(self) -> int:
        async with self._call():
            found = await gather([part.push.next_ms() for part in self._parts])
            return min((ms for ms in found if ms), default=0)

    async def claim_push(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[base.PushRow]:
        async with self._call(writes=True):
            found: list[base.PushRow] = []
            for part in self._rotated():
                if len(found) < limit:
                    found += await part.push.claim(holder, now_ms, claim_ms, limit - len(found))
            badges = await self._lists.badges(sorted({row.user for row in found}))
            return [msgspec.structs.replace(row, badge=badges[row.user]) for row in found]

    async def finish_push(self, holder: str, row: base.PushRow, now_ms: int, *, retry_at_ms: int) -> None:
        async with self._call(writes=True):
            await self._home(row.conv).push.finish(holder, row, now_ms, retry_at_ms)

    # ------------------------------------------------------------------------------------- recovery and audit

    async def settled_mark(self) -> int:
        async with self._call():
            return await self._ledger.settled_mark()

    async def settle(self, msg_id: int) -> None:
        async with self._call(writes=True):
            await self._ledger.settle(msg_id)

    async def head_msg_id(self) -> int:
        async with self._call():
            return await self._order.head()

    async def unsettled(self, upto_msg_id: int) -> list[base.OpenRange]:
        async with self._call():
            return await self._ledger.unsettled(upto_msg_id)

    async def obligations(
        self, after_msg_id: int, limit_messages: int, now_ms: int
    ) -> tuple[list[base.Obligation], int]:
        async with self._call():
            return await self._ledger.obligations(after_msg_id, limit_messages, now_ms)

    async def trace(self, msg_id: int, now_ms: int) -> base.Trace | None:
        async with self._call():
            found = await self._find(msg_id)
            if found is None:
                return None
            part, one = found
            return await self._ledger.trace(part.db, one, now_ms)

    # ------------------------------------------------------------------------------------- groups and devices

    async def create_group(self, group: str, owner: str, members: Sequence[str], now_ms: int) -> int:
        async with self._call(writes=True):
            part = self._home(f"g:{group}")
            seq = await part.groups.create(group, owner, members, now_ms)
            part.projector.appended()
            return seq

    async def members(self, conv: str) -> list[base.Member]:
        async with self._call():
            return await self._home(conv).groups.members(conv)

    async def register_device(self, user: str, device: str, device_class: str, now_ms: int) -> base.Device:
        async with self._call(writes=True):
            return await self._devices.register(user, device, device_class, now_ms)

    async def devices(self, user: str) -> list[base.Device]:
        async with self._call():
            return await self._devices.of(user)

    # -------------------------------------------------------------------------------------------------- nodes

    async def next_boot(self, node: str) -> int:
        async with self._call(writes=True):
            return await self._nodes.next_boot(node)

    async def open_boot(self, node: str, boot: int) -> None:
        async with self._call(writes=True):
            await self._nodes.open_boot(node, boot)

    async def open_boots(self) -> list[base.OpenBoot]:
        async with self._call():
            return await self._nodes.open_boots()

    async def end_boot(self, node: str, boot: int) -> None:
        async with self._call(writes=True):
            await self._nodes.end_boot(node, boot)

    async def fence(self, node: str, boot: int, holder: str, now_ms: int, claim_ms: int) -> bool:
        async with self._call(writes=True):
            return await self._nodes.fence(node, boot, holder, now_ms, claim_ms)

    async def fenced(self, node: str, boot: int) -> bool:
        async with self._call():
            return await self._nodes.fenced(node, boot)


def _recipients(frames: Sequence[base.AppendFrame]) -> set[str]:
    """Who must be known for the frames to be taken. A group's members need not."""
    users: set[str] = set()
    for frame in frames:
        if frame.require_known and frame.conv[0] != "g":
            users.update(user for user in frame.conv[2:].split(":") if user != frame.sender)
    return users


def _in_order(count: int, shares: dict[_Part, list[int]], answers: list[list[bool]]) -> list[bool]:
    results = [False] * count
    for numbers, found in zip(shares.values(), answers, strict=True):
        for number, result in zip(numbers, found, strict=True):
            results[number] = result
    return results
