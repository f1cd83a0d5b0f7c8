"""Session: what is BEHIND, from where, and what a replay has."""

from __future__ import annotations

import random

import pytest

from fastim.auth import Identity, Scope
from fastim.node.session import CURSOR, Session, Sync

CONV = "p:alice:bob"


def session() -> Session:
    identity = Identity("bob", frozenset({Scope.CLIENT}), 10**15, "test", "t")
    return Session("s", identity, "phone", "app")


def test_a_conversation_is_behind_from_the_lower_of_two_positions() -> None:
    s = session()
    heard = s.put_behind(CONV, 9, 5)
    assert s.put_behind(CONV, 7, 8) is heard
    assert (heard.position, heard.upto, heard.version) == (5, 9, 0)
    s.put_behind(CONV, 0, 3)
    assert (heard.position, heard.upto, heard.version) == (3, 9, 1)
    s.put_behind(CONV, 0, CURSOR)
    assert (heard.position, heard.version) == (CURSOR, 2)


def test_a_pause_and_its_end_void_the_page_that_is_read() -> None:
    s = session()
    heard = s.put_behind(CONV, 9, 5)
    s.put_behind(CONV, 9, CURSOR, paused=True)
    assert (heard.paused, heard.version) == (True, 1)
    s.put_behind(CONV, 9, CURSOR, paused=True)
    assert heard.version == 1
    s.put_behind(CONV, 0, 5)
    assert (heard.paused, heard.position, heard.version) == (False, CURSOR, 2)


def test_what_may_have_been_sent_before_stays_marked_so() -> None:
    s = session()
    heard = s.put_behind(CONV, 1, 0, dup=True)
    s.put_behind(CONV, 1, 0)
    assert heard.dup


def test_a_live_message_only_raises_what_was_heard() -> None:
    s = session()
    assert not s.note_live(CONV, 4)
    heard = s.put_behind(CONV, 3, 2)
    assert s.note_live(CONV, 4)
    assert s.note_live(CONV, 1)
    assert (heard.upto, heard.position, heard.version) == (4, 2, 0)


def test_there_is_something_to_stream_only_on_a_greeted_connection() -> None:
    s = session()
    s.put_behind(CONV, 1, 0)
    assert not s.wants_stream()
    s.link = object()  # type: ignore[assignment]
    assert s.wants_stream()
    s.joining = True
    assert not s.wants_stream()
    assert s.open_link is None
    s.joining = False
    assert s.open_link is s.link
    s.put_behind(CONV, 1, 0, paused=True)
    assert not s.wants_stream()
    s.sync = Sync(0)
    assert s.wants_stream()
    assert s.syncing
    s.sync.paged = True
    assert not s.syncing
    s.ended = True
    assert not s.wants_stream()


@pytest.mark.parametrize(
    ("ranges", "cursor", "reached"),
    [
        ([], 4, 4),
        ([(5, 5), (6, 6)], 4, 6),
        ([(6, 6), (5, 5)], 4, 6),
        ([(6, 6)], 4, 4),
        ([(5, 5), (7, 9)], 4, 5),
        ([(1, 3)], 4, 4),
        ([(3, 8)], 4, 8),
        ([(5, 6), (5, 9), (7, 7)], 4, 9),
    ],
)
def test_a_replay_reaches_as_far_as_it_has_no_hole(
    ranges: list[tuple[int, int]], cursor: int, reached: int
) -> None:
    s = session()
    s.replayed[CONV] = ranges
    assert s.reached(CONV, cursor) == reached
    assert s.reached("p:bob:carol", cursor) == cursor


def test_a_replay_against_counting() -> None:
    rng = random.Random(3)
    for _ in range(500):
        s = session()
        ranges = [(first, first + rng.randrange(3)) for first in (rng.randrange(1, 12) for _ in range(5))]
        s.replayed[CONV] = ranges
        cursor = rng.randrange(12)
        has = {seq for first, last in ranges for seq in range(first, last + 1)}
        expected = cursor
        while expected + 1 in has:
            expected += 1
        assert s.reached(CONV, cursor) == expected, (ranges, cursor)


def test_tags_are_numbered_from_one() -> None:
    s = session()
    assert [s.next_tag(), s.next_tag(), s.tag] == [1, 2, 2]
