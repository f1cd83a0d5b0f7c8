"""Group commit: every call that is waiting when the writer wakes goes into one transaction.

    call ─▶ queue ─▶ one hop to the writer's thread ─▶ BEGIN · call · call · slice of the projection · COMMIT
                                                          each in a savepoint of its own

G1  a call that fails undoes itself and nobody else
G2  a COMMIT that fails fails every call of the group, and what they left in memory (heads, names, the tail)
    is forgotten; whatever state SQLite is in then, the next group starts clean
G3  a result is given only after the COMMIT returned, and the tail knows it by then (Store.S8)
G4  the log is copied back after results were given, and stays bounded however busy the reader is
    tests/contract/test_store_sqlite.py
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import apsw

from fastim.errors import StoreUnavailable
from fastim.store.sqlite import files
from fastim.store.sqlite.duties import Duties
from fastim.store.sqlite.files import Sql
from fastim.store.sqlite.ledger import Ledger
from fastim.store.sqlite.lists import Lists
from fastim.store.sqlite.minting import Minter
from fastim.store.sqlite.names import Names
from fastim.store.sqlite.people import Devices, Groups, Nodes
from fastim.store.sqlite.push import PushBox, earliest
from fastim.store.sqlite.tail import Dirty, Projector, Tail
from fastim.store.sqlite.timeline import Timeline

T = TypeVar("T")

GROUP_CALLS: Final = 256
"""Calls of one transaction: what one caller waits for on behalf of the others."""
CLOCK_STEP_MS: Final = 60_000
"""A wall clock that is so far behind what callers said before has been set back. Callers that waited for a
slow disk say old moments too, so this is more than they wait."""


class Runner(Protocol):
    """Where the store's blocking work runs. The work of one runner never overlaps itself."""

    async def __call__(self, work: Callable[[], T]) -> T: ...


