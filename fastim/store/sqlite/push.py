"""The push outbox: one row per (user, conv) that a phone is to be told about.

 park ─▶ WAITING until ready_ms ─claim─▶ OUT ─finish─▶ idle until the collapse window has passed ─▶ gone
            ▲                             ├─ retry ─▶ WAITING under the same push_id
            └── asked again since OUT ────┘

A push inside the collapse window after the last one waits for its end. Whether something is still pending is
asked at the claim, so a push is dropped only because nothing is. A push that was OUT once may have rung, and
a vendor rings once per push_id: what is parked after that gets a push of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fastim.model import is_expired
from fastim.store.base import Park, PushRow
from fastim.store.rules import merged
from fastim.store.sqlite.fates import LOW, furthest, spans_of
from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.names import Names

MOST_PENDING: Final = 1_000
"""How many of the newest messages a claim looks through, so that `pending` counts at most as many."""
_REMEMBER_MS: Final = 60_000
"""How much longer than its window a finished push is remembered: the clock may step back."""
_FORGET: Final = 100
"""Idle rows that one claim removes."""


def earliest(sql: Sql, table: str) -> int:
    """The earliest moment a row of `due` or `push` may be claimed, 0 if there is none."""
    return int(sql.value(f"SELECT min(ready_ms) FROM {table} WHERE ready_ms IS NOT NULL") or 0)


class PushBox:
    """The writer's."""

    def __init__(self, sql: Sql, names: Names, badge: Callable[[int], int]) -> None:
        self._sql = sql
        self._names = names
        self._badge = badge

    def ask(self, pair: int, park: Park, now_ms: int) -> None:
        """Something was parked: have a push not before park.push_at_ms and outside the collapse window."""
        sql = self._sql
        row = sql.row("SELECT ready_ms, attempt, holder, last_ms FROM push WHERE pair = ?", (pair,))
        if row is None:
            # The serial starts at the moment: a row that was forgotten must not give its push_ids out again,
            # or the vendor takes the new push for a repeat and no phone rings.
            sql.run(
                "INSERT INTO push VALUES (?, ?, ?, 0, NULL, 0, ?, 0, 0)",
                (pair, now_ms, park.push_at_ms, park.collapse_ms),
            )
            return
        ready_ms, attempt, holder, last_ms = row
        at_ms = park.push_at_ms
        if last_ms:
            # A clock that went back must not keep a phone silent. But a caller that waited, for a bus that is
            # away say, is no clock that went back.
            began_ms = last_ms if last_ms <= now_ms + park.collapse_ms else now_ms
            at_ms = max(at_ms, began_ms + park.collapse_ms)
        if ready_ms is None:
            sql.run(
                "UPDATE push SET serial = serial + 1, ready_ms = ?, attempt = 0, collapse_ms = ?"
                " WHERE pair = ?",
                (at_ms, park.collapse_ms, pair),
            )
        elif holder is not None or attempt:
            sql.run(
                "UPDATE push SET again_ms = ?, collapse_ms = ? WHERE pair = ?",
                (at_ms, park.collapse_ms, pair),
            )
        else:
            sql.run("UPDATE push SET ready_ms = ? WHERE pair = ?", (min(ready_ms, at_ms), pair))

    def claim(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[PushRow]:
        sql = self._sql
        sql.run(
            "DELETE FROM push WHERE pair IN"
            " (SELECT pair FROM push WHERE ready_ms IS NULL AND idle_ms < ? LIMIT ?)",
            (now_ms, _FORGET),
        )
        found = []
        for pair, serial, attempt in sql.rows(
            "SELECT pair, serial, attempt FROM push WHERE ready_ms <= ? ORDER BY ready_ms, pair LIMIT ?",
            (now_ms, limit),
        ):
            row = self._pending(pair, now_ms, attempt, f"{pair:x}.{serial:x}")
            if row is None:
                self._rest(pair, now_ms)
                continue
            sql.run(
                "UPDATE push SET holder = ?, ready_ms = ? WHERE pair = ?", (holder, now_ms + claim_ms, pair)
            )
            found.append(row)
        return found

    def finish(self, holder: str, push: PushRow, now_ms: int, retry_at_ms: int) -> None:
        """Only the holder of this very push may; anybody else comes too late."""
        sql = self._sql
        pair = self._names.person(push.user) << 32 | self._names.conv_id(push.conv)
        row = sql.row(
            "SELECT serial, again_ms, collapse_ms FROM push WHERE pair = ? AND holder = ?", (pair, holder)
        )
        if row is None or f"{pair:x}.{row[0]:x}" != push.push_id:
            return
        _, again_ms, collapse_ms = row
        if retry_at_ms:
            sql.run(
                "UPDATE push SET holder = NULL, ready_ms = ?, attempt = attempt + 1 WHERE pair = ?",
                (retry_at_ms, pair),
            )
            return
        sql.run("UPDATE push SET last_ms = ? WHERE pair = ?", (now_ms, pair))
        if again_ms:
            sql.run(
                "UPDATE push SET serial = serial + 1, holder = NULL, attempt = 0, again_ms = 0, ready_ms = ?"
                " WHERE pair = ?",
                (max(again_ms, now_ms + collapse_ms), pair),
            )
        else:
            self._rest(pair, now_ms)

    def _rest(self, pair: int, now_ms: int) -> None:
        """Nothing to push: the row only remembers the last one until its window has passed."""
        self._sql.run(
            "UPDATE push SET holder = NULL, attempt = 0, again_ms = 0, ready_ms = NULL,"
            " idle_ms = min(last_ms, ?) + collapse_ms + ? WHERE pair = ?",
            (now_ms, _REMEMBER_MS, pair),
        )

    def _pending(self, pair: int, now_ms: int, attempt: int, push_id: str) -> PushRow | None:
        """The newest open message and how many there are, None if nothing is open."""
        sql, names = self._sql, self._names
        person, conv = pair >> 32, pair & LOW
        floor = furthest(sql, person, conv)
        closed = merged(
            sql.rows(
                "SELECT from_seq, to_seq FROM fate WHERE seat = ? AND to_seq > ? AND fate <> 5",
                (conv << 32 | person, floor),
            )
        )
        spans = spans_of(sql, names, person, conv)
        newest = 0
        pending = 0
        for seq, msg_id, loss_ms in sql.rows(
            "SELECT seq, msg_id, loss_time_ms FROM message WHERE conv = ? AND seq > ? AND sender <> ?"
            " AND kind < 32 AND NOT recalled ORDER BY seq DESC LIMIT ?",
            (conv, floor, person, MOST_PENDING),
        ):
            if (
                is_expired(loss_ms, now_ms)
                or any(first <= seq <= last for first, last in closed)
                or not any(span.first <= seq <= span.last for span in spans)
            ):
                continue
            newest = newest or msg_id
            pending += 1
        if not pending:
            return None
        sender, kind, flags, body, loss_ms = sql.row(
            "SELECT sender, kind, flags, body, loss_time_ms FROM message WHERE msg_id = ?", (newest,)
        )
        return PushRow(
            names.person_name(person), names.conv_name(conv), newest, names.person_name(sender), kind, flags,
            body, pending, self._badge(person), loss_ms, attempt, push_id,
        )  # fmt: skip
