"""Message ids over shards, which are also the clocks of the change index.

    msg_id = 41 bits ms since 2020 | 6 bits shard | 6 bits counter

An id is given while the row of its shard is locked, so within a shard ids are committed in the order in which
they were given: whoever sees one has seen, or can see, all below it. Between shards there is no such order;
where one is needed (a scan, a version, the settled mark) all shards are *sealed* at an id: their clocks are
moved up to it under the same locks, so nothing at or below it can be committed any more.

A process never gives an id below one it gave or met before (a Lamport clock), so what one caller does one
after the other is in that order also across shards.
    tests/contract/store.py (S1, S10), tests/contract/test_store_postgres.py
"""

from __future__ import annotations

from typing import Final

from fastim.errors import StoreUnavailable
from fastim.model import EPOCH_MS, MAX_SAFE_INT, MSG_ID_COUNTER_BITS, MSG_ID_SHARD_BITS

MS_SHIFT: Final = MSG_ID_SHARD_BITS + MSG_ID_COUNTER_BITS
_COUNTERS: Final = (1 << MSG_ID_COUNTER_BITS) - 1
_SHARDS: Final = (1 << MSG_ID_SHARD_BITS) - 1


def following(last: int, shard: int) -> int:
    """The smallest id of the shard above `last`. Raises StoreUnavailable at the end of all ids."""
    first = (last >> MS_SHIFT << MS_SHIFT) | shard << MSG_ID_COUNTER_BITS
    if last < first:
        found = first
    elif last < first | _COUNTERS:
        found = last + 1
    else:
        found = first + (1 << MS_SHIFT)
    if found > MAX_SAFE_INT:
        raise StoreUnavailable(f"the next message id would be {found:,}; limit {MAX_SAFE_INT:,}")
    return found


def shard_in(msg_id: int) -> int:
    """The shard that gave the id. Ids of an embedded store say 0 wherever they were moved to."""
    return msg_id >> MSG_ID_COUNTER_BITS & _SHARDS


def ms_of(msg_id: int) -> int:
    """The wall-clock moment in an id."""
    return (msg_id >> MS_SHIFT) + EPOCH_MS


def floor_at(wall_ms: int) -> int:
    """Ids given at wall_ms are at or above it. Raises StoreUnavailable for a clock beyond all ids."""
    floor = (wall_ms - EPOCH_MS) << MS_SHIFT
    if floor > MAX_SAFE_INT:
        raise StoreUnavailable(
            f"the clock says {wall_ms:,} ms; message ids end at {EPOCH_MS + (MAX_SAFE_INT >> MS_SHIFT):,}"
        )
    return floor


class Clock:
    """The newest id that this process gave or met."""

    def __init__(self) -> None:
        self.last = 0

    def before(self, now_ms: int) -> int:
        """New ids lie above it."""
        return max(self.last, floor_at(now_ms) - 1)

    def met(self, msg_id: int) -> None:
        self.last = max(self.last, msg_id)
