"""Errors of the node: delivery, flush, catching up, sessions."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import ExitStack
from typing import Any

import msgspec

from fastim import model
from fastim.errors import PresenceUnavailable, StoreUnavailable
from fastim.node.catchup import Catchup
from fastim.node.delivery import Delivery
from fastim.node.flush import Flusher
from fastim.node.handshake import Handshake
from fastim.node.service import Node
from fastim.node.session import Session
from fastim.store.base import FlushResult
from fastim.store.sqlite import SqliteStore
from tests.simulation.network import SimHub
from tests.simulation.planted.stage import (
    GONE,
    B,
    cut_before_it_reads,
    does_nothing,
    from_a,
    from_b,
    patch,
    planted,
    stage,
    when,
)
from tests.simulation.scenario import FaultPlan


@planted(
    "settled before the flush",
    ("ledger", "loss"),
    1,
    stage(
        FaultPlan(5.1, "disk_full", 2.9),
        FaultPlan(8.45, "crash"),
        sends=(from_a(5.0),),
        offline=(8.4, GONE),
        slow_s=0.3,
    ),
)
def _(stack: ExitStack) -> None:
    """An inbox record is settled first and its next step made durable afterwards."""
    commit = Flusher._commit_pending

    async def commit_pending(self: Any) -> None:
        hand = self._pending
        for entry in hand.entries:
            entry.holds -= 1
            if entry.holds == 0 and self.reader is not None:
                self.reader.settle(entry.record)
        hand.entries = []
        await commit(self)

    patch(stack, Flusher, "_commit_pending", commit_pending)


@planted(
    "a failed flush is forgotten",
    ("ledger", "loss"),
    2,
    stage(
        FaultPlan(5.2, "disk_full", 1.0),
        FaultPlan(5.3, "cut", 0.0, B),
        sends=(from_a(5.0),),
        offline=(5.3, GONE),
        slow_s=2.0,
    ),
)
def _(stack: ExitStack) -> None:
    """The disk was full for a moment: the rows of that flush are gone, its records are settled."""
    flush = SqliteStore.flush

    async def once(self: Any, wanted: Any) -> FlushResult:
        try:
            return await flush(self, wanted)
        except StoreUnavailable:
            return FlushResult(())

    patch(stack, SqliteStore, "flush", once)


@planted(
    "due row lost",
    ("ledger", "loss"),
    1,
    cut_before_it_reads(),
)
def _(stack: ExitStack) -> None:
    """A connection that goes away leaves no due rows for what was under way."""

    def release_all(self: Any, session: Any, parcels: Any, *_args: Any, **_kwargs: Any) -> dict[str, int]:
        for parcel in parcels:
            if parcel.entry is not None:
                self._flusher.release(parcel.entry)
                parcel.entry = None
        return {}

    patch(stack, Delivery, "_move", release_all)


@planted(
    "settled against a row that is gone",
    ("ledger", "loss"),
    1,
    stage(sends=(from_a(3.0), from_a(95.0)), acks=False, end_s=100.0),
)
def _(stack: ExitStack) -> None:
    """A conversation that is behind already has its due row, so none is asked for: the row may be gone."""
    deliver = Delivery._deliver

    def trusting(self: Any, entry: Any, found: Any, wall_ms: int, mono_ms: int) -> None:
        ask = self._flusher.ask_due

        def unless_behind(user: str, conv: str, *args: Any, **kwargs: Any) -> None:
            sessions = self._pool.of_user(user).values()
            if not any(conv in session.behind for session in sessions if session.link is not None):
                ask(user, conv, *args, **kwargs)

        self._flusher.ask_due = unless_behind
        try:
            deliver(self, entry, found, wall_ms, mono_ms)
        finally:
            del self._flusher.ask_due

    patch(stack, Delivery, "_deliver", trusting)


@planted(
    "cursor moved before the ack",
    ("ledger", "loss"),
    1,
    cut_before_it_reads(),
)
def _(stack: ExitStack) -> None:
    """What was written counts as acknowledged."""
    write = Delivery._write

    def write_and_settle(self: Any, entry: Any, session: Any, found: Any, own: bool, mono_ms: int) -> None:
        write(self, entry, session, found, own, mono_ms)
        self._flusher.settled(self._acks.items(session.ack_slot)[-1][1])
        self._flusher.wake()

    patch(stack, Delivery, "_write", write_and_settle)


@planted(
    "race B",
    ("loss", "ledger"),
    2,
    stage(sends=(from_a(8.5),), offline=(4.0, 8.0)),
)
def _(stack: ExitStack) -> None:
    """Attached after the sync instead of before: what is routed in between is parked and never seen."""
    register = Handshake.register

    async def late(self: Any, session: Any) -> None:
        async def attach() -> None:
            await asyncio.sleep(1.0)
            if session.link is not None:
                with contextlib.suppress(PresenceUnavailable):
                    await register(self, session)

        self._spawn(attach(), "late attach")

    patch(stack, Handshake, "register", late)


@planted(
    "accepted before the first lease",
    ("loss", "ledger"),
    1,
    stage(
        FaultPlan(4.9, "cut", 0.0, B),
        FaultPlan(5.0, "presence_away", 3.0),
        sends=(from_a(10.0),),
    ),
)
def _(stack: ExitStack) -> None:
    """A session whose attach failed is served all the same."""
    for step in ("_check_devices", "register"):
        inner = getattr(Handshake, step)

        async def careless(self: Any, *args: Any, inner: Any = inner) -> None:
            with contextlib.suppress(PresenceUnavailable):
                await inner(self, *args)

        patch(stack, Handshake, step, careless)


@planted(
    "no sync after a new registration",
    ("loss", "ledger"),
    1,
    stage(FaultPlan(5.0, "presence_flush"), sends=(from_a(5.1),)),
)
def _(stack: ExitStack) -> None:
    """Presence was flushed, the sessions attach again, and nobody looks for what was parked meanwhile."""

    async def only_attach(self: Any, session: Any) -> None:
        if session.link is not None:
            await self.handshake.register(session)

    patch(stack, Node, "_register_again", only_attach)


@planted(
    "LEVEL before its messages",
    ("loss", "ledger"),
    2,
    stage(
        sends=(from_a(3.0, 30),),
        triggers=(when("b/d0 is level", 2, "crash", 0.2),),
        offline=(2.0, 8.0),
        slow_s=0.4,
    ),
)
def _(stack: ExitStack) -> None:
    """The sync is told done when its pages are read; who resumes from there misses what was not streamed."""
    finish = Catchup._finish

    def early(self: Any, session: Any, sync: Any) -> None:
        sync.waiting.clear()
        finish(self, session, sync)

    patch(stack, Catchup, "_finish", early)


@planted(
    "silent peers stay",
    ("settle",),
    1,
    stage(FaultPlan(4.9, "half_open", 0.0, B), offline=(5.0, GONE)),
)
def _(stack: ExitStack) -> None:
    """A connection whose peer is gone without a word is neither swept nor taken for half-open."""
    patch(stack, SimHub, "link_at", lambda self, slot: None)
    patch(stack, Delivery, "_late", does_nothing)


@planted(
    "a resume is believed",
    ("ledger", "loss"),
    2,
    stage(
        sends=(from_a(3.0, 3),),
        triggers=(when("b/d0 is level", 2, "crash"),),
        offline=(2.0, 9.0),
    ),
)
def _(stack: ExitStack) -> None:
    """A sync begins where the client says, though the acks behind its word died with the last process."""
    register = SqliteStore.register_device

    async def trusting(self: Any, *args: Any) -> Any:
        return msgspec.structs.replace(await register(self, *args), level=model.MAX_SAFE_INT)

    patch(stack, SqliteStore, "register_device", trusting)


@planted(
    "window overrun",
    ("error",),
    1,
    stage(sends=(from_a(3.0, 200),), acks=False),
)
def _(stack: ExitStack) -> None:
    """There is always room."""
    patch(stack, Delivery, "has_room", lambda self, session, more_bytes=0: session.link is not None)


@planted(
    "written before HELLO",
    ("error",),
    1,
    stage(
        FaultPlan(4.95, "disk_full", 2.0),
        FaultPlan(5.0, "slow_presence", 4.0, number=40),
        FaultPlan(5.05, "cut", 0.0, B),
        sends=(from_b(5.0),),
    ),
)
def _(stack: ExitStack) -> None:
    """A reply that comes while its session resumes is written at once."""
    patch(stack, Session, "open_link", property(lambda self: self.link))
