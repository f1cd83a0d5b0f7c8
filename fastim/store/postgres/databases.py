"""The databases: connections, deadlines, transactions, and what their errors mean.

D1  whatever goes wrong at a database is StoreUnavailable (temporary unless trying again cannot help) within
    a stated time; what can only be our bug is InternalError
D2  inside, only what certainly did not happen is repeated: a transaction that met a deadlock, or whose
    connection broke before its COMMIT was sent. After that the caller repeats, and the call finds what it did
D3  a cancelled or late call hands its connection's reply to nobody: its statement is cancelled at the server
    and waited for before the connection serves again, else the connection is closed
D4  who was stopped in the middle of a transaction loses it, and its locks, after idle_transaction_ms
    tests/contract/test_store_postgres_faults.py
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import asyncpg
import msgspec
from asyncpg import exceptions as pg

from fastim.errors import InternalError, StoreUnavailable, UsageError

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record] | asyncpg.Connection[asyncpg.Record]

T = TypeVar("T")

Row = Any
"""An asyncpg.Record, which is read by position."""

TRIES: Final = 4
"""Of one transaction."""
_BACK_OFF_S: Final = 0.02

_SAID: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    EOFError,
)
"""All that a call of asyncpg raises."""
_REPEATABLE: Final = (pg.DeadlockDetectedError, pg.SerializationError)
_LOST: Final = (
    OSError,
    asyncpg.InternalClientError,
    pg.ConnectionDoesNotExistError,
    pg.ConnectionFailureError,
    pg.AdminShutdownError,
    pg.CrashShutdownError,
)
"""The connection is gone. asyncpg says an InterfaceError too, when it knew before it tried."""
_HOPELESS: Final = (
    pg.InvalidAuthorizationSpecificationError,
    pg.InvalidCatalogNameError,
    pg.InsufficientPrivilegeError,
    pg.DataCorruptedError,
    pg.IndexCorruptedError,
)
_PASSING: Final = (
    pg.ReadOnlySQLTransactionError,
    pg.InternalServerError,
    asyncpg.InternalClientError,
    pg.InterfaceError,
    pg.ProtocolViolationError,
    OSError,
    EOFError,
    pg.PostgresConnectionError,
    pg.OperatorInterventionError,
    pg.InsufficientResourcesError,
    pg.TransactionRollbackError,
    pg.LockNotAvailableError,
    pg.PostgresSystemError,
    pg.InvalidTransactionStateError,
    pg.IdleInTransactionSessionTimeoutError,
    pg.ObjectInUseError,
)


class Deadlines(msgspec.Struct, frozen=True):
    """How long a caller waits for what. A call takes at most a few of them, never longer."""

    connect_ms: int = 5_000
    acquire_ms: int = 5_000
    """For a free connection of the pool, a new one included."""
    command_ms: int = 10_000
    """One statement, the wait for locks included. Longer than idle_transaction_ms."""
    idle_transaction_ms: int = 3_000
    """A transaction whose client says nothing for so long (it was stopped, or its network is gone) is rolled
    back by the server: its locks would hold up every other process."""


def unavailable(error: BaseException, what: str) -> StoreUnavailable | InternalError | UsageError:
    """What an error of asyncpg means to a caller of the port. `what` says which database."""
    text = str(error) or type(error).__name__
    if isinstance(error, _HOPELESS):
        return StoreUnavailable(f"{what}: {text}", temporary=False)
    # An argument that does not fit its column is an InterfaceError and a ValueError.
    if isinstance(error, _PASSING) and not isinstance(error, ValueError):
        return StoreUnavailable(f"{what}: {text}")
    return InternalError(f"{what}: {type(error).__name__}: {text}")


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Nothing but errors of fastim.errors comes out."""
    try:
        yield
    except _SAID as error:
        raise unavailable(error, what) from error


