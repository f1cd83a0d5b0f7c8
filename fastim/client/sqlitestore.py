"""The durable local store: one SQLite file, a thread of its own, one commit per batch.

Hides SQL, the thread, and where the app's place in the feed is kept. commit returns after fsync
(synchronous=FULL), so what is acknowledged survives power loss. `mark` must not wait for a disk: it writes 28
bytes into `<path>-shown`, which survives a kill of the process; every commit copies it into the database, so
that after a power loss at most what was shown since the last commit is handed over again.

The file is locked while it is open: two clients on it would show things twice.

 message.position > 0: in the feed, at that place      < 0: from a history page, not in the feed

D1 to D3 of localstore                                  tests/unit/test_client_localstore.py
Measured (docs/adr/0050): the thread hop costs 25 µs a batch; inline, an fsync would stop the loop for as long
as the disk takes.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import apsw
import msgspec

from fastim.client.events import Gone, Message
from fastim.client.localstore import Batch, ConvRow, Placed, Reset, Snapshot, Ticket
from fastim.client.outbox import Unsent
from fastim.errors import StoreUnavailable, UsageError
from fastim.model import FIRST_EVENT_KIND, Flag

T = TypeVar("T")

SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE about (one INTEGER PRIMARY KEY CHECK (one = 1), device TEXT NOT NULL, ident BLOB NOT NULL,
    ticket BLOB NOT NULL, taken INTEGER NOT NULL, done INTEGER NOT NULL);
CREATE TABLE conv (conv TEXT PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE message (position INTEGER PRIMARY KEY, conv TEXT NOT NULL, old INTEGER NOT NULL,
    seq INTEGER NOT NULL, msg_id INTEGER NOT NULL, sender TEXT NOT NULL, countable INTEGER NOT NULL,
    rest BLOB NOT NULL);
CREATE UNIQUE INDEX message_seq ON message (conv, old, seq);
CREATE INDEX message_id ON message (msg_id);
CREATE TABLE gone (position INTEGER PRIMARY KEY, conv TEXT NOT NULL, from_seq INTEGER NOT NULL,
    to_seq INTEGER NOT NULL, reason INTEGER NOT NULL);
CREATE TABLE outbox (n INTEGER PRIMARY KEY, client_id BLOB NOT NULL UNIQUE, row BLOB NOT NULL);
CREATE TABLE reading (conv TEXT NOT NULL, user TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (conv, user))
    WITHOUT ROWID;
"""
_PRAGMAS: Final = (
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA wal_autocheckpoint = 1000",
)
_SHOWN: Final = struct.Struct(">8sQQI")
_encode: Final = msgspec.msgpack.Encoder().encode
_decode_ticket: Final = msgspec.msgpack.Decoder(Ticket).decode
_decode_conv: Final = msgspec.msgpack.Decoder(ConvRow).decode
_decode_message: Final = msgspec.msgpack.Decoder(Message).decode
_decode_unsent: Final = msgspec.msgpack.Decoder(Unsent).decode
_TEMPORARY: Final = (apsw.BusyError, apsw.LockedError, apsw.FullError, apsw.IOError, apsw.NoMemError)


