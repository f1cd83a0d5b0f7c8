"""Errors of the store: commits, ids, cursors, due rows, pushes."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import msgspec

from fastim import model
from fastim.store.sqlite import SqliteStore, files
from fastim.store.sqlite.duties import Duties
from fastim.store.sqlite.minting import MS_SHIFT, Minter
from fastim.store.sqlite.names import Names
from fastim.store.sqlite.push import PushBox
from fastim.store.sqlite.tail import Tail
from fastim.store.sqlite.timeline import Timeline
from fastim.store.sqlite.writer import Writer
from tests.simulation.planted.stage import (
    GONE,
    A,
    B,
    does_nothing,
    from_a,
    patch,
    planted,
    stage,
    when,
)
from tests.simulation.scenario import FaultPlan


@planted(
    "synchronous=NORMAL",
    ("loss",),
    1,
    stage(sends=(from_a(5.0),), triggers=(when("a/d0 shows", 1, "power"),)),
)
def _(stack: ExitStack) -> None:
    """A commit does not wait for the disk: the power goes, and what was accepted is gone."""
    open_writer = files.open_writer
    patch(stack, files, "open_writer", lambda directory, vfs, _: open_writer(directory, vfs, "NORMAL"))


@planted(
    "answered before the commit",
    ("loss",),
    1,
    stage(sends=(from_a(5.0),), triggers=(when("a/d0 shows", 1, "crash"),)),
)
def _(stack: ExitStack) -> None:
    """The result of a call is given while its transaction is still open; the commit comes a moment later."""
    run = files.Sql.run

    def late_commit(self: Any, sql: str, args: Any = ()) -> None:
        if sql != "COMMIT":
            run(self, sql, args)

    async def turn(self: Any) -> None:
        try:
            while self._queue:
                for call in await self._run(self._group):
                    call.deliver()
                await asyncio.sleep(0.03)
                await self._run(lambda: run(self.sql, "COMMIT") if self.sql.db.in_transaction else None)
        finally:
            self._task = None

    patch(stack, Writer, "_turn", turn)
    patch(stack, files.Sql, "run", late_commit)


@planted(
    "idempotency forgotten",
    ("duplicate", "error"),
    1,
    stage(FaultPlan(5.005, "cut", 0.0, A), sends=(from_a(5.0),)),
)
def _(stack: ExitStack) -> None:
    """A client_id is known for one second: whoever repeats later has sent a new message."""
    append = SqliteStore.append

    async def forgetful(self: Any, frames: Any, now_ms: int) -> Any:
        known = self.__dict__.setdefault("planted_known", {})

        def forget(item: Any) -> Any:
            if now_ms - known.setdefault(item.client_id, now_ms) <= 1_000:
                return item
            return msgspec.structs.replace(item, client_id=now_ms.to_bytes(16, "big"))

        changed = [msgspec.structs.replace(f, items=tuple(map(forget, f.items))) for f in frames]
        return await append(self, changed, now_ms)

    patch(stack, SqliteStore, "append", forgetful)


@planted(
    "seq hole",
    ("loss",),
    1,
    stage(FaultPlan(4.9, "disk_full", 0.5), sends=(from_a(4.0), from_a(5.0))),
)
def _(stack: ExitStack) -> None:
    """A seq that was given in a transaction that failed is not given again."""
    undo = Timeline.undo

    def keep_heads(self: Any, touched: int) -> None:
        self._touched.clear()
        undo(self, touched)

    patch(stack, Timeline, "undo", keep_heads)
    patch(stack, Names, "forget", does_nothing)


@planted(
    "ids follow the clock",
    ("order", "duplicate"),
    1,
    stage(FaultPlan(5.0, "clock_jump", number=1), sends=(from_a(4.0), from_a(6.0))),
)
def _(stack: ExitStack) -> None:
    """msg_id is the time, whatever was given before."""
    patch(stack, Minter, "advance", lambda self, now_ms: ((now_ms - model.EPOCH_MS) << MS_SHIFT) - 1)


@planted(
    "a crash hides what was not projected",
    ("loss", "ledger"),
    1,
    stage(
        FaultPlan(2.0, "cut", 0.0, B),
        FaultPlan(7.0, "crash"),
        sends=(from_a(5.0),),
        offline=(2.0, 10.0),
    ),
)
def _(stack: ExitStack) -> None:
    """The change index is read after a start as the projection left it; its tail is forgotten."""
    patch(stack, Tail, "load", does_nothing)


@planted(
    "due row nobody clears",
    ("settle",),
    1,
    stage(sends=(from_a(5.0),), offline=(4.0, 10.0)),
)
def _(stack: ExitStack) -> None:
    """A due row is fired without asking whether anything is open, and a park of nothing leaves it."""
    patch(stack, Duties, "_clear", lambda self, *_args, **_kwargs: True)
    patch(stack, Duties, "_end_due", does_nothing)


@planted(
    "collapsed push dropped",
    ("push",),
    2,
    stage(sends=(from_a(5.0), from_a(9.0)), offline=(2.0, GONE)),
)
def _(stack: ExitStack) -> None:
    """A push inside the collapse window of the last one is dropped instead of waiting for its end."""
    ask = PushBox.ask

    def ask_or_drop(self: Any, pair: int, park: Any, now_ms: int) -> None:
        if self._sql.row("SELECT 1 FROM push WHERE pair = ?", (pair,)) is None:
            ask(self, pair, park, now_ms)

    patch(stack, PushBox, "ask", ask_or_drop)
