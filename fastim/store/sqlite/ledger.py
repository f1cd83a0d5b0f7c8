"""Recovery and audit: each obligation's state, from timeline, fate rows, due rows and settled mark."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from fastim.model import Fate, is_expired
from fastim.store.base import DueRow, FateRow, Obligation, ObligationState, OpenRange, Trace
from fastim.store.rules import FATE_SPAN, Span
from fastim.store.sqlite.fates import spans_of
from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.names import Names
from fastim.store.sqlite.rows import Rows

_PARKED: Final = int(Fate.PARKED)
_STATES: Final = {int(state): state for state in ObligationState}
_MOST_MESSAGES: Final = 10_000
_MOST_OBLIGATIONS: Final = 50_000
"""Large groups make many of few messages: a page ends with the message that reaches this."""
_OWED: Final = "msg_id, conv, seq, client_id, sender, kind, loss_time_ms"


class _Claims:
    """What is recorded about one (user, conv) between two seqs."""

    def __init__(self, sql: Sql, names: Names, person: int, conv: int, first: int, last: int) -> None:
        self.spans: tuple[Span, ...] = spans_of(sql, names, person, conv)
        self.fates: list[Any] = [
            row
            for row in sql.rows(
                "SELECT from_seq, to_seq, fate, device, node, attempt, ts_ms FROM fate"
                " WHERE seat = ? AND to_seq >= ? AND to_seq < ?",
                (conv << 32 | person, first, last + FATE_SPAN),
            )
            if row[0] <= last
        ]
        self.due: Any = sql.row(
            "SELECT from_seq, due_at_ms, attempt FROM due WHERE pair = ?", (person << 32 | conv,)
        )

    def sees(self, seq: int) -> bool:
        return any(span.first <= seq <= span.last for span in self.spans)

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
    """Reads on one connection."""

    def __init__(self, sql: Sql, names: Names) -> None:
        self._sql = sql
        self._names = names

    def settled_mark(self) -> int:
        return int(self._sql.value("SELECT value FROM meta WHERE name = 'settled'"))

    def head_msg_id(self) -> int:
        return int(self._sql.value("SELECT max(msg_id) FROM message") or 0)

    def settle(self, msg_id: int) -> None:
        """The writer's."""
        mark = min(msg_id, self.head_msg_id())
        self._sql.run("UPDATE meta SET value = ? WHERE name = 'settled' AND value < ?", (mark, mark))

    def unsettled(self, upto_msg_id: int) -> list[OpenRange]:
        """A member who sent all of a range is owed nothing of it and left out."""
        names = self._names
        found = []
        for conv, first, last, one, other in self._sql.rows(
            "SELECT conv, min(seq), max(seq), min(sender), max(sender) FROM message"
            " WHERE msg_id > ? AND msg_id <= ? GROUP BY conv HAVING min(kind) < 32 ORDER BY conv",
            (self.settled_mark(), upto_msg_id),
        ):
            name = names.conv_name(conv)
            only = names.person_name(one) if one == other else ""
            members = {
                member.user
                for member in names.members(name)
                if member.user != only and member.join_seq <= last and first < (member.leave_seq or last + 1)
            }
            if members:
                found.append(OpenRange(name, first, last, tuple(sorted(members))))
        return found

    def obligations(
        self, after_msg_id: int, limit_messages: int, now_ms: int
    ) -> tuple[list[Obligation], int]:
        limit = min(max(limit_messages, 1), _MOST_MESSAGES)
        rows = self._sql.rows(
            f"SELECT {_OWED} FROM message WHERE msg_id > ? ORDER BY msg_id LIMIT ?",
            (after_msg_id, limit),
        )
        found, done = self._derive(rows, now_ms)
        at_end = done == len(rows) < limit
        return found, 0 if at_end else rows[done - 1][0]

    def _derive(self, rows: list[Any], now_ms: int) -> tuple[list[Obligation], int]:
        """The obligations of the first rows, and of how many. One look-up of the claims per (user, conv)."""
        names = self._names
        mark = self.settled_mark()
        bounds: dict[int, tuple[int, int]] = {}
        for _, conv, seq, *_ in rows:
            first, last = bounds.get(conv, (seq, seq))
            bounds[conv] = (min(first, seq), max(last, seq))
        people: dict[int, list[tuple[int, str, _Claims]]] = {}
        for conv, (first, last) in bounds.items():
            users = dict.fromkeys(member.user for member in names.members(names.conv_name(conv)))
            people[conv] = [
                (person, user, _Claims(self._sql, names, person, conv, first, last))
                for user in users
                if (person := names.person(user))
            ]
        found: list[Obligation] = []
        for done, (msg_id, conv, seq, client_id, sender, kind, loss_ms) in enumerate(rows):
            if len(found) >= _MOST_OBLIGATIONS:
                return found, done
            if kind >= 32:
                continue
            for person, user, claims in people[conv]:
                if person != sender and claims.sees(seq):
                    state = claims.state(seq, loss_ms, now_ms, msg_id > mark)
                    found.append(
                        Obligation(
                            msg_id,
                            names.conv_name(conv),
                            seq,
                            client_id,
                            names.person_name(sender),
                            user,
                            state,
                        )
                    )
        return found, len(rows)

    def trace(self, rows: Rows, msg_id: int, now_ms: int) -> Trace | None:
        sql, names = self._sql, self._names
        message = rows.find(msg_id, b"", "")
        if message is None:
            return None
        conv, seq = names.conv_id(message.conv), message.seq
        obligations, _ = self._derive(
            sql.rows(
                f"SELECT {_OWED} FROM message WHERE msg_id = ?",
                (msg_id,),
            ),
            now_ms,
        )
        fates: list[FateRow] = []
        due: list[DueRow] = []
        cursors: list[tuple[str, str, int]] = []
        for user in dict.fromkeys(member.user for member in names.members(message.conv)):
            person = names.person(user)
            claims = _Claims(sql, names, person, conv, seq, seq)
            fates += self._fate_rows(user, message.conv, claims.fates)
            if claims.due is not None and claims.due[0] <= seq:
                due.append(DueRow(user, message.conv, *claims.due))
            cursors += [
                (user, device, cursor)
                for device, cursor in sql.rows(
                    "SELECT name, coalesce(seq, 0) FROM device LEFT JOIN cursor ON spot = ? | id"
                    " WHERE person = ? ORDER BY name",
                    (conv << 32, person),
                )
            ]
        fates.sort(key=lambda row: row.ts_ms)
        return Trace(message, tuple(obligations), tuple(fates), tuple(due), tuple(cursors))

    def _fate_rows(self, user: str, conv: str, rows: Iterable[Any]) -> list[FateRow]:
        return [
            FateRow(
                user, self._names.device_name(device), conv, first, last, Fate(fate), node, attempt, ts_ms
            )
            for first, last, fate, device, node, attempt, ts_ms in rows
        ]
