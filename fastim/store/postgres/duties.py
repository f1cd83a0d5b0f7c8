"""What nodes and dispatch write about the obligations of one database: cursors and fates, due rows, parks.

One call is one transaction in each database that it touches, and everything about a (user, conv) lies in one
(Store.S13). Every call that writes, fires or clears a due row locks it first and then asks whether an
obligation of that (user, conv) is open (owed.py): asked the other way round, a row could be cleared that
somebody else just asked for because of a message that the asker did not see yet.

Rows are locked in one order: cursors, due rows, pushes, each by (conv, user).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from fastim.store.base import (
    Behind,
    DueFiring,
    DueRequest,
    DueRow,
    Park,
    Settled,
    shard_of,
)
from fastim.store.postgres.databases import Database
from fastim.store.postgres.owed import (
    EXPIRED,
    PARKED,
    FateEntry,
    Pair,
    add_fates,
    ask_open,
    ask_owed,
    columns,
    fate_columns,
)
from fastim.store.postgres.push import PushBox
from fastim.store.rules import FOREVER, merged, runs

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

_KNOWN_CONVS: Final = 65_536

SETTLE: Final = (
    "WITH wanted AS MATERIALIZED (SELECT * FROM unnest($11::smallint[], $12::text[], $13::text[],"
    " $14::text[], $15::bigint[], $16::bigint[]) AS w(shard, conv, user_id, device, first, last)),"
    " facts AS (INSERT INTO fate (shard, conv, user_id, device, from_seq, to_seq, fate, node, attempt, ts_ms)"
    " SELECT * FROM unnest($1::smallint[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],"
    " $7::smallint[], $8::text[], $9::int[], $10::bigint[]) ON CONFLICT DO NOTHING),"
    " stood AS MATERIALIZED (SELECT k.*, coalesce(c.seq, 0) AS seq FROM"
    " (SELECT DISTINCT shard, conv, user_id, device FROM wanted) k LEFT JOIN cursor c ON c.shard = k.shard"
    " AND c.conv = k.conv AND c.user_id = k.user_id AND c.device = k.device),"
    " stands AS MATERIALIZED (SELECT s.shard, s.conv, s.user_id, s.device, s.seq AS before,"
    " greatest(s.seq, max(w.last) FILTER (WHERE w.first - 1 <= s.seq)) AS seq, max(w.first) AS first"
    " FROM stood s JOIN wanted w ON w.shard = s.shard AND w.conv = s.conv AND w.user_id = s.user_id"
    " AND w.device = s.device GROUP BY s.shard, s.conv, s.user_id, s.device, s.seq),"
    " moved AS (INSERT INTO cursor (shard, conv, user_id, device, seq)"
    " SELECT shard, conv, user_id, device, seq FROM stands WHERE seq > before"
    " ORDER BY conv, user_id, device ON CONFLICT (conv, user_id, device, shard)"
    " DO UPDATE SET seq = greatest(cursor.seq, excluded.seq))"
    " SELECT s.conv, s.user_id, s.device, s.seq, s.seq > s.before, CASE WHEN s.first > s.seq + 1 THEN"
    " (SELECT max(m.seq) FROM message m WHERE m.shard = s.shard AND m.conv = s.conv) END,"
    " CASE WHEN s.first > s.seq + 1 THEN"
    " (SELECT k.epoch FROM conv k WHERE k.shard = s.shard AND k.conv = s.conv) END FROM stands s"
)
"""Facts and cursors at once: (conv, user, device, cursor, if it moved, head and epoch if there is a gap).