class Database:
    """One database of the cluster. Made by connect()."""

    def __init__(self, number: int, url: str, deadlines: Deadlines, pool_size: int, read_only: bool) -> None:
        self.number = number
        self.read_only = read_only
        self._url = url
        self._deadlines = deadlines
        self._size = pool_size
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self.name = f"database {number}"
        """For messages: never the URL, which may hold a password."""

    async def connect(self) -> None:
        """Make the pool, which connects when it is used. Raises StoreUnavailable, UsageError."""
        late = self._deadlines
        settings = {
            "application_name": "fastim",
            # A plan is made once per statement and connection: planning over partitions costs more than the
            # work. It is made for tables of any size, also on the first day, when they are empty and would
            # be read whole.
            "plan_cache_mode": "force_generic_plan",
            "enable_seqscan": "off",
            "jit": "off",
            "statement_timeout": str(late.command_ms),
            "idle_in_transaction_session_timeout": str(late.idle_transaction_ms),
            "tcp_keepalives_idle": "10",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "3",
        }
        if self.read_only:
            settings["default_transaction_read_only"] = "on"
        with translated(self.name):
            self._pool = await asyncpg.create_pool(
                self._url,
                # With a floor asyncpg restores it in the background, each try a stack trace in the log.
                min_size=0,
                max_size=self._size,
                max_inactive_connection_lifetime=300,
                timeout=late.connect_ms / 1000,
                command_timeout=late.command_ms / 1000,
                max_cached_statement_lifetime=0,
                server_settings=settings,
                init=_durable,
                reset=_nothing_to_reset,
            )

    async def close(self) -> None:
        """Idle connections are closed in peace; what hangs is cut."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            try:
                async with asyncio.timeout(self._deadlines.acquire_ms / 1000):
                    await pool.close()
            except _SAID:
                pool.terminate()

    # ---------------------------------------------------------------------------------------- connections

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        pool = self._pool
        if pool is None:
            raise StoreUnavailable("it is closed", temporary=False)
        try:
            conn = await pool.acquire(timeout=self._deadlines.acquire_ms / 1000)
        except ValueError as error:
            raise UsageError(f"{self.name}: its URL is no PostgreSQL URL: {error}") from error
        except TimeoutError as error:
            if pool.get_idle_size() or pool.get_size() < self._size:
                raise
            raise StoreUnavailable(
                f"{self.name}: all {self._size} connections were in use for "
                f"{self._deadlines.acquire_ms:,} ms (store.pool_size)"
            ) from error
        try:
            yield conn
        except asyncpg.InternalClientError:
            # The server said good-bye between two statements, and asyncpg had not finished reading it.
            conn.terminate()
            raise
        finally:
            # What a broken connection says when it is given back is no news: it is replaced.
            with contextlib.suppress(*_SAID):
                await pool.release(conn, timeout=self._deadlines.connect_ms / 1000)

    async def fetch(self, sql: str, *args: object) -> list[Row]:
        """The rows of one statement, which is a transaction of its own."""
        with translated(self.name):
            async with self._connection() as conn:
                return await conn.fetch(sql, *args)

    async def row(self, sql: str, *args: object) -> Row:
        """Its first row, or None."""
        rows = await self.fetch(sql, *args)
        return rows[0] if rows else None

    async def transact(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work` in a transaction (READ COMMITTED: each statement sees what is committed when it starts).

        Repeated only if it certainly did not happen (D2); so `work` must leave nothing behind when it fails.
        """
        if self.read_only:
            raise UsageError(f"{self.name} was opened read-only")
        tried = 0
        while True:
            tried += 1
            try:
                with translated(self.name):
                    return await self._transact(work)
            except StoreUnavailable as error:
                cause = error.__cause__
                if not isinstance(cause, _Undone) or tried >= TRIES:
                    raise
            await asyncio.sleep(_BACK_OFF_S * tried)

    async def _transact(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._connection() as conn:
            try:
                await conn.execute("BEGIN")
                result = await work(conn)
            except BaseException as error:
                await _roll_back(conn)
                if isinstance(error, _REPEATABLE) or _is_lost(conn, error):
                    raise _Undone(str(error)) from error
                raise
            try:
                await conn.execute("COMMIT")
            except BaseException:
                # Cancelled or late: whether it is committed is the server's secret. A connection that still
                # may be in the transaction must not go back into the pool.
                conn.terminate()
                raise
            return result


class _Undone(OSError):
    """A transaction that did not happen and may be tried again."""


def _is_lost(conn: Connection, error: BaseException) -> bool:
    """A TimeoutError is an OSError too, but who has waited that long is not kept waiting again."""
    if isinstance(error, asyncpg.InterfaceError):
        return conn.is_closed()
    return isinstance(error, _LOST) and not isinstance(error, TimeoutError)


async def _roll_back(conn: Connection) -> None:
    """Leave the transaction; the connection is cut if that is impossible."""
    if conn.is_closed():
        return
    try:
        await conn.execute("ROLLBACK")
    except BaseException as error:
        conn.terminate()
        if not isinstance(error, _SAID):
            raise


async def _durable(conn: Connection) -> None:
    """A commit returns when it is on disk, whatever the server's default is; a stronger one stays."""
    if await conn.fetchval("SHOW synchronous_commit") == "off":
        await conn.execute("SET synchronous_commit = on")


async def _nothing_to_reset(_conn: object) -> None:
    """Sessions are never changed after they began, so giving one back costs no round trip."""


async def gather(calls: Sequence[Awaitable[T]]) -> list[T]:
    """All of them at once. The first error is raised when all have ended: none goes on behind the caller."""
    if len(calls) == 1:
        return [await calls[0]]
    results = await asyncio.gather(*calls, return_exceptions=True)
    found: list[T] = []
    errors = []
    for result in results:
        if isinstance(result, BaseException):
            errors.append(result)
        else:
            found.append(result)
    if errors:
        # A bug is told before an outage.
        raise next((error for error in errors if not isinstance(error, StoreUnavailable)), errors[0])
    return found
