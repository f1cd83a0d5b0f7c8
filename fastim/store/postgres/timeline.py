"""Appending to the conversations of one database: ids, seqs, idempotency, deadlines.

    lock the shards' rows ─▶ heads not remembered ─▶ one INSERT for the batch and the clocks ─▶ COMMIT

A batch is first inserted on trust that every message is new. If the index of client_ids objects, or a message
is past its deadline, or a frame is refused (a known message gets its first result all the same), the
transaction begins again and looks every client_id up first.

T1  one hole or repeat of seq is impossible: the row of the shard is locked before heads are read, until the
    commit; heads are remembered only together with the `turn` that the shard's row has when they are true.
    Everybody who appends draws a new turn, and notes it before the first remembered head moves, so heads of
    a transaction that did not commit match no row                   tests/contract/store.py, S1
T2  the client_id look-up comes before every refusal                 same, S2
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from asyncpg import UniqueViolationError

from fastim.errors import InternalError, StoreUnavailable
from fastim.model import Flag
from fastim.store.base import Appended, AppendedFrame, AppendFrame, AppendItem, AppendStatus, shard_of
from fastim.store.postgres.databases import Database
from fastim.store.postgres.minting import Clock, following, ms_of
from fastim.store.postgres.unread import MOVE_MARKS
from fastim.store.rules import EPOCH, content_hash, named_members

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

CACHED_CONVS: Final = 65_536
"""Per database; a group counts as one more for every 16 members."""
_MENTION_ALL: Final = int(Flag.MENTION_ALL)
_STORED: Final = AppendStatus.STORED
_NOT_REACHED: Final = Appended(AppendStatus.NOT_REACHED)

LOCK: Final = (
    "SELECT shard, last, turn FROM shard WHERE shard = ANY($1::smallint[]) ORDER BY shard FOR UPDATE"
)
HEADS: Final = (
    "SELECT w.conv, k.epoch, coalesce(h.seq, 0), coalesce(h.cseq, 0)"
    " FROM unnest($1::smallint[], $2::text[]) AS w(shard, conv)"
    " JOIN conv k ON k.shard = w.shard AND k.conv = w.conv"
    " LEFT JOIN LATERAL (SELECT m.seq, m.cseq FROM message m WHERE m.shard = w.shard AND m.conv = w.conv"
    " ORDER BY m.seq DESC LIMIT 1) h ON TRUE"
)
MEMBERS: Final = (
    "SELECT w.conv, b.user_id FROM unnest($1::smallint[], $2::text[]) AS w(shard, conv)"
    " CROSS JOIN LATERAL (SELECT b.user_id, b.number FROM member b WHERE b.shard = w.shard"
    " AND b.conv = w.conv AND b.leave_seq = 0 ORDER BY b.number) b ORDER BY w.conv, b.number"
)
KNOWN: Final = (
    "SELECT w.conv, w.sender, w.client_id, m.content, m.msg_id, m.seq, m.cseq, m.ts_ms, m.loss_time_ms"
    " FROM unnest($1::smallint[], $2::text[], $3::text[], $4::bytea[]) AS w(shard, conv, sender, client_id)"
    " JOIN message m ON m.client_id = w.client_id AND m.sender = w.sender AND m.conv = w.conv"
    " AND m.shard = w.shard"
)
MAKE_CONVS: Final = (
    "WITH made AS (INSERT INTO conv (shard, conv, epoch)"
    f" SELECT w.shard, w.conv, {EPOCH} FROM unnest($1::smallint[], $2::text[]) AS w(shard, conv))"
    " INSERT INTO user_conv (shard, conv, user_id)"
    " SELECT * FROM unnest($3::smallint[], $4::text[], $5::text[])"
)
APPEND: Final = (
    "WITH clocks AS (UPDATE shard s SET last = greatest(s.last, w.last), newest = greatest(s.newest, w.last),"
    " ahead_ms = greatest(s.ahead_ms, w.ahead_ms), turn = $4"
    " FROM unnest($1::smallint[], $2::bigint[], $3::bigint[]) AS w(shard, last, ahead_ms)"
    " WHERE s.shard = w.shard)"
    " INSERT INTO message (shard, msg_id, conv, seq, cseq, sender, client_id, kind, flags, countable, ts_ms,"
    " loss_time_ms, content, mentions, body) SELECT * FROM unnest($5::smallint[], $6::bigint[], $7::text[],"
    " $8::bigint[], $9::bigint[], $10::text[], $11::bytea[], $12::int[], $13::int[], $14::boolean[],"
    " $15::bigint[], $16::bigint[], $17::bytea[], $18::text[], $19::bytea[])"
)
_COLUMNS: Final = 15
MOVE_CLOCK: Final = "UPDATE shard SET last = greatest(last, $2) WHERE shard = $1"


class Conv:
    """A conversation as it is while its shard is locked. seq and cseq are its head."""

    __slots__ = ("cseq", "epoch", "is_new", "members", "name", "people", "seq", "shard", "type")

    def __init__(self, shard: int, name: str, epoch: int, members: tuple[str, ...], is_new: bool) -> None:
        self.shard = shard
        self.name = name
        self.type = name[0]
        self.epoch = epoch
        self.members = members
        self.people = frozenset(members)
        self.seq = 0
        self.cseq = 0
        self.is_new = is_new


class _Remembered:
    """Conversations of one shard, true while the shard's row says `turn`."""

    __slots__ = ("convs", "turn")

    def __init__(self) -> None:
        self.turn = 0
        self.convs: dict[str, Conv] = {}