class SqliteLocalStore:
    """A LocalStore in the file `path`, made when missing. See the module."""

    max_waiting = 0

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._thread: ThreadPoolExecutor | None = None
        self._db: apsw.Connection | None = None
        self._shown_fd = -1
        self._ident = b""
        self._taken = 0
        self._done = 0
        self._newest = 0
        self._oldest_page = 0
        self._retired = False
        """Some messages belong to an old epoch."""

    # ------------------------------------------------------------------------------------------- the port

    async def open(self, device: str) -> Snapshot:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastim-local-store")
        return await self._run(lambda: self._open(device))

    async def commit(self, batch: Batch) -> list[Placed]:
        return await self._run(lambda: self._commit(batch))

    async def waiting(self, after: int, limit: int) -> list[Placed]:
        return await self._run(lambda: self._waiting(after, limit))

    async def page(self, conv: str, above_seq: int, below_seq: int, limit: int) -> list[Message]:
        return await self._run(lambda: self._page(conv, above_seq, below_seq, limit))

    async def count(self, conv: str, above_seq: int, not_by: str) -> int:
        sql = """SELECT count(*) FROM message
            WHERE conv = ? AND old = 0 AND seq > ? AND sender <> ? AND countable"""
        return await self._run(lambda: int(self._one(sql, conv, above_seq, not_by)))

    def floor(self, conv: str) -> int:
        return 0

    def mark(self, taken: int, done: int) -> None:
        self._taken, self._done = taken, done
        body = _SHOWN.pack(self._ident, taken, done, 0)[:-4]
        try:
            os.pwrite(self._shown_fd, body + zlib.crc32(body).to_bytes(4, "big"), 0)
        except OSError as error:
            raise StoreUnavailable(f"{self._path}-shown: {error.strerror}") from None

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(thread, self._close)
            thread.shutdown(wait=False)

    # ---------------------------------------------------------------------------------------- in the thread

    async def _run(self, work: Callable[[], T]) -> T:
        if self._thread is None:
            raise StoreUnavailable("the local store is closed", temporary=False)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except _TEMPORARY as error:
            raise StoreUnavailable(f"{self._path}: {error}") from error
        except (apsw.Error, OSError, msgspec.MsgspecError) as error:
            raise StoreUnavailable(f"{self._path}: {error}", temporary=False) from error

    def _open(self, device: str) -> Snapshot:
        self._close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        db = self._db = apsw.Connection(str(self._path))
        try:
            db.set_busy_timeout(0)
            for pragma in _PRAGMAS:
                db.execute(pragma)
            self._migrate(db, device)
            owner, ident, ticket, taken, done = next(
                iter(db.execute("SELECT device, ident, ticket, taken, done FROM about"))
            )
            if owner != device:
                raise UsageError(f"{self._path} belongs to device {owner!r}; asked for {device!r}")
            self._ident = ident
            self._newest = max(self._one("SELECT coalesce(max(position), 0) FROM message"), 0)
            self._newest = max(self._newest, self._one("SELECT coalesce(max(position), 0) FROM gone"), taken)
            self._oldest_page = min(self._one("SELECT coalesce(min(position), 0) FROM message"), 0)
            self._retired = bool(self._one("SELECT EXISTS (SELECT 1 FROM message WHERE old > 0)"))
            self._taken, self._done = self._read_shown(taken, done)
        except BaseException:
            self._close()
            raise
        return Snapshot(
            _decode_ticket(ticket),
            [_decode_conv(row) for (row,) in db.execute("SELECT row FROM conv")],
            [_decode_unsent(row) for (row,) in db.execute("SELECT row FROM outbox ORDER BY n")],
            [(conv, user, seq) for conv, user, seq in db.execute("SELECT conv, user, seq FROM reading")],
            self._taken, self._done, self._newest,
        )  # fmt: skip

    def _migrate(self, db: apsw.Connection, device: str) -> None:
        version = self._one("PRAGMA user_version")
        if version > SCHEMA_VERSION:
            raise UsageError(f"{self._path} has schema {version}; this client knows up to {SCHEMA_VERSION}")
        if version == SCHEMA_VERSION:
            return
        with self._transaction(db):
            db.execute(_SCHEMA)
            db.execute(
                "INSERT INTO about VALUES (1, ?, ?, ?, 0, 0)",
                (device, secrets.token_bytes(8), _encode(Ticket())),
            )
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _read_shown(self, taken: int, done: int) -> tuple[int, int]:
        """The side file if it is this store's and whole; it is never behind the database."""
        self._shown_fd = os.open(f"{self._path}-shown", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        raw = os.pread(self._shown_fd, _SHOWN.size, 0)
        if len(raw) == _SHOWN.size:
            ident, shown_taken, shown_done, crc = _SHOWN.unpack(raw)
            if ident == self._ident and crc == zlib.crc32(raw[:-4]) and shown_taken <= self._newest:
                return max(taken, shown_taken), max(done, shown_done)
        return taken, done

    def _close(self) -> None:
        if self._db is not None:
            try:
                if self._ident:
                    self._db.execute("UPDATE about SET taken = ?, done = ?", (self._taken, self._done))
            except apsw.Error:
                pass  # the side file has it
            self._db.close(True)
            self._db = None
        if self._shown_fd >= 0:
            os.close(self._shown_fd)
            self._shown_fd = -1
        self._ident = b""

    def _handle(self) -> apsw.Connection:
        if self._db is None:
            raise StoreUnavailable(f"{self._path} is closed", temporary=False)
        return self._db

    def _one(self, sql: str, *values: str | int) -> int:
        value = next(iter(self._handle().execute(sql, values)))[0]
        assert isinstance(value, int)
        return value

    @staticmethod
    def _transaction(db: apsw.Connection) -> _Transaction:
        return _Transaction(db)

    # ------------------------------------------------------------------------------------------- a batch

    def _commit(self, batch: Batch) -> list[Placed]:
        db = self._handle()
        newest, oldest_page = self._newest, self._oldest_page
        taken, done = self._taken, self._done
        try:
            with self._transaction(db):
                placed = [place for entry in batch.feed if (place := self._feed(db, entry)) is not None]
                for message in batch.pages:
                    self._oldest_page -= 1
                    self._insert(db, "IGNORE", self._oldest_page, message)
                db.executemany(
                    "INSERT OR REPLACE INTO conv VALUES (?, ?)",
                    ((conv, _encode(row)) for conv, row in batch.convs.items()),
                )
                self._keep_outbox(db, batch)
                db.executemany(
                    "INSERT OR REPLACE INTO reading VALUES (?, ?, ?)",
                    ((conv, user, seq) for (conv, user), seq in batch.reads.items()),
                )
                if batch.ticket is not None:
                    db.execute("UPDATE about SET ticket = ?", (_encode(batch.ticket),))
                db.execute("UPDATE about SET taken = ?, done = ?", (taken, done))
                db.execute("DELETE FROM gone WHERE position <= ?", (done,))
        except BaseException:
            self._newest, self._oldest_page = newest, oldest_page
            raise
        return placed

    def _retire(self, db: apsw.Connection, conv: str) -> None:
        """The stored messages become an old epoch: no history, but still known by msg_id, and still fed."""
        db.execute(
            """UPDATE message SET old = 1 + (SELECT max(old) FROM message WHERE conv = ?)
               WHERE conv = ? AND old = 0""",
            (conv, conv),
        )
        self._retired = True

    def _feed(self, db: apsw.Connection, entry: Message | Gone | Reset) -> Placed | None:
        """None: nothing to show. It may have been fed under an old epoch, and only its seq is new."""
        if isinstance(entry, Reset):
            self._retire(db, entry.conv)
            return None
        if isinstance(entry, Gone):
            self._newest += 1
            row = (self._newest, entry.conv, entry.from_seq, entry.to_seq, entry.reason)
            db.execute("INSERT INTO gone VALUES (?, ?, ?, ?, ?)", row)
            return self._newest, entry
        if self._retired:
            rows = db.execute(
                "SELECT position FROM message WHERE msg_id = ? AND conv = ? AND old > 0 LIMIT 1",
                (entry.msg_id, entry.conv),
            )
            place = next(iter(rows), (None,))[0]
            if isinstance(place, int):
                self._insert(db, "REPLACE", place, entry)
                return None
        self._newest += 1
        self._insert(db, "REPLACE", self._newest, entry)
        return self._newest, entry

    @staticmethod
    def _values(message: Message) -> tuple[str, int, int, str, bool, bytes]:
        countable = message.kind < FIRST_EVENT_KIND and not message.flags & Flag.SILENT
        return message.conv, message.seq, message.msg_id, message.sender, countable, _encode(message)

    def _insert(self, db: apsw.Connection, otherwise: str, position: int, message: Message) -> None:
        db.execute(
            f"INSERT OR {otherwise} INTO message VALUES (?, ?, 0, ?, ?, ?, ?, ?)",
            (position, *self._values(message)),
        )

    def _keep_outbox(self, db: apsw.Connection, batch: Batch) -> None:
        rows = (*batch.queued, *batch.refused)
        db.executemany(
            "INSERT OR REPLACE INTO outbox VALUES (?, ?, ?)",
            ((unsent.n, unsent.client_id, _encode(unsent)) for unsent in rows),
        )
        db.executemany("DELETE FROM outbox WHERE client_id = ?", ((i,) for i in batch.closed))

    # ------------------------------------------------------------------------------------------- reading

    def _waiting(self, after: int, limit: int) -> list[Placed]:
        db = self._handle()
        placed: list[Placed] = [
            (position, _decode_message(rest))
            for position, rest in db.execute(
                "SELECT position, rest FROM message WHERE position > ? ORDER BY position LIMIT ?",
                (max(after, 0), limit),
            )
        ]
        placed += [
            (position, Gone(conv, from_seq, to_seq, reason))
            for position, conv, from_seq, to_seq, reason in db.execute(
                "SELECT * FROM gone WHERE position > ? ORDER BY position LIMIT ?", (max(after, 0), limit)
            )
        ]
        placed.sort(key=lambda place: place[0])
        return placed[:limit]

    def _page(self, conv: str, above_seq: int, below_seq: int, limit: int) -> list[Message]:
        rows: Iterator[tuple[bytes]] = self._handle().execute(
            """SELECT rest FROM message WHERE conv = ? AND old = 0 AND seq > ? AND seq < ?
               ORDER BY seq DESC LIMIT ?""",
            (conv, above_seq, below_seq, limit),
        )
        messages = [_decode_message(rest) for (rest,) in rows]
        messages.reverse()
        return messages


class _Transaction:
    """BEGIN IMMEDIATE, then COMMIT or ROLLBACK."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            return
        try:
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
