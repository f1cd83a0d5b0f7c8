"""The files of one embedded store: who owns the directory, how SQLite is set up, what its errors mean.

    <directory>/store.db (+ -wal, -shm)     everything
    <directory>/store.lock                  held by flock while a server runs; the kernel drops it at kill -9

One process owns a directory; any number may read beside it. The schema is taken to its newest version at
open; data of a newer program is refused. Held by tests/contract/test_store_sqlite.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import apsw

from fastim.errors import InternalError, StoreUnavailable, UsageError
from fastim.store import migrations

DATABASE: Final = "store.db"
LOCK: Final = "store.lock"
APPLICATION_ID: Final = 0x6661_7374
"""So that `file` and we know a store when we see one."""
BUSY_MS: Final = 2_000
WRITER_CACHE_KIB: Final = 65_536
READER_CACHE_KIB: Final = 16_384
CHECKPOINT_PAGES: Final = 4_000
"""16 MiB of log: a hot page is written back once per so many; a start after a crash reads about that."""

_PERMANENT_IO: Final = frozenset({apsw.SQLITE_IOERR_CORRUPTFS, apsw.SQLITE_IOERR_DATA})


def unavailable(error: apsw.Error) -> StoreUnavailable | InternalError:
    """What an SQLite error means to a caller of the port."""
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return StoreUnavailable(f"the data is damaged: {error}", temporary=False)
    if isinstance(error, apsw.IOError):
        return StoreUnavailable(
            str(error), temporary=getattr(error, "extendedresult", 0) not in _PERMANENT_IO
        )
    if isinstance(
        error,
        apsw.FullError
        | apsw.BusyError
        | apsw.LockedError
        | apsw.CantOpenError
        | apsw.ReadOnlyError
        | apsw.NoMemError
        | apsw.InterruptError
        | apsw.ProtocolError,
    ):
        return StoreUnavailable(str(error))
    if isinstance(error, apsw.ConnectionClosedError):
        return StoreUnavailable("the store is closed", temporary=False)
    return InternalError(f"{type(error).__name__}: {error}")


class Sql:
    """One connection, and the three shapes in which results are wanted. Used by one thread at a time."""

    __slots__ = ("db",)

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Any]:
        return self.db.execute(sql, args).fetchall()

    def row(self, sql: str, args: Sequence[Any] = ()) -> Any:
        """The first row, None if there is none."""
        return self.db.execute(sql, args).fetchone()

    def value(self, sql: str, args: Sequence[Any] = ()) -> Any:
        """The first column of the first row, None if there is none."""
        row = self.db.execute(sql, args).fetchone()
        return None if row is None else row[0]

    def run(self, sql: str, args: Sequence[Any] = ()) -> None:
        self.db.execute(sql, args)

    def many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        self.db.executemany(sql, rows)


class DirectoryLock:
    """The right to write into a directory, until close() or the end of the process."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 20).decode(errors="replace").strip()
            self.close()
            raise UsageError(
                f"{directory} is in use by another server (process {holder or 'unknown'}); "
                "one server per directory"
            ) from None
        # A convenience for the message above; a full disk must not keep a server from starting.
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


def make_directory(directory: Path) -> None:
    """Create it so that it survives power loss."""
    if directory.is_dir():
        return
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    parent = os.open(directory.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def open_writer(directory: Path, vfs: str, synchronous: str) -> apsw.Connection:
    """A connection whose commits survive power loss when synchronous is FULL. Raises apsw.Error."""
    db = _connect(directory, apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE, vfs)
    try:
        for pragma in (
            "journal_mode = wal",
            f"synchronous = {synchronous}",
            "wal_autocheckpoint = 0",
            f"journal_size_limit = {CHECKPOINT_PAGES * 4 * 4_096}",
            f"cache_size = -{WRITER_CACHE_KIB}",
            # Each call's savepoint copies the pages it changes; above 64 KiB that is a file in /var/tmp.
            "temp_store = memory",
        ):
            db.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        db.close(True)
        raise
    return db


def open_reader(directory: Path, vfs: str, *, beside: bool = False) -> apsw.Connection:
    """A connection that never writes. beside: to data that another process may own."""
    if beside and not (directory / DATABASE).exists():
        raise UsageError(f"there is no store in {directory}")
    flags = apsw.SQLITE_OPEN_READONLY if beside else apsw.SQLITE_OPEN_READWRITE
    db = _connect(directory, flags, vfs)
    try:
        db.execute("PRAGMA query_only = on").fetchall()
        db.execute(f"PRAGMA cache_size = -{READER_CACHE_KIB}").fetchall()
    except BaseException:
        db.close(True)
        raise
    return db


def _connect(directory: Path, flags: int, vfs: str) -> apsw.Connection:
    db = apsw.Connection(str(directory / DATABASE), flags=flags, vfs=vfs or None, statementcachesize=256)
    db.set_busy_timeout(BUSY_MS)
    return db


def migrate(db: apsw.Connection) -> None:
    """Take the schema to the newest version. Raises UsageError for data of a newer program."""
    known = migrations.steps("sqlite")
    version = schema_version(db)
    check_version(version, known[-1].version)
    for step in known[version:]:
        db.execute("BEGIN IMMEDIATE")
        try:
            db.execute(
                "CREATE TABLE IF NOT EXISTS migration (version INTEGER PRIMARY KEY, name TEXT NOT NULL)"
            )
            for _ in db.execute(step.sql):
                pass
            db.execute("INSERT INTO migration VALUES (?, ?)", (step.version, step.name))
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}").fetchall()
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def schema_version(db: apsw.Connection) -> int:
    """0 for an empty file. Raises UsageError for a database that is not a store."""
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if "migration" in tables:
        return int(db.execute("SELECT max(version) FROM migration").fetchall()[0][0] or 0)
    if tables:
        raise UsageError(
            f"{db.filename} is no store of fastim: it holds {', '.join(sorted(map(str, tables)))}"
        )
    return 0


def check_version(version: int, newest: int, *, oldest: int = 0) -> None:
    """Raises UsageError for a schema outside oldest..newest."""
    if version > newest:
        raise UsageError(
            f"the store was written by a newer fastim: its schema is version {version}, "
            f"this program knows up to {newest}"
        )
    if version < oldest:
        raise UsageError(
            f"the store's schema is version {version}, this program reads {oldest}; "
            "start the server once to migrate it"
        )
