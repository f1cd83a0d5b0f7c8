"""SettleWindow against a naive reference that remembers everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastim.bus.window import SettleWindow
from fastim.errors import UsageError


class NaiveWindow:
    """Keeps every offset ever handed out and whether it is settled."""

    def __init__(self) -> None:
        self.settled: dict[int, bool] = {}

    def out(self) -> list[int]:
        return sorted(offset for offset, done in self.settled.items() if not done)

    def check(self, committed: int, next_offset: int) -> None:
        """Nothing that is out lies below `committed`, and no settled prefix is left above it."""
        out = self.out()
        if not out:
            assert committed == next_offset
        else:
            assert committed <= out[0]
            assert not any(committed <= offset < out[0] for offset in self.settled)


@given(data=st.data(), start=st.integers(0, 1000))
def test_committed_is_the_end_of_the_settled_prefix_whatever_the_order(
    data: st.DataObject, start: int
) -> None:
    window, naive = SettleWindow(start), NaiveWindow()
    next_offset = start
    for _ in range(data.draw(st.integers(1, 30))):
        before = window.committed
        settles: bool = data.draw(st.booleans())
        if settles and naive.out():
            done: list[int] = data.draw(st.lists(st.sampled_from(naive.out()), min_size=1, unique=True))
            naive.settled |= dict.fromkeys(done, True)
            committed = window.settle(done[0]) if len(done) == 1 else window.settle_all(done)
            assert committed == window.committed
            naive.check(window.committed, next_offset)
        else:
            offsets: list[int] = []
            holes: list[int] = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
            for hole in holes:
                offsets.append(next_offset + hole)
                next_offset += hole + 1
            window.hand_out(offsets)
            naive.settled |= dict.fromkeys(offsets, False)
        assert window.committed >= before
        assert window.unsettled == len(naive.out())
        assert window.next_offset == next_offset


def test_an_offset_settles_once() -> None:
    window = SettleWindow()
    window.hand_out(range(3))
    window.settle(1)
    with pytest.raises(UsageError):
        window.settle(1)
    with pytest.raises(UsageError):
        window.settle(3)


@pytest.mark.parametrize("wrong", [[0, 1], [0, 3], [2, 2]])
def test_a_batch_with_an_offset_that_is_not_out_changes_nothing(wrong: list[int]) -> None:
    window = SettleWindow()
    window.hand_out(range(3))
    window.settle(1)
    with pytest.raises(UsageError):
        window.settle_all(wrong)
    assert (window.committed, window.unsettled) == (0, 2)


def test_an_offset_is_handed_out_once() -> None:
    window = SettleWindow()
    window.hand_out(range(3))
    with pytest.raises(UsageError):
        window.hand_out(range(2, 4))


def test_rewind_hands_out_again_from_the_committed_offset() -> None:
    window = SettleWindow(10)
    window.hand_out(range(10, 14))
    window.settle(10)
    window.settle(12)
    window.rewind()
    assert (window.committed, window.next_offset, window.unsettled) == (11, 11, 0)
    window.hand_out(range(11, 14))
