"""Appending to conversations: ids, seqs, idempotency, deadlines.

A batch is first inserted on trust that every message is new: no look-up, one executemany. If the index of
client_ids objects, or a message is past its deadline (a known one gets its first result, only an unknown one
is refused), that batch or frame is gone through again, one message at a time.

T1  one hole or repeat of seq is impossible: heads are read inside the transaction, or remembered from one
    that committed                                             tests/contract/store.py, S1
T2  the client_id look-up comes before every refusal           same, S2
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final

import apsw

from fastim.model import Flag
from fastim.store.base import Appended, AppendedFrame, AppendFrame, AppendItem, AppendStatus
from fastim.store.rules import named_members
from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.minting import MS_SHIFT, SHARD_MASK, Minter
from fastim.store.sqlite.names import Conv, Names
from fastim.store.sqlite.tail import Tail
from fastim.store.sqlite.unread import move_marks

_MENTION_ALL: Final = int(Flag.MENTION_ALL)

_STORED: Final = AppendStatus.STORED
_NOT_REACHED: Final = Appended(AppendStatus.NOT_REACHED)

_INSERT: Final = (
    "INSERT INTO message (msg_id, conv, seq, cseq, sender, client_id, kind, flags, countable, recalled,"
    " ts_ms, loss_time_ms, content, mentions, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?, ?, ?)"
)
_KNOWN: Final = (
    "SELECT content, msg_id, seq, cseq, ts_ms, loss_time_ms FROM message"
    " WHERE client_id = ? AND sender = ? AND conv = ?"
)


def content_hash(item: AppendItem) -> bytes:
    """Of the fields as sent; 8 bytes are plenty to tell two contents of one client_id apart."""
    mentions = "\n".join(item.mentions).encode() if item.mentions else b""
    head = b"%d:%d:%d:%b\0" % (item.kind, item.loss_time_ms, item.flags, mentions)
    return blake2b(head + item.body, digest_size=8).digest()


class Timeline:
    """The writer's half of the timeline."""

    def __init__(self, sql: Sql, names: Names, minter: Minter, tail: Tail) -> None:
        self._sql = sql
        self._names = names
        self._minter = minter
        self._tail = tail
        self._rows: list[tuple[Any, ...]] = []
        self._reads: dict[tuple[int, int], tuple[int, bool]] = {}
        self._touched: list[Conv] = []
        """Convs whose remembered head is ahead of the last commit."""

    # ------------------------------------------------------------------------------------- transactions

    @property
    def touched(self) -> int:
        return len(self._touched)

    def kept(self) -> None:
        self._touched.clear()

    def undo(self, touched: int) -> None:
        """Forget the heads that a rolled-back call moved."""
        for conv in self._touched[touched:]:
            conv.seq = -1
        del self._touched[touched:]
        self._rows.clear()
        self._reads.clear()
        self._minter.ahead_ms = 0

    # ------------------------------------------------------------------------------------------- append

    def append(self, frames: Sequence[AppendFrame], now_ms: int) -> list[AppendedFrame]:
        names, tail = self._names, self._tail
        before = names.fresh, len(self._touched), tail.pending
        self._sql.run("SAVEPOINT trust")
        try:
            result = self._append(frames, now_ms, trust=True)
        except apsw.ConstraintError:
            self._sql.run("ROLLBACK TO trust")
            names.undo(before[0])
            self.undo(before[1])
            tail.undo(before[2])
            result = self._append(frames, now_ms, trust=False)
        self._sql.run("RELEASE trust")
        return result

    def _append(self, frames: Sequence[AppendFrame], now_ms: int, trust: bool) -> list[AppendedFrame]:
        tail, touched, known = self._tail, self._touched, self._names.convs.young
        last = self._minter.advance(now_ms)
        results = []
        for frame in frames:
            conv = known.get(frame.conv)
            sender = conv.people.get(frame.sender) if conv is not None and conv.known else None
            if sender is None:
                conv, status = self._admit(frame)
                if status is not None:
                    results.append(self._refuse(frame, conv, status))
                    continue
                known = self._names.convs.young
                assert conv is not None
                sender = conv.people.get(frame.sender) or self._names.make_person(frame.sender)
            assert conv is not None
            if conv.seq < 0:
                self._load_head(conv)
            touched.append(conv)
            seq, cseq = conv.seq, conv.cseq
            items: list[Appended] = []
            if trust:
                last = self._store_on_trust(frame, conv, sender, now_ms, last, items)
            if len(items) < len(frame.items):
                self._insert()
                last = self._store_with_care(frame, conv, sender, now_ms, last, items)
            if conv.seq > seq:
                tail.add(conv, seq, sender, last, conv.cseq - cseq)
            if frame.read_seq:
                self._note_read(frame, conv, sender, stored=conv.seq > seq)
            results.append(AppendedFrame(conv.name, conv.epoch, tuple(items), conv.members))
        self._insert()
        self._minter.keep(last)
        self._minter.note_ahead(self._sql, now_ms)
        if self._reads:
            move_marks(self._sql, self._minter, self._reads, now_ms)
            self._reads.clear()
        return results

    def _store_on_trust(
        self, frame: AppendFrame, conv: Conv, sender: int, now_ms: int, last: int, items: list[Appended]
    ) -> int:
        """Queue the items up to the first that is past its deadline. Returns the last id given."""
        rows, conv_id, seq, cseq = self._rows, conv.id, conv.seq, conv.cseq
        for item in frame.items:
            loss_ms = item.loss_time_ms
            if loss_ms:
                if now_ms > loss_ms:
                    break
            elif item.ttl_ms:
                loss_ms = now_ms + item.ttl_ms
            last += 1
            if last & SHARD_MASK:
                last = ((last >> MS_SHIFT) + 1) << MS_SHIFT
            seq += 1
            countable = item.countable
            if countable:
                cseq += 1
            mentions = "\n".join(item.mentions) if item.mentions or item.flags & _MENTION_ALL else None
            rows.append(
                (
                    last, conv_id, seq, cseq, sender, item.client_id, item.kind, item.flags, countable,
                    now_ms, loss_ms, content_hash(item), mentions, item.body,
                )
            )  # fmt: skip
            items.append(Appended(_STORED, last, seq, cseq, now_ms, loss_ms))
        conv.seq, conv.cseq = seq, cseq
        return last

    def _store_with_care(
        self, frame: AppendFrame, conv: Conv, sender: int, now_ms: int, last: int, items: list[Appended]
    ) -> int:
        """The items from len(items) on, each looked up first."""
        for item in frame.items[len(items) :]:
            known = self._sql.row(_KNOWN, (item.client_id, sender, conv.id))
            if known is not None:
                if known[0] != content_hash(item):
                    items.append(Appended(AppendStatus.CONFLICT))
                    break
                items.append(Appended(AppendStatus.REPEATED, *known[1:]))
                continue
            one = AppendFrame(frame.conv, frame.sender, (item,))
            stored = len(items)
            last = self._store_on_trust(one, conv, sender, now_ms, last, items)
            if len(items) == stored:
                items.append(Appended(AppendStatus.EXPIRED))
                break
            self._insert()
        items += [_NOT_REACHED] * (len(frame.items) - len(items))
        return last

    def _insert(self) -> None:
        if self._rows:
            self._sql.many(_INSERT, self._rows)
            self._rows.clear()

    def _load_head(self, conv: Conv) -> None:
        row = self._sql.row(
            "SELECT seq, cseq FROM message WHERE conv = ? ORDER BY seq DESC LIMIT 1", (conv.id,)
        )
        conv.seq, conv.cseq = row or (0, 0)

    # -------------------------------------------------------------------------------- who may send where

    def _admit(self, frame: AppendFrame) -> tuple[Conv | None, AppendStatus | None]:
        """The conversation, created if need be, and why the frame is refused, None if it is not."""
        conv = self._names.conv(frame.conv)
        if conv is None:
            named = named_members(frame.conv)
            if named is None:
                return None, AppendStatus.UNKNOWN_GROUP
            if frame.conv[0] == "p" and frame.sender not in named:
                return None, AppendStatus.NOT_MEMBER
            if frame.require_known and not self._known(named, frame.sender):
                # Nothing is created: a stranger must not fill the store with names.
                return None, AppendStatus.UNKNOWN_USER
            return self._names.open_conv(frame.conv), None
        if frame.sender not in conv.people and conv.type != "s":
            return conv, AppendStatus.NOT_MEMBER
        if frame.require_known and not conv.known:
            if not self._known(conv.members, frame.sender):
                return conv, AppendStatus.UNKNOWN_USER
            conv.known = self._known(conv.members, "")
        return conv, None

    def _known(self, users: Sequence[str], sender: str) -> bool:
        """Whether every one of them but the sender has ever registered a device."""
        return all(
            user == sender
            or self._sql.row("SELECT 1 FROM device WHERE person = ? LIMIT 1", (self._names.person(user),))
            for user in users
        )

    def _refuse(self, frame: AppendFrame, conv: Conv | None, status: AppendStatus) -> AppendedFrame:
        """What is known already gets its first result all the same (T2)."""
        items: list[Appended] = []
        sender = self._names.person(frame.sender)
        if conv is not None and sender:
            self._insert()
            for item in frame.items:
                known = self._sql.row(_KNOWN, (item.client_id, sender, conv.id))
                if known is None:
                    break
                if known[0] != content_hash(item):
                    status = AppendStatus.CONFLICT
                    break
                items.append(Appended(AppendStatus.REPEATED, *known[1:]))
        if len(items) < len(frame.items):
            items.append(Appended(status))
            items += [_NOT_REACHED] * (len(frame.items) - len(items))
        epoch = conv.epoch if conv is not None else 0
        return AppendedFrame(frame.conv, epoch, tuple(items), conv.members if conv is not None else ())

    def _note_read(self, frame: AppendFrame, conv: Conv, sender: int, stored: bool) -> None:
        """The mark is clamped to the head; a version is minted only if no message brings one."""
        if frame.sender not in conv.people:
            return
        key = (sender, conv.id)
        read_seq = min(frame.read_seq, conv.seq)
        known = self._reads.get(key, (0, False))
        self._reads[key] = (max(known[0], read_seq), known[1] or stored)
