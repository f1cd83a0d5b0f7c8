"""The embedded store keeps the store contract; and what only it promises."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import apsw
import pytest

from fastim.errors import InternalError, PeerError, StoreUnavailable, UsageError
from fastim.model import Message
from fastim.store.base import AppendFrame, AppendStatus, MessageStore
from fastim.store.sqlite import SqliteStore, files, ledger, tail
from fastim.store.sqlite.names import Cache
from fastim.store.sqlite.writer import Writer
from tests.contract.store import (
    CONV,
    DAY_MS,
    EVERYBODY,
    NOW,
    StoreContract,
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
from tests.simulation.disk import Disk, ram_directory

T = TypeVar("T")


def writer_of(store: MessageStore) -> Writer:
    assert isinstance(store, SqliteStore)
    assert store._writer is not None
    return store._writer


async def execute(store: MessageStore, sql: str, *args: object) -> None:
    """What no call of the port does yet, in a transaction of the writer."""
    writer = writer_of(store)

    def work() -> None:
        writer.sql.run(sql, args)
        writer.names.forget()

    await writer.call(work)


class TestSqliteStore(StoreContract):
    @pytest.fixture(autouse=True)
    def directory(self) -> Iterator[None]:
        ram = ram_directory()
        self.path = Path(ram) / "data"
        yield
        shutil.rmtree(ram)

    async def open(self) -> MessageStore:
        return await SqliteStore.open(self.path)

    async def reopen(self, store: MessageStore) -> MessageStore:
        await store.close()
        return await SqliteStore.open(self.path)

    async def set_membership(self, store: MessageStore, conv: str, user: str, join: int, leave: int) -> None:
        await execute(
            store,
            "UPDATE member SET join_seq = ?, leave_seq = ? WHERE conv = (SELECT id FROM conv WHERE name = ?)"
            " AND person = (SELECT id FROM person WHERE name = ?)",
            join, leave, conv, user,
        )  # fmt: skip

    async def recall(self, store: MessageStore, msg_id: int) -> None:
        await execute(store, "UPDATE message SET recalled = 1 WHERE msg_id = ?", msg_id)


# ------------------------------------------------------------------------------------------- group commit


class Counting:
    """A runner that runs inline and counts the hops."""

    def __init__(self) -> None:
        self.hops = 0

    async def __call__(self, work: Callable[[], T]) -> T:
        self.hops += 1
        await asyncio.sleep(0)
        return work()


@pytest.fixture
def directory() -> Iterator[Path]:
    ram = ram_directory()
    yield Path(ram) / "data"
    shutil.rmtree(ram)


@asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(directory, **options)
    try:
        for user in EVERYBODY:
            await store.register_device(user, "phone", "app", NOW)
        yield store
    finally:
        await store.close()


def commits_of(store: SqliteStore) -> list[int]:
    """Grows by one entry per commit from now on."""
    seen: list[int] = []
    writer_of(store).sql.db.set_commit_hook(lambda: seen.append(1) or False)
    return seen


async def test_calls_that_wait_together_are_one_hop_and_one_commit(directory: Path) -> None:
    runner = Counting()
    async with opened(directory, runner=runner) as store:
        seen, hops = commits_of(store), runner.hops
        await asyncio.gather(*(send(store, CONV, "alice", text(number)) for number in range(100)))
        assert (len(seen), runner.hops - hops) == (1, 1)
        assert [m.seq for m in await store.scan(0, 200)] == list(range(1, 101))


async def test_a_call_that_fails_undoes_itself_and_nobody_else(directory: Path) -> None:
    async with opened(directory) as store:
        await store.create_group("team", "alice", ["bob"], NOW)
        results = await asyncio.gather(
            send(store, CONV, "alice", text(1)),
            store.create_group("team", "alice", ["carol", "new1"], NOW),
            send(store, CONV, "alice", text(2)),
            store.read("mallory", CONV, 1, NOW),
            send(store, CONV, "bob", text(3)),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [list, PeerError, list, PeerError, list]
        assert [m.seq for m in await store.scan(0, 9) if m.conv == CONV] == [1, 2, 3]


async def test_a_bug_in_one_call_leaves_the_others_and_the_heads_alone(directory: Path) -> None:
    async with opened(directory) as store:
        writer = writer_of(store)

        def bug() -> None:
            writer.timeline.append([AppendFrame(CONV, "alice", (text(7), text(8)))], NOW)
            writer.sql.run("INSERT INTO nowhere VALUES (1)")

        results = await asyncio.gather(
            send(store, CONV, "alice", text(1)),
            writer.call(bug),
            send(store, CONV, "alice", text(2)),
            return_exceptions=True,
        )
        assert isinstance(results[1], InternalError)
        assert [(m.seq, m.client_id[-1]) for m in await store.scan(0, 9)] == [(1, 1), (2, 2)]
        page = await store.conversations("bob", "phone", 0, 9, NOW)
        assert [(item.head, item.unread) for item in page.items] == [(2, 2)]
        assert await store.recount("bob") == []


async def test_a_caller_that_is_gone_gets_nobody_elses_result(directory: Path) -> None:
    async with opened(directory) as store:
        rng = random.Random(3)
        answered: dict[int, int] = {}

        async def one(number: int) -> None:
            (result,) = await send(store, CONV, "alice", text(number))
            found = await store.find(msg_id=result.msg_id)
            assert found is not None
            answered[number] = int.from_bytes(found.client_id, "big")

        tasks = [asyncio.create_task(one(number)) for number in range(300)]
        for task in tasks:
            if rng.random() < 0.4:
                task.cancel()
            if rng.random() < 0.1:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert answered
        assert all(number == found for number, found in answered.items())
        assert [m.seq for m in await store.scan(0, 999)] == list(range(1, len(await store.scan(0, 999)) + 1))


async def test_close_waits_for_what_was_taken(directory: Path) -> None:
    async with opened(directory) as store:
        tasks = [asyncio.create_task(send(store, CONV, "alice", text(number))) for number in range(20)]
        await asyncio.sleep(0)
        await store.close()
        assert [(await task)[0].seq for task in tasks] == list(range(1, 21))


# ---------------------------------------------------------------------------------------- disks that fail


@asynccontextmanager
async def on_disk(*users: str) -> AsyncIterator[tuple[SqliteStore, Disk]]:
    disk = Disk(ram_directory())
    store = await SqliteStore.open(disk.directory, vfs=disk.vfs)
    try:
        for user in users or EVERYBODY:
            await store.register_device(user, "phone", "app", NOW)
        yield store, disk
    finally:
        disk.full = False
        await store.close()
        disk.remove()


async def unavailable(call: Awaitable[Any], *, temporary: bool = True) -> None:
    with pytest.raises(StoreUnavailable) as raised:
        await call
    assert raised.value.temporary is temporary


async def test_a_full_disk_refuses_writes_answers_reads_and_recovers_by_itself(directory: Path) -> None:
    async with on_disk() as (store, disk):
        await fill(store, 3)
        for _ in range(3):
            disk.full = True
            await unavailable(send(store, CONV, "alice", text(50)))
            await unavailable(flush(store, acked("bob", 1, 3)))
            assert [m.seq for m in await store.scan(0, 99)] == [1, 2, 3]
            assert await cursor(store, "bob") == 0
            disk.full = False
        (result,) = await send(store, CONV, "alice", text(50))
        assert (result.status, result.seq) == (AppendStatus.STORED, 4)
        assert await store.recount("bob") == []


async def test_a_write_error_anywhere_in_a_commit_leaves_nothing_and_the_next_call_works(
    directory: Path,
) -> None:
    async with on_disk() as (store, disk):
        failed = 0
        for number in range(1, 41):
            disk.trap = (number, lambda: None)
            items = [text(number * 100 + n, b"x" * 3_000) for n in range(8)]
            before = len(await store.scan(0, 999))
            try:
                await send(store, CONV, "alice", *items)
            except StoreUnavailable as error:
                failed += error.temporary
                assert len(await store.scan(0, 999)) == before
                disk.trap = None
                await send(store, CONV, "alice", *items)
            disk.trap = None
            found = await store.scan(0, 999)
            assert [m.seq for m in found] == list(range(1, 8 * number + 1))
        assert failed > 5
        assert writer_of(store).sql.value("PRAGMA integrity_check") == "ok"
        assert await store.recount("bob") == []
        assert (await store.behind("bob", "phone", 0, 9)).items[0].head == 320


async def test_a_group_whose_commit_fails_fails_as_a_whole(directory: Path) -> None:
    async with on_disk() as (store, disk):
        await fill(store, 1)
        disk.full = True
        results = await asyncio.gather(
            *(send(store, CONV, "alice", text(number)) for number in range(10, 20)),
            store.register_device("zoe", "pad", "pad", NOW),
            return_exceptions=True,
        )
        assert {type(result) for result in results} == {StoreUnavailable}
        disk.full = False
        assert await store.devices("zoe") == []
        (result,) = await send(store, CONV, "alice", text(10))
        assert (result.seq, result.status) == (2, AppendStatus.STORED)
        assert (await send(store, "p:alice:zoe", "alice", text(1)))[0].status == AppendStatus.UNKNOWN_USER


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """6 MB, half of them taken by `ballast`."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mount], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a small disk needs root: {done.stderr.decode()}")
    (mount / "ballast").write_bytes(b"x" * 3_000_000)
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


