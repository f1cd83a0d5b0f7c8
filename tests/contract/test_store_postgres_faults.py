"""The cluster's store when PostgreSQL is killed, stopped, away, full of other work, or refuses.

Each test has a server of its own, to kill. Promises D1-D4 of fastim/store/postgres/databases.py.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from fastim.errors import StoreUnavailable, UsageError
from fastim.store.base import AppendFrame, AppendStatus, Flush, MessageStore
from fastim.store.postgres import Deadlines, PostgresStore
from tests.contract.postgres import store_urls, urls
from tests.contract.store import (
    CONV,
    EVERYBODY,
    NOW,
    acked,
    cursor,
    due,
    fill,
    flush,
    park,
    send,
    states,
    text,
)
from tests.servers import Servers

__all__ = ["store_urls", "urls"]

QUICK = Deadlines(connect_ms=500, acquire_ms=500, command_ms=1_000, idle_transaction_ms=500)


@asynccontextmanager
async def opened(urls: list[str], count: int = 1, **options: Any) -> AsyncIterator[list[PostgresStore]]:
    stores = [await PostgresStore.open(urls, **options) for _ in range(count)]
    try:
        for user in EVERYBODY:
            await stores[0].register_device(user, "phone", "app", NOW)
        yield stores
    finally:
        for store in stores:
            await store.close()


def urls_of(servers: Servers) -> list[str]:
    found = servers.start("postgres")
    return [found["FASTIM_POSTGRES"], found["FASTIM_POSTGRES2"]]


async def unavailable(call: Awaitable[Any], *, temporary: bool = True) -> str:
    with pytest.raises(StoreUnavailable) as raised:
        await call
    assert raised.value.temporary is temporary
    return raised.value.detail


async def until_back(store: MessageStore, limit_s: float = 10.0) -> float:
    """Seconds until the store answers again by itself."""
    began = time.monotonic()
    while True:
        try:
            await store.append([AppendFrame("s:zoe", "x", (text(0),), 0, False)], NOW)
            await store.unread("bob")
        except StoreUnavailable as error:
            if not error.temporary or time.monotonic() - began > limit_s:
                raise
            await asyncio.sleep(0.05)
        else:
            return time.monotonic() - began


class Load:
    """Senders that repeat until they are answered, and devices that acknowledge, on several stores."""

    def __init__(self, stores: list[PostgresStore]) -> None:
        self.accepted: dict[bytes, tuple[str, int, int]] = {}
        self.refusals = 0
        self.stop = asyncio.Event()
        self._stores = stores
        self._numbers = itertools.count(1)

    async def _refused(self, error: StoreUnavailable) -> None:
        if not error.temporary:
            raise error
        self.refusals += 1
        await asyncio.sleep(0.02)

    async def accepts(self, more: int) -> None:
        """Wait until so many more are accepted."""
        wanted = len(self.accepted) + more
        async with asyncio.timeout(20):
            while len(self.accepted) < wanted:  # noqa: ASYNC110 - a poll with a deadline
                await asyncio.sleep(0.01)

    async def sender(self, seed: int) -> None:
        rng = random.Random(seed)
        convs = [CONV, "p:alice:carol", "p:bob:carol", "p:carol:dave"]
        while not self.stop.is_set():
            store = rng.choice(self._stores)
            frames = [
                AppendFrame(
                    conv, conv[2:].split(":")[0], (text(next(self._numbers)), text(next(self._numbers)))
                )
                for conv in rng.sample(convs, 3)
            ]
            while True:
                try:
                    results = await store.append(frames, NOW)
                    break
                except StoreUnavailable as error:
                    await self._refused(error)
            for frame, result in zip(frames, results, strict=True):
                for item, one in zip(frame.items, result.items, strict=True):
                    assert one.status in (AppendStatus.STORED, AppendStatus.REPEATED)
                    self.accepted[item.client_id] = (frame.conv, one.msg_id, one.seq)

    async def device(self, store: PostgresStore) -> None:
        """bob follows one conversation."""
        acked_upto = 0
        while not self.stop.is_set():
            try:
                page = await store.stream("bob", CONV, acked_upto, NOW, limit=50, max_bytes=1 << 16)
                if page.to_seq > acked_upto:
                    settled = (acked("bob", acked_upto + 1, page.to_seq),)
                    await store.flush(Flush(settled, (due("bob", page.to_seq, NOW),), "n1", NOW))
                    acked_upto = page.to_seq
                else:
                    await asyncio.sleep(0.01)
            except StoreUnavailable as error:
                await self._refused(error)


async def everything(store: MessageStore) -> dict[bytes, tuple[str, int, int]]:
    found: dict[bytes, tuple[str, int, int]] = {}
    after = 0
    while page := await store.scan(after, 500):
        for message in page:
            assert message.client_id not in found
            found[message.client_id] = (message.conv, message.msg_id, message.seq)
        after = page[-1].msg_id
    return found


async def test_a_server_killed_under_load_loses_nothing_accepted_and_is_found_again(
    own_servers: Servers,
) -> None:
    async with opened(urls_of(own_servers), 2, deadlines=QUICK) as stores:
        load = Load(stores)
        tasks = [asyncio.create_task(load.sender(seed)) for seed in range(4)]
        tasks.append(asyncio.create_task(load.device(stores[1])))
        for _ in range(3):
            await load.accepts(100)
            await asyncio.to_thread(own_servers.kill, "postgres")
            await asyncio.sleep(0.1)
            await asyncio.to_thread(own_servers.start, "postgres")
            assert await until_back(stores[0]) < 10
        load.stop.set()
        await asyncio.gather(*tasks)
        assert load.refusals > 3
        found = await everything(stores[0])
        assert {key: found.get(key) for key in load.accepted} == load.accepted
        for conv in {conv for conv, _, _ in found.values()}:
            seqs = sorted(seq for one, _, seq in found.values() if one == conv)
            assert seqs == list(range(1, len(seqs) + 1))
        for user in EVERYBODY:
            assert await stores[1].recount(user) == []
        assert await cursor(stores[0], "bob") == await cursor(stores[1], "bob") > 0


async def test_a_server_that_hangs_is_told_of_within_the_deadlines(own_servers: Servers) -> None:
    async with opened(urls_of(own_servers), deadlines=QUICK) as (store,):
        await fill(store, 3)
        await asyncio.to_thread(own_servers.pause, "postgres")
        try:
            for call in (
                lambda: send(store, CONV, "alice", text(9)),
                lambda: flush(store, acked("bob", 1, 2)),
                lambda: store.unread("bob"),
                lambda: store.next_due_ms(),
                lambda: store.park([park("bob")], NOW),
            ):
                began = time.monotonic()
                await unavailable(call())
                assert time.monotonic() - began < 4
        finally:
            await asyncio.to_thread(own_servers.resume, "postgres")
        assert await until_back(store) < 10
        (result,) = await send(store, CONV, "alice", text(9))
        assert result.seq == 4
        assert await store.recount("bob") == []


async def test_a_server_that_is_away_refuses_at_once_and_open_says_so(own_servers: Servers) -> None:
    where = urls_of(own_servers)
    async with opened(where, deadlines=QUICK) as (store,):
        await fill(store, 1)
        await asyncio.to_thread(own_servers.stop, "postgres")
        began = time.monotonic()
        await unavailable(send(store, CONV, "alice", text(9)))
        assert time.monotonic() - began < 2
        await unavailable(PostgresStore.open(where, deadlines=QUICK))
        await asyncio.to_thread(own_servers.start, "postgres")
        assert await until_back(store) < 10


async def test_a_dispatcher_that_is_stopped_within_a_transaction_holds_nobody_up_for_long(
    urls: list[str],
) -> None:
    """D4. A connection with the store's settings locks all shards and then says nothing."""
    async with opened(urls, deadlines=QUICK) as (store,):
        pools = [part.db._pool for part in store._parts]
        stopped = [await pool.acquire() for pool in pools if pool is not None]
        for conn in stopped:
            await conn.execute("BEGIN")
            await conn.execute("SELECT shard FROM shard ORDER BY shard FOR UPDATE")
        began = time.monotonic()
        (result,) = await send(store, CONV, "alice", text(1))
        assert result.seq == 1
        assert 0.2 < time.monotonic() - began < 2
        for pool, conn in zip(pools, stopped, strict=True):
            assert pool is not None
            await pool.release(conn)


