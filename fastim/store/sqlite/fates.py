"""Obligations: who still owes what to whom, and what closed it.

An obligation is (message, user) for every member at that seq but the sender; control events (kind >= 32)
carry none, though they are streamed and moved over by cursors like everything with a seq.

For due rows and pushes it is **open** while it lies above the furthest cursor of the user's devices and no
fate row but PARKED covers it and its deadline has not passed. So a parked obligation is open: a device that
was sent it in a sync and did not ack gets a due row again (semantics.md, "Retry": neither acked, expired nor
recalled). Parking it a second time changes nothing and rings nobody: only what has no PARKED row is parked,
and only a park that parked something asks for a push.

A fate row covers at most FATE_SPAN seqs; longer ranges become several rows, so that all rows that touch a seq
lie within FATE_SPAN of it in the primary key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from fastim.model import Fate, is_expired
from fastim.store.rules import FATE_SPAN, FOREVER, WHOLE, Range, Span, merged
from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.names import Names

LOW: Final = 0xFFFF_FFFF
FIRST_CONTROL_KIND: Final = 32
_PARKED: Final = int(Fate.PARKED)
_PAGE: Final = 64


class Owed(NamedTuple):
    """A message of others above the user's furthest cursor that no fate row closes."""

    seq: int
    expired: bool
    parked: bool


def furthest(sql: Sql, person: int, conv: int) -> int:
    """The furthest cursor of the user's devices."""
    return int(
        sql.value(
            "SELECT max(seq) FROM device JOIN cursor ON spot = ? | id WHERE person = ?", (conv << 32, person)
        )
        or 0
    )


def spans_of(sql: Sql, names: Names, person: int, conv: int) -> tuple[Span, ...]:
    """What a person is shown of a conversation, by ids; () for a stranger."""
    named = names.named(conv)
    if named is not None:
        return WHOLE if person in named else ()
    rows = sql.rows(
        "SELECT join_seq, leave_seq FROM member WHERE person = ? AND conv = ? ORDER BY join_seq",
        (person, conv),
    )
    return tuple(Span(join, leave - 1 if leave else FOREVER) for join, leave in rows)


def add_fates(sql: Sql, rows: Iterable[Sequence[Any]]) -> None:
    """rows: (seat, to_seq, fate, device, from_seq, node, attempt, ts_ms). Written twice is written once."""
    ready: list[Sequence[Any]] = []
    for row in rows:
        if row[1] - row[4] < FATE_SPAN:
            ready.append(row)
            continue
        seat, to_seq, fate, device, from_seq, *rest = row
        for first in range(from_seq, to_seq + 1, FATE_SPAN):
            ready.append((seat, min(first + FATE_SPAN - 1, to_seq), fate, device, first, *rest))
    sql.many("INSERT INTO fate VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", ready)


def owed(
    sql: Sql, names: Names, pair: int, now_ms: int, from_seq: int = 0, to_seq: int = FOREVER
) -> Iterator[Owed]:
    """What no fate but PARKED covers, in seq order. O(what is read): closed ranges are jumped over."""
    person, conv = pair >> 32, pair & LOW
    floor = max(furthest(sql, person, conv), from_seq - 1)
    closed: list[Range] = []
    parked: list[Range] = []
    for first, last, fate in sql.rows(
        "SELECT from_seq, to_seq, fate FROM fate WHERE seat = ? AND to_seq > ?", (conv << 32 | person, floor)
    ):
        (parked if fate == _PARKED else closed).append((first, last))
    closed, parked = merged(closed), merged(parked)
    for span in spans_of(sql, names, person, conv):
        position, last = max(floor, span.first - 1), min(to_seq, span.last)
        while position < last:
            rows = sql.rows(
                "SELECT seq, loss_time_ms FROM message WHERE conv = ? AND seq > ? AND seq <= ?"
                " AND sender <> ? AND kind < 32 AND NOT recalled ORDER BY seq LIMIT ?",
                (conv, position, last, person, _PAGE),
            )
            for seq, loss_ms in rows:
                if seq <= position:
                    continue
                position = max(seq, _end(closed, seq))
                if position == seq and not _covers(closed, seq):
                    yield Owed(seq, is_expired(loss_ms, now_ms), _covers(parked, seq))
            if len(rows) < _PAGE:
                break


def _covers(ranges: list[Range], seq: int) -> bool:
    return any(first <= seq <= last for first, last in ranges)


def _end(ranges: list[Range], seq: int) -> int:
    """The end of the range around seq, 0 if there is none."""
    for first, last in ranges:
        if first <= seq <= last:
            return last
    return 0
