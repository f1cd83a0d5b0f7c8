"""Rows of the timeline as messages, in seq order or append order, one user's or everybody's."""

from __future__ import annotations

from typing import Any, Final

from fastim.model import EPOCH_MS, Message, SkipReason
from fastim.store.base import StreamPage
from fastim.store.rules import EPOCH, FOREVER, Page, Span, forbidden, seen
from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.minting import MS_SHIFT
from fastim.store.sqlite.names import Names

_COLUMNS: Final = (
    "conv, seq, msg_id, cseq, sender, client_id, kind, flags, ts_ms, loss_time_ms, body, mentions, recalled"
)
_ID_AT: Final = "SELECT msg_id FROM message WHERE conv = ? AND seq = ?"
_MOST_READ: Final = 1_000
"""Rows of one page of history or scan, whatever is asked for."""


class Rows:
    """Reads of the timeline on one connection."""

    def __init__(self, sql: Sql, names: Names) -> None:
        self._sql = sql
        self._names = names

    def message(self, row: Any) -> Message:
        conv, seq, msg_id, cseq, sender, client_id, kind, flags, ts_ms, loss_ms, body, mentions, recalled = (
            row
        )
        names = self._names
        return Message(
            names.conv_name(conv), seq, msg_id, cseq, names.epoch(conv), names.person_name(sender),
            client_id, kind, flags, ts_ms, loss_ms, body,
            tuple(mentions.split("\n")) if mentions else (), bool(recalled),
        )  # fmt: skip

    def head(self, conv: int) -> int:
        return int(self._sql.value("SELECT max(seq) FROM message WHERE conv = ?", (conv,)) or 0)

    # ------------------------------------------------------------------------------------------- stream

    def stream(
        self, user: str, conv: str, after_seq: int, now_ms: int, limit: int, max_bytes: int
    ) -> StreamPage:
        """At most `limit` seqs: messages as they are, runs of what is never shown as one Gap each."""
        names = self._names
        spans = names.spans(user, conv)
        if not spans:
            raise forbidden(user, conv)
        conv_id = names.conv_id(conv)
        if not conv_id:
            return StreamPage((), 0, 0, EPOCH)
        head = self.head(conv_id)
        page = Page(conv, min(max(after_seq, 0), head), max_bytes)
        left = max(limit, 1)
        while page.position < head and left > 0:
            span = next((span for span in spans if span.last > page.position), None)
            if span is None or span.first > page.position + 1:
                page.skip(min(span.first - 1, head) if span else head, SkipReason.NOT_MEMBER)
                left -= 1
                continue
            rows = self._sql.db.execute(
                f"SELECT {_COLUMNS} FROM message WHERE conv = ? AND seq > ? AND seq <= ?"
                " ORDER BY seq LIMIT ?",
                (conv_id, page.position, min(span.last, head), left),
            )
            for row in rows:
                if not page.take(self.message(row), now_ms):
                    left = 0
                    break
                left -= 1
        return StreamPage(tuple(page.entries), page.position, head, names.epoch(conv_id))

    # ---------------------------------------------------------------------------------------- history etc.

    def history(
        self,
        user: str,
        conv: str,
        before_seq: int,
        after_seq: int,
        from_ms: int,
        to_ms: int,
        limit: int,
        now_ms: int,
    ) -> tuple[list[Message], bool]:
        """Oldest first above after_seq if only that is given, else newest first below before_seq."""
        spans = self._names.spans(user, conv)
        if not spans:
            raise forbidden(user, conv)
        conv_id = self._names.conv_id(conv)
        rising = bool(after_seq) and not before_seq
        limit = min(max(limit, 1), _MOST_READ)
        first, end = max(after_seq, 0) + 1, before_seq or FOREVER
        if from_ms:
            first = max(first, self._seq_at(conv_id, from_ms))
        if to_ms:
            ahead_ms = self._sql.value("SELECT value FROM meta WHERE name = 'ahead'")
            end = min(end, self._seq_at(conv_id, to_ms + ahead_ms + 1))
        rows = self._sql.db.execute(
            f"SELECT {_COLUMNS} FROM message WHERE conv = ? AND seq >= ? AND seq < ?"
            " AND ts_ms BETWEEN ? AND ? AND NOT recalled AND (loss_time_ms = 0 OR loss_time_ms >= ?)"
            f" ORDER BY seq {'ASC' if rising else 'DESC'}",
            (conv_id, first, end, from_ms, to_ms or FOREVER, now_ms),
        )
        found: list[Message] = []
        for row in rows:
            if not seen(spans, row[1]):
                continue
            if len(found) == limit:
                return (found if rising else found[::-1]), True
            found.append(self.message(row))
        return (found if rising else found[::-1]), False

    def _seq_at(self, conv: int, wall_ms: int) -> int:
        """The first seq whose id was minted at wall_ms or later. O(log messages).

        The time in an id is never before ts_ms, and at most `ahead` after it, so both ends of a time range
        are found without reading what lies outside.
        """
        low, high = 1, self.head(conv) + 1
        bound = (wall_ms - EPOCH_MS) << MS_SHIFT
        while low < high:
            middle = (low + high) // 2
            if (
                self._sql.value("SELECT msg_id FROM message WHERE conv = ? AND seq = ?", (conv, middle))
                < bound
            ):
                low = middle + 1
            else:
                high = middle
        return low

    def newest(self, conv: int, spans: tuple[Span, ...], now_ms: int) -> Message | None:
        """What a conversation list shows: the newest of the last 100 that is no control event and visible."""
        for row in self._sql.db.execute(
            f"SELECT {_COLUMNS} FROM message WHERE conv = ? ORDER BY seq DESC LIMIT 100", (conv,)
        ):
            message = self.message(row)
            if (
                message.kind < 32
                and not message.recalled
                and not message.expired(now_ms)
                and seen(spans, message.seq)
            ):
                return message
        return None

    def find(self, msg_id: int, client_id: bytes, sender: str) -> Message | None:
        if msg_id:
            row = self._sql.row(f"SELECT {_COLUMNS} FROM message WHERE msg_id = ?", (msg_id,))
        elif sender:
            row = self._sql.row(
                f"SELECT {_COLUMNS} FROM message WHERE client_id = ? AND sender = ?"
                " ORDER BY msg_id DESC LIMIT 1",
                (client_id, self._names.person(sender)),
            )
        else:
            row = self._sql.row(
                f"SELECT {_COLUMNS} FROM message WHERE client_id = ? ORDER BY msg_id DESC LIMIT 1",
                (client_id,),
            )
        return None if row is None else self.message(row)

    def scan(self, after_msg_id: int, limit: int) -> list[Message]:
        rows = self._sql.rows(
            f"SELECT {_COLUMNS} FROM message WHERE msg_id > ? ORDER BY msg_id LIMIT ?",
            (after_msg_id, min(max(limit, 1), _MOST_READ)),
        )
        return [self.message(row) for row in rows]
