"""Obligations: who still owes what to whom, and what closed it; many (user, conv) in one question.

The words are those of the embedded store (fastim/store/sqlite/fates.py): an obligation is **owed** while it
lies above the furthest cursor of the user's devices and no fate row but PARKED covers it; **open** if
moreover its deadline has not passed. So a parked obligation is open.

O1  a question is asked in a statement that starts after the due rows it is about were locked, so it sees
    whatever committed before anybody else gave those rows up          tests/contract/test_store_postgres.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from fastim.model import Fate
from fastim.store.base import shard_of
from fastim.store.rules import FATE_SPAN, cut, named_members

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

PARKED: Final = int(Fate.PARKED)
EXPIRED: Final = int(Fate.EXPIRED)

Pair = tuple[str, str]
"""(conv, user), the order in which rows are locked"""

FURTHEST: Final = (
    "(SELECT coalesce(max(c.seq), 0) FROM cursor c"
    " WHERE c.shard = w.shard AND c.conv = w.conv AND c.user_id = w.user_id)"
)
SHOWN: Final = (
    "(left(w.conv, 1) <> 'g' OR EXISTS (SELECT FROM member b WHERE b.shard = w.shard AND b.conv = w.conv"
    " AND b.user_id = w.user_id AND b.join_seq <= m.seq AND (b.leave_seq = 0 OR m.seq < b.leave_seq)))"
)
_COVERED: Final = (
    "EXISTS (SELECT FROM fate f WHERE f.shard = w.shard AND f.conv = w.conv AND f.user_id = w.user_id"
    f" AND f.to_seq >= m.seq AND f.to_seq < m.seq + {FATE_SPAN} AND f.from_seq <= m.seq AND f.fate "
)
CLOSED: Final = f"{_COVERED}<> {PARKED})"
IS_PARKED: Final = f"{_COVERED}= {PARKED})"
ALIVE: Final = "(m.loss_time_ms = 0 OR m.loss_time_ms >= $4)"
"""$4: now"""
MINE: Final = (
    "m.shard = w.shard AND m.conv = w.conv AND m.sender <> w.user_id AND m.kind < 32 AND NOT m.recalled"
)
_OWED: Final = f"FROM message m WHERE {MINE} AND m.seq > w.floor AND {SHOWN} AND NOT {CLOSED}"

OPEN: Final = (
    "SELECT w.conv, w.user_id, w.open, CASE WHEN w.open THEN NULL ELSE"
    f" ARRAY(SELECT m.seq {_OWED} ORDER BY m.seq) END FROM ("
    f"SELECT w.*, EXISTS (SELECT {_OWED} AND {ALIVE}) AS open FROM ("
    f"SELECT w.*, {FURTHEST} AS floor FROM unnest($1::smallint[], $2::text[], $3::text[])"
    " AS w(shard, conv, user_id)) w) w"
)
OWED: Final = (
    f"SELECT w.conv, w.user_id, m.seq, NOT {ALIVE}"
    f" FROM (SELECT w.*, greatest({FURTHEST}, w.first - 1) AS floor"
    " FROM unnest($1::smallint[], $2::text[], $3::text[], $5::bigint[], $6::bigint[])"
    " AS w(shard, conv, user_id, first, last)) w JOIN LATERAL (SELECT m.* FROM message m"
    f" WHERE {MINE} AND m.seq > w.floor AND m.seq <= w.last AND {SHOWN} AND NOT {CLOSED}"
    f" AND (NOT {ALIVE} OR NOT {IS_PARKED})) m ON TRUE ORDER BY w.conv, w.user_id, m.seq"
)
ADD_FATES: Final = (
    "INSERT INTO fate (shard, conv, user_id, device, from_seq, to_seq, fate, node, attempt, ts_ms)"
    " SELECT * FROM unnest($1::smallint[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],"
    " $7::smallint[], $8::text[], $9::int[], $10::bigint[]) ON CONFLICT DO NOTHING"
)


class FateEntry(NamedTuple):
    """A fate row to be written."""

    conv: str
    user: str
    device: str
    first: int
    last: int
    fate: int
    node: str
    attempt: int
    ts_ms: int


class Owed(NamedTuple):
    """A message of others above the user's furthest cursor that no fate row closes. The parked are left out
    unless they expired: parking them again changes nothing."""

    seq: int
    expired: bool


def columns(pairs: Iterable[Pair]) -> tuple[list[int], list[str], list[str]]:
    """shards, convs, users."""
    pairs = list(pairs)
    return [shard_of(conv) for conv, _ in pairs], [conv for conv, _ in pairs], [user for _, user in pairs]


def may_owe(pair: Pair) -> bool:
    """False for who is no member by the conversation's very name."""
    named = named_members(pair[0])
    return named is None or pair[1] in named


async def ask_open(conn: Connection, pairs: Iterable[Pair], now_ms: int) -> dict[Pair, list[int] | None]:
    """None where something is open, else what is owed and expired, rising."""
    pairs = list(pairs)
    found: dict[Pair, list[int] | None] = {pair: [] for pair in pairs}
    wanted = [pair for pair in pairs if may_owe(pair)]
    if wanted:
        for conv, user, is_open, expired in await conn.fetch(OPEN, *columns(wanted), now_ms):
            found[conv, user] = None if is_open else expired
    return found


async def ask_owed(
    conn: Connection, ranges: dict[Pair, tuple[int, int]], now_ms: int
) -> dict[Pair, list[Owed]]:
    """What is owed between two seqs (both included), rising, but for the parked."""
    found: dict[Pair, list[Owed]] = {pair: [] for pair in ranges}
    wanted = [pair for pair in ranges if may_owe(pair)]
    if wanted:
        bounds = [ranges[pair][0] for pair in wanted], [ranges[pair][1] for pair in wanted]
        for conv, user, seq, expired in await conn.fetch(OWED, *columns(wanted), now_ms, *bounds):
            found[conv, user].append(Owed(seq, expired))
    return found


def fate_columns(entries: Sequence[FateEntry]) -> tuple[list[object], ...]:
    """The arguments of ADD_FATES; long ranges become several rows."""
    rows = [
        (shard_of(e.conv), e.conv, e.user, e.device, first, last, e.fate, e.node, e.attempt, e.ts_ms)
        for e in entries
        for first, last in cut(e.first, e.last)
    ]
    # In one order, so that two transactions that write the same facts wait for each other and do not embrace.
    rows.sort(key=lambda row: row[1:7])
    return tuple(map(list, zip(*rows, strict=True))) if rows else ([],) * 10


async def add_fates(conn: Connection, entries: Sequence[FateEntry]) -> None:
    """Written twice is written once."""
    if entries:
        await conn.execute(ADD_FATES, *fate_columns(entries))
