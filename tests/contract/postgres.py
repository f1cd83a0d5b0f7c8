"""Databases for the tests of the cluster's store: two of their own per session, emptied for each test."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest


def database_url(server: str, name: str) -> str:
    return urlunsplit(urlsplit(server)._replace(path=f"/{name}"))


async def execute(url: str, *statements: str) -> None:
    conn = await asyncpg.connect(url)
    try:
        for statement in statements:
            await conn.execute(statement)
    finally:
        await conn.close()


async def wipe(urls: Sequence[str]) -> None:
    """Empty every table; the schema and the placement of shards stay."""
    for url in urls:
        conn = await asyncpg.connect(url)
        try:
            tables = [
                name
                for (name,) in await conn.fetch(
                    "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND NOT relispartition"
                    " AND relnamespace = 'public'::regnamespace"
                )
            ]
            if "migration" in tables:
                kept = ("migration", "shard", "projection", "mark")
                await conn.execute(
                    ";".join(
                        [f"DELETE FROM {name}" for name in tables if name not in kept]
                        + [
                            "UPDATE shard SET last = 0, newest = 0, ahead_ms = 0, turn = 0",
                            "UPDATE projection SET upto = 0",
                            "UPDATE mark SET value = 0",
                        ]
                    )
                )
        finally:
            await conn.close()


async def drop(urls: Sequence[str]) -> None:
    """Back to databases without any table."""
    for url in urls:
        await execute(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")


@pytest.fixture(scope="session")
def store_urls(postgres: str) -> Iterator[list[str]]:
    """Two empty databases on the session's server."""
    names = [f"store_{secrets.token_hex(4)}_{number}" for number in (1, 2)]
    asyncio.run(execute(postgres, *(f"CREATE DATABASE {name}" for name in names)))
    yield [database_url(postgres, name) for name in names]
    asyncio.run(execute(postgres, *(f"DROP DATABASE {name} WITH (FORCE)" for name in names)))


@pytest.fixture
def urls(store_urls: list[str]) -> list[str]:
    """Two databases with nothing in them."""
    asyncio.run(wipe(store_urls))
    return store_urls