async def test_a_tmpfs_that_fills_up_under_load_loses_nothing_that_was_accepted(small_disk: Path) -> None:
    async with opened(small_disk / "data") as store:
        accepted: list[int] = []
        refused = number = 0
        while refused < 20:
            number += 1
            try:
                (result,) = await send(store, CONV, "alice", text(number, b"y" * 2_000))
            except StoreUnavailable as error:
                refused += error.temporary
            else:
                accepted.append(result.msg_id)
        assert [m.msg_id async for m in everything(store)] == accepted
        (small_disk / "ballast").unlink()
        (result,) = await send(store, CONV, "alice", text(9_999))
        assert result.seq == len(accepted) + 1


async def everything(store: MessageStore) -> AsyncIterator[Message]:
    after = 0
    while page := await store.scan(after, 500):
        for message in page:
            yield message
        after = page[-1].msg_id


async def test_damaged_data_is_no_temporary_trouble(directory: Path) -> None:
    async with opened(directory) as store:
        await fill(store, 200)
    database = directory / files.DATABASE
    data = bytearray(database.read_bytes())
    for page in range(1, len(data) // 4_096):
        data[page * 4_096 : page * 4_096 + 64] = b"\xee" * 64
    database.write_bytes(data)
    with pytest.raises(StoreUnavailable) as raised:
        async with opened(directory) as store:
            await store.scan(0, 999)
    assert not raised.value.temporary
    database.write_bytes(b"this is no database" * 1_000)
    await unavailable(SqliteStore.open(directory), temporary=False)


# ----------------------------------------------------------------------------------------- the directory


OPENER = """
import asyncio, sys
from pathlib import Path
from fastim.store.sqlite import SqliteStore
from fastim.store.base import AppendFrame, AppendItem

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    await store.append([AppendFrame("s:bob", "x", (AppendItem(b"0123456789abcdef", 1, b"hi"),), 0, False)], 1)
    print("open", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def other_process(directory: Path) -> asyncio.subprocess.Process:
    """A process that owns the directory and holds one message."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OPENER, directory, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 20) == b"open\n"
    return process


async def test_a_directory_has_one_owner_until_the_kernel_says_it_is_gone(directory: Path) -> None:
    process = await other_process(directory)
    with pytest.raises(UsageError, match=f"in use by another server .process {process.pid}"):
        await SqliteStore.open(directory)
    beside = await SqliteStore.open(directory, read_only=True)
    assert [m.body for m in await beside.scan(0, 9)] == [b"hi"]
    with pytest.raises(UsageError, match="read-only"):
        await beside.append([], NOW)
    await beside.close()
    process.kill()
    await process.wait()
    await process.communicate()
    after_the_kill = await SqliteStore.open(directory, read_only=True)
    assert len(await after_the_kill.scan(0, 9)) == 1
    assert (await after_the_kill.behind("bob", "d", 0, 9)).items[0].head == 1
    await after_the_kill.close()
    async with opened(directory) as store:
        assert len(await store.scan(0, 9)) == 1


async def test_one_process_opens_a_directory_once(directory: Path) -> None:
    async with opened(directory):
        with pytest.raises(UsageError, match="in use"):
            await SqliteStore.open(directory)
    async with opened(directory):
        pass


async def test_a_stopped_store_can_be_read(directory: Path) -> None:
    async with opened(directory) as store:
        await fill(store, 3)
        await flush(store, due=[due("bob", 1, NOW + 7)])
    beside = await SqliteStore.open(directory, read_only=True)
    assert len(await states(beside)) == 3
    assert (await beside.next_due_ms(), await beside.next_push_ms()) == (NOW + 7, 0)
    assert await beside.recount("bob") == []
    await beside.close()
    with pytest.raises(UsageError, match="no store"):
        await SqliteStore.open(directory / "elsewhere", read_only=True)


async def test_data_of_a_newer_program_is_refused(directory: Path) -> None:
    async with opened(directory) as store:
        await execute(store, "INSERT INTO migration VALUES (99, 'later')")
    for read_only in (False, True):
        with pytest.raises(UsageError, match=r"version 99, this program knows up to \d"):
            await SqliteStore.open(directory, read_only=read_only)


async def test_a_foreign_database_is_left_alone(tmp_path: Path) -> None:
    db = apsw.Connection(str(tmp_path / files.DATABASE))
    db.execute("CREATE TABLE photos (x)")
    db.close()
    with pytest.raises(UsageError, match="photos"):
        await SqliteStore.open(tmp_path)


async def test_a_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable):
        await SqliteStore.open(tmp_path / "file" / "data")


