"""Every statement of the cluster's store finds its rows by an index.

The tables are filled until reading one whole costs more than a few look-ups, and the planner is left to its
own judgement: the setting by which the store helps it (no sequential scans) is off. A second time the tables
are empty and that setting is on: what a connection plans on the first day it keeps.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import pkgutil
import re
import secrets
from collections.abc import Iterator
from typing import Any, Final

import asyncpg
import pytest

import fastim.store.postgres
from fastim.store.base import shard_of
from fastim.store.postgres import PostgresStore, projection
from tests.contract.postgres import database_url, execute

SMALL: Final = {"shard", "projection", "mark", "migration"}
"""At most a row per shard."""
ASKED_WHOLE: Final = {"people.OPEN_BOOTS"}
"""A row per node that runs."""
NOBODYS: Final = {"shard_pkey", "projection_pkey", "mark_pkey"}
"""Whether tables that small are read by index is the planner's."""
WHOLE: Final = {"due_ready", "push_ready", "push_idle"}
"""Indexes whose beginning is what is asked for."""
CONVS, MESSAGES, USERS = 30_000, 4, 2_000


def statements() -> dict[str, str]:
    """Every statement that the package holds, by module and name."""
    found = {}
    for info in pkgutil.iter_modules(fastim.store.postgres.__path__):
        module = importlib.import_module(f"fastim.store.postgres.{info.name}")
        for name, value in vars(module).items():
            if not isinstance(value, str) or not name.isupper() or name.startswith("_"):
                continue
            if re.match(r"(SELECT|INSERT|UPDATE|DELETE|WITH) ", value) and value not in found.values():
                found[f"{info.name}.{name}"] = value.replace("{columns}", "m.conv, m.seq")
    return found


