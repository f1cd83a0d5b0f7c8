"""fastim._core.acks does what its slow twin does, over any history, and gives every item out exactly once."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastim._core.acks import AckTable
from fastim.errors import PeerError, UsageError
from tests.reference.acks import AckTable as Oracle

MONTH_MS = 30 * 86_400_000


class AcksAgree(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = AckTable()
        self.oracle = Oracle()
        self.now = 5_000
        self.inserted = 0
        self.out: list[object] = []

    def a_slot(self, index: int) -> int:
        slots = sorted(self.oracle.sessions)
        return slots[index % len(slots)]

    def both(self, act: Callable[[AckTable | Oracle], object]) -> object:
        results: list[object] = []
        for table in (self.table, self.oracle):
            try:
                results.append(act(table))
            except (PeerError, UsageError) as error:
                results.append(type(error))
        assert results[0] == results[1]
        return results[0]

    @rule()
    def open(self) -> None:
        slot = self.table.open()
        self.oracle.open(slot)

    @precondition(lambda self: self.oracle.sessions)
    @rule(index=st.integers(0, 9))
    def close(self, index: int) -> None:
        slot = self.a_slot(index)
        items = self.both(lambda table: table.close(slot))
        assert isinstance(items, list)
        self.out += items
        assert self.both(lambda table: table.close(slot)) is UsageError

    @precondition(lambda self: self.oracle.sessions)
    @rule(
        index=st.integers(0, 9),
        count=st.sampled_from([1, 1, 7, 8, 9, 40]),
        ahead=st.sampled_from([8_000, 8_000, 8_000, 1, 3_000, 7 * 86_400_000]),
        first=st.sampled_from([1, 1, 17, 2**32 - 50]),
        ids=st.integers(0, 5),
    )
    def insert(self, index: int, count: int, ahead: int, first: int, ids: int) -> None:
        slot = self.a_slot(index)
        tag = self.oracle.last_tag(slot) + 1 if self.oracle.last_tag(slot) else first
        for step in range(count):
            if tag + step >= 2**32:
                break
            item = f"item {self.inserted}"
            self.inserted += 1
            msg_id = (self.inserted * ids) % 50
            deadline = self.now + ahead + step
            self.both(lambda table: table.insert(slot, tag + step, msg_id, item, 10 + step, deadline))  # noqa: B023

    @precondition(lambda self: self.oracle.sessions)
    @rule(index=st.integers(0, 9), skip=st.sampled_from([0, 2, 100]))
    def insert_out_of_turn(self, index: int, skip: int) -> None:
        slot = self.a_slot(index)
        tag = self.oracle.last_tag(slot) + skip
        if self.oracle.last_tag(slot) and tag < 2**32:
            act = self.both(lambda table: table.insert(slot, tag, 1, "never", 1, self.now + 1))
            assert act is UsageError

    @precondition(lambda self: self.oracle.sessions)
    @rule(index=st.integers(0, 9), back=st.sampled_from([0, 0, 1, 3, 8, 50, -1]))
    def ack_to(self, index: int, back: int) -> None:
        slot = self.a_slot(index)
        tag = min(max(self.oracle.last_tag(slot) - back, 0), 2**32 - 1)
        self.both(lambda table: table.ack_to(slot, tag))

    @precondition(lambda self: self.oracle.sessions)
    @rule(index=st.integers(0, 9), msg_ids=st.lists(st.integers(0, 50), max_size=12))
    def ack_ids(self, index: int, msg_ids: list[int]) -> None:
        slot = self.a_slot(index)
        self.both(lambda table: table.ack_ids(slot, msg_ids))

    @rule()
    def drain(self) -> None:
        assert self.table.pending_drain == bool(self.oracle.resolved)
        pairs = self.both(lambda table: table.drain())
        assert isinstance(pairs, list)
        self.out += [item for _, item in pairs]
        assert not self.table.pending_drain

    @rule(ms=st.sampled_from([1, 500, 3_000, 8_000, 86_400_000, MONTH_MS]))
    def time_passes(self, ms: int) -> None:
        self.now += ms
        # As a node does; it is also what lets deadlines far from the start be kept.
        self.overdue(3)

    @rule(cap=st.sampled_from([1, 3, 100]))
    def overdue(self, cap: int) -> None:
        self.both(lambda table: table.overdue(self.now, cap))

    @precondition(lambda self: self.oracle.sessions)
    @rule(index=st.integers(0, 9))
    def take_overdue(self, index: int) -> None:
        slot = self.a_slot(index)
        items = self.both(lambda table: table.take_overdue(slot, self.now))
        assert isinstance(items, list)
        self.out += items

    @rule()
    def take_all_overdue(self) -> None:
        for slot in self.table.overdue(self.now, 100):
            self.out += self.table.take_overdue(slot, self.now)
            self.oracle.take_overdue(slot, self.now)
        assert self.table.overdue(self.now, 100) == []

    @invariant()
    def every_slot_looks_the_same(self) -> None:
        assert len(self.table) == len(self.oracle.sessions)
        for slot in self.oracle.sessions:
            for look in ("unacked", "items", "last_tag"):
                self.both(lambda table: getattr(table, look)(slot))  # noqa: B023
            # A deadline that was 12 days past when the base moved is only known to be past.
            exact = self.oracle.oldest_deadline(slot)
            kept = self.table.oldest_deadline(slot)
            assert kept == exact or exact < kept <= self.now - 12 * 86_400_000

    def teardown(self) -> None:
        self.drain()
        for slot in list(self.oracle.sessions):
            self.out += self.table.close(slot)
        assert sorted(map(str, self.out)) == sorted(f"item {n}" for n in range(self.inserted))


AcksAgree.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestAcksAgree = AcksAgree.TestCase
