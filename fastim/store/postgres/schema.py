"""The schema of one database, and which database holds which shards.

Placement is recorded where the data are: a database owns the shards that have a row in its table `shard`. An
empty cluster is dealt out evenly (shard s to database s mod N); from then on the order of the URLs means
nothing, a database may be added empty, and a shard moves by moving its rows. Every open checks that each of
the 64 shards is owned exactly once.

Held by tests/contract/test_store_postgres.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from fastim.errors import UsageError
from fastim.store import migrations
from fastim.store.base import SHARDS
from fastim.store.postgres.databases import Database

if TYPE_CHECKING:
    from fastim.store.postgres.databases import Connection

_LOCK: Final = 0x6661_7374_696D
"""Advisory lock of whoever migrates a database."""
_PATIENCE_S: Final = 600.0
"""For a migration, or for whoever else migrates."""
_TABLES: Final = (
    "SELECT c.relname FROM pg_class c WHERE c.relkind IN ('r', 'p') AND c.relnamespace = "
    "(SELECT oid FROM pg_namespace WHERE nspname = current_schema()) ORDER BY 1"
)


async def migrate(database: Database) -> None:
    """Take the schema to the newest version, one process at a time. Raises UsageError."""
    known = migrations.steps("postgres")

    async def work(conn: Connection) -> None:
        await conn.execute("SET LOCAL statement_timeout = 0")
        await conn.execute(f"SELECT pg_advisory_xact_lock({_LOCK})", timeout=_PATIENCE_S)
        version = await _version(conn, database)
        _check(database, version, known[-1].version)
        for step in known[version:]:
            await conn.execute(
                "CREATE TABLE IF NOT EXISTS migration (version INT PRIMARY KEY, name TEXT NOT NULL)"
            )
            await conn.execute(step.sql, timeout=_PATIENCE_S)
            await conn.execute("INSERT INTO migration VALUES ($1, $2)", step.version, step.name)

    await database.transact(work)


async def check(database: Database) -> None:
    """For who only reads. Raises UsageError unless the schema is the newest."""
    newest = migrations.steps("postgres")[-1].version
    tables = {name for (name,) in await database.fetch(_TABLES)}
    if "migration" not in tables:
        raise UsageError(f"{database.name} is no store of fastim")
    row = await database.row("SELECT coalesce(max(version), 0) FROM migration")
    _check(database, row[0], newest, oldest=newest)


async def _version(conn: Connection, database: Database) -> int:
    tables = [name for (name,) in await conn.fetch(_TABLES)]
    if "migration" in tables:
        return int(await conn.fetchval("SELECT coalesce(max(version), 0) FROM migration"))
    if tables:
        raise UsageError(f"{database.name} is no store of fastim: it holds {', '.join(tables)}")
    return 0


def _check(database: Database, version: int, newest: int, oldest: int = 0) -> None:
    if version > newest:
        raise UsageError(
            f"{database.name} was written by a newer fastim: its schema is version {version}, "
            f"this program knows up to {newest}"
        )
    if version < oldest:
        raise UsageError(
            f"{database.name} has schema version {version}, this program reads {oldest}; "
            "start a dispatcher once to migrate it"
        )


async def place(databases: Sequence[Database], *, deal: bool) -> list[Database]:
    """The database of each shard. deal: give the shards of an empty cluster out. Raises UsageError."""
    owned = [await _owned(database) for database in databases]
    if deal:
        count = len(databases)
        for number, database in enumerate(databases):
            wanted = range(number, SHARDS, count)
            if not owned[number] and set().union(*owned).isdisjoint(wanted):
                await database.transact(partial(_own, shards=list(wanted)))
                owned[number] = await _owned(database)
    owners: list[list[Database]] = [[] for _ in range(SHARDS)]
    for database, shards in zip(databases, owned, strict=True):
        for shard in shards:
            owners[shard].append(database)
    missing = [shard for shard in range(SHARDS) if not owners[shard]]
    if missing:
        raise UsageError(f"no database of {len(databases)} owns the shards {_list(missing)}")
    doubled = [shard for shard in range(SHARDS) if len(owners[shard]) > 1]
    if doubled:
        both = ", ".join(database.name for database in owners[doubled[0]])
        raise UsageError(f"the shards {_list(doubled)} are owned more than once ({both})")
    return [found[0] for found in owners]


async def _owned(database: Database) -> set[int]:
    return {shard for (shard,) in await database.fetch("SELECT shard FROM shard")}


async def _own(conn: Connection, shards: list[int]) -> None:
    await conn.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")
    if not await conn.fetchval("SELECT count(*) FROM shard"):
        for table in ("shard", "projection"):
            await conn.execute(f"INSERT INTO {table} (shard) SELECT unnest($1::smallint[])", shards)


def _list(shards: list[int]) -> str:
    return ", ".join(map(str, shards))