async def test_a_pool_that_is_used_up_refuses_and_recovers(urls: list[str]) -> None:
    async with opened(urls, deadlines=QUICK, pool_size=2) as (store,):
        pools = [part.db._pool for part in store._parts]
        taken = [(pool, await pool.acquire()) for pool in pools if pool is not None for _ in range(2)]
        detail = await unavailable(send(store, CONV, "alice", text(1)))
        assert "all 2 connections were in use for 500 ms" in detail
        await unavailable(store.unread("bob"))
        for pool, conn in taken:
            await pool.release(conn)
        assert (await send(store, CONV, "alice", text(1)))[0].seq == 1
        results = await asyncio.gather(*(send(store, CONV, "alice", text(n)) for n in range(2, 40)))
        assert sorted(result[0].seq for result in results) == list(range(2, 40))


async def test_a_database_that_fails_leaves_its_part_to_the_repeat(urls: list[str]) -> None:
    """One of two databases refuses: what the other stored is found by the same call again."""
    async with opened(urls, deadlines=QUICK) as (store,):
        convs = [f"s:w{n}" for n in range(20)]
        frames = [AppendFrame(conv, "x", (text(n),), 0, False) for n, conv in enumerate(convs)]
        blocker = await asyncpg.connect(urls[1])
        await blocker.execute("BEGIN")
        await blocker.execute("LOCK TABLE message IN EXCLUSIVE MODE")
        await unavailable(store.append(frames, NOW))
        await blocker.execute("ROLLBACK")
        results = await store.append(frames, NOW)
        statuses = [result.items[0].status for result in results]
        assert set(statuses) == {AppendStatus.STORED, AppendStatus.REPEATED}
        assert len(await everything(store)) == 20
        assert [result.items[0].seq for result in results] == [1] * 20
        await blocker.close()


