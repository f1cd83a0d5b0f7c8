"""The embedded store keeps the store contract; and what only it promises."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastim.store.base import MessageStore
from fastim.store.sqlite import SqliteStore
from fastim.store.sqlite.writer import Writer
from tests.contract.store import StoreContract
from tests.simulation.disk import ram_directory


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