class _Batch:
    """What one transaction is going to write."""

    __slots__ = (
        "before", "convs", "known", "last", "made", "now_ms", "reads", "remembered", "rows", "turn", "turns",
    )  # fmt: skip

    def __init__(self, now_ms: int, before: int) -> None:
        self.now_ms = now_ms
        self.before = before
        self.turn = random.getrandbits(62)
        self.last: dict[int, int] = {}
        """shard -> its newest id"""
        self.turns: dict[int, int] = {}
        """shard -> the turn of its row"""
        self.remembered: dict[int, _Remembered] = {}
        self.convs: dict[str, Conv] = {}
        self.rows: list[tuple[Any, ...]] = []
        self.made: list[Conv] = []
        self.reads: dict[tuple[str, str], tuple[int, bool]] = {}
        """(conv, user) -> (read mark, whether a message brings a version)"""
        self.known: dict[tuple[str, str, bytes], tuple[bytes, Appended]] | None = None
        """What was there before and, as it grows, what this batch adds; None on trust."""

    def mint(self, shard: int) -> int:
        found = following(max(self.last[shard], self.before), shard)
        self.last[shard] = found
        return found


class Timeline:
    """Appends to one database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._db = database
        self._clock = clock
        self._remembered: dict[int, _Remembered] = {}
        self._room = CACHED_CONVS

    async def append(
        self, frames: Sequence[AppendFrame], unknown: frozenset[str], now_ms: int, before: int
    ) -> list[AppendedFrame]:
        """unknown: who among the recipients has no device. before: new ids lie above it."""
        shards = sorted({shard_of(frame.conv) for frame in frames})
        careful = False
        while True:
            try:
                return await self._db.transact(
                    partial(
                        self._append,
                        frames=frames,
                        shards=shards,
                        unknown=unknown,
                        now_ms=now_ms,
                        before=before,
                        careful=careful,
                    )
                )
            except _NeedsCare:
                self._forget(shards)
                careful = True
            except UniqueViolationError as error:
                self._forget(shards)
                raise InternalError(f"{self._db.name}: {error}") from error
            except BaseException:
                # Whether it is committed may be unknown: the next one reads the heads again.
                self._forget(shards)
                raise

    async def _append(
        self,
        conn: Connection,
        frames: Sequence[AppendFrame],
        shards: list[int],
        unknown: frozenset[str],
        now_ms: int,
        before: int,
        careful: bool,
    ) -> list[AppendedFrame]:
        batch = _Batch(now_ms, before)
        await self._begin(conn, batch, frames, shards)
        if careful:
            batch.known = await _look_up(conn, frames)
        results = [self._frame(batch, frame, unknown) for frame in frames]
        await self._write(conn, batch)
        return results

    # ------------------------------------------------------------------------------------------- reading

    async def _begin(
        self, conn: Connection, batch: _Batch, frames: Iterable[AppendFrame], shards: list[int]
    ) -> None:
        for shard, last, turn in await lock(conn, self._db, shards):
            remembered = self._remembered.get(shard)
            if remembered is None or remembered.turn != turn:
                remembered = self._remembered[shard] = _Remembered()
            remembered.turn = batch.turn
            batch.last[shard], batch.turns[shard], batch.remembered[shard] = last, turn, remembered
        wanted: dict[str, int] = {}
        for frame in frames:
            name = frame.conv
            if name in batch.convs or name in wanted:
                continue
            shard = shard_of(name)
            found = batch.remembered[shard].convs.get(name)
            if found is None:
                wanted[name] = shard
            else:
                batch.convs[name] = found
        if wanted:
            await self._load(conn, batch, wanted)

    async def _load(self, conn: Connection, batch: _Batch, wanted: dict[str, int]) -> None:
        """Read in statements of their own: the one that waited for the lock sees what was before it."""
        heads = await conn.fetch(HEADS, list(wanted.values()), list(wanted))
        members: dict[str, list[str]] = {name: [] for name, *_ in heads if name[0] == "g"}
        if members:
            shards = [wanted[name] for name in members]
            for name, user in await conn.fetch(MEMBERS, shards, list(members)):
                members[name].append(user)
        for name, epoch, seq, cseq in heads:
            people = named_members(name) or tuple(members[name])
            conv = Conv(wanted[name], name, epoch, people, is_new=False)
            conv.seq, conv.cseq = seq, cseq
            self._remember(batch, conv)

    def _remember(self, batch: _Batch, conv: Conv) -> None:
        self._room -= 1 + len(conv.members) // 16
        if self._room < 0:
            for remembered in self._remembered.values():
                remembered.convs.clear()
            self._room = CACHED_CONVS
        batch.remembered[conv.shard].convs[conv.name] = batch.convs[conv.name] = conv

    def _forget(self, shards: Iterable[int]) -> None:
        for shard in shards:
            self._remembered.pop(shard, None)

    # ------------------------------------------------------------------------------------------ deciding

    def _frame(self, batch: _Batch, frame: AppendFrame, unknown: frozenset[str]) -> AppendedFrame:
        conv, refusal = self._admit(batch, frame, unknown)
        if refusal is not None:
            if batch.known is None:
                raise _NeedsCare
            items = self._items(batch, frame, conv, refusal)
            if conv is None:
                return AppendedFrame(frame.conv, 0, tuple(items), ())
            return AppendedFrame(frame.conv, conv.epoch, tuple(items), conv.members)
        assert conv is not None
        before = conv.seq
        items = self._items(batch, frame, conv, None)
        if frame.read_seq and frame.sender in conv.people:
            key = (frame.conv, frame.sender)
            seq, has_version = batch.reads.get(key, (0, False))
            batch.reads[key] = (max(seq, min(frame.read_seq, conv.seq)), has_version or conv.seq > before)
        return AppendedFrame(frame.conv, conv.epoch, tuple(items), conv.members)

    def _admit(
        self, batch: _Batch, frame: AppendFrame, unknown: frozenset[str]
    ) -> tuple[Conv | None, AppendStatus | None]:
        """The conversation, to be created if need be, and why the frame is refused, None if it is not."""
        conv = batch.convs.get(frame.conv)
        members = named_members(frame.conv) if conv is None else conv.members
        if members is None:
            return None, AppendStatus.UNKNOWN_GROUP
        if frame.conv[0] != "s" and frame.sender not in members:
            return conv, AppendStatus.NOT_MEMBER
        if frame.require_known and unknown and frame.conv[0] != "g":
            for user in members:
                if user != frame.sender and user in unknown:
                    # Nothing is created: a stranger must not fill the store with names.
                    return conv, AppendStatus.UNKNOWN_USER
        if conv is None:
            conv = Conv(shard_of(frame.conv), frame.conv, EPOCH, members, is_new=True)
            self._remember(batch, conv)
        return conv, None

    def _items(
        self, batch: _Batch, frame: AppendFrame, conv: Conv | None, refusal: AppendStatus | None
    ) -> list[Appended]:
        items: list[Appended] = []
        for item in frame.items:
            content = content_hash(item)
            if batch.known is not None:
                first = batch.known.get((frame.conv, frame.sender, item.client_id))
                if first is not None:
                    if first[0] == content:
                        items.append(first[1])
                        continue
                    items.append(Appended(AppendStatus.CONFLICT))
                    break
            if refusal is not None:
                items.append(Appended(refusal))
                break
            if item.loss_time_ms and batch.now_ms > item.loss_time_ms:
                if batch.known is None:
                    raise _NeedsCare
                items.append(Appended(AppendStatus.EXPIRED))
                break
            assert conv is not None
            items.append(self._store(batch, frame, conv, item, content))
        items += [_NOT_REACHED] * (len(frame.items) - len(items))
        return items

    def _store(
        self, batch: _Batch, frame: AppendFrame, conv: Conv, item: AppendItem, content: bytes
    ) -> Appended:
        if conv.is_new:
            batch.made.append(conv)
            conv.is_new = False
        now_ms = batch.now_ms
        loss_ms = item.loss_time_ms or (now_ms + item.ttl_ms if item.ttl_ms else 0)
        msg_id = batch.mint(conv.shard)
        conv.seq += 1
        if item.countable:
            conv.cseq += 1
        mentions = "\n".join(item.mentions) if item.mentions or item.flags & _MENTION_ALL else None
        batch.rows.append(
            (
                conv.shard, msg_id, conv.name, conv.seq, conv.cseq, frame.sender, item.client_id,
                int(item.kind), int(item.flags), item.countable, now_ms, loss_ms, content, mentions,
                item.body,
            )
        )  # fmt: skip
        if batch.known is not None:
            again = Appended(AppendStatus.REPEATED, msg_id, conv.seq, conv.cseq, now_ms, loss_ms)
            batch.known[frame.conv, frame.sender, item.client_id] = (content, again)
        return Appended(_STORED, msg_id, conv.seq, conv.cseq, now_ms, loss_ms)

    # ------------------------------------------------------------------------------------------- writing

    async def _write(self, conn: Connection, batch: _Batch) -> None:
        if batch.made:
            shards = [conv.shard for conv in batch.made]
            named = [(conv.shard, conv.name, user) for conv in batch.made for user in conv.members]
            users = map(list, zip(*named, strict=True))
            await conn.execute(MAKE_CONVS, shards, [conv.name for conv in batch.made], *users)
        if batch.rows:
            await self._insert(conn, batch)
        if batch.reads:
            await self._move_marks(conn, batch)
        touched = {row[0] for row in batch.rows}
        for shard, remembered in batch.remembered.items():
            if shard not in touched:
                remembered.turn = batch.turns[shard]
        self._clock.met(max(batch.last.values()))

    async def _insert(self, conn: Connection, batch: _Batch) -> None:
        columns = [list(column) for column in zip(*batch.rows, strict=True)]
        assert len(columns) == _COLUMNS
        newest: dict[int, int] = {}
        for row in batch.rows:
            newest[row[0]] = row[1]
        ahead_ms = [ms_of(last) - batch.now_ms for last in newest.values()]
        try:
            await conn.execute(APPEND, list(newest), list(newest.values()), ahead_ms, batch.turn, *columns)
        except UniqueViolationError as error:
            if batch.known is None:
                raise _NeedsCare from error
            raise

    async def _move_marks(self, conn: Connection, batch: _Batch) -> None:
        """The marks that came with frames; a version is minted only if no message brings one."""
        rows = []
        for (conv, user), (seq, has_version) in sorted(batch.reads.items()):
            shard = shard_of(conv)
            if seq:
                rows.append((shard, conv, user, seq, 0 if has_version else batch.mint(shard)))
        if rows:
            await conn.execute(MOVE_MARKS, *map(list, zip(*rows, strict=True)))
            for shard in {row[0] for row in rows if row[4]}:
                await conn.execute(MOVE_CLOCK, shard, batch.last[shard])


class _NeedsCare(Exception):
    """The batch is not all new: roll back, look every client_id up, begin again."""


async def lock(conn: Connection, database: Database, shards: list[int]) -> list[Any]:
    """(shard, last, turn) of rising shards, locked until the end of the transaction."""
    rows = await conn.fetch(LOCK, shards)
    if len(rows) != len(shards):
        raise StoreUnavailable(f"{database.name} no longer owns some of the shards {shards}")
    return rows


async def _look_up(
    conn: Connection, frames: Sequence[AppendFrame]
) -> dict[tuple[str, str, bytes], tuple[bytes, Appended]]:
    """What was stored before under the frames' client_ids: its content and the result to give again."""
    keys = [
        (shard_of(frame.conv), frame.conv, frame.sender, item.client_id)
        for frame in frames
        for item in frame.items
    ]
    found: dict[tuple[str, str, bytes], tuple[bytes, Appended]] = {}
    if keys:
        for conv, sender, client_id, content, *first in await conn.fetch(
            KNOWN, *map(list, zip(*keys, strict=True))
        ):
            found[conv, sender, client_id] = (content, Appended(AppendStatus.REPEATED, *first))
    return found