async def test_cancelled_calls_hand_their_replies_to_nobody(urls: list[str]) -> None:
    """D3: each answer belongs to its question, whatever was cancelled before on the same connection."""
    async with opened(urls, pool_size=3) as (store,):
        await fill(store, 200)
        known = {m.msg_id: m.client_id for m in await store.scan(0, 500)}
        ids = list(known)
        rng = random.Random(5)
        answered = cancelled = 0

        async def look() -> None:
            nonlocal answered
            wanted = rng.choice(ids)
            found = await store.find(msg_id=wanted)
            assert found is not None
            assert (found.msg_id, found.client_id) == (wanted, known[wanted])
            answered += 1

        async def write(number: int) -> None:
            nonlocal answered
            (result,) = await send(store, CONV, "bob", text(10_000 + number))
            found = await store.find(msg_id=result.msg_id)
            assert found is not None
            assert int.from_bytes(found.client_id, "big") == 10_000 + number
            answered += 1

        for round_ in range(60):
            tasks = [
                asyncio.create_task(write(round_ * 100 + n) if n % 10 == 0 else look()) for n in range(40)
            ]
            for _ in range(rng.randint(0, 12)):
                await asyncio.sleep(0)
            await asyncio.sleep(rng.choice((0, 0, 0.001, 0.003)))
            for task in tasks:
                if rng.random() < 0.5:
                    cancelled += task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, asyncio.CancelledError), repr(outcome)
        assert answered > 500
        assert cancelled > 500
        seqs = sorted(seq for _, _, seq in (await everything(store)).values())
        assert seqs == list(range(1, len(seqs) + 1))
        assert await store.recount("alice") == []


async def test_what_can_never_work_is_no_temporary_trouble(urls: list[str], postgres: str) -> None:
    for url in (urls[0].replace(":fastim@", ":wrong@"), postgres.rsplit("/", 1)[0] + "/nowhere"):
        await unavailable(PostgresStore.open([url]), temporary=False)
    with pytest.raises(UsageError):
        await PostgresStore.open(["postgresql://user@host:port/x"])


async def test_close_waits_for_what_was_taken_and_leaves_no_connection(urls: list[str]) -> None:
    async with opened(urls) as (store,):
        tasks = [asyncio.create_task(send(store, CONV, "alice", text(number))) for number in range(20)]
        await asyncio.sleep(0)
        await store.close()
        results = [await task for task in tasks]
        assert sorted(result[0].seq for result in results) == list(range(1, 21))
    async with opened(urls) as (store,):
        assert len(await states(store)) == 20
