"""Unread, exactly:

    cseq(head) - cseq(mark) - own countable messages above the mark - recalled ones of others above it

mark = max(read mark, first seq the member is shown - 1). Own ones are a difference of running sums: `own` up
to the projected head, `base_own` up to base_seq; what lies outside of both is counted in the timeline, on
the shorter side of the mark. So the cost is O(1) but for what was sent or read since the last projection.

U1  equal to counting the timeline (recount)        tests/contract/store.py (S6), property test
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from fastim.store.rules import FOREVER, Span
from fastim.store.sqlite.files import Sql

_ROW: Final = (
    "SELECT version, head, cseq, own, read_seq, base_seq, base_cseq, base_own FROM user_conv WHERE pair = ?"
)


class Row(NamedTuple):
    """A row of user_conv without its key."""

    version: int
    head: int
    cseq: int
    own: int
    read_seq: int
    base_seq: int
    base_cseq: int
    base_own: int


_NO_ROW: Final = Row(0, 0, 0, 0, 0, 0, 0, 0)


class Mints(Protocol):
    """What a read mark needs of the minter."""

    def mint(self, now_ms: int) -> int: ...


def row_of(sql: Sql, pair: int) -> Row:
    """All zero if there is none yet."""
    row = sql.row(_ROW, (pair,))
    return _NO_ROW if row is None else Row(*row)


def head_of(sql: Sql, conv: int) -> tuple[int, int]:
    """(seq, cseq) of the newest message, zeros for an empty conversation."""
    row = sql.row("SELECT seq, cseq FROM message WHERE conv = ? ORDER BY seq DESC LIMIT 1", (conv,))
    return (0, 0) if row is None else (row[0], row[1])


def count_own(sql: Sql, conv: int, person: int, above: int, upto: int) -> int:
    """The user's own countable messages with above < seq <= upto."""
    if upto <= above:
        return 0
    return int(
        sql.value(
            "SELECT count(*) FROM message WHERE conv = ? AND seq > ? AND seq <= ? AND sender = ?"
            " AND countable",
            (conv, above, upto, person),
        )
    )


def cseq_at(sql: Sql, conv: int, seq: int) -> int:
    if seq <= 0:
        return 0
    return int(sql.value("SELECT cseq FROM message WHERE conv = ? AND seq = ?", (conv, seq)) or 0)


def unread_of(
    sql: Sql, conv: int, person: int, row: Row, head: tuple[int, int], spans: tuple[Span, ...]
) -> int:
    """How many of the conversation's messages the user has not read."""
    seq, cseq = head
    mark = row.read_seq
    if len(spans) != 1 or spans[0].first > 1 or spans[0].last != FOREVER:
        return count_unread(sql, conv, person, mark, spans)
    if mark >= seq:
        return 0
    if mark == row.base_seq:
        mark_cseq = row.base_cseq
        own = row.own - row.base_own + count_own(sql, conv, person, row.head, seq)
    else:
        mark_cseq = cseq_at(sql, conv, mark)
        own = _own_above(sql, conv, person, row, mark, seq)
    recalled = sql.value(
        "SELECT count(*) FROM message WHERE conv = ? AND seq > ? AND recalled AND countable AND sender <> ?",
        (conv, mark, person),
    )
    return cseq - mark_cseq - own - int(recalled)


def _own_above(sql: Sql, conv: int, person: int, row: Row, mark: int, seq: int) -> int:
    if seq - mark <= mark - row.base_seq or row.head < mark:
        return count_own(sql, conv, person, mark, seq)
    below = row.base_own + count_own(sql, conv, person, row.base_seq, mark)
    return row.own - below + count_own(sql, conv, person, row.head, seq)


def count_unread(sql: Sql, conv: int, person: int, mark: int, spans: tuple[Span, ...]) -> int:
    """The same from the timeline alone."""
    total = 0
    for span in spans:
        total += sql.value(
            "SELECT count(*) FROM message WHERE conv = ? AND seq > ? AND seq <= ? AND sender <> ?"
            " AND countable AND NOT recalled",
            (conv, max(mark, span.first - 1), span.last, person),
        )
    return total


def refresh_base(sql: Sql, pair: int) -> None:
    """Let base_seq catch up with read_seq."""
    row = row_of(sql, pair)
    person, conv = pair >> 32, pair & 0xFFFF_FFFF
    mark = row.read_seq
    if row.head >= mark and row.head - mark < mark - row.base_seq:
        own = row.own - count_own(sql, conv, person, mark, row.head)
    else:
        own = row.base_own + count_own(sql, conv, person, row.base_seq, mark)
    sql.run(
        "UPDATE user_conv SET base_seq = ?, base_cseq = ?, base_own = ? WHERE pair = ?",
        (mark, cseq_at(sql, conv, mark), own, pair),
    )


def move_marks(sql: Sql, minter: Mints, reads: dict[tuple[int, int], tuple[int, bool]], now_ms: int) -> None:
    """Read marks that came with a SEND: {(person, conv): (seq, whether a message brings a version)}."""
    rows = []
    for (person, conv), (seq, has_version) in reads.items():
        pair = person << 32 | conv
        version = 0
        if not has_version and seq > row_of(sql, pair).read_seq:
            version = mint_version(sql, minter, now_ms)
        rows.append((pair, person, version, seq))
    sql.many(
        "INSERT INTO user_conv VALUES (?, ?, ?, 0, 0, 0, ?, 0, 0, 0) ON CONFLICT (pair) DO UPDATE SET"
        " read_seq = excluded.read_seq, version = max(version, excluded.version)"
        " WHERE excluded.read_seq > read_seq",
        rows,
    )


def move_mark(sql: Sql, minter: Mints, pair: int, seq: int, now_ms: int) -> None:
    """One read mark forward, with a version of its own; its sums follow at once."""
    version = mint_version(sql, minter, now_ms)
    sql.run(
        "INSERT INTO user_conv VALUES (?, ?, ?, 0, 0, 0, ?, 0, 0, 0) ON CONFLICT (pair) DO UPDATE SET"
        " read_seq = excluded.read_seq, version = excluded.version",
        (pair, pair >> 32, version, seq),
    )
    refresh_base(sql, pair)


def mint_version(sql: Sql, minter: Mints, now_ms: int) -> int:
    """An id for a change that is no message, durable so that none is minted below it after a restart."""
    version = minter.mint(now_ms)
    sql.run("UPDATE meta SET value = ? WHERE name = 'minted'", (version,))
    return version