# -------------------------------------------------------------------------------------- the change index


async def test_rows_and_tail_are_read_as_one_while_the_projector_works(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "PROJECT_MESSAGES", 10)
    monkeypatch.setattr(tail, "SLICE_ROWS", 2)
    async with opened(directory) as store:
        seen: dict[str, int] = {}
        since = 0
        done = False

        async def follow() -> None:
            nonlocal since
            while True:
                last = done
                page = await store.behind("alice", "phone", since, 5)
                for item in page.items:
                    assert item.head >= seen.get(item.conv, 0)
                    seen[item.conv] = item.head
                since = page.version
                if last and not page.more:
                    return

        follower = asyncio.create_task(follow())
        rng = random.Random(8)
        heads: dict[str, int] = {}
        for number in range(400):
            peer = f"x{rng.randrange(12)}"
            conv = f"p:alice:{peer}"
            await store.append([AppendFrame(conv, peer, (text(number),), 0, False)], NOW)
            heads[conv] = heads.get(conv, 0) + 1
        done = True
        await follower
        assert seen == heads
        rows = writer_of(store).sql.value("SELECT count(*) FROM user_conv")
        assert rows > 10


async def test_a_crash_within_a_projection_round_counts_nothing_twice(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "PROJECT_MESSAGES", 30)
    monkeypatch.setattr(tail, "SLICE_ROWS", 1)
    number = 0
    for _ in range(6):
        async with opened(directory) as store:
            for _ in range(25):
                number += 1
                choices = ((CONV, "bob"), ("p:bob:carol", "carol"), (CONV, "alice"))
                conv, sender = random.Random(number).choice(choices)
                await send(store, conv, sender, text(number))
            for user in ("alice", "bob", "carol"):
                assert await store.recount(user) == []
            mark = writer_of(store).sql.value("SELECT value FROM meta WHERE name = 'projected'")
            assert mark <= await store.head_msg_id()


