"""The cluster's store keeps the store contract on real PostgreSQL; and what only it promises."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from fastim.errors import StoreUnavailable, UsageError
from fastim.model import Message
from fastim.store.base import AppendFrame, AppendStatus, DueFiring, MessageStore, shard_of
from fastim.store.postgres import PostgresStore, duties, owed, projection, timeline
from fastim.store.postgres.minting import following, shard_in
from fastim.store.rules import content_hash
from fastim.store.sqlite.timeline import content_hash as embedded_content_hash
from tests.contract.postgres import drop, execute, store_urls, urls
from tests.contract.store import (
    CONV,
    EVERYBODY,
    NOW,
    StoreContract,
    acked,
    due,
    fill,
    flush,
    park,
    send,
    state_names,
    states,
    text,
)

__all__ = ["store_urls", "urls"]


def parts_of(store: MessageStore) -> PostgresStore:
    assert isinstance(store, PostgresStore)
    return store


class TestPostgresStore(StoreContract):
    @pytest.fixture(autouse=True)
    def databases(self, urls: list[str]) -> None:
        self.urls = urls

    async def open(self) -> MessageStore:
        return await PostgresStore.open(self.urls)

    async def reopen(self, store: MessageStore) -> MessageStore:
        await store.close()
        return await PostgresStore.open(self.urls)

    async def set_membership(self, store: MessageStore, conv: str, user: str, join: int, leave: int) -> None:
        part = parts_of(store)._home(conv)
        await part.db.fetch(
            "UPDATE member SET join_seq = $4, leave_seq = $5 WHERE shard = $1 AND conv = $2 AND user_id = $3",
            shard_of(conv), conv, user, join, leave,
        )  # fmt: skip

    async def recall(self, store: MessageStore, msg_id: int) -> None:
        shard = shard_in(msg_id)
        part = parts_of(store)._homes[shard]
        await part.db.fetch(
            "UPDATE message SET recalled = TRUE WHERE shard = $1 AND msg_id = $2", shard, msg_id
        )


@asynccontextmanager
async def opened(urls: list[str], count: int = 1, **options: Any) -> AsyncIterator[list[PostgresStore]]:
    """Several stores on the same databases, as several processes have them."""
    stores = [await PostgresStore.open(urls, **options) for _ in range(count)]
    try:
        for user in EVERYBODY:
            await stores[0].register_device(user, "phone", "app", NOW)
        yield stores
    finally:
        for store in stores:
            await store.close()


class Gate:
    """Holds a coroutine function up at its first call, until it is opened."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.reached.is_set():
            self.reached.set()
            await self.opened.wait()
        return await self._work(*args, **kwargs)


@asynccontextmanager
async def gated(work: Callable[..., Any]) -> AsyncIterator[Gate]:
    """Inside of opened(): whatever fails, nobody stands before the gate when the stores close."""
    gate = Gate(work)
    try:
        yield gate
    finally:
        gate.opened.set()


async def everything(store: MessageStore, page: int = 100) -> list[Message]:
    found: list[Message] = []
    while messages := await store.scan(found[-1].msg_id if found else 0, page):
        found += messages
    return found


# ------------------------------------------------------------------------------------- several dispatchers


