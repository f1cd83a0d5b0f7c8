"""The ack table's edges: references, cycles, re-entry, tags at their end, memory."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest

from fastim._core.acks import AckTable
from fastim.errors import PeerError, UsageError

DAY_MS = 86_400_000


class Item:
    """Something whose death can be seen."""


class Nosy:
    """Runs code when it dies, as a record with a finalizer would."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __del__(self) -> None:
        self.act()


def fill(table: AckTable, slot: int, items: list[object], *, deadline_ms: int = 1000) -> None:
    for tag, item in enumerate(items, table.last_tag(slot) + 1):
        table.insert(slot, tag, tag * 10, item, 100, deadline_ms)


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_cumulative_ack_resolves_everything_up_to_its_tag_in_order() -> None:
    table = AckTable()
    slot = table.open()
    fill(table, slot, ["a", "b", "c"])
    assert table.unacked(slot) == (3, 300)
    assert table.ack_to(slot, 2) == 2
    assert table.pending_drain
    assert table.drain() == [(slot, "a"), (slot, "b")]
    assert (table.pending_drain, table.drain()) == (False, [])
    assert table.items(slot) == [(3, "c")]


def test_an_old_tag_resolves_nothing_and_a_future_one_is_refused() -> None:
    table = AckTable()
    slot = table.open()
    with pytest.raises(PeerError, match="tag 1 was never sent; last 0") as refused:
        table.ack_to(slot, 1)
    assert refused.value.code == "bad_ack"
    assert table.ack_to(slot, 0) == 0
    table.insert(slot, 50, 1, "a", 1, 1000)
    assert table.ack_to(slot, 49) == 0
    with pytest.raises(PeerError, match="tag 51 was never sent; last 50"):
        table.ack_to(slot, 51)
    assert table.ack_to(slot, 50) == 1
    assert table.ack_to(slot, 50) == 0


def test_single_acks_may_come_in_any_order_and_a_cumulative_one_takes_the_rest() -> None:
    table = AckTable()
    slot = table.open()
    fill(table, slot, ["a", "b", "c", "d"])
    assert table.ack_ids(slot, [30, 999, 10, 30]) == 2
    assert table.items(slot) == [(2, "b"), (4, "d")]
    assert table.ack_to(slot, 4) == 2
    assert [item for _, item in table.drain()] == ["c", "a", "b", "d"]


def test_an_entry_without_a_message_is_not_acked_by_id_0() -> None:
    table = AckTable()
    slot = table.open()
    table.insert(slot, 1, 0, "sent", 1, 1000)
    assert table.ack_ids(slot, [0]) == 0
    assert table.ack_to(slot, 1) == 1


@pytest.mark.parametrize("tag", [0, 1, 5, 7])
def test_a_tag_out_of_turn_is_refused(tag: int) -> None:
    table = AckTable()
    slot = table.open()
    if tag != 0:
        table.insert(slot, 5, 1, "a", 1, 1000)
    with pytest.raises(UsageError, match="does not follow"):
        table.insert(slot, tag, 1, "b", 1, 1000)


def test_tags_end_at_u32() -> None:
    table = AckTable()
    slot = table.open()
    last = 2**32 - 1
    for tag in (last - 1, last):
        table.insert(slot, tag, 1, tag, 1, 1000)
    assert table.items(slot) == [(last - 1, last - 1), (last, last)]
    for tag in (0, 1):
        with pytest.raises(UsageError, match="does not follow"):
            table.insert(slot, tag, 1, "wrapped", 1, 1000)
    with pytest.raises(OverflowError):
        table.insert(slot, 2**32, 1, "wrapped", 1, 1000)
    assert table.ack_to(slot, last) == 2


def test_overdue_reports_a_slot_until_its_entries_are_taken() -> None:
    table = AckTable()
    quiet, slot = table.open(), table.open()
    table.insert(quiet, 1, 1, "later", 1, 9_000)
    for tag, deadline in ((1, 5_000), (2, 3_000), (3, 8_000)):
        table.insert(slot, tag, tag, f"due {deadline}", 7, deadline)
    assert table.oldest_deadline(slot) == 3_000
    assert table.overdue(2_999, 10) == []
    assert table.overdue(3_000, 10) == table.overdue(3_000, 10) == [slot]
    assert table.take_overdue(slot, 5_000) == ["due 5000", "due 3000"]
    assert (table.unacked(slot), table.oldest_deadline(slot)) == ((1, 7), 8_000)
    assert table.overdue(5_000, 10) == []
    assert table.ack_to(slot, 2) == 0
    assert table.overdue(9_000, 1) == [quiet]
    assert not table.pending_drain


@pytest.mark.parametrize("deadline", [0, 60 * DAY_MS])
def test_a_deadline_out_of_range_is_refused(deadline: int) -> None:
    table = AckTable()
    slot = table.open()
    table.insert(slot, 1, 1, "a", 1, 1_000)
    with pytest.raises(UsageError, match="deadline_ms is"):
        table.insert(slot, 2, 1, "b", 1, deadline)


def test_deadlines_stay_exact_for_years() -> None:
    table = AckTable()
    slot = table.open()
    now = 77
    for tag in range(1, 1000):
        now += DAY_MS
        table.insert(slot, tag, tag, tag, 1, now + 8_000)
        assert table.overdue(now + 7_999, 1) == []
        assert table.overdue(now + 8_000, 1) == [slot]
        assert table.oldest_deadline(slot) == now + 8_000
        assert table.take_overdue(slot, now + 8_000) == [tag]


