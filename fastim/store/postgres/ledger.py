"""Recovery and audit: each obligation's state, from timeline, fate rows, due rows and settled mark.

The statements of one page follow each other: mark, due rows, fates. A due row that is gone by the second had
its fate before, so the third finds it; nothing is called LOST that is only on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from fastim.model import Fate, Message, is_expired
from fastim.store.base import DueRow, FateRow, Obligation, ObligationState, OpenRange, Trace, shard_of
from fastim.store.postgres.databases import Database, gather
from fastim.store.postgres.order import Order, seal
from fastim.store.postgres.owed import Pair, columns
from fastim.store.postgres.people import Devices
from fastim.store.rules import FATE_SPAN, FOREVER, WHOLE, Span, named_members, seen

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

_PARKED: Final = int(Fate.PARKED)
_STATES: Final = {int(state): state for state in ObligationState}
_MOST_MESSAGES: Final = 10_000
_MOST_OBLIGATIONS: Final = 50_000
"""Large groups make many of few messages: a page ends with the message that reaches this."""

OWED_COLUMNS: Final = "m.conv, m.seq, m.client_id, m.sender, m.kind, m.loss_time_ms"
MARK: Final = "SELECT value FROM mark WHERE name = 'settled'"
SETTLE: Final = "UPDATE mark SET value = $1 WHERE name = 'settled' AND value < $1"
OPEN_RANGES: Final = (
    "SELECT t.* FROM (SELECT m.conv, min(m.seq), max(m.seq), min(m.sender), max(m.sender),"
    " min(m.kind) AS kind FROM shard s"
    " CROSS JOIN LATERAL (SELECT * FROM message m WHERE m.shard = s.shard AND m.msg_id > $1"
    " AND m.msg_id <= $2) m GROUP BY m.shard, m.conv) t WHERE t.kind < 32 ORDER BY t.conv"
)
SPANS_OF: Final = (
    "SELECT w.conv, b.user_id, b.join_seq, b.leave_seq"
    " FROM unnest($1::smallint[], $2::text[]) AS w(shard, conv) CROSS JOIN LATERAL (SELECT * FROM member b"
    " WHERE b.shard = w.shard AND b.conv = w.conv ORDER BY b.number) b ORDER BY w.conv, b.number"
)
FATES_OF: Final = (
    "SELECT f.conv, f.user_id, f.from_seq, f.to_seq, f.fate, f.device, f.node, f.attempt, f.ts_ms"
    " FROM unnest($1::smallint[], $2::text[], $3::text[], $4::bigint[], $5::bigint[])"
    " AS w(shard, conv, user_id, first, last) JOIN fate f ON f.shard = w.shard AND f.conv = w.conv"
    f" AND f.user_id = w.user_id AND f.to_seq >= w.first AND f.to_seq < w.last + {FATE_SPAN}"
    " AND f.from_seq <= w.last"
)
DUE_OF: Final = (
    "SELECT d.conv, d.user_id, d.from_seq, d.due_at_ms, d.attempt"
    " FROM unnest($1::smallint[], $2::text[], $3::text[]) AS w(shard, conv, user_id)"
    " JOIN due d ON d.shard = w.shard AND d.conv = w.conv AND d.user_id = w.user_id"
)
CURSORS_OF: Final = (
    "SELECT c.user_id, c.device, c.seq FROM cursor c WHERE c.shard = $1 AND c.conv = $2"
    " AND c.user_id = ANY($3::text[])"
)


class _Claims:
    """What is recorded about one (user, conv) between two seqs."""

    __slots__ = ("due", "fates", "spans")

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self.spans = spans
        self.fates: list[Any] = []
        self.due: Any = None

    def state(self, seq: int, loss_ms: int, now_ms: int, unsettled: bool) -> ObligationState:
        """The strongest fate; a parked one past its deadline has expired; else what is in flight."""
        fate = min((fate for first, last, fate, *_ in self.fates if first <= seq <= last), default=0)
        if fate == _PARKED and is_expired(loss_ms, now_ms):
            return ObligationState.EXPIRED
        if fate:
            return _STATES[fate]
        if self.due is not None and self.due[0] <= seq:
            return ObligationState.DUE
        return ObligationState.UNSETTLED if unsettled else ObligationState.LOST


class Ledger:
    """Over all databases."""

    def __init__(self, databases: Sequence[Database], order: Order, devices: Devices) -> None:
        self._databases = databases
        self._order = order
        self._devices = devices

    # ------------------------------------------------------------------------------------------ the mark

    async def settled_mark(self) -> int:
        """The lowest of all databases: each moves by itself."""
        rows = await gather([database.row(MARK) for database in self._databases])
        return min(int(row[0]) for row in rows)

    async def settle(self, msg_id: int) -> None:
        """Every shard is sealed at the mark, so no message is ever committed below it."""
        mark = min(msg_id, await self._order.head())

        async def work(conn: Connection) -> None:
            await seal(conn, mark)
            await conn.execute(SETTLE, mark)

        if mark > 0:
            await gather([database.transact(work) for database in self._databases])

    async def unsettled(self, upto_msg_id: int) -> list[OpenRange]:
        """A member who sent all of a range is owed nothing of it and left out."""
        upto = min(upto_msg_id, await self._order.head())
        if upto <= 0:
            return []
        await self._order.seal(self._databases, upto)
        found = await gather([self._open_ranges(database, upto) for database in self._databases])
        return [one for ranges in found for one in ranges]

    async def _open_ranges(self, database: Database, upto: int) -> list[OpenRange]:
        (mark,) = await database.row(MARK)
        rows = await database.fetch(OPEN_RANGES, mark, upto)
        spans = await self._spans(database, [row[0] for row in rows])
        found = []
        for conv, first, last, one, other, _ in rows:
            only = one if one == other else ""
            members = {
                user
                for user, shown in spans[conv].items()
                if user != only and any(span.first <= last and first <= span.last for span in shown)
            }
            if members:
                found.append(OpenRange(conv, first, last, tuple(sorted(members))))
        return found

    # ----------------------------------------------------------------------------------------- the audit

    async def obligations(
        self, after_msg_id: int, limit_messages: int, now_ms: int
    ) -> tuple[list[Obligation], int]:
        limit = min(max(limit_messages, 1), _MOST_MESSAGES)
        page = await self._order.page(OWED_COLUMNS, after_msg_id, limit)
        if not page:
            return [], 0
        by_database: dict[Database, list[Any]] = {}
        for database, row in page:
            by_database.setdefault(database, []).append(row[2:])
        answers = await gather(
            [self._derive(database, rows, now_ms) for database, rows in by_database.items()]
        )
        derived = {msg_id: owed for answer in answers for msg_id, owed in answer}
        found: list[Obligation] = []
        for _, row in page:
            found += derived[row[2]]
            if len(found) >= _MOST_OBLIGATIONS:
                return found, row[2]
        return found, page[-1][1][2]

    async def _derive(
        self, database: Database, rows: list[Any], now_ms: int
    ) -> list[tuple[int, list[Obligation]]]:
        """The obligations of each message: (msg_id, conv, seq, client_id, sender, kind, loss_time_ms)."""
        (mark,) = await database.row(MARK)
        bounds: dict[str, tuple[int, int]] = {}
        for _, conv, seq, *_ in rows:
            first, last = bounds.get(conv, (seq, seq))
            bounds[conv] = (min(first, seq), max(last, seq))
        claims = await self._claims(database, bounds)
        by_conv: dict[str, list[tuple[str, _Claims]]] = {}
        for (conv, user), claim in claims.items():
            by_conv.setdefault(conv, []).append((user, claim))
        found = []
        for msg_id, conv, seq, client_id, sender, kind, loss_ms in rows:
            owed = []
            for user, claim in by_conv.get(conv, ()) if kind < 32 else ():
                if user != sender and seen(claim.spans, seq):
                    state = claim.state(seq, loss_ms, now_ms, msg_id > mark)
                    owed.append(Obligation(msg_id, conv, seq, client_id, sender, user, state))
            found.append((msg_id, owed))
        return found

    async def _claims(self, database: Database, bounds: dict[str, tuple[int, int]]) -> dict[Pair, _Claims]:
        """By (conv, user), in join order."""
        spans = await self._spans(database, bounds)
        claims = {(conv, user): _Claims(shown) for conv in bounds for user, shown in spans[conv].items()}
        keys = columns(claims)
        for conv, user, *due in await database.fetch(DUE_OF, *keys):
            claims[conv, user].due = due
        firsts, lasts = [bounds[conv][0] for conv, _ in claims], [bounds[conv][1] for conv, _ in claims]
        for conv, user, *fate in await database.fetch(FATES_OF, *keys, firsts, lasts):
            claims[conv, user].fates.append(fate)
        return claims

    async def _spans(
        self, database: Database, convs: Iterable[str]
    ) -> dict[str, dict[str, tuple[Span, ...]]]:
        """What each member, past ones included, is shown."""
        found: dict[str, dict[str, tuple[Span, ...]]] = {}
        groups = []
        for conv in convs:
            named = named_members(conv)
            if named is None:
                groups.append(conv)
                found[conv] = {}
            else:
                found[conv] = dict.fromkeys(named, WHOLE)
        if groups:
            shards = [shard_of(conv) for conv in groups]
            for conv, user, join, leave in await database.fetch(SPANS_OF, shards, groups):
                span = Span(join, leave - 1 if leave else FOREVER)
                found[conv][user] = (*found[conv].get(user, ()), span)
        return found

    async def trace(self, database: Database, message: Message, now_ms: int) -> Trace:
        conv, seq = message.conv, message.seq
        row = (
            message.msg_id, conv, seq, message.client_id, message.sender, message.kind, message.loss_time_ms,
        )  # fmt: skip
        ((_, obligations),) = await self._derive(database, [row], now_ms)
        claims = await self._claims(database, {conv: (seq, seq)})
        users = [user for _, user in claims]
        stored = {
            (user, device): cursor
            for user, device, cursor in await database.fetch(CURSORS_OF, shard_of(conv), conv, users)
        }
        devices = await gather([self._devices.of(user) for user in users])
        fates = [
            FateRow(user, device, conv, first, last, Fate(fate), node, attempt, ts_ms)
            for (_, user), claim in claims.items()
            for first, last, fate, device, node, attempt, ts_ms in claim.fates
        ]
        fates.sort(key=lambda row: row.ts_ms)
        due = [
            DueRow(user, conv, *claim.due)
            for (_, user), claim in claims.items()
            if claim.due is not None and claim.due[0] <= seq
        ]
        cursors = [
            (one.user, one.device, stored.get((one.user, one.device), 0))
            for found in devices
            for one in sorted(found, key=lambda one: one.device)
        ]
        return Trace(message, tuple(obligations), tuple(fates), tuple(due), tuple(cursors))