async def test_the_log_stays_bounded_while_the_reader_is_never_idle(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHECKPOINT_PAGES", 50)
    async with opened(directory) as store:
        done = False

        async def read_on() -> None:
            while not done:
                await store.stream("bob", CONV, 0, NOW, limit=50, max_bytes=1 << 20)

        readers = [asyncio.create_task(read_on()) for _ in range(4)]
        for number in range(400):
            await send(store, CONV, "alice", text(number, b"x" * 2_000))
        done = True
        await asyncio.gather(*readers)
        log = (directory / f"{files.DATABASE}-wal").stat().st_size
        assert log < 3 * 50 * 4_096 * 2


def test_a_cache_forgets_what_nobody_asks_for() -> None:
    cache: Cache[int, int] = Cache(10)
    for number in range(1_000):
        cache.put(number, number, 1 + number % 3)
        assert cache.get(0) == 0
        assert len(cache) <= 20
    assert cache.get(500) is None
    cache.put(7, 7, 1_000)
    assert cache.get(7) == 7


async def test_an_audit_page_of_large_groups_ends_early_and_misses_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_MOST_OBLIGATIONS", 5)
    async with opened(directory) as store:
        await store.create_group("team", "alice", EVERYBODY, NOW)
        await fill(store, 4, "g:team")
        await fill(store, 3)
        first, reached = await store.obligations(0, 100, NOW)
        assert (len(first), reached != 0) == (6, True)
        found = [*first]
        while reached:
            page, reached = await store.obligations(reached, 100, NOW)
            found += page
        assert len({(one.msg_id, one.user) for one in found}) == len(found) == 4 * 3 + 3


async def test_the_acks_of_a_large_group_touch_few_pages(directory: Path) -> None:
    async with opened(directory) as store:
        users = [f"u{n}" for n in range(500)]
        await asyncio.gather(*(store.register_device(user, "phone", "app", NOW) for user in users))
        await store.create_group("team", users[0], users, NOW)
        await send(store, "g:team", users[0], text(1))
        everybody = tuple(acked(user, 1, 2, conv="g:team") for user in users)
        written = writer_of(store).sql
        before = written.value("PRAGMA wal_checkpoint(TRUNCATE)")
        assert before == 0
        await flush(store, *everybody)
        _, pages, _ = written.row("PRAGMA wal_checkpoint(PASSIVE)")
        assert pages < 40
        assert len(await states(store)) == 499


# --------------------------------------------------------------------------------------------- the clock


async def test_what_waits_moves_back_with_a_clock_that_was_set_back(directory: Path) -> None:
    later = NOW + 365 * DAY_MS
    async with opened(directory) as store:
        await send(store, CONV, "alice", text(1), text(2), now=later)
        await send(store, "p:alice:carol", "alice", text(3), now=later)
        await flush(store, due=[due("bob", 1, later + 1_000)], now=later)
        await store.park([park("carol", conv="p:alice:carol", at=later + 5_000)], later)
        assert await store.fence("n0", 1, "d1", later, 2_000)
        await send(store, CONV, "alice", text(4), now=NOW)
        assert (await store.next_due_ms(), await store.next_push_ms()) == (NOW + 1_000, NOW + 5_000)
        assert len(await store.claim_due("d", NOW + 1_000, 1_000, 9)) == 1
        assert not await store.fence("n0", 1, "d2", NOW + 1_999, 1_000)
        assert await store.fence("n0", 1, "d2", NOW + 2_000, 1_000)


async def test_a_caller_who_waited_for_a_slow_disk_sets_no_clock_back(directory: Path) -> None:
    async with opened(directory) as store:
        await fill(store, 1)
        await flush(store, due=[due("bob", 1, NOW + 40_000)], now=NOW + 30_000)
        await send(store, CONV, "alice", text(2), now=NOW)
        assert await store.next_due_ms() == NOW + 40_000