@pytest.mark.parametrize("slot", [-1, 0, 1, 10**6])
def test_a_slot_that_is_not_open_is_refused(slot: int) -> None:
    table = AckTable()
    table.close(table.open())
    acts: list[Callable[[], object]] = [
        lambda: table.close(slot), lambda: table.insert(slot, 1, 1, "a", 1, 1), lambda: table.ack_to(slot, 1),
        lambda: table.ack_ids(slot, []), lambda: table.take_overdue(slot, 1), lambda: table.unacked(slot),
        lambda: table.items(slot), lambda: table.oldest_deadline(slot), lambda: table.last_tag(slot),
    ]  # fmt: skip
    for act in acts:
        with pytest.raises(UsageError, match=f"ack slot {slot} is not open"):
            act()


def test_a_closed_slot_is_used_again_as_new_and_keeps_its_place_on_the_drain_ring() -> None:
    table = AckTable()
    slot = table.open()
    fill(table, slot, ["a", "b", "c"])
    table.ack_to(slot, 1)
    assert table.close(slot) == ["b", "c"]
    assert table.open() == slot
    assert (table.last_tag(slot), table.unacked(slot), table.oldest_deadline(slot)) == (0, (0, 0), 0)
    assert table.drain() == [(slot, "a")]


def test_the_table_owns_one_reference_until_the_item_leaves() -> None:
    table = AckTable()
    slot = table.open()
    items = [Item() for _ in range(40)]

    def references() -> set[int]:
        return {sys.getrefcount(item) for item in items}

    (free,) = references()
    fill(table, slot, [*items])
    assert references() == {free + 1}
    assert table.ack_to(slot, 10) == 10
    assert table.ack_ids(slot, [200]) == 1
    assert references() == {free + 1}
    out: list[object] = [item for _, item in table.drain()]
    assert len(out) == 11
    out += table.take_overdue(slot, 1000)
    assert len(out) == 40
    assert references() == {free + 1}
    out = []
    assert references() == {free}
    fill(table, slot, [*items])
    out = table.close(slot)
    assert references() == {free + 1}
    del out
    assert references() == {free}


def test_a_dropped_table_drops_what_it_holds(no_collection: None) -> None:
    table = AckTable()
    slot = table.open()
    items = [Item() for _ in range(20)]
    seen = [weakref.ref(item) for item in items]
    fill(table, slot, [*items])
    table.ack_to(slot, 5)
    table.ack_ids(slot, [100])
    del items
    assert all(ref() is not None for ref in seen)
    del table
    assert all(ref() is None for ref in seen)


@pytest.mark.parametrize("acked", [0, 3])
def test_the_collector_sees_through_a_cycle(acked: int) -> None:
    class Session:
        def __init__(self) -> None:
            self.table = AckTable()

    session = Session()
    slot = session.table.open()
    fill(session.table, slot, [session, session, session])
    session.table.ack_to(slot, acked)
    seen = weakref.ref(session)
    gc.collect()
    assert seen() is not None
    del session
    gc.collect()
    assert seen() is None


def test_an_item_that_uses_the_table_as_it_dies_finds_it_whole() -> None:
    table = AckTable()
    slot = table.open()
    other = table.open()
    fill(table, other, ["x", "y"])
    table.insert(slot, 1, 1, Nosy(lambda: table.ack_to(other, 1)), 1, 1000)
    table.insert(slot, 2, 2, Nosy(lambda: table.insert(slot, 3, 3, "late", 1, 1000)), 1, 1000)
    table.ack_to(slot, 2)
    table.drain()
    assert table.items(slot) == [(3, "late")]
    assert table.drain() == [(other, "x")]


def test_a_collection_inside_any_call_may_use_the_table() -> None:
    table = AckTable()
    slot = table.open()
    other = table.open()
    seen = []

    def meddle() -> None:
        seen.append(1)
        tag = table.last_tag(slot)
        table.insert(slot, tag + 1, tag + 1, "meddled", 1, 1000)
        table.ack_ids(slot, [tag - 1])
        table.drain()

    def garbage() -> None:
        knot: list[object] = [Nosy(meddle)]
        knot.append(knot)

    threshold = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1, 1, 1)
    try:
        fill(table, slot, ["a"] * 50)
        for act in (
            lambda: table.items(slot),
            lambda: table.ack_to(slot, table.last_tag(slot) - 3),
            table.drain,
            lambda: table.take_overdue(slot, 1000),
            lambda: table.close(other),
        ):
            garbage()
            act()
        garbage()
        fill(table, slot, ["b"] * 20)
        garbage()
        assert len(table.take_overdue(slot, 1000)) > 0
    finally:
        gc.set_threshold(*threshold)
    assert len(seen) > 0
    count, total = table.unacked(slot)
    assert count == len(table.items(slot))
    assert total == count


def test_memory_stays_flat_over_millions_of_messages(peak_kb: Callable[[], int]) -> None:
    table = AckTable()
    body = b"x" * 100

    def churn() -> None:
        slots = [table.open() for _ in range(20)]
        for slot in slots:
            fill(table, slot, [bytes(body) for _ in range(100)])
            table.ack_to(slot, 60)
        table.drain()
        for slot in slots:
            table.close(slot)

    for _ in range(5):
        churn()
    before = peak_kb()
    for _ in range(150):
        churn()
    assert peak_kb() - before < 2048
