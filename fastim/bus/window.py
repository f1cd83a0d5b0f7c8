"""Which records of one partition are out at a reader, and below which offset all are settled.

Pure bookkeeping (promises B4 and B5) for every Bus: records settle in any order, only a prefix may be
committed. Offsets grow but need not be contiguous (a compacted or transactional log has holes).

I1  every offset below `committed` that was handed out is settled     tests/unit/test_settle_window.py
I2  `committed` never goes back                                       same
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from fastim.errors import UsageError


class SettleWindow:
    """The records out of one partition for one group. All operations are amortised O(1) per record."""

    __slots__ = ("_open", "_order", "committed", "next_offset")

    def __init__(self, committed: int = 0) -> None:
        self.committed = committed
        """Everything below is settled; a reader that starts again starts here."""
        self.next_offset = committed
        """One more than the last offset handed out."""
        self._order: deque[int] = deque()
        self._open: set[int] = set()

    @property
    def unsettled(self) -> int:
        """Records that are out."""
        return len(self._open)

    def hand_out(self, offsets: Sequence[int]) -> None:
        """Note that these offsets are out. They grow, and start at or above next_offset (else UsageError)."""
        if not offsets:
            return
        if offsets[0] < self.next_offset:
            raise UsageError(f"offset {offsets[0]} is handed out a second time; next is {self.next_offset}")
        self._order.extend(offsets)
        self._open.update(offsets)
        self.next_offset = offsets[-1] + 1

    def settle(self, offset: int) -> int:
        """Note that the record is settled. Returns `committed` after it.

        Raises UsageError for an offset that is not out (a second settle, or never handed out).
        """
        opened = self._open
        try:
            opened.remove(offset)
        except KeyError:
            raise UsageError(f"offset {offset} is not out; settled before, or never handed out") from None
        order = self._order
        if offset == order[0]:
            while order and order[0] not in opened:
                order.popleft()
            self.committed = order[0] if order else self.next_offset
        return self.committed

    def settle_all(self, offsets: Sequence[int]) -> int:
        """settle() of each; nothing is changed when one of them is not out."""
        opened = self._open
        if not opened.issuperset(offsets) or len(set(offsets)) < len(offsets):
            wrong = next(offset for offset in offsets if offset not in opened or offsets.count(offset) > 1)
            raise UsageError(f"offset {wrong} is not out; settled before, or never handed out")
        opened.difference_update(offsets)
        order = self._order
        if not opened:
            order.clear()
            self.committed = self.next_offset
        else:
            while order[0] not in opened:
                order.popleft()
            self.committed = order[0]
        return self.committed

    def rewind(self) -> None:
        """The reader is gone: hand out again from `committed` on."""
        self._order.clear()
        self._open.clear()
        self.next_offset = self.committed