class ThreadRunner:
    """A thread that does one piece of work after the other."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def __call__(self, work: Callable[[], T]) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put((work, future))
        return await future

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            result: Any = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as raised:
                error = raised
            # A loop that is closed has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                future.get_loop().call_soon_threadsafe(_finish, future, result, error)
            del item, work, future, result, error

    def close(self) -> None:
        """After the last call has returned."""
        self._queue.put(None)
        self._thread.join()


def _finish(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class Call:
    """One call of the port on its way through a group."""

    __slots__ = ("error", "future", "now_ms", "result", "work")

    def __init__(self, work: Callable[[], Any], future: asyncio.Future[Any], now_ms: int) -> None:
        self.work = work
        self.now_ms = now_ms
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None

    def deliver(self) -> None:
        _finish(self.future, self.result, self.error)


class Writer:
    """The connection that writes, and all that it remembers. Everything but `call` runs in its runner."""

    def __init__(
        self,
        directory: Path,
        vfs: str,
        synchronous: str,
        tail: Tail,
        run: Callable[..., Awaitable[Any]],
        gate: threading.Lock,
    ) -> None:
        """gate: held by the reader during each snapshot."""
        self._files = (directory, vfs, synchronous)
        self._run = run
        self._gate = gate
        self._log_pages = 0
        self._queue: list[Call] = []
        self._task: asyncio.Task[None] | None = None
        self._broken = False
        self.sql = sql = Sql(files.open_writer(*self._files))
        try:
            files.migrate(sql.db)
        except BaseException:
            sql.db.close(True)
            raise
        sql.db.set_wal_hook(self._note_log)
        self.tail = tail
        self.names = names = Names(sql)
        self.minter = Minter()
        self.timeline = Timeline(sql, names, self.minter, tail)
        self.push = PushBox(sql, names, Lists(sql, names, tail).badge)
        self.duties = Duties(sql, names, self.push)
        self.ledger = Ledger(sql, names)
        self.groups = Groups(sql, names, self.minter, tail)
        self.devices = Devices(sql, names, tail)
        self.nodes = Nodes(sql)
        self._projector = Projector(sql, tail)
        self.next_due_ms = earliest(sql, "due")
        self.next_push_ms = earliest(sql, "push")
        self._load()

    def _load(self) -> None:
        sql = self.sql
        meta = dict(sql.rows("SELECT name, value FROM meta"))
        self.minter.last = max(self.ledger.head_msg_id(), meta["minted"])
        self.minter.ahead_ms = meta["ahead"]
        self._latest_ms = sql.value("SELECT ts_ms FROM message ORDER BY msg_id DESC LIMIT 1") or 0
        self.tail.load(sql, self.names, meta["projected"], self.minter.last)

    # ------------------------------------------------------------------------------------- from the loop

    async def call(self, work: Callable[[], T], now_ms: int = 0) -> T:
        """Run work inside the next group; its result once that is committed. Raises StoreUnavailable.

        now_ms: what the caller says the time is, 0 if he says nothing.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.append(Call(work, future, now_ms))
        if self._task is None:
            self._task = loop.create_task(self._turn(), name="store.writer")
        return await future

    async def _turn(self) -> None:
        try:
            while self._queue:
                for call in await self._run(self._group):
                    call.deliver()
                if self._log_pages >= files.CHECKPOINT_PAGES:
                    await self._run(self._checkpoint)
        finally:
            self._task = None

    async def drained(self) -> None:
        """Everything that was called is done."""
        if self._task is not None:
            await asyncio.wait([self._task])

    # -------------------------------------------------------------------------------------- in the runner

    def _group(self) -> list[Call]:
        """One transaction. Never raises: each call carries its own outcome."""
        calls = self._queue[:GROUP_CALLS]
        del self._queue[: len(calls)]
        try:
            self._transact(calls)
        except BaseException as error:
            self._forget()
            failure = files.unavailable(error) if isinstance(error, apsw.Error) else error
            for call in calls:
                if call.error is None:
                    call.result, call.error = None, failure
        return calls

    def _transact(self, calls: list[Call]) -> None:
        self._reopen()
        sql = self.sql
        sql.run("BEGIN IMMEDIATE")
        project = self._projector.wanted()
        alone = len(calls) == 1 and not project
        latest_ms = self._follow_clock(calls)
        for call in calls:
            self._one(call, alone)
        projected: list[Dirty] = []
        if project:
            projected = self._projector.slice()
        next_due_ms, next_push_ms = earliest(sql, "due"), earliest(sql, "push")
        if alone and calls[0].error is not None:
            sql.run("ROLLBACK")
            return
        sql.run("COMMIT")
        self.tail.committed(self.minter.last, projected)
        self._projector.done(projected)
        self.timeline.kept()
        self.names.kept()
        self.next_due_ms, self.next_push_ms = next_due_ms, next_push_ms
        self._latest_ms = latest_ms

    def _follow_clock(self, calls: list[Call]) -> int:
        """The newest moment that was heard of.

        Due rows, pushes and claims move back with a clock that was set back: who was to be told in a second
        is not told in a year.
        """
        heard = [call.now_ms for call in calls if call.now_ms]
        if not heard:
            return self._latest_ms
        back_ms = self._latest_ms - min(heard)
        if back_ms <= CLOCK_STEP_MS:
            return max(self._latest_ms, *heard)
        for sql in (
            "UPDATE due SET due_at_ms = due_at_ms - ?1, ready_ms = ready_ms - ?1",
            "UPDATE push SET ready_ms = ready_ms - ?1, last_ms = max(last_ms - ?1, 0),"
            " idle_ms = idle_ms - ?1, again_ms = max(again_ms - ?1, 0)",
            "UPDATE fence SET claim_until_ms = claim_until_ms - ?1",
        ):
            self.sql.run(sql, (back_ms,))
        return max(heard)

    def _one(self, call: Call, alone: bool) -> None:
        """Run a call; if it fails, undo it alone. Raises apsw.Error if that is impossible."""
        sql = self.sql
        before = self.names.fresh, self.timeline.touched, self.tail.pending
        if not alone:
            sql.run("SAVEPOINT call")
        try:
            call.result = call.work()
        except BaseException as error:
            call.error = files.unavailable(error) if isinstance(error, apsw.Error) else error
            self.names.undo(before[0])
            self.timeline.undo(before[1])
            self.tail.undo(before[2])
            if not sql.db.in_transaction:
                # SQLite has rolled everything back by itself: what earlier calls did is gone too.
                raise StoreUnavailable(str(error)) from error
            if not alone:
                sql.run("ROLLBACK TO call")
        if not alone:
            sql.run("RELEASE call")

    def _forget(self) -> None:
        """Back to what the last commit left; a connection that cannot even roll back is replaced."""
        self.timeline.undo(0)
        self.tail.undo(0)
        self.names.kept()
        self.names.forget()
        try:
            if self.sql.db.in_transaction:
                self.sql.run("ROLLBACK")
        except apsw.Error:
            self._broken = True

    def _reopen(self) -> None:
        if self._broken:
            with contextlib.suppress(apsw.Error):
                self.sql.db.close(True)
            self.sql.db = files.open_writer(*self._files)
            self.sql.db.set_wal_hook(self._note_log)
            self._broken = False

    def _note_log(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK

    def _checkpoint(self) -> None:
        """Copy the log back into the database; what a snapshot still needs stays.

        A reader that is never idle would let the log grow for ever: beyond twice the wanted length, the
        reader waits for the copy. Errors are the next commit's.
        """
        self._log_pages = 0
        with contextlib.suppress(apsw.Error):
            pages, copied = self.sql.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            if copied < pages and pages > 2 * files.CHECKPOINT_PAGES:
                with self._gate:
                    self.sql.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def close(self) -> None:
        with contextlib.suppress(apsw.Error):
            self.sql.db.close(True)
