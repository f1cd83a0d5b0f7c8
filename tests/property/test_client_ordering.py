"""fastim.client.ordering does what its slow twin does, whatever arrives; and what it applies is the order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastim.client.ordering import HOLD_MS, REPULL_MOST_MS, UNKNOWN_MS, Ordering, Outcome
from tests.reference.ordering import Ordering as Oracle

CONVS = st.sampled_from(["p:a:b", "g:team"])
EPOCHS = st.sampled_from([1, 1, 1, 1, 1, 0, 2])
SEQS = st.integers(1, 14)


class OrderingAgrees(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.real: Ordering[str] = Ordering()
        self.oracle = Oracle()
        self.now = 1_000
        self.items = 0
        self.inside: set[str] = set()
        """Items that were handed in and did not come back."""

    def new_item(self) -> str:
        self.items += 1
        self.inside.add(f"item {self.items}")
        return f"item {self.items}"

    def compare(self, out: Outcome[str], expected: tuple[list[tuple[int, int, str]], set[str], bool]) -> None:
        applied, done, reset = expected
        assert out.applied == applied
        assert sorted(out.done) == sorted(done)
        assert out.reset == reset
        back = [item for _, _, item in out.applied] + out.done
        assert len(back) == len(set(back))
        assert set(back) <= self.inside
        self.inside -= set(back)

    @rule(conv=CONVS, epoch=EPOCHS, seq=SEQS)
    def a_message_comes(self, conv: str, epoch: int, seq: int) -> None:
        item = self.new_item()
        out = self.real.offer(conv, epoch, seq, seq, item, self.now)
        self.compare(out, self.oracle.offer(conv, epoch, seq, seq, item))

    @rule(conv=CONVS, epoch=EPOCHS, from_seq=SEQS, length=st.integers(1, 6))
    def a_skip_comes(self, conv: str, epoch: int, from_seq: int, length: int) -> None:
        item = self.new_item()
        to_seq = from_seq + length - 1
        out = self.real.offer(conv, epoch, from_seq, to_seq, item, self.now)
        self.compare(out, self.oracle.offer(conv, epoch, from_seq, to_seq, item))

    @rule(conv=CONVS, epoch=EPOCHS, seq=SEQS)
    def a_seq_is_heard_of(self, conv: str, epoch: int, seq: int) -> None:
        item = self.new_item()
        out = self.real.heard(conv, epoch, seq, item, self.now)
        self.compare(out, self.oracle.heard(conv, epoch, seq, item))

    @rule(conv=CONVS, epoch=EPOCHS, cursor=st.integers(0, 14))
    def the_list_says_where_to_start(self, conv: str, epoch: int, cursor: int) -> None:
        out = self.real.start(conv, epoch, cursor, self.now)
        self.compare(out, self.oracle.start(conv, epoch, cursor))

    @rule()
    def the_connection_is_lost(self) -> None:
        self.real.lost()
        self.oracle.lost()
        self.inside.clear()

    @rule(ms=st.sampled_from([1, HOLD_MS, UNKNOWN_MS, REPULL_MOST_MS]))
    def time_passes_and_holes_are_pulled(self, ms: int) -> None:
        self.now += ms
        expected = {conv: hole for conv in self.oracle.convs if (hole := self.oracle.hole(conv)) is not None}
        for conv, from_seq, to_seq in self.real.pulls(self.now):
            assert expected[conv] == (from_seq, to_seq)
            if self.oracle.convs[conv].last is None:
                self.oracle.convs[conv].last = 0
            del expected[conv]
        if ms == REPULL_MOST_MS:
            assert not expected, "a hole was never pulled"

    @invariant()
    def positions_are_the_same(self) -> None:
        for conv in ("p:a:b", "g:team"):
            state = self.oracle.convs.get(conv)
            assert self.real.last(conv) == (None if state is None else state.last)
        assert self.real.level == all(not state.waiting for state in self.oracle.convs.values())
        due_ms = self.real.next_due_ms()
        assert (due_ms is None) == self.real.level


OrderingAgrees.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
TestOrderingAgrees = OrderingAgrees.TestCase


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """(head, frames): a timeline cut into messages and skips, each at least once, in any order."""
    frames = []
    seq = 1
    for length in draw(st.lists(st.sampled_from([1, 1, 1, 2, 5]), min_size=1, max_size=20)):
        frames.append((seq, seq + length - 1))
        seq += length
    repeats = draw(st.lists(st.sampled_from(frames), max_size=15))
    return seq - 1, draw(st.permutations(frames + repeats))


@given(deliveries())
@settings(max_examples=500, deadline=None)
def test_any_arrival_order_with_duplicates_gives_every_seq_once_and_in_order(
    delivery: tuple[int, list[tuple[int, int]]],
) -> None:
    head, frames = delivery
    ordering: Ordering[tuple[int, int]] = Ordering()
    ordering.load("p:a:b", 1, 0)
    shown: list[int] = []
    back = 0
    for frame in frames:
        out = ordering.offer("p:a:b", 1, *frame, frame, 1)
        back += len(out.applied) + len(out.done)
        for from_seq, to_seq, _ in out.applied:
            shown += range(from_seq, to_seq + 1)
    assert shown == list(range(1, head + 1))
    assert back == len(frames)
    assert ordering.level
