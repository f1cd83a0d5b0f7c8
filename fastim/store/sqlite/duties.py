"""What nodes and dispatch write about obligations: cursors and fates, due rows, parks.

One call is one transaction (Store.S13). Every call that writes, fires or clears a due row first asks whether
an obligation of that (user, conv) is open (fates.py); if none is, the expired among the owed get their fate
row and the due row goes.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any

import apsw

from fastim.model import Fate
from fastim.store.base import (
    Behind,
    DueFiring,
    DueRequest,
    DueRow,
    Flush,
    FlushResult,
    Park,
    Settled,
)
from fastim.store.rules import runs
from fastim.store.sqlite.fates import LOW, add_fates, owed
from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.names import Names
from fastim.store.sqlite.push import PushBox
from fastim.store.sqlite.unread import head_of

_PARKED = int(Fate.PARKED)
_EXPIRED = int(Fate.EXPIRED)


class Duties:
    """The writer's."""

    def __init__(self, sql: Sql, names: Names, push: PushBox) -> None:
        self._sql = sql
        self._names = names
        self._push = push

    # -------------------------------------------------------------------------------------------- flush

    def flush(self, flush: Flush) -> FlushResult:
        gaps: tuple[tuple[str, str, Behind], ...] = ()
        if flush.settled:
            gaps = self._settle(flush)
        for request in flush.due:
            self._request(request, flush)
        for one in flush.levels:
            device = self._names.device(self._names.person(one.user), one.device)
            self._sql.run("UPDATE device SET level = max(level, ?) WHERE id = ?", (one.version, device))
        return FlushResult(gaps)

    def _settle(self, flush: Flush) -> tuple[tuple[str, str, Behind], ...]:
        """Cursors and fates; then the due rows of what was touched."""
        names, node, now_ms = self._names, flush.node, flush.now_ms
        convs, owners = names.conv_ids.young, names.owners.young
        entries: list[tuple[int, int, int, int, Settled]] = []
        fates: list[tuple[Any, ...]] = []
        for one in flush.settled:
            user, device, name = one.user, one.device, one.conv
            conv = convs.get(name) or names.conv_id(name)
            first, last = one.from_seq, one.to_seq
            if not conv or last < first:
                continue
            owner = owners.get((user, device)) or names.owner(user, device, now_ms)
            person, device_id = owner
            entries.append((conv << 32 | device_id, person << 32 | conv, first, last, one))
            if not one.own:
                fates.append(
                    (conv << 32 | person, last, one.fate, device_id, first, node, one.attempt, now_ms)
                )
        if not entries:
            return ()
        moved, gaps = self._move_cursors(entries)
        add_fates(self._sql, fates)
        self._after_settling({entry[1] for entry in entries}, moved, flush)
        return gaps

    def _move_cursors(
        self, entries: list[tuple[int, int, int, int, Settled]]
    ) -> tuple[set[int], tuple[tuple[str, str, Behind], ...]]:
        """Returns the pairs whose cursor moved, and the gaps."""
        keys = list(dict.fromkeys([entry[0] for entry in entries]))
        cursors = dict(zip(keys, self._cursors(keys), strict=True))
        before = cursors.copy()
        moved: set[int] = set()
        late: list[tuple[int, int, int, int, Settled]] = []
        for entry in entries:
            key, pair, first, last, _ = entry
            cursor = cursors[key]
            if first - 1 > cursor:
                late.append(entry)
            elif last > cursor:
                cursors[key] = last
                moved.add(pair)
        gaps: dict[int, Settled] = {}
        if late:
            # Acks may be drained out of order: in seq order they may turn out to have no hole.
            late.sort(key=lambda entry: entry[2])
            for key, pair, first, last, one in late:
                if first - 1 > cursors[key]:
                    gaps[key] = one
                elif last > cursors[key]:
                    cursors[key] = last
                    moved.add(pair)
        self._sql.many(
            "INSERT OR REPLACE INTO cursor VALUES (?, ?)",
            [item for item in cursors.items() if item[1] != before[item[0]]],
        )
        return moved, tuple(
            (one.user, one.device, self._behind(one.conv, key >> 32, cursors[key]))
            for key, one in gaps.items()
        )

    def _cursors(self, keys: list[int]) -> list[int]:
        """One row whatever their number: each row costs a change of the thread that holds the interpreter."""
        found = self._sql.value(
            "SELECT json_group_array(coalesce(seq, 0)) FROM carray(?) LEFT JOIN cursor ON spot = value",
            (apsw.carray(array("q", keys)),),
        )
        cursors: list[int] = json.loads(found)
        return cursors

    def _behind(self, conv: str, conv_id: int, cursor: int) -> Behind:
        return Behind(conv, cursor, head_of(self._sql, conv_id)[0], self._names.epoch(conv_id))

    def _after_settling(self, touched: set[int], moved: set[int], flush: Flush) -> None:
        found = apsw.carray(array("q", touched))
        for pair, attempt in self._sql.rows(
            "SELECT pair, attempt FROM carray(?) CROSS JOIN due ON pair = value ORDER BY pair", (found,)
        ):
            if self._clear(pair, flush.now_ms, flush.node) and attempt and pair in moved:
                self._sql.run("UPDATE due SET attempt = 0 WHERE pair = ?", (pair,))

    # ----------------------------------------------------------------------------------------- due rows

    def _clear(self, pair: int, now_ms: int, node: str, attempt: int = 0) -> bool:
        """Whether something is open. If not: fate rows for the expired, and the due row goes."""
        expired: list[int] = []
        for one in owed(self._sql, self._names, pair, now_ms):
            if not one.expired:
                return True
            expired.append(one.seq)
        self._expire(pair, expired, now_ms, node, attempt)
        self._sql.run("DELETE FROM due WHERE pair = ?", (pair,))
        return False

    def _expire(self, pair: int, seqs: list[int], now_ms: int, node: str, attempt: int) -> None:
        if seqs:
            add_fates(
                self._sql,
                [
                    (_seat(pair), last, _EXPIRED, 0, first, node, attempt, now_ms)
                    for first, last in runs(seqs)
                ],
            )

    def _request(self, request: DueRequest, flush: Flush) -> None:
        sql = self._sql
        pair = self._pair(request.user, request.conv)
        if not pair or not self._clear(pair, flush.now_ms, flush.node):
            return
        row = sql.row("SELECT from_seq, due_at_ms, holder FROM due WHERE pair = ?", (pair,))
        if row is None:
            sql.run(
                "INSERT INTO due VALUES (?, ?, ?, 0, NULL, ?)",
                (pair, request.from_seq, request.due_at_ms, request.due_at_ms),
            )
            return
        from_seq, due_at_ms, holder = row
        if request.from_seq < from_seq:
            sql.run("UPDATE due SET from_seq = ? WHERE pair = ?", (request.from_seq, pair))
        if request.urgent and request.due_at_ms < due_at_ms:
            sql.run("UPDATE due SET due_at_ms = ? WHERE pair = ?", (request.due_at_ms, pair))
            if holder is None:
                sql.run("UPDATE due SET ready_ms = ? WHERE pair = ?", (request.due_at_ms, pair))

    def claim(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[DueRow]:
        names = self._names
        found = []
        for pair, from_seq, due_at_ms, attempt in self._sql.rows(
            "SELECT pair, from_seq, due_at_ms, attempt FROM due WHERE ready_ms <= ?"
            " ORDER BY ready_ms, pair LIMIT ?",
            (now_ms, limit),
        ):
            if not self._clear(pair, now_ms, holder, attempt):
                continue
            self._sql.run(
                "UPDATE due SET holder = ?, ready_ms = ? WHERE pair = ?", (holder, now_ms + claim_ms, pair)
            )
            user, conv = names.person_name(pair >> 32), names.conv_name(pair & LOW)
            found.append(DueRow(user, conv, from_seq, due_at_ms, attempt))
        return found

    def fire(self, holder: str, firings: Sequence[DueFiring], now_ms: int) -> list[bool]:
        return [self._fire(holder, firing, now_ms) for firing in firings]

    def _fire(self, holder: str, firing: DueFiring, now_ms: int) -> bool:
        sql = self._sql
        pair = self._pair(firing.user, firing.conv)
        row = sql.row("SELECT attempt FROM due WHERE pair = ? AND holder = ?", (pair, holder))
        if row is None or not self._clear(pair, now_ms, holder, row[0]):
            return False
        # A cursor that moved since the claim has set the attempts back; then this firing is the first.
        attempt = min(firing.attempt, row[0] + 1)
        sql.run(
            "UPDATE due SET attempt = ?, due_at_ms = ?, holder = NULL, ready_ms = ? WHERE pair = ?",
            (attempt, firing.next_due_ms, firing.next_due_ms, pair),
        )
        return True

    # --------------------------------------------------------------------------------------------- park

    def park(self, parks: Sequence[Park], now_ms: int) -> list[bool]:
        return [self._park(park, now_ms) for park in parks]

    def _park(self, park: Park, now_ms: int) -> bool:
        """A due row that reaches further down takes its obligations along: nothing else accounts for them.

        What it covers above to_seq stays with it.
        """
        sql = self._sql
        pair = self._pair(park.user, park.conv)
        if not pair:
            return False
        due = sql.value("SELECT from_seq FROM due WHERE pair = ?", (pair,))
        from_seq = park.from_seq if due is None else min(park.from_seq, due)
        found = list(owed(sql, self._names, pair, now_ms, from_seq, park.to_seq))
        fresh = [one.seq for one in found if not one.expired and not one.parked]
        add_fates(
            sql,
            [(_seat(pair), last, _PARKED, 0, first, "", park.attempt, now_ms) for first, last in runs(fresh)],
        )
        self._expire(pair, [one.seq for one in found if one.expired], now_ms, "", park.attempt)
        if due is not None:
            self._end_due(pair, park.to_seq, now_ms)
        if fresh and (park.push or fresh[0] < park.from_seq):
            self._push.ask(pair, park, now_ms)
        return bool(fresh)

    def _end_due(self, pair: int, parked_upto: int, now_ms: int) -> None:
        left = list(owed(self._sql, self._names, pair, now_ms, parked_upto + 1))
        alive = next((one.seq for one in left if not one.expired and not one.parked), 0)
        if alive:
            self._sql.run("UPDATE due SET from_seq = ? WHERE pair = ?", (alive, pair))
        else:
            self._expire(pair, [one.seq for one in left if one.expired], now_ms, "", 0)
            self._sql.run("DELETE FROM due WHERE pair = ?", (pair,))

    def _pair(self, user: str, conv: str) -> int:
        """0 if either was never stored."""
        person, conv_id = self._names.person(user), self._names.conv_id(conv)
        return person << 32 | conv_id if person and conv_id else 0


def _seat(pair: int) -> int:
    return (pair & LOW) << 32 | pair >> 32
