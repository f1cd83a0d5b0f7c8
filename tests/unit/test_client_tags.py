"""fastim.client.tags: the floor, and what is missing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastim.client.tags import Tags


def fresh(floor: int = 0, *, hot: bool = False) -> Tags:
    tags = Tags(0)
    tags.begin(floor, hot=hot)
    return tags


def test_the_floor_stops_below_the_first_frame_that_is_not_stored() -> None:
    tags = fresh()
    for tag in (1, 2, 3):
        assert tags.received(tag)
    tags.stored(1)
    tags.stored(3)
    assert tags.floor == 1
    tags.stored(2)
    assert tags.floor == 3


def test_tag_0_is_nobodys() -> None:
    tags = fresh()
    assert tags.received(0)
    tags.stored(0)
    assert (tags.floor, tags.seen) == (0, 0)


def test_a_missing_tag_is_noticed_when_the_next_one_comes() -> None:
    tags = fresh()
    assert tags.received(1)
    assert not tags.received(3)


def test_a_missing_tail_is_noticed_by_pong() -> None:
    tags = fresh()
    tags.received(1)
    assert tags.complete(1)
    assert not tags.complete(2)


def test_a_hot_resume_may_leave_tags_out() -> None:
    tags = fresh(10, hot=True)
    assert tags.received(12)
    assert tags.received(15)
    tags.stored(12)
    tags.stored(15)
    assert tags.floor == 15
    assert tags.complete(17), "16 and 17 needed no ack any more"
    assert tags.received(18)
    assert not tags.received(20), "the replay is over"


def test_a_frame_that_comes_again_after_a_hot_resume_counts_once() -> None:
    tags = fresh(10, hot=True)
    assert tags.received(9)
    assert tags.received(11)
    assert tags.received(11)
    tags.stored(11)
    tags.stored(11)
    assert tags.floor == 11


def test_frames_of_the_future_may_have_carried_the_missing_tags() -> None:
    tags = fresh()
    tags.received(1)
    tags.stored(1)
    tags.unknown()
    assert tags.received(3)
    tags.stored(3)
    assert tags.floor == 3
    tags.unknown()
    assert tags.complete(4)
    assert tags.floor == 4


def test_quiet_means_that_no_tagged_frame_came_since_the_last_question() -> None:
    tags = fresh()
    assert tags.quiet()
    tags.received(1)
    assert not tags.quiet()
    assert tags.quiet()


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 30))
def test_the_floor_never_passes_what_is_not_stored(stored: list[int], received: int) -> None:
    tags = fresh()
    for tag in range(1, received + 1):
        tags.received(tag)
    done: set[int] = set()
    for tag in stored:
        tags.stored(tag)
        done.add(tag)
        first = next((t for t in range(1, received + 1) if t not in done), received + 1)
        assert tags.floor == first - 1