async def test_two_dispatchers_append_to_the_same_conversations_at_once(urls: list[str]) -> None:
    async with opened(urls, 2) as stores:
        convs = [CONV, "p:alice:carol", "p:bob:carol", "p:alice:dave", "p:bob:dave", "s:alice"]
        numbers = itertools.count(1)
        accepted: dict[bytes, tuple[int, int]] = {}
        pages: list[list[int]] = []

        async def dispatcher(store: PostgresStore, seed: int) -> None:
            rng = random.Random(seed)
            for round_ in range(60):
                frames = []
                for conv in rng.sample(convs, rng.randint(1, 5)):
                    items = tuple(text(next(numbers)) for _ in range(rng.randint(1, 3)))
                    frames.append(AppendFrame(conv, rng.choice(conv[2:].split(":")), items, 0, False))
                now = NOW + round_ + rng.choice((0, 0, -5_000, 5_000))
                for frame, result in zip(frames, await store.append(frames, now), strict=True):
                    for item, one in zip(frame.items, result.items, strict=True):
                        assert one.status == AppendStatus.STORED
                        accepted[item.client_id] = (one.msg_id, one.seq)

        async def reader(store: PostgresStore) -> None:
            """S4: pages forwards while messages come."""
            seen = [1]
            while not done.is_set() or seen[-1] < (await store.position("bob", "d", CONV)).head:
                page, _ = await store.history(
                    "bob", CONV, before_seq=0, after_seq=seen[-1], from_ms=0, to_ms=0, limit=7, now_ms=NOW
                )
                seen += [m.seq for m in page]
                await asyncio.sleep(0)
            pages.append(seen)

        done = asyncio.Event()
        reading = asyncio.create_task(reader(stores[1]))
        await asyncio.gather(*(dispatcher(stores[n % 2], n) for n in range(4)))
        done.set()
        await reading
        found = await everything(stores[0])
        assert {m.client_id: (m.msg_id, m.seq) for m in found} == accepted
        for conv in convs:
            mine = [m for m in found if m.conv == conv]
            assert [m.seq for m in mine] == list(range(1, len(mine) + 1))
            assert [m.cseq for m in mine] == list(range(1, len(mine) + 1))
        assert pages == [list(range(1, sum(m.conv == CONV for m in found) + 1))]
        for user in EVERYBODY:
            assert await stores[1].recount(user) == []