@pytest.fixture(scope="module")
def database(postgres: str) -> Iterator[str]:
    name = f"plans_{secrets.token_hex(4)}"
    asyncio.run(execute(postgres, f"CREATE DATABASE {name}"))
    yield database_url(postgres, name)
    asyncio.run(execute(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


async def fill(conn: asyncpg.Connection) -> None:
    """Conversations of two people each, everybody in about thirty."""
    convs, messages, users, fates, members = [], [], [], [], []
    for number in range(CONVS):
        group = number % 4 == 0
        people = (f"u{number % USERS:05d}", f"u{(number * 7 + 1) % USERS:05d}x")
        conv = f"g:{number}" if group else f"p:{min(people)}:{max(people)}x{number}"
        shard = shard_of(conv)
        convs.append((shard, conv, 1))
        for place, user in enumerate(people):
            users.append((shard, conv, user, number * 100, MESSAGES, MESSAGES))
            fates.append((shard, conv, user, "phone", 1, 2, 1, "n1", 0, number))
            if group:
                members.append((shard, conv, place, user, 1, 1, 0))
        for seq in range(1, MESSAGES + 1):
            msg_id = (number * MESSAGES + seq) << 12 | shard << 6
            client_id = msg_id.to_bytes(16, "big")
            messages.append(
                (shard, msg_id, conv, seq, seq, people[seq % 2], client_id, 1, 0, True, seq == 2, seq, 0,
                 b"content!", "x" if seq == 3 else None, b"y" * 64)
            )  # fmt: skip
    tables: dict[str, tuple[list[Any], str]] = {
        "conv": (convs, "shard conv epoch"),
        "member": (members, "shard conv number user_id role join_seq leave_seq"),
        "message": (
            messages,
            "shard msg_id conv seq cseq sender client_id kind flags countable recalled ts_ms loss_time_ms"
            " content mentions body",
        ),
        "user_conv": (users, "shard conv user_id version head cseq"),
        "cursor": ([(*row[:3], "phone", 5) for row in users], "shard conv user_id device seq"),
        "fate": (fates, "shard conv user_id device from_seq to_seq fate node attempt ts_ms"),
        "due": (
            [(*row[:3], 1, row[3], row[3], 0) for row in users],
            "shard conv user_id from_seq due_at_ms ready_ms attempt",
        ),
        "push": (
            [(*row[:3], 1, None if n % 2 else n, n, 1) for n, row in enumerate(users)],
            "shard conv user_id serial ready_ms idle_ms collapse_ms",
        ),
        "device": (
            [(shard_of(user), user, "phone", "app", 1, 1) for user in {row[2] for row in users}],
            "shard user_id device class first_seen_ms last_seen_ms",
        ),
        "boot": ([(shard_of(f"n{n}"), f"n{n}", 1) for n in range(5_000)], "shard node boot"),
        "open_boot": ([(shard_of(f"n{n}"), f"n{n}", 1) for n in range(5_000)], "shard node boot"),
        "fence": (
            [(shard_of(f"n{n}"), f"n{n}", 1, "d", 1) for n in range(5_000)],
            "shard node boot holder claim_until_ms",
        ),
    }
    for table, (rows, columns) in tables.items():
        await conn.copy_records_to_table(table, records=rows, columns=columns.split())
    await conn.execute("ANALYZE")


class Plans:
    """EXPLAIN of generic plans on one connection."""

    def __init__(self, conn: asyncpg.Connection) -> None:
        self._conn = conn
        self._parents: dict[str, str] = {}

    async def prepare(self) -> None:
        """Partitions are not pruned, so that a plan shows the way into each."""
        await self._conn.execute(
            "SET plan_cache_mode = force_generic_plan; SET enable_partition_pruning = off; SET jit = off"
        )
        children = await self._conn.fetch(
            "SELECT c.relname, p.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
            " JOIN pg_class p ON p.oid = i.inhparent"
        )
        self._parents = dict(map(tuple, children))

    async def faults(self, sql: str) -> tuple[list[str], set[str]]:
        """What is wrong with the plan of a statement, and the indexes that it uses."""
        async with self._conn.transaction():
            if sql == projection.PROJECT:
                await self._conn.execute(projection.SETTINGS)
            return await self._faults(sql)

    async def _faults(self, sql: str) -> tuple[list[str], set[str]]:
        await self._conn.execute(f"PREPARE one AS {sql}")
        count = max([int(number) for number in re.findall(r"\$(\d+)", sql)], default=0)
        arguments = f"({', '.join(['NULL'] * count)})" if count else ""
        ((text,),) = await self._conn.fetch(f"EXPLAIN (FORMAT JSON) EXECUTE one{arguments}")
        await self._conn.execute("DEALLOCATE one")
        wrong: list[str] = []
        indexes: set[str] = set()
        self._walk(json.loads(text)[0]["Plan"], wrong, indexes)
        return sorted(set(wrong)), indexes

    def _walk(self, node: dict[str, Any], wrong: list[str], indexes: set[str]) -> None:
        kind = node["Node Type"]
        if kind == "Seq Scan":
            table = self._parents.get(node["Relation Name"], node["Relation Name"])
            if table not in SMALL:
                wrong.append(f"reads {table} whole")
        if "Index Name" in node:
            index = self._parents.get(node["Index Name"], node["Index Name"])
            indexes.add(index)
            if "Index Cond" not in node and index not in WHOLE and index.removesuffix("_pkey") not in SMALL:
                wrong.append(f"reads {index} whole")
        for child in node.get("Plans", ()):
            self._walk(child, wrong, indexes)


async def explain(url: str, *, filled: bool) -> dict[str, tuple[list[str], set[str]]]:
    store = await PostgresStore.open([url])
    await store.close()
    conn = await asyncpg.connect(url)
    try:
        if filled:
            await fill(conn)
        else:
            await conn.execute("SET enable_seqscan = off")
        plans = Plans(conn)
        await plans.prepare()
        return {name: await plans.faults(sql) for name, sql in statements().items()}
    finally:
        await conn.close()


EXPECTED: Final[dict[str, set[str]]] = {
    "duties.SETTLE": {"conv_pkey", "cursor_pkey", "message_seq"},
    "duties.EXISTING": {"conv_pkey"},
    "duties.LOCK_DUE": {"due_pkey"},
    "duties.READY_DUE": {"due_ready"},
    "duties.CHANGE_DUE": {"due_pkey"},
    "duties.CLEAR_DUE": {"due_pkey"},
    "duties.NEXT_DUE": {"due_ready"},
    "ledger.OPEN_RANGES": {"message_pkey"},
    "ledger.SPANS_OF": {"member_pkey"},
    "ledger.FATES_OF": {"fate_pkey"},
    "ledger.DUE_OF": {"due_pkey"},
    "ledger.CURSORS_OF": {"cursor_pkey"},
    "lists.VERSION": {"user_conv_version"},
    "lists.BEHIND": {"conv_pkey", "cursor_pkey", "user_conv_version"},
    "lists.CONVERSATIONS": {
        "conv_pkey",
        "cursor_pkey",
        "member_user",
        "message_mention",
        "message_recalled",
        "message_seq",
        "user_conv_version",
    },
    "lists.UNREAD": {"member_user", "message_recalled", "message_seq", "user_conv_version"},
    "lists.BADGES": {"member_user", "message_recalled", "message_seq", "user_conv_version"},
    "lists.RECOUNT": {"member_user", "message_recalled", "message_seq", "user_conv_version"},
    "order.PAGE": {"message_pkey"},
    "owed.OPEN": {"cursor_pkey", "fate_pkey", "member_user", "message_seq"},
    "owed.OWED": {"cursor_pkey", "fate_pkey", "member_user", "message_seq"},
    "people.ALL_MEMBERS": {"member_pkey"},
    "people.DEVICES": {"device_pkey"},
    "people.SEE_DEVICE": {"device_pkey"},
    "people.WHO_IS_KNOWN": {"device_pkey"},
    "people.START_CURSORS": {"cursor_pkey", "user_conv_version"},
    "people.RAISE_LEVELS": {"device_pkey"},
    "people.END_BOOT": {"open_boot_pkey"},
    "people.FENCED": {"fence_pkey"},
    "projection.PROJECT": {"message_pkey", "user_conv_pkey"},
    "push.LOCK_PUSH": {"push_pkey"},
    "push.CHANGE_PUSH": {"push_pkey"},
    "push.FORGET_IDLE": {"push_idle", "push_pkey"},
    "push.READY_PUSH": {"push_ready"},
    "push.PENDING": {"cursor_pkey", "fate_pkey", "member_user", "message_pkey", "message_seq"},
    "push.NEXT_PUSH": {"push_ready"},
    "rows.SPANS": {"member_user"},
    "rows.STREAM": {"conv_pkey", "message_seq"},
    "rows.POSITION": {"conv_pkey", "cursor_pkey", "message_seq"},
    "rows.SEQ_AT": {"message_seq"},
    "rows.RISING": {"conv_pkey", "message_seq"},
    "rows.FALLING": {"conv_pkey", "message_seq"},
    "rows.BY_ID": {"conv_pkey", "message_pkey"},
    "rows.BY_ID_ANYWHERE": {"conv_pkey", "message_pkey"},
    "rows.BY_CLIENT": {"conv_pkey", "message_client"},
    "rows.BY_CLIENT_AND_SENDER": {"conv_pkey", "message_client"},
    "store.LIVE": {"member_user", "message_recalled", "message_seq", "user_conv_pkey"},
    "store.MOVE_MARKS": {"message_seq", "user_conv_pkey"},
    "timeline.HEADS": {"conv_pkey", "message_seq"},
    "timeline.MEMBERS": {"member_pkey"},
    "timeline.KNOWN": {"message_client"},
}
"""The indexes of each plan. What is not named inserts, or reads only tables of a row per shard."""


async def test_on_empty_tables_every_plan_is_by_index(database: str) -> None:
    found = await explain(database, filled=False)
    assert {name: wrong for name, (wrong, _) in found.items() if wrong and name not in ASKED_WHOLE} == {}


async def test_on_full_tables_the_planner_itself_chooses_the_indexes(database: str) -> None:
    found = await explain(database, filled=True)
    assert {name: wrong for name, (wrong, _) in found.items() if wrong and name not in ASKED_WHOLE} == {}
    used = {name: indexes - NOBODYS for name, (_, indexes) in found.items()}
    assert {name: indexes for name, indexes in used.items() if indexes} == EXPECTED
