"""Errors of dispatch: routing, recovery, the settled mark."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastim import model
from fastim.bus.memory import MemoryBus, MemoryReader
from fastim.dispatch import push, router
from fastim.dispatch.router import Router
from fastim.dispatch.settled import SettledMark
from fastim.dispatch.worker import SubmitWorker
from fastim.presence.base import NOWHERE
from fastim.store import rules
from fastim.store.sqlite import fates
from tests.simulation.planted.stage import (
    GONE,
    B,
    dead_then_killed,
    does_nothing,
    from_a,
    from_b,
    patch,
    planted,
    stage,
)
from tests.simulation.scenario import FaultPlan


@planted(
    "stale presence",
    ("loss", "ledger", "settle", "push"),
    2,
    stage(sends=(from_a(2.5), from_a(8.0)), offline=(1.5, 4.0)),
)
def _(stack: ExitStack) -> None:
    """The answer of the first look-up is used for ever."""
    locate = Router.locate

    async def remembered(self: Any, users: Any) -> Any:
        known = self.__dict__.setdefault("planted_known", {})
        users = list(users)
        missing = [user for user in users if user not in known]
        if missing:
            found = await locate(self, missing)
            if found is None:
                return None
            known.update({user: found.get(user, NOWHERE) for user in missing})
        return {user: known[user] for user in users}

    patch(stack, Router, "locate", remembered)


@planted(
    "presence away is offline",
    ("loss", "ledger"),
    1,
    stage(FaultPlan(5.0, "presence_away", 2.0), sends=(from_a(5.5),)),
)
def _(stack: ExitStack) -> None:
    """Presence does not answer: everybody is taken for offline, parked and forgotten."""
    locate = Router.locate

    async def nobody(self: Any, users: Any) -> Any:
        return await locate(self, users) or {}

    patch(stack, Router, "locate", nobody)


@planted(
    "nobody recovers",
    ("ledger", "loss"),
    1,
    dead_then_killed(6.5),
)
def _(stack: ExitStack) -> None:
    """After a crash nobody takes up what lay above the settled mark."""

    async def recover(self: Any) -> bool:
        head = await self._store.head_msg_id()
        if head:
            await self._store.settle(head)
        self._reached = self._stored = self._position = head
        return bool(head)

    patch(stack, SettledMark, "recover", recover)


@planted(
    "mark moves with the publish",
    ("ledger", "loss"),
    1,
    dead_then_killed(7.5),
)
def _(stack: ExitStack) -> None:
    """The settled mark follows what the inboxes were given, not what they have settled."""
    patch(stack, MemoryBus, "committed", lambda self, topic, group: self.published(topic))


@planted(
    "committed before the routing is durable",
    ("ledger", "loss"),
    1,
    stage(
        FaultPlan(5.0, "slow_presence", 4.0, number=40),
        FaultPlan(6.3, "crash"),
        sends=(from_a(5.5),),
        offline=(2.0, GONE),
    ),
)
def _(stack: ExitStack) -> None:
    """A batch counts as routed once it is appended."""
    append = SubmitWorker._append

    async def append_and_count(self: Any, work: Any) -> None:
        await append(self, work)
        ids = [item.msg_id for one in work if one.result is not None for item in one.result.items]
        if any(ids):
            self._mark.routed(max(ids), ())

    patch(stack, SubmitWorker, "_append", append_and_count)


@planted(
    "auto-commit",
    ("ledger", "loss"),
    1,
    dead_then_killed(7.5),
)
def _(stack: ExitStack) -> None:
    """Records count as settled when they are read."""
    read, settle = MemoryReader.read, MemoryReader.settle

    async def read_and_settle(self: Any, max_records: int) -> Any:
        records = await read(self, max_records)
        for record in records:
            settle(self, record)
        return records

    patch(stack, MemoryReader, "read", read_and_settle)
    patch(stack, MemoryReader, "settle", does_nothing)
    patch(stack, MemoryReader, "settle_all", does_nothing)


@planted(
    "dropped when the user is elsewhere",
    ("ledger", "loss"),
    1,
    stage(FaultPlan(2.0, "cut", 0.0, B), sends=(from_a(5.0),), offline=(2.0, GONE)),
)
def _(stack: ExitStack) -> None:
    """Nobody is attached: the message is not parked, it is dropped."""
    patch(stack, router.Plan, "park", does_nothing)


@planted(
    "now > 0 expires",
    ("expiry", "loss", "settle"),
    2,
    stage(sends=(from_a(5.0),), offline=(4.0, 8.0)),
)
def _(stack: ExitStack) -> None:
    """A deadline of 0 is compared like any other."""

    def wrong(loss_time_ms: int, wall_ms: int) -> bool:
        return wall_ms > loss_time_ms

    for module in (model, router, push, rules, fates):
        patch(stack, module, "is_expired", wrong)


@planted(
    "only the first device hears",
    ("loss",),
    1,
    stage(FaultPlan(5.0, "presence_away", 3.0), sends=(from_a(5.1), from_b(5.3)), devices_of_b=2),
)
def _(stack: ExitStack) -> None:
    """What could not be published is owed to nobody: the due row goes with the first device of the user."""
    patch(stack, Router, "_owe", does_nothing)
