"""One PostgreSQL database of the store."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Final

import asyncpg

from fastim.app.doctor.report import DEADLINE_S, Finding, skew
from fastim.config import Config
from fastim.store import migrations

_LEAST_VERSION: Final = 15
_SPARE: Final = 10
"""Connections for people and for processes that come and go in a rolling restart."""


async def examine_postgres(config: Config, number: int, url: str) -> AsyncIterator[Finding]:
    """Version, durability, connections, schema, clock."""
    subject = f"store {number}"
    conn = await asyncpg.connect(url, timeout=DEADLINE_S, command_timeout=DEADLINE_S)
    try:
        numeric = int(await conn.fetchval("SHOW server_version_num"))
        version = await conn.fetchval("SHOW server_version")
        database = await conn.fetchval("SELECT current_database()")
        name = f"PostgreSQL {str(version).split()[0]} answers, database {database}"
        good = numeric // 10_000 >= _LEAST_VERSION
        yield Finding(
            good, subject, name if good else f"{name}; fastim is made for {_LEAST_VERSION} and above"
        )
        if await conn.fetchval("SELECT pg_is_in_recovery()"):
            yield Finding(False, subject, "it is a standby and only reads; store.url must name the primary")
        off = [name for name in ("fsync", "full_page_writes") if await conn.fetchval(f"SHOW {name}") == "off"]
        if off:
            yield Finding(
                False, subject, f"{' and '.join(off)} off: a power cut would lose what was accepted; set on"
            )
        else:
            commit = await conn.fetchval("SHOW synchronous_commit")
            yield Finding(
                True, subject, f"fsync on, synchronous_commit {commit} (off counts as on for fastim)"
            )
        async for finding in _connections(conn, subject, config.store.pool_size):
            yield finding
        yield await _schema(conn, subject)
        asked_ms = time.time() * 1000
        server_s = await conn.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        yield skew(subject, server_s * 1000, asked_ms, time.time() * 1000)
    finally:
        await conn.close(timeout=1.0)


async def _connections(
    conn: asyncpg.Connection[asyncpg.Record], subject: str, pool_size: int
) -> AsyncIterator[Finding]:
    most = int(await conn.fetchval("SHOW max_connections"))
    used = int(
        await conn.fetchval("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
    )
    text = f"{used:,} of {most:,} connections in use, up to {pool_size} for each process (store.pool_size)"
    if used + pool_size + _SPARE > most:
        yield Finding(False, subject, f"{text}: no room for one more process; raise max_connections")
    else:
        yield Finding(True, subject, text)


async def _schema(conn: asyncpg.Connection[asyncpg.Record], subject: str) -> Finding:
    newest = migrations.steps("postgres")[-1].version
    if await conn.fetchval("SELECT to_regclass('migration')") is None:
        return Finding(True, subject, "no schema yet: the first process that starts makes it")
    version = int(await conn.fetchval("SELECT coalesce(max(version), 0) FROM migration"))
    if version > newest:
        return Finding(False, subject, f"schema {version}, from a newer fastim; this one knows {newest}")
    if version < newest:
        return Finding(True, subject, f"schema {version}: the next start takes it to {newest}")
    shards = await conn.fetchval("SELECT count(*) FROM shard")
    return Finding(True, subject, f"schema {version}, {shards} of 64 shards")
