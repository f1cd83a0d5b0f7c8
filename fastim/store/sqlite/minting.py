"""Message ids, which are also the clock of the change index.

    msg_id = 41 bits ms since 2020 | 6 bits shard | 6 bits counter

An embedded store is one shard, number 0, so its ids grow from append to append, not only inside a
conversation: they are the rowid and the append order (Store.S10). A change that is no message (a read mark)
mints one too. The counter runs ahead of the clock when 64 per millisecond do not suffice or the clock goes
back, so an id never comes twice and never falls (tests/contract/store.py, S1).
"""

from __future__ import annotations

from typing import Final

from fastim.errors import StoreUnavailable
from fastim.model import EPOCH_MS, MAX_SAFE_INT, MSG_ID_COUNTER_BITS, MSG_ID_SHARD_BITS
from fastim.store.sqlite.files import Sql

MS_SHIFT: Final = MSG_ID_SHARD_BITS + MSG_ID_COUNTER_BITS
SHARD_MASK: Final = ((1 << MSG_ID_SHARD_BITS) - 1) << MSG_ID_COUNTER_BITS


def following(last: int) -> int:
    """The next id of shard 0: counter + 1, or the next millisecond."""
    last += 1
    return ((last >> MS_SHIFT) + 1) << MS_SHIFT if last & SHARD_MASK else last


class Minter:
    """The ids of one store, growing for ever. A rolled-back id is never given again by this process."""

    def __init__(self) -> None:
        self.last = 0
        self.ahead_ms = 0
        """How many ms ids have been ahead of the clock at most, or more; 0 = look it up again."""

    def advance(self, now_ms: int) -> int:
        """The id before the next one, for a clock that says now_ms. Raises StoreUnavailable."""
        floor = (now_ms - EPOCH_MS) << MS_SHIFT
        if floor > MAX_SAFE_INT:
            raise StoreUnavailable(
                f"the clock says {now_ms:,} ms; message ids end at {EPOCH_MS + (MAX_SAFE_INT >> MS_SHIFT):,}"
            )
        return max(self.last, floor - 1)

    def mint(self, now_ms: int) -> int:
        minted = following(self.advance(now_ms))
        self.keep(minted)
        return minted

    def keep(self, last: int) -> None:
        """Everything up to `last` was given. Raises StoreUnavailable at the end of all ids."""
        if last > MAX_SAFE_INT:
            raise StoreUnavailable(f"the next message id would be {last:,}; limit {MAX_SAFE_INT:,}")
        self.last = last

    def note_ahead(self, sql: Sql, now_ms: int) -> None:
        """Keep `ahead` true for what was just minted at now_ms. Written when it doubles."""
        ahead_ms = (self.last >> MS_SHIFT) + EPOCH_MS - now_ms
        if ahead_ms > self.ahead_ms:
            self.ahead_ms = 1 << ahead_ms.bit_length()
            sql.run("UPDATE meta SET value = max(value, ?) WHERE name = 'ahead'", (self.ahead_ms,))