async def test_one_send_through_two_dispatchers_is_stored_once(urls: list[str]) -> None:
    async with opened(urls, 2) as stores:
        frames = [
            AppendFrame(CONV, "alice", tuple(text(n) for n in range(k, k + 4))) for k in range(0, 40, 4)
        ]
        both = await asyncio.gather(
            *(stores[n % 2].append(frames[n // 2 : n // 2 + 3], NOW + n) for n in range(20))
        )
        results: dict[int, set[tuple[int, int]]] = {}
        statuses = []
        for n, batch in enumerate(both):
            for frame, result in zip(frames[n // 2 : n // 2 + 3], batch, strict=True):
                for item, one in zip(frame.items, result.items, strict=True):
                    number = int.from_bytes(item.client_id, "big")
                    results.setdefault(number, set()).add((one.msg_id, one.seq))
                    statuses.append(one.status)
        assert statuses.count(AppendStatus.STORED) == 40
        assert set(statuses) == {AppendStatus.STORED, AppendStatus.REPEATED}
        assert all(len(found) == 1 for found in results.values())
        assert [m.seq for m in await everything(stores[0])] == list(range(1, 41))


async def test_heads_of_a_batch_that_failed_are_forgotten(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(urls) as (store,):
        await send(store, CONV, "alice", text(1))
        real = timeline.Timeline._write
        for trouble in (StoreUnavailable("gone"), asyncio.CancelledError()):

            async def fail(*args: Any, trouble: BaseException = trouble) -> None:
                await real(*args)
                raise trouble

            monkeypatch.setattr(timeline.Timeline, "_write", fail)
            with pytest.raises(type(trouble)):
                await send(store, CONV, "alice", text(7), text(8))
            monkeypatch.setattr(timeline.Timeline, "_write", real)
        (result,) = await send(store, CONV, "alice", text(9))
        assert (result.seq, result.cseq) == (2, 2)
        assert await store.recount("bob") == []


# ---------------------------------------------------------------------------------------- order over shards


async def test_no_reader_passes_a_message_that_is_not_committed_yet(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C2 and R1: the lower id is on its way when the higher one, of another shard, is read."""
    async with opened(urls, 2) as (first, second), gated(timeline.Timeline._insert) as gate:
        other = "p:bob:carol"
        assert shard_of(CONV) != shard_of(other)

        async def insert(self: timeline.Timeline, conn: Any, batch: Any) -> None:
            await gate(self, conn, batch)

        monkeypatch.setattr(timeline.Timeline, "_insert", insert)
        slow = asyncio.create_task(send(first, CONV, "alice", text(1)))
        await gate.reached.wait()
        (quick,) = await send(second, other, "carol", text(2), now=NOW + 5)
        readers = [
            asyncio.create_task(second.behind("bob", "phone", 0, 10)),
            asyncio.create_task(second.scan(0, 10)),
            asyncio.create_task(second.version("bob")),
        ]
        await asyncio.sleep(0.2)
        assert not any(reader.done() for reader in readers)
        gate.opened.set()
        (late,) = await slow
        assert late.msg_id < quick.msg_id
        assert {item.conv for item in (await readers[0]).items} == {CONV, other}  # type: ignore[union-attr]
        assert [m.msg_id for m in await readers[1]] == [late.msg_id, quick.msg_id]  # type: ignore[union-attr]
        assert await readers[2] == quick.msg_id


async def test_a_follower_of_versions_misses_nothing_that_four_dispatchers_append(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "ROUND_MESSAGES", 5)
    async with opened(urls, 2) as stores:
        heads: dict[str, int] = {}
        scanned: list[int] = []
        seen: dict[str, int] = {}
        done = asyncio.Event()

        async def dispatcher(number: int) -> None:
            rng = random.Random(number)
            for round_ in range(50):
                peers = rng.sample(range(40), 3)
                items = [(text(number * 10_000 + round_ * 100 + peer),) for peer in peers]
                frames = [
                    AppendFrame(f"p:alice:x{peer}", f"x{peer}", item, 0, False)
                    for peer, item in zip(peers, items, strict=True)
                ]
                results = await stores[number % 2].append(frames, NOW + rng.randint(-3_000, 3_000))
                for result in results:
                    heads[result.conv] = max(heads.get(result.conv, 0), result.items[0].seq)

        async def follow(store: PostgresStore) -> None:
            since = 0
            while True:
                last = done.is_set()
                page = await store.behind("alice", "phone", since, 6)
                for item in page.items:
                    seen[item.conv] = max(item.head, seen.get(item.conv, 0))
                assert page.version >= since
                since = page.version
                if last and not page.more:
                    return

        async def scan(store: PostgresStore) -> None:
            after = 0
            while True:
                last = done.is_set()
                messages = await store.scan(after, 9)
                scanned.extend(m.msg_id for m in messages)
                after = scanned[-1] if scanned else 0
                if last and not messages:
                    return

        readers = [asyncio.create_task(follow(stores[0])), asyncio.create_task(scan(stores[1]))]
        await asyncio.gather(*(dispatcher(number) for number in range(4)))
        done.set()
        await asyncio.gather(*readers)
        assert seen == heads
        assert scanned == [m.msg_id for m in await everything(stores[0])]
        assert len(scanned) == 4 * 50 * 3


async def test_nothing_is_ever_committed_below_the_settled_mark(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(urls, 2) as (first, second):
        (newest,) = await send(first, CONV, "alice", text(1), now=NOW + 1_000)
        await flush(first, acked("bob", 1, 1))
        await first.settle(newest.msg_id)
        # A process whose clock is behind, and which never heard of that id.
        second._clock.last = 0
        (late,) = await send(second, "p:alice:dave", "alice", text(2), now=NOW)
        assert shard_of("p:alice:dave") != shard_of(CONV)
        assert late.msg_id > newest.msg_id
        assert await state_names(first) == ["ACKED", "UNSETTLED"]
        assert await first.settled_mark() == newest.msg_id


def test_ids_follow_each_other_within_a_shard() -> None:
    last, ids = 5 << 12 | 7, []
    for _ in range(200):
        last = following(last, 21)
        ids.append(last)
    assert ids == sorted(set(ids))
    assert {shard_in(one) for one in ids} == {21}
    assert [one >> 12 for one in ids] == [5] * 64 + [6] * 64 + [7] * 64 + [8] * 8
    assert following((5 << 12) | (22 << 6), 21) == (6 << 12) | (21 << 6)


# --------------------------------------------------------------------------------------------- due rows


async def test_a_due_row_that_is_being_cleared_is_not_lost_to_who_asks_for_it(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """O1: all is acked and the row about to go, when a newer message comes and somebody asks for the row."""
    async with opened(urls, 2) as (first, second), gated(owed.ask_open) as gate:
        await fill(first, 1)
        await flush(first, due=[due("bob", 1, NOW + 9)])
        monkeypatch.setattr(duties, "ask_open", gate)
        clearing = asyncio.create_task(flush(first, acked("bob", 1, 1)))
        await gate.reached.wait()
        await send(second, CONV, "alice", text(2))
        asking = asyncio.create_task(flush(second, due=[due("bob", 2, NOW + 5)]))
        await asyncio.sleep(0.1)
        assert not asking.done()
        gate.opened.set()
        await asyncio.gather(clearing, asking)
        await first.settle(await first.head_msg_id())
        assert await state_names(first) == ["ACKED", "DUE"]


async def test_two_requests_for_a_row_that_is_not_there_become_one(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(urls, 2) as (first, second), gated(owed.ask_open) as gate:
        await fill(first, 5)
        monkeypatch.setattr(duties, "ask_open", gate)
        slow = asyncio.create_task(flush(first, due=[due("bob", 2, NOW + 5, urgent=True)]))
        await gate.reached.wait()
        await flush(second, due=[due("bob", 4, NOW + 500)])
        gate.opened.set()
        await slow
        assert await first.next_due_ms() == NOW + 5
        (row,) = await first.claim_due("d", NOW + 5, 1_000, 9)
        assert row.from_seq == 2


async def test_claims_of_several_dispatchers_share_all_rows_of_all_databases(urls: list[str]) -> None:
    async with opened(urls, 2) as stores:
        convs = [f"p:alice:y{n}" for n in range(60)]
        frames = [AppendFrame(conv, "alice", (text(n),), 0, False) for n, conv in enumerate(convs)]
        await stores[0].append(frames, NOW)
        await flush(stores[0], due=[due(conv[8:], 1, NOW, conv=conv) for conv in convs])
        claimed: list[str] = []
        fired: list[bool] = []

        async def dispatcher(number: int) -> None:
            store = stores[number % 2]
            while rows := await store.claim_due(f"d{number}", NOW, 1_000, 7):
                assert len(rows) <= 7
                claimed.extend(row.conv for row in rows)
                firings = [DueFiring(row.user, row.conv, 1, NOW + 5_000) for row in rows]
                fired.extend(await store.fire_due(f"d{number}", firings, NOW))

        await asyncio.gather(*(dispatcher(number) for number in range(4)))
        assert sorted(claimed) == sorted(convs)
        assert fired == [True] * 60
        assert await stores[0].next_due_ms() == NOW + 5_000


async def test_s13_a_park_that_fails_leaves_fate_push_and_due_row_as_they_were(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(urls) as (store,):
        await fill(store, 2)
        await flush(store, due=[due("bob", 1, NOW)])
        await store.settle(await store.head_msg_id())

        async def fail(*_: Any) -> None:
            raise StoreUnavailable("gone")

        part = store._home(CONV)
        monkeypatch.setattr(part.push, "ask", fail)
        with pytest.raises(StoreUnavailable):
            await store.park([park("bob")], NOW)
        assert await state_names(store) == ["DUE", "DUE"]
        assert (await store.next_due_ms(), await store.next_push_ms()) == (NOW, 0)


# -------------------------------------------------------------------------------------------- placement


async def test_both_databases_hold_their_share(urls: list[str]) -> None:
    async with opened(urls) as (store,):
        convs = [f"s:z{n}" for n in range(200)]
        await store.append([AppendFrame(conv, "b", (text(1),), 0, False) for conv in convs], NOW)
        counts = [(await part.db.row("SELECT count(*) FROM message"))[0] for part in store._parts]
        assert sum(counts) == 200
        assert min(counts) > 60


async def test_the_order_of_the_urls_means_nothing_once_there_are_data(urls: list[str]) -> None:
    async with opened(urls) as (store,):
        await fill(store, 3)
        await send(store, "p:alice:carol", "alice", text(4))
        before = await everything(store)
    async with opened(urls[::-1]) as (store,):
        assert await everything(store) == before
        assert (await send(store, CONV, "alice", text(5)))[0].seq == 4


async def test_a_cluster_with_a_database_missing_is_not_opened(urls: list[str]) -> None:
    async with opened(urls):
        pass
    with pytest.raises(UsageError, match=r"owns the shards 1, 3, 5"):
        await PostgresStore.open(urls[:1])
    with pytest.raises(UsageError, match=r"owned more than once \(database 1, database 3\)"):
        await PostgresStore.open([*urls, urls[0]])
    with pytest.raises(UsageError, match="no database"):
        await PostgresStore.open([])


@pytest.fixture
def bare_urls(urls: list[str]) -> Iterable[list[str]]:
    """Databases in which nobody was ever."""
    asyncio.run(drop(urls))
    yield urls
    asyncio.run(drop(urls))


async def test_many_processes_may_make_the_schema_at_once(bare_urls: list[str]) -> None:
    stores = await asyncio.gather(*(PostgresStore.open(bare_urls) for _ in range(6)))
    await stores[3].append([AppendFrame("s:bob", "x", (text(1),), 0, False)], NOW)
    assert [len(await store.scan(0, 9)) for store in stores] == [1] * 6
    for store in stores:
        await store.close()


async def move_shard(shard: int, source: str, target: str) -> None:
    """What an operator does while nobody runs (docs/adr/0095)."""
    conns = [await asyncpg.connect(url) for url in (source, target)]
    tables = [
        name
        for (name,) in await conns[0].fetch(
            "SELECT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid"
            " WHERE a.attname = 'shard' AND c.relkind IN ('r', 'p') AND NOT c.relispartition"
        )
    ]
    for table in tables:
        rows = await conns[0].fetch(f"DELETE FROM {table} WHERE shard = $1 RETURNING *", shard)
        columns = [name for name in (rows[0].keys() if rows else ()) if (table, name) != ("device", "number")]
        if rows:
            values = [[row[name] for name in columns] for row in rows]
            await conns[1].copy_records_to_table(table, records=values, columns=columns)
    for conn in conns:
        await conn.close()


async def test_an_empty_database_joins_and_takes_a_shard_over(bare_urls: list[str]) -> None:
    store = await PostgresStore.open(bare_urls[:1])
    for user in EVERYBODY:
        await store.register_device(user, "phone", "app", NOW)
    await fill(store, 3)
    await flush(store, acked("bob", 1, 1), due=[due("bob", 2, NOW + 9)])
    await store.close()
    store = await PostgresStore.open(bare_urls)
    assert {part.db.number for part in store._homes} == {1}
    before = [await everything(store), await states(store), await store.unread("bob")]
    await store.close()
    await move_shard(shard_of(CONV), *bare_urls)
    store = await PostgresStore.open(bare_urls)
    assert [part.db.number for part in store._homes].count(2) == 1
    assert [await everything(store), await states(store), await store.unread("bob")] == before
    assert (await send(store, CONV, "alice", text(9)))[0].seq == 4
    assert (await store.claim_due("d", NOW + 9, 1_000, 9))[0].from_seq == 2
    await store.close()


async def test_a_schema_of_a_newer_program_and_a_foreign_database_are_left_alone(
    bare_urls: list[str],
) -> None:
    await (await PostgresStore.open(bare_urls)).close()
    await execute(bare_urls[1], "INSERT INTO migration VALUES (99, 'later')")
    for read_only in (False, True):
        with pytest.raises(UsageError, match=r"version 99, this program knows up to \d"):
            await PostgresStore.open(bare_urls, read_only=read_only)
    await drop(bare_urls)
    await execute(bare_urls[0], "CREATE TABLE photos (x int)")
    with pytest.raises(UsageError, match="photos"):
        await PostgresStore.open(bare_urls)


async def test_a_store_beside_the_others_only_reads(urls: list[str]) -> None:
    async with opened(urls) as (store,):
        await fill(store, 3)
        await flush(store, due=[due("bob", 1, NOW + 7)])
        assert await store.unread("bob") == (3, [(CONV, 3)])
        beside = await PostgresStore.open(urls, read_only=True)
        assert len(await states(beside)) == 3
        assert await beside.unread("bob") == (3, [(CONV, 3)])
        assert await beside.next_due_ms() == NOW + 7
        with pytest.raises(UsageError, match="read-only"):
            await beside.append([], NOW)
        await beside.close()


def test_a_content_has_the_same_hash_in_both_stores() -> None:
    for item in (text(1), text(2, b"x", loss=5, flags=4, mentions=("a", "b"))):
        assert content_hash(item) == embedded_content_hash(item)