The ranges of one device are merged, so that none of them leads on from another: from a cursor, the highest
end of those that begin at or below its next seq is where it comes to stand.
"""
EXISTING: Final = (
    "SELECT w.conv FROM unnest($1::smallint[], $2::text[]) AS w(shard, conv)"
    " JOIN conv k ON k.shard = w.shard AND k.conv = w.conv"
)
LOCK_DUE: Final = (
    "SELECT d.conv, d.user_id, d.from_seq, d.due_at_ms, d.attempt, d.holder"
    " FROM unnest($1::smallint[], $2::text[], $3::text[]) AS w(shard, conv, user_id)"
    " JOIN due d ON d.shard = w.shard AND d.conv = w.conv AND d.user_id = w.user_id"
    " ORDER BY d.conv, d.user_id FOR UPDATE OF d"
)
READY_DUE: Final = (
    "SELECT d.conv, d.user_id, d.from_seq, d.due_at_ms, d.attempt FROM due d WHERE d.ready_ms <= $1"
    " ORDER BY d.ready_ms, d.conv, d.user_id LIMIT $2 FOR UPDATE SKIP LOCKED"
)
ADD_DUE: Final = (
    "INSERT INTO due (shard, conv, user_id, from_seq, due_at_ms, ready_ms, attempt)"
    " SELECT w.*, w.due_at_ms, 0 FROM unnest($1::smallint[], $2::text[], $3::text[], $4::bigint[],"
    " $5::bigint[]) AS w(shard, conv, user_id, from_seq, due_at_ms)"
    " ON CONFLICT DO NOTHING RETURNING conv, user_id"
)
CHANGE_DUE: Final = (
    "UPDATE due d SET from_seq = w.from_seq, due_at_ms = w.due_at_ms, ready_ms = coalesce(w.ready_ms,"
    " d.ready_ms), attempt = w.attempt, holder = w.holder FROM unnest($1::smallint[], $2::text[], $3::text[],"
    " $4::bigint[], $5::bigint[], $6::bigint[], $7::int[], $8::text[])"
    " AS w(shard, conv, user_id, from_seq, due_at_ms, ready_ms, attempt, holder)"
    " WHERE d.shard = w.shard AND d.conv = w.conv AND d.user_id = w.user_id"
)
CLEAR_DUE: Final = (
    "DELETE FROM due d USING unnest($1::smallint[], $2::text[], $3::text[]) AS w(shard, conv, user_id)"
    " WHERE d.shard = w.shard AND d.conv = w.conv AND d.user_id = w.user_id"
)
NEXT_DUE: Final = "SELECT d.ready_ms FROM due d ORDER BY d.ready_ms LIMIT 1"


class _Due:
    """A due row that this transaction has locked, or is about to write."""

    __slots__ = ("attempt", "changed", "due_at_ms", "from_seq", "holder", "is_new", "ready_ms")

    def __init__(
        self, from_seq: int, due_at_ms: int, attempt: int = 0, holder: str | None = None, is_new: bool = False
    ) -> None:
        self.from_seq = from_seq
        self.due_at_ms = due_at_ms
        self.attempt = attempt
        self.holder = holder
        self.ready_ms: int | None = None
        """None: as it was."""
        self.is_new = is_new
        self.changed = is_new

    def fold(self, request: DueRequest) -> None:
        if request.from_seq < self.from_seq:
            self.from_seq, self.changed = request.from_seq, True
        if request.urgent and request.due_at_ms < self.due_at_ms:
            self.due_at_ms, self.changed = request.due_at_ms, True
            if self.holder is None:
                self.ready_ms = request.due_at_ms


class Duties:
    """The due rows of one database, and what moves with them."""

    def __init__(self, database: Database, push: PushBox) -> None:
        self._db = database
        self._push = push
        self._known: set[str] = set()

    # -------------------------------------------------------------------------------------------- flush

    async def flush(
        self, settled: Sequence[Settled], due: Sequence[DueRequest], node: str, now_ms: int
    ) -> list[tuple[str, str, Behind]]:
        """The gaps. One transaction (S13). `settled` holds only conversations that exist."""

        async def work(conn: Connection) -> list[tuple[str, str, Behind]]:
            moved: set[Pair] = set()
            gaps: list[tuple[str, str, Behind]] = []
            if settled:
                gaps = await _settle(conn, settled, node, now_ms, moved)
            touched = {(one.conv, one.user) for one in settled}
            await self._follow(conn, touched, moved, due, node, now_ms)
            return gaps

        return await self._db.transact(work)

    async def existing(self, convs: Iterable[str]) -> set[str]:
        """Which of the conversations hold anything. That is for ever, so it is remembered."""
        wanted = set(convs)
        found = wanted & self._known
        names = list(wanted - found)
        if names:
            rows = await self._db.fetch(EXISTING, [shard_of(name) for name in names], names)
            fresh = {name for (name,) in rows}
            if len(self._known) + len(fresh) > _KNOWN_CONVS:
                self._known = set()
            self._known |= fresh
            found |= fresh
        return found

    async def _follow(
        self,
        conn: Connection,
        touched: set[Pair],
        moved: set[Pair],
        due: Sequence[DueRequest],
        node: str,
        now_ms: int,
    ) -> None:
        """What becomes of the due rows of who settled something, and of those that are asked for."""
        asked: dict[Pair, list[DueRequest]] = {}
        for request in due:
            asked.setdefault((request.conv, request.user), []).append(request)
        rows = await _lock_due(conn, touched | asked.keys())
        wanted = sorted({pair for pair in touched if pair in rows} | asked.keys())
        if not wanted:
            return
        fates: list[FateEntry] = []
        gone: list[Pair] = []
        for pair, expired in (await ask_open(conn, wanted, now_ms)).items():
            row = rows.get(pair)
            if expired is not None:
                fates += _expire(pair, expired, node, 0, now_ms)
                if row is not None:
                    gone.append(pair)
                    del rows[pair]
                continue
            if row is not None and row.attempt and pair in moved:
                row.attempt, row.changed = 0, True
            for request in asked.get(pair, ()):
                if row is None:
                    row = rows[pair] = _Due(request.from_seq, request.due_at_ms, is_new=True)
                row.fold(request)
        await add_fates(conn, fates)
        await _clear(conn, gone)
        await self._write(conn, rows, asked)

    async def _write(
        self, conn: Connection, rows: dict[Pair, _Due], asked: dict[Pair, list[DueRequest]]
    ) -> None:
        """Somebody else may insert a row that we did not find: then it is there to be locked and folded into,
        unless it is gone again."""
        await _change(conn, {pair: row for pair, row in rows.items() if row.changed and not row.is_new})
        new = sorted(pair for pair, row in rows.items() if row.is_new)
        while new:
            values = [[rows[pair].from_seq for pair in new], [rows[pair].due_at_ms for pair in new]]
            added = {(conv, user) for conv, user in await conn.fetch(ADD_DUE, *columns(new), *values)}
            new = [pair for pair in new if pair not in added]
            if not new:
                return
            found = await _lock_due(conn, new)
            for pair, row in found.items():
                for request in asked[pair]:
                    row.fold(request)
            await _change(conn, {pair: row for pair, row in found.items() if row.changed})
            new = [pair for pair in new if pair not in found]

    # ----------------------------------------------------------------------------------------- due rows

    async def next_ms(self) -> int:
        row = await self._db.row(NEXT_DUE)
        return 0 if row is None else int(row[0])

    async def claim(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[DueRow]:
        async def work(conn: Connection) -> list[DueRow]:
            ready = await conn.fetch(READY_DUE, now_ms, limit)
            rows = {(conv, user): _Due(first, at, attempt) for conv, user, first, at, attempt in ready}
            await self._keep_open(conn, rows, holder, now_ms)
            found = []
            for (conv, user), row in rows.items():
                row.holder, row.ready_ms = holder, now_ms + claim_ms
                found.append(DueRow(user, conv, row.from_seq, row.due_at_ms, row.attempt))
            await _change(conn, rows)
            return found

        return await self._db.transact(work)

    async def fire(self, holder: str, firings: Sequence[DueFiring], now_ms: int) -> list[bool]:
        async def work(conn: Connection) -> list[bool]:
            rows = await _lock_due(conn, {(firing.conv, firing.user) for firing in firings})
            rows = {pair: row for pair, row in rows.items() if row.holder == holder}
            await self._keep_open(conn, rows, holder, now_ms)
            results = []
            for firing in firings:
                row = rows.get((firing.conv, firing.user))
                if row is None or row.holder != holder:
                    results.append(False)
                    continue
                # A cursor that moved since the claim has set the attempts back: this firing is the first.
                row.attempt = min(firing.attempt, row.attempt + 1)
                row.due_at_ms = row.ready_ms = firing.next_due_ms
                row.holder = None
                results.append(True)
            await _change(conn, rows)
            return results

        return await self._db.transact(work)

    async def _keep_open(self, conn: Connection, rows: dict[Pair, _Due], node: str, now_ms: int) -> None:
        """Clear the rows with nothing open and take them out of `rows`."""
        fates: list[FateEntry] = []
        gone: list[Pair] = []
        for pair, expired in (await ask_open(conn, rows, now_ms)).items():
            if expired is not None:
                fates += _expire(pair, expired, node, rows.pop(pair).attempt, now_ms)
                gone.append(pair)
        await add_fates(conn, fates)
        await _clear(conn, gone)

    # --------------------------------------------------------------------------------------------- park

    async def park(self, parks: Sequence[Park], now_ms: int) -> list[bool]:
        async def work(conn: Connection) -> list[bool]:
            results = [False] * len(parks)
            left = list(enumerate(parks))
            while left:
                # Two parks of one (user, conv) see each other's work.
                round_: dict[Pair, tuple[int, Park]] = {}
                later = []
                for number, park in left:
                    pair = (park.conv, park.user)
                    if pair in round_:
                        later.append((number, park))
                    else:
                        round_[pair] = (number, park)
                done = await self._park(conn, {pair: park for pair, (_, park) in round_.items()}, now_ms)
                for pair, (number, _) in round_.items():
                    results[number] = pair in done
                left = later
            return results

        return await self._db.transact(work)

    async def _park(self, conn: Connection, parks: dict[Pair, Park], now_ms: int) -> set[Pair]:
        """A due row that reaches further down takes its obligations along: nothing else accounts for them.

        What it covers above to_seq stays with it.
        """
        rows = await _lock_due(conn, parks)
        ranges = {}
        for pair, park in parks.items():
            row = rows.get(pair)
            first = park.from_seq if row is None else min(park.from_seq, row.from_seq)
            ranges[pair] = (first, park.to_seq if row is None else FOREVER)
        fates: list[FateEntry] = []
        gone: list[Pair] = []
        ringing: dict[Pair, Park] = {}
        done: set[Pair] = set()
        for pair, owed in (await ask_owed(conn, ranges, now_ms)).items():
            park, row = parks[pair], rows.get(pair)
            inside = [one for one in owed if one.seq <= park.to_seq]
            fresh = [one.seq for one in inside if not one.expired]
            fates += _entries(pair, fresh, PARKED, "", park.attempt, now_ms)
            fates += _expire(pair, [one.seq for one in inside if one.expired], "", park.attempt, now_ms)
            if row is not None:
                above = [one for one in owed if one.seq > park.to_seq]
                alive = next((one.seq for one in above if not one.expired), 0)
                if alive:
                    row.changed, row.from_seq = True, alive
                else:
                    fates += _expire(pair, [one.seq for one in above], "", 0, now_ms)
                    gone.append(pair)
                    del rows[pair]
            if fresh:
                done.add(pair)
                if park.push or fresh[0] < park.from_seq:
                    ringing[pair] = park
        await add_fates(conn, fates)
        await _clear(conn, gone)
        await _change(conn, {pair: row for pair, row in rows.items() if row.changed})
        if ringing:
            await self._push.ask(conn, ringing, now_ms)
        return done


async def _settle(
    conn: Connection, settled: Sequence[Settled], node: str, now_ms: int, moved: set[Pair]
) -> list[tuple[str, str, Behind]]:
    """Write facts and cursors. Fills `moved`, returns the gaps."""
    ranges: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    fates = []
    for one in settled:
        ranges.setdefault((one.conv, one.user, one.device), []).append((one.from_seq, one.to_seq))
        if not one.own:
            fates.append(
                FateEntry(
                    one.conv, one.user, one.device, one.from_seq, one.to_seq, int(one.fate), node,
                    one.attempt, now_ms,
                )
            )  # fmt: skip
    wanted = [
        (shard_of(key[0]), *key, first, last) for key in sorted(ranges) for first, last in merged(ranges[key])
    ]
    rows = await conn.fetch(SETTLE, *fate_columns(fates), *map(list, zip(*wanted, strict=True)))
    gaps = []
    for conv, user, device, cursor, has_moved, head, epoch in rows:
        if has_moved:
            moved.add((conv, user))
        if head is not None:
            gaps.append((user, device, Behind(conv, cursor, head, epoch)))
    return gaps


async def _lock_due(conn: Connection, pairs: Iterable[Pair]) -> dict[Pair, _Due]:
    rows = await conn.fetch(LOCK_DUE, *columns(pairs))
    return {
        (conv, user): _Due(first, due_at_ms, attempt, holder)
        for conv, user, first, due_at_ms, attempt, holder in rows
    }


async def _change(conn: Connection, rows: dict[Pair, _Due]) -> None:
    if rows:
        found = rows.values()
        await conn.execute(
            CHANGE_DUE, *columns(rows), [row.from_seq for row in found], [row.due_at_ms for row in found],
            [row.ready_ms for row in found], [row.attempt for row in found], [row.holder for row in found],
        )  # fmt: skip


async def _clear(conn: Connection, pairs: list[Pair]) -> None:
    if pairs:
        await conn.execute(CLEAR_DUE, *columns(pairs))


def _expire(pair: Pair, seqs: list[int], node: str, attempt: int, now_ms: int) -> list[FateEntry]:
    return _entries(pair, seqs, EXPIRED, node, attempt, now_ms)


def _entries(pair: Pair, seqs: list[int], fate: int, node: str, attempt: int, now_ms: int) -> list[FateEntry]:
    conv, user = pair
    return [FateEntry(conv, user, "", first, last, fate, node, attempt, now_ms) for first, last in runs(seqs)]
