"""The embedded message store: one directory, one SQLite database, one writer.

Hides SQLite. Calls that write go through the group commit of writer.py; calls that read have a connection of
their own and see the newest commit (WAL), so they never wait for a disk. Each kind has its runner: a thread,
or in a simulation whatever runs the work inline.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import apsw

from fastim import model
from fastim.errors import StoreUnavailable, UsageError
from fastim.store import base, migrations
from fastim.store.rules import forbidden
from fastim.store.sqlite import files
from fastim.store.sqlite.ledger import Ledger
from fastim.store.sqlite.lists import Lists
from fastim.store.sqlite.names import Names
from fastim.store.sqlite.people import Devices, Nodes
from fastim.store.sqlite.push import earliest
from fastim.store.sqlite.rows import Rows
from fastim.store.sqlite.tail import Changed, Tail
from fastim.store.sqlite.unread import head_of, move_mark, row_of, unread_of
from fastim.store.sqlite.writer import Runner, ThreadRunner, Writer

T = TypeVar("T")


class Reader:
    """The connection that reads."""

    def __init__(self, db: apsw.Connection, tail: Tail, gate: threading.Lock) -> None:
        self._gate = gate
        self.sql = sql = files.Sql(db)
        self.names = names = Names(sql)
        self.rows = Rows(sql, names)
        self.lists = Lists(sql, names, tail)
        self.ledger = Ledger(sql, names)
        self.devices = Devices(sql, names, tail)
        self.nodes = Nodes(sql)

    def snapshot(self, work: Callable[[], T]) -> T:
        """All statements of one call see one state."""
        with self._gate:
            self.sql.run("BEGIN")
            try:
                return work()
            finally:
                self.sql.run("ROLLBACK")

    def of_user(self, user: str, work: Callable[[tuple[list[Changed], int]], T]) -> T:
        """The same for reads of the change index: the tail first, the snapshot second (tail.py, C1)."""
        tail = self.lists.tail_of(user)
        return self.snapshot(lambda: work(tail))

    def next_due_ms(self) -> int:
        return earliest(self.sql, "due")

    def next_push_ms(self) -> int:
        return earliest(self.sql, "push")

    def close(self) -> None:
        with contextlib.suppress(apsw.Error):
            self.sql.db.close(True)


class SqliteStore:
    """MessageStore on SQLite. Made by open()."""

    def __init__(self, directory: Path, runner: Runner | None) -> None:
        self._directory = directory
        self._threads: list[ThreadRunner] = []
        self._run_write: Runner = runner or self._thread("store.write")
        self._run_read: Runner = runner or self._thread("store.read")
        self._tail = Tail()
        self._gate = threading.Lock()
        self._lock: files.DirectoryLock | None = None
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        self._closed = False

    def _thread(self, name: str) -> ThreadRunner:
        thread = ThreadRunner(name)
        self._threads.append(thread)
        return thread

    @classmethod
    async def open(
        cls,
        directory: Path,
        *,
        runner: Runner | None = None,
        vfs: str = "",
        synchronous: str = "FULL",
        read_only: bool = False,
    ) -> SqliteStore:
        """Own `directory` (created if need be), or only read beside whoever does.

        synchronous: anything below FULL loses commits with the power; for tests that show it.
        Raises UsageError if another process owns it, or if a newer fastim wrote it; StoreUnavailable.
        """
        store = cls(Path(directory), runner)
        try:
            if read_only:
                await store._run_read(lambda: store._open_beside(vfs))
            else:
                await store._run_write(lambda: store._open(vfs, synchronous))
        except BaseException as error:
            store._closed = True
            store._release()
            if isinstance(error, apsw.Error):
                raise files.unavailable(error) from error
            if isinstance(error, OSError):
                raise StoreUnavailable(str(error)) from error
            raise
        return store

    def _open(self, vfs: str, synchronous: str) -> None:
        files.make_directory(self._directory)
        self._lock = files.DirectoryLock(self._directory)
        self._writer = Writer(self._directory, vfs, synchronous, self._tail, self._run_write, self._gate)
        self._reader = Reader(files.open_reader(self._directory, vfs), self._tail, self._gate)

    def _open_beside(self, vfs: str) -> None:
        self._reader = reader = Reader(
            files.open_reader(self._directory, vfs, beside=True), self._tail, self._gate
        )
        newest = migrations.steps("sqlite")[-1].version
        files.check_version(files.schema_version(reader.sql.db), newest, oldest=newest)
        meta = dict(reader.sql.rows("SELECT name, value FROM meta"))
        clock = max(reader.ledger.head_msg_id(), meta["minted"])
        self._tail.load(reader.sql, reader.names, meta["projected"], clock)

    async def close(self) -> None:
        """Finish what was taken, then close. Twice is once."""
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            await self._writer.drained()
        if self._reader is not None:
            await self._run_read(self._reader.close)
        if self._writer is not None:
            await self._run_write(self._writer.close)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
        for thread in self._threads:
            thread.close()

    # -------------------------------------------------------------------------------------------- two ways in

    async def _write(self, work: Callable[[Writer], T], now_ms: int = 0) -> T:
        self._check_open()
        writer = self._writer
        if writer is None:
            raise UsageError(f"{self._directory} was opened read-only")
        return await writer.call(lambda: work(writer), now_ms)

    async def _read(self, work: Callable[[Reader], T]) -> T:
        self._check_open()
        reader = self._reader
        assert reader is not None
        try:
            return await self._run_read(lambda: work(reader))
        except apsw.Error as error:
            raise files.unavailable(error) from error

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("it is closed", temporary=False)

    # ----------------------------------------------------------------------------------------------- timeline

    async def append(self, frames: Sequence[base.AppendFrame], now_ms: int) -> list[base.AppendedFrame]:
        return await self._write(lambda w: w.timeline.append(frames, now_ms), now_ms)

    async def stream(
        self, user: str, conv: str, after_seq: int, now_ms: int, *, limit: int, max_bytes: int
    ) -> base.StreamPage:
        return await self._read(
            lambda r: r.snapshot(lambda: r.rows.stream(user, conv, after_seq, now_ms, limit, max_bytes))
        )

    async def history(
        self,
        user: str,
        conv: str,
        *,
        before_seq: int,
        after_seq: int,
        from_ms: int,
        to_ms: int,
        limit: int,
        now_ms: int,
    ) -> tuple[list[model.Message], bool]:
        return await self._read(
            lambda r: r.snapshot(
                lambda: r.rows.history(user, conv, before_seq, after_seq, from_ms, to_ms, limit, now_ms)
            )
        )

    async def find(
        self, *, msg_id: int = 0, client_id: bytes = b"", sender: str = ""
    ) -> model.Message | None:
        return await self._read(lambda r: r.snapshot(lambda: r.rows.find(msg_id, client_id, sender)))

    async def scan(self, after_msg_id: int, limit: int) -> list[model.Message]:
        return await self._read(lambda r: r.snapshot(lambda: r.rows.scan(after_msg_id, limit)))

    # -------------------------------------------------------------------------------------------- catching up

    async def behind(self, user: str, device: str, since_version: int, limit: int) -> base.BehindPage:
        return await self._read(
            lambda r: r.of_user(
                user, lambda tail: r.lists.behind(user, device, since_version, max(limit, 1), tail)
            )
        )

    async def position(self, user: str, device: str, conv: str) -> base.Behind:
        return await self._read(lambda r: r.snapshot(lambda: r.lists.position(user, device, conv)))

    async def conversations(
        self, user: str, device: str, since_version: int, limit: int, now_ms: int
    ) -> base.ConvPage:
        return await self._read(
            lambda r: r.of_user(
                user,
                lambda tail: r.lists.conversations(user, device, since_version, max(limit, 1), now_ms, tail),
            )
        )

    async def version(self, user: str) -> int:
        return await self._read(lambda r: r.of_user(user, lambda tail: r.lists.version(user, tail)))

    # ---------------------------------------------------------------------------------------- marks and fates

    async def flush(self, flush: base.Flush) -> base.FlushResult:
        return await self._write(lambda w: w.duties.flush(flush), flush.now_ms)

    async def read(self, user: str, conv: str, seq: int, now_ms: int) -> tuple[int, int]:
        return await self._write(lambda w: _read_mark(w, user, conv, seq, now_ms), now_ms)

    async def unread(self, user: str, conv: str | None = None) -> tuple[int, list[tuple[str, int]]]:
        return await self._read(lambda r: r.of_user(user, lambda tail: r.lists.unread(user, conv, tail)))

    async def recount(self, user: str) -> list[tuple[str, int, int]]:
        return await self._read(lambda r: r.of_user(user, lambda tail: r.lists.recount(user, tail)))

    # -------------------------------------------------------------------------------------- due rows and push

    async def next_due_ms(self) -> int:
        self._check_open()
        if self._writer is None:
            return await self._read(lambda r: r.next_due_ms())
        return self._writer.next_due_ms

    async def claim_due(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[base.DueRow]:
        return await self._write(lambda w: w.duties.claim(holder, now_ms, claim_ms, limit), now_ms)

    async def fire_due(self, holder: str, firings: Sequence[base.DueFiring], now_ms: int) -> list[bool]:
        return await self._write(lambda w: w.duties.fire(holder, firings, now_ms), now_ms)

    async def park(self, parks: Sequence[base.Park], now_ms: int) -> list[bool]:
        return await self._write(lambda w: w.duties.park(parks, now_ms), now_ms)

    async def next_push_ms(self) -> int:
        self._check_open()
        if self._writer is None:
            return await self._read(lambda r: r.next_push_ms())
        return self._writer.next_push_ms

    async def claim_push(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[base.PushRow]:
        return await self._write(lambda w: w.push.claim(holder, now_ms, claim_ms, limit), now_ms)

    async def finish_push(self, holder: str, row: base.PushRow, now_ms: int, *, retry_at_ms: int) -> None:
        await self._write(lambda w: w.push.finish(holder, row, now_ms, retry_at_ms), now_ms)

    # ------------------------------------------------------------------------------------- recovery and audit

    async def settled_mark(self) -> int:
        return await self._read(lambda r: r.ledger.settled_mark())

    async def settle(self, msg_id: int) -> None:
        await self._write(lambda w: w.ledger.settle(msg_id))

    async def head_msg_id(self) -> int:
        return await self._read(lambda r: r.ledger.head_msg_id())

    async def unsettled(self, upto_msg_id: int) -> list[base.OpenRange]:
        return await self._read(lambda r: r.snapshot(lambda: r.ledger.unsettled(upto_msg_id)))

    async def obligations(
        self, after_msg_id: int, limit_messages: int, now_ms: int
    ) -> tuple[list[base.Obligation], int]:
        return await self._read(
            lambda r: r.snapshot(lambda: r.ledger.obligations(after_msg_id, limit_messages, now_ms))
        )

    async def trace(self, msg_id: int, now_ms: int) -> base.Trace | None:
        return await self._read(lambda r: r.snapshot(lambda: r.ledger.trace(r.rows, msg_id, now_ms)))

    # ------------------------------------------------------------------------------------- groups and devices

    async def create_group(self, group: str, owner: str, members: Sequence[str], now_ms: int) -> int:
        return await self._write(lambda w: w.groups.create(group, owner, members, now_ms), now_ms)

    async def members(self, conv: str) -> list[base.Member]:
        return await self._read(lambda r: r.names.members(conv))

    async def register_device(self, user: str, device: str, device_class: str, now_ms: int) -> base.Device:
        return await self._write(lambda w: w.devices.register(user, device, device_class, now_ms), now_ms)

    async def devices(self, user: str) -> list[base.Device]:
        return await self._read(lambda r: r.devices.of(user))

    # -------------------------------------------------------------------------------------------------- nodes

    async def next_boot(self, node: str) -> int:
        return await self._write(lambda w: w.nodes.next_boot(node))

    async def open_boot(self, node: str, boot: int) -> None:
        await self._write(lambda w: w.nodes.open_boot(node, boot))

    async def open_boots(self) -> list[base.OpenBoot]:
        return await self._read(lambda r: r.nodes.open_boots())

    async def end_boot(self, node: str, boot: int) -> None:
        await self._write(lambda w: w.nodes.end_boot(node, boot))

    async def fence(self, node: str, boot: int, holder: str, now_ms: int, claim_ms: int) -> bool:
        return await self._write(lambda w: w.nodes.fence(node, boot, holder, now_ms, claim_ms), now_ms)

    async def fenced(self, node: str, boot: int) -> bool:
        return await self._read(lambda r: r.nodes.fenced(node, boot))


def _read_mark(writer: Writer, user: str, conv: str, seq: int, now_ms: int) -> tuple[int, int]:
    sql, names = writer.sql, writer.names
    spans = names.spans(user, conv)
    if not spans:
        raise forbidden(user, conv)
    conv_id, person = names.conv_id(conv), names.person(user)
    if not conv_id or not person:
        return 0, 0
    pair = person << 32 | conv_id
    head = head_of(sql, conv_id)
    if min(seq, head[0]) > row_of(sql, pair).read_seq:
        move_mark(sql, writer.minter, pair, min(seq, head[0]), now_ms)
    row = row_of(sql, pair)
    return row.read_seq, unread_of(sql, conv_id, person, row, head, spans)
