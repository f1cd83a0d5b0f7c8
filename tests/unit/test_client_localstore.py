"""Both local stores keep what they promise; the durable one across a kill, a lost side file, a full disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fastim.client.events import Gone, Message
from fastim.client.localstore import Batch, ConvRow, LocalStore, MemoryLocalStore, Reset, Ticket
from fastim.client.outbox import Unsent
from fastim.client.sqlitestore import SqliteLocalStore
from fastim.errors import StoreUnavailable, UsageError
from fastim.model import Flag, Kind

CONV = "p:alice:bob"
Make = Callable[[], LocalStore]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "memory":
        return MemoryLocalStore
    return lambda: SqliteLocalStore(tmp_path / "local.db")


def message(
    seq: int, conv: str = CONV, *, sender: str = "bob", epoch: int = 1, msg_id: int = 0, **more: int
) -> Message:
    client_id = seq.to_bytes(16, "big")
    kind, flags = more.get("kind", int(Kind.TEXT)), more.get("flags", 0)
    return Message(
        conv,
        seq,
        msg_id or 1_000 + seq,
        sender,
        client_id,
        kind,
        b"hello",
        5_000 + seq,
        0,
        flags,
        ("alice",),
        epoch,
        seq,
    )


def unsent(n: int) -> Unsent:
    return Unsent(n, n.to_bytes(16, "big"), CONV, 1, b"mine", 0, 0, ("bob",), 3, 77)


def seqs(messages: list[Message]) -> list[int]:
    return [one.seq for one in messages]


async def test_what_was_committed_is_there(make: Make) -> None:
    store = make()
    empty = await store.open("d0")
    assert (empty.convs, empty.outbox, empty.reads, empty.newest) == ([], [], [], 0)
    row = ConvRow(CONV, 1, 0, 2, head=2, unread=2, preview="hello")
    ticket = Ticket("alice", "s1", 9, 4, 5)
    batch = Batch(
        feed=[message(1), message(2)], convs={CONV: row}, queued=[unsent(2), unsent(1)],
        reads={(CONV, "bob"): 1}, ticket=ticket,
    )  # fmt: skip
    placed = await store.commit(batch)
    assert placed == [(1, message(1)), (2, message(2))]
    if isinstance(store, SqliteLocalStore):
        await store.close()
    found = await store.open("d0")
    assert found.ticket == ticket
    assert found.convs == [row]
    assert found.outbox == [unsent(1), unsent(2)]
    assert found.reads == [(CONV, "bob", 1)]
    assert (found.taken, found.done, found.newest) == (0, 0, 2)
    assert await store.waiting(0, 10) == placed
    await store.close()


async def test_the_outbox_changes_by_client_id(make: Make) -> None:
    store = make()
    await store.open("d0")
    await store.commit(Batch(queued=[unsent(1), unsent(2), unsent(3)]))
    bad = unsent(2)
    bad.refused, bad.detail = "too_big", "why"
    await store.commit(Batch(closed=[unsent(1).client_id], refused=[bad]))
    found = await store.open("d0")
    assert [(one.n, one.refused) for one in found.outbox] == [(2, "too_big"), (3, "")]
    await store.close()


async def test_the_feed_gives_messages_and_gaps_in_the_order_of_the_commits(make: Make) -> None:
    store = make()
    await store.open("d0")
    await store.commit(Batch(feed=[message(1), Gone(CONV, 2, 4, 1)]))
    await store.commit(Batch(feed=[message(1, "g:team"), message(5)]))
    waiting = await store.waiting(0, 10)
    assert [position for position, _ in waiting] == [1, 2, 3, 4]
    assert [entry for _, entry in waiting] == [
        message(1),
        Gone(CONV, 2, 4, 1),
        message(1, "g:team"),
        message(5),
    ]
    assert await store.waiting(1, 2) == waiting[1:3]
    store.mark(3, 2)
    found = await store.open("d0")
    assert (found.taken, found.done) == (3, 2)
    assert await store.waiting(2, 10) == waiting[2:]
    await store.close()


async def test_pages_are_the_newest_below_in_seq_order_and_not_fed(make: Make) -> None:
    store = make()
    await store.open("d0")
    await store.commit(Batch(feed=[message(6), message(7)]))
    await store.commit(Batch(pages=[message(4), message(5)]))
    assert seqs(await store.page(CONV, 0, 8, 3)) == [5, 6, 7]
    assert seqs(await store.page(CONV, 4, 7, 50)) == [5, 6]
    assert seqs(await store.page("g:team", 0, 8, 3)) == []
    assert [entry for _, entry in await store.waiting(0, 10)] == [message(6), message(7)]
    await store.close()


async def test_a_message_that_comes_again_under_another_epoch_is_not_fed_again(make: Make) -> None:
    store = make()
    await store.open("d0")
    await store.commit(Batch(feed=[message(1), message(2), message(3)]))
    again = [message(1, epoch=2, msg_id=1_002), message(2, epoch=2, msg_id=1_003)]
    fresh = message(3, epoch=2, msg_id=2_000)
    placed = await store.commit(Batch(feed=[Reset(CONV), *again, fresh]))
    assert placed == [(4, fresh)]
    assert await store.page(CONV, 0, 99, 10) == [*again, fresh]
    assert len(await store.waiting(3, 10)) == 1
    await store.close()


async def test_a_reset_takes_place_where_it_stands_in_the_batch(make: Make) -> None:
    store = make()
    await store.open("d0")
    old, new = message(1), message(1, epoch=2, msg_id=3_000)
    placed = await store.commit(Batch(feed=[old, Reset(CONV), new]))
    assert [entry for _, entry in placed] == [old, new]
    assert [entry.msg_id for _, entry in await store.waiting(0, 9) if isinstance(entry, Message)] == [
        1_001,
        3_000,
    ]
    assert await store.page(CONV, 0, 99, 10) == [new]
    await store.close()


async def test_two_resets_of_one_conversation(make: Make) -> None:
    store = make()
    await store.open("d0")
    await store.commit(Batch(feed=[message(1)]))
    await store.commit(Batch(feed=[Reset(CONV), message(1, epoch=2, msg_id=2_001)]))
    placed = await store.commit(
        Batch(feed=[Reset(CONV), message(1, epoch=3, msg_id=1_001), message(2, epoch=3, msg_id=2_001)])
    )
    assert placed == []
    assert seqs(await store.page(CONV, 0, 99, 10)) == [1, 2]
    await store.close()


async def test_unread_counts_countable_messages_of_others(make: Make) -> None:
    store = make()
    await store.open("d0")
    await store.commit(
        Batch(
            feed=[
                message(1), message(2), message(3, sender="alice"), message(4, kind=int(Kind.MEMBER)),
                message(5, flags=int(Flag.SILENT)), message(6),
            ]
        )
    )  # fmt: skip
    assert await store.count(CONV, 1, "alice") == 2
    assert await store.count(CONV, 6, "alice") == 0
    await store.close()


# -------------------------------------------------------------------------------------------- memory only


async def test_memory_keeps_so_many_messages_and_says_where_its_floor_is() -> None:
    store = MemoryLocalStore(keep=3)
    await store.open("d0")
    await store.commit(Batch(feed=[message(seq) for seq in range(1, 6)]))
    assert store.floor(CONV) == 2
    assert seqs(await store.page(CONV, store.floor(CONV), 99, 10)) == [3, 4, 5]
    assert len(await store.waiting(0, 10)) == 5, "what was not handed over is kept"


# -------------------------------------------------------------------------------------------- sqlite only


def durable(tmp_path: Path) -> SqliteLocalStore:
    return SqliteLocalStore(tmp_path / "local.db")


async def test_a_second_client_on_the_same_file_is_refused(tmp_path: Path) -> None:
    first, second = durable(tmp_path), durable(tmp_path)
    await first.open("d0")
    with pytest.raises(StoreUnavailable, match="locked"):
        await second.open("d0")
    await first.close()
    await second.open("d0")
    await second.close()


async def test_the_store_of_another_device_is_refused(tmp_path: Path) -> None:
    store = durable(tmp_path)
    await store.open("d0")
    await store.close()
    with pytest.raises(UsageError, match="belongs to device 'd0'; asked for 'd1'"):
        await store.open("d1")
    await store.close()


async def test_a_schema_of_the_future_is_refused(tmp_path: Path) -> None:
    store = durable(tmp_path)
    await store.open("d0")
    await store.close()
    with sqlite3.connect(tmp_path / "local.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UsageError, match="schema 99; this client knows up to 1"):
        await store.open("d0")
    await store.close()


async def test_marks_survive_without_any_commit(tmp_path: Path) -> None:
    store = durable(tmp_path)
    await store.open("d0")
    await store.commit(Batch(feed=[message(1), message(2), message(3)]))
    store.mark(3, 2)
    # As a kill leaves it: nobody closes. The file lock goes with the process; here a copy stands in for it.
    for name in ("local.db", "local.db-wal", "local.db-shown"):
        (tmp_path / f"copy-{name}").write_bytes((tmp_path / name).read_bytes())
    copy = SqliteLocalStore(tmp_path / "copy-local.db")
    found = await copy.open("d0")
    assert (found.taken, found.done, found.newest) == (3, 2, 3)
    await copy.close()
    await store.close()


async def test_a_lost_or_foreign_side_file_falls_back_to_the_last_commit(tmp_path: Path) -> None:
    store, side = durable(tmp_path), tmp_path / "local.db-shown"
    await store.open("d0")
    await store.commit(Batch(feed=[message(1), message(2), message(3)]))
    store.mark(2, 2)
    await store.commit(Batch(reads={(CONV, "bob"): 1}))
    await store.close()
    whole = side.read_bytes()
    for damaged in (b"", whole[:20], b"x" * 28, whole[:8] + bytes(7) + b"\x63" + whole[16:]):
        side.write_bytes(damaged)
        found = await store.open("d0")
        assert (found.taken, found.done) == (2, 2)
        await store.close()
    other = SqliteLocalStore(tmp_path / "other.db")
    await other.open("d0")
    await other.commit(Batch(feed=[message(seq) for seq in range(1, 9)]))
    other.mark(8, 8)
    await other.close()
    side.write_bytes((tmp_path / "other.db-shown").read_bytes())
    found = await store.open("d0")
    assert (found.taken, found.done) == (2, 2)
    await store.close()


async def test_gaps_that_were_taken_are_forgotten(tmp_path: Path) -> None:
    store = durable(tmp_path)
    await store.open("d0")
    await store.commit(Batch(feed=[Gone(CONV, 1, 4, 1), Gone(CONV, 5, 5, 1)]))
    store.mark(1, 1)
    await store.commit(Batch(feed=[Gone(CONV, 6, 6, 1)]))
    await store.close()
    with sqlite3.connect(tmp_path / "local.db") as db:
        assert [row[0] for row in db.execute("SELECT position FROM gone")] == [2, 3]
    db.close()


async def test_positions_are_not_used_twice_when_gaps_were_forgotten(tmp_path: Path) -> None:
    store = durable(tmp_path)
    await store.open("d0")
    await store.commit(Batch(feed=[Gone(CONV, 1, 4, 1)]))
    store.mark(1, 1)
    await store.commit(Batch(reads={(CONV, "bob"): 1}))
    await store.close()
    assert (await store.open("d0")).newest == 1
    assert await store.commit(Batch(feed=[message(5)])) == [(2, message(5))]
    await store.close()


async def test_a_full_disk_stores_nothing_of_the_batch_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    store = durable(tmp_path)
    await store.open("d0")
    await store.commit(Batch(feed=[message(1)]))

    async def set_most_pages(pages: int) -> None:
        await store._run(lambda: store._handle().execute(f"PRAGMA max_page_count = {pages}").get)

    await set_most_pages(1)
    large = [msgspec.structs.replace(message(seq), body=bytes(60_000)) for seq in range(2, 6)]
    with pytest.raises(StoreUnavailable) as refused:
        await store.commit(Batch(feed=large, reads={(CONV, "bob"): 1}))
    assert refused.value.temporary
    await set_most_pages(1 << 20)
    assert await store.commit(Batch(feed=[message(2)])) == [(2, message(2))]
    found = await store.open("d0")
    assert (found.newest, found.reads) == (2, [])
    await store.close()


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = durable(tmp_path)
    await store.open("d0")
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.commit(Batch())
    with pytest.raises(StoreUnavailable):
        store.mark(1, 1)


async def test_a_path_that_cannot_be_a_store_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "local.db").write_bytes(b"this is no database, and long enough to be read as one " * 40)
    store = durable(tmp_path)
    with pytest.raises(StoreUnavailable) as refused:
        await store.open("d0")
    assert not refused.value.temporary
    await store.close()
