"""fastim.client.ordering: when a hole is pulled, and what is not held."""

from __future__ import annotations

from fastim.client.ordering import HOLD_MS, MAX_HELD, REPULL_MOST_MS, REPULL_MS, UNKNOWN_MS, Ordering

CONV = "p:a:b"


def known(last: int = 0) -> Ordering[str]:
    ordering: Ordering[str] = Ordering()
    ordering.load(CONV, 1, last)
    return ordering


def pulls(ordering: Ordering[str], now: int) -> list[tuple[str, int, int]]:
    return list(ordering.pulls(now))


def test_a_hole_is_pulled_after_it_was_held_for_500_ms() -> None:
    ordering = known()
    ordering.offer(CONV, 1, 4, 4, "four", 1_000)
    assert ordering.next_due_ms() == 1_000 + HOLD_MS
    assert pulls(ordering, 1_000 + HOLD_MS - 1) == []
    assert pulls(ordering, 1_000 + HOLD_MS) == [(CONV, 1, 3)]


def test_a_pull_is_repeated_with_growing_waits_until_the_hole_is_filled() -> None:
    ordering = known()
    ordering.offer(CONV, 1, 3, 3, "three", 0)
    now, waits = HOLD_MS, []
    for _ in range(6):
        assert pulls(ordering, now) == [(CONV, 1, 2)]
        due = ordering.next_due_ms()
        assert due is not None
        waits.append(due - now)
        now = due
    assert waits == [REPULL_MS, 8_000, 16_000, REPULL_MOST_MS, REPULL_MOST_MS, REPULL_MOST_MS]
    ordering.offer(CONV, 1, 1, 2, "skip", now)
    assert ordering.next_due_ms() is None


def test_a_hole_that_is_being_filled_is_not_pulled() -> None:
    ordering = known()
    ordering.offer(CONV, 1, 9, 9, "nine", 0)
    for seq in range(1, 9):
        assert pulls(ordering, seq * 400) == []
        ordering.offer(CONV, 1, seq, seq, str(seq), seq * 400)
    assert ordering.level
    assert ordering.last(CONV) == 9


def test_two_copies_of_a_held_frame_both_come_back() -> None:
    ordering = known()
    ordering.offer(CONV, 1, 2, 2, "first", 0)
    ordering.offer(CONV, 1, 2, 2, "second", 0)
    out = ordering.offer(CONV, 1, 1, 1, "one", 0)
    assert out.applied == [(1, 1, "one"), (2, 2, "first")]
    assert out.done == ["second"]


def test_a_skip_applies_only_to_what_was_not_shown() -> None:
    ordering = known(7)
    assert ordering.offer(CONV, 1, 5, 10, "skip", 0).applied == [(8, 10, "skip")]


def test_an_unknown_conversation_waits_for_the_list_and_then_starts_there() -> None:
    ordering: Ordering[str] = Ordering()
    assert ordering.offer(CONV, 1, 51, 51, "live", 0).applied == []
    assert ordering.last(CONV) is None
    assert pulls(ordering, HOLD_MS) == []
    assert ordering.start(CONV, 1, 50, 10).applied == [(51, 51, "live")]


def test_a_cursor_above_a_held_frame_does_not_hide_it() -> None:
    ordering: Ordering[str] = Ordering()
    ordering.offer(CONV, 1, 51, 51, "live", 0)
    assert ordering.start(CONV, 1, 60, 10).applied == [(51, 51, "live")]


def test_hole_below_a_start_that_was_told_is_pulled_after_the_usual_hold() -> None:
    ordering: Ordering[str] = Ordering()
    ordering.offer(CONV, 1, 2, 2, "live", 0)
    assert ordering.next_due_ms() == UNKNOWN_MS
    assert ordering.start(CONV, 1, 0, 10).applied == []
    assert ordering.next_due_ms() == 10 + HOLD_MS
    assert list(ordering.pulls(10 + HOLD_MS)) == [(CONV, 1, 1)]


def test_an_unknown_conversation_that_no_list_tells_of_is_pulled_from_the_beginning() -> None:
    ordering: Ordering[str] = Ordering()
    ordering.offer(CONV, 1, 51, 51, "live", 0)
    assert pulls(ordering, UNKNOWN_MS) == [(CONV, 1, 50)]


def test_another_epoch_drops_what_is_held_and_pulls_from_the_beginning() -> None:
    ordering = known(20)
    ordering.offer(CONV, 1, 25, 25, "old", 0)
    out = ordering.offer(CONV, 2, 3, 3, "new", 100)
    assert out.reset
    assert out.done == ["old"]
    assert out.applied == []
    assert pulls(ordering, 100 + HOLD_MS) == [(CONV, 1, 2)]


def test_a_seq_without_content_is_pulled_and_comes_back_when_it_is_reached() -> None:
    ordering = known(4)
    assert ordering.heard(CONV, 1, 6, "notice", 0).done == []
    assert pulls(ordering, HOLD_MS) == [(CONV, 5, 6)]
    assert ordering.offer(CONV, 1, 5, 5, "five", 600).done == []
    assert ordering.offer(CONV, 1, 6, 6, "six", 600).done == ["notice"]


def test_frames_beyond_the_bound_are_remembered_as_missing_and_pulled() -> None:
    ordering = known()
    for seq in range(2, MAX_HELD + 4):
        ordering.offer(CONV, 1, seq, seq, str(seq), 0)
    out = ordering.offer(CONV, 1, 1, 1, "1", 0)
    assert len(out.applied) == 1 + MAX_HELD
    assert pulls(ordering, HOLD_MS) == [(CONV, MAX_HELD + 2, MAX_HELD + 3)]


def test_a_lost_connection_forgets_what_was_held_but_no_position() -> None:
    ordering = known(3)
    ordering.offer(CONV, 1, 9, 9, "nine", 0)
    ordering.lost()
    assert ordering.level
    assert ordering.last(CONV) == 3
