"""fastim.client.feed: every entry once and in order, signals as their newest state, deadlines last of all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fastim.client.events import (
    Connected,
    ConvChanged,
    Delivery,
    Disconnected,
    Event,
    Gone,
    Message,
    ReadMark,
    StateChanged,
)
from fastim.client.feed import MAX_SIGNALS, Feed
from fastim.client.localstore import FEED_PAGE, Batch, LocalStore, MemoryLocalStore
from fastim.client.sqlitestore import SqliteLocalStore
from fastim.errors import UsageError
from fastim.model import SkipReason

CONV = "p:alice:bob"


def message(seq: int, loss_time_ms: int = 0) -> Message:
    return Message(CONV, seq, seq, "bob", seq.to_bytes(16, "big"), 1, b"x", 1, loss_time_ms)


async def opened(store: LocalStore, now_ms: int = 0) -> Feed:
    return Feed(store, await store.open("d0"), lambda: now_ms)


async def commit(store: LocalStore, feed: Feed, *entries: Message | Gone) -> None:
    feed.committed(await store.commit(Batch(feed=list(entries))))


async def take(feed: Feed, count: int) -> list[Event]:
    taken = []
    for _ in range(count):
        event = await feed.next()
        assert event is not None
        taken.append(event)
    return taken


async def taken_seqs(feed: Feed, count: int) -> list[int]:
    return [event.seq for event in await take(feed, count) if isinstance(event, Message)]


async def test_entries_come_once_and_in_order() -> None:
    store = MemoryLocalStore()
    feed = await opened(store)
    await commit(store, feed, message(1), Gone(CONV, 2, 3, 1), message(4))
    assert await take(feed, 3) == [message(1), Gone(CONV, 2, 3, 1), message(4)]
    assert feed.waiting == 0


async def test_who_waits_is_woken_by_a_commit() -> None:
    store = MemoryLocalStore()
    feed = await opened(store)
    waiter = asyncio.create_task(feed.next())
    await asyncio.sleep(0)
    await commit(store, feed, message(1))
    assert await waiter == message(1)


async def test_a_slow_app_is_served_from_the_store_and_memory_stays_small(tmp_path: Path) -> None:
    store = SqliteLocalStore(tmp_path / "local.db")
    feed = await opened(store)
    for start in range(1, 2_001, 50):
        await commit(store, feed, *(message(seq) for seq in range(start, start + 50)))
        assert len(feed._at_hand) <= FEED_PAGE
    half = await taken_seqs(feed, 1_000)
    await commit(store, feed, *(message(seq) for seq in range(2_001, 2_101)))
    assert half + await taken_seqs(feed, 1_100) == list(range(1, 2_101))
    await store.close()


async def test_commits_between_two_pages_are_neither_lost_nor_doubled(tmp_path: Path) -> None:
    store = SqliteLocalStore(tmp_path / "local.db")
    feed = await opened(store)
    await commit(store, feed, *(message(seq) for seq in range(1, 301)))
    seen: list[int] = []

    async def consume() -> None:
        while len(seen) < 900:
            seen.extend(await taken_seqs(feed, 1))

    consumer = asyncio.create_task(consume())
    for start in range(301, 901, 20):
        await commit(store, feed, *(message(seq) for seq in range(start, start + 20)))
    await consumer
    assert seen == list(range(1, 901))
    await store.close()


async def test_a_restart_goes_on_after_what_was_done(tmp_path: Path) -> None:
    store = SqliteLocalStore(tmp_path / "local.db")
    feed = await opened(store)
    await commit(store, feed, message(1), message(2), message(3))
    assert await taken_seqs(feed, 2) == [1, 2]
    waiting = asyncio.create_task(feed.next())
    assert await waiting == message(3)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(feed.next(), 0.01)  # the app is back for more: it is done with the third
    await store.close()
    feed = await opened(store)
    await commit(store, feed, message(4))
    assert await take(feed, 1) == [message(4)]
    await store.close()


async def test_what_the_app_had_when_it_was_killed_comes_again_and_says_so(tmp_path: Path) -> None:
    store = SqliteLocalStore(tmp_path / "local.db")
    feed = await opened(store)
    await commit(store, feed, message(1), message(2), message(3))
    await take(feed, 2)
    await store.close()  # killed while it had the second
    feed = await opened(store)
    events = await take(feed, 2)
    assert [(event.seq, event.again) for event in events if isinstance(event, Message)] == [
        (2, True),
        (3, False),
    ]
    await store.close()


async def test_an_orderly_end_means_that_the_app_is_done(tmp_path: Path) -> None:
    store = SqliteLocalStore(tmp_path / "local.db")
    feed = await opened(store)
    await commit(store, feed, message(1))
    await take(feed, 1)
    feed.close(orderly=True)
    await store.close()
    feed = await opened(store)
    assert feed.waiting == 0
    await store.close()


async def test_a_cancelled_wait_loses_nothing() -> None:
    store = MemoryLocalStore()
    feed = await opened(store)
    waiter = asyncio.create_task(feed.next())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    await commit(store, feed, message(1))
    assert await take(feed, 1) == [message(1)]


async def test_a_deadline_is_compared_when_the_app_takes_the_message() -> None:
    store = MemoryLocalStore()
    now = 100
    feed = Feed(store, await store.open("d0"), lambda: now)
    await commit(store, feed, message(1, 100), message(2, 100), message(3))
    assert await take(feed, 1) == [message(1, 100)]
    now = 101
    assert await take(feed, 2) == [Gone(CONV, 2, 2, SkipReason.EXPIRED), message(3)]


async def test_a_newer_signal_takes_the_place_of_an_older_one_about_the_same() -> None:
    feed = await opened(MemoryLocalStore())
    client_id = bytes(16)
    feed.publish(
        [
            ConvChanged(CONV), ReadMark(CONV, "bob", 1), Connected("alice", "s", 0),
            ReadMark(CONV, "carol", 1), StateChanged(client_id, CONV, Delivery.SENT, 4, 5),
            ConvChanged(CONV), ReadMark(CONV, "bob", 2),
            Disconnected(1006, "gone", False, 1.0),
        ]
    )  # fmt: skip
    assert await take(feed, 5) == [
        ReadMark(CONV, "carol", 1),
        StateChanged(client_id, CONV, Delivery.SENT, 4, 5),
        ConvChanged(CONV),
        ReadMark(CONV, "bob", 2),
        Disconnected(1006, "gone", False, 1.0),
    ]


async def test_signals_and_messages_take_turns() -> None:
    store = MemoryLocalStore()
    feed = await opened(store)
    await commit(store, feed, message(1), message(2))
    feed.publish([ConvChanged("g:a"), ConvChanged("g:b")])
    assert await take(feed, 4) == [ConvChanged("g:a"), message(1), ConvChanged("g:b"), message(2)]


async def test_signals_that_nobody_takes_are_bounded() -> None:
    feed = await opened(MemoryLocalStore())
    for n in range(MAX_SIGNALS + 5):
        feed.publish([ConvChanged(f"g:{n}")])
    assert await take(feed, 1) == [ConvChanged("g:5")]


async def test_a_second_consumer_is_refused() -> None:
    feed = await opened(MemoryLocalStore())
    first = asyncio.create_task(feed.next())
    await asyncio.sleep(0)
    with pytest.raises(UsageError, match="one consumer"):
        await feed.next()
    feed.close(orderly=True)
    assert await first is None


async def test_a_failure_reaches_whoever_waits() -> None:
    feed = await opened(MemoryLocalStore())
    waiter = asyncio.create_task(feed.next())
    await asyncio.sleep(0)
    feed.fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        await waiter


async def test_progress_is_told_for_every_entry() -> None:
    store = MemoryLocalStore()
    feed = await opened(store)
    taken: list[int] = []
    feed.on_progress = lambda: taken.append(feed.waiting)
    await commit(store, feed, message(1), message(2))
    await take(feed, 2)
    assert taken == [1, 0]
