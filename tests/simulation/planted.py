"""Errors that the design could have had, as patches over the real code. Each must be caught, on a pinned
seed.

A patch is the smallest change that makes the mistake; nothing in the product knows of it. `kinds` are the
violations (checkers.py) that count as catching it. `plan`, if given, is a directed nemesis: it bends the
drawn plan towards the moment that matters, for errors that are rare under random faults.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tests.simulation.scenario import Plan


@dataclass(frozen=True)
class Planted:
    """One error."""

    name: str
    story: str
    kinds: tuple[str, ...]
    seed: int
    plant: Callable[[ExitStack], None]
    plan: Callable[[Plan], None] | None = None


PLANTED: dict[str, Planted] = {}


def planted(
    name: str, kinds: tuple[str, ...], seed: int, plan: Callable[[Plan], None] | None = None
) -> Callable[[Callable[[ExitStack], None]], Callable[[ExitStack], None]]:
    def register(plant: Callable[[ExitStack], None]) -> Callable[[ExitStack], None]:
        PLANTED[name] = Planted(name, (plant.__doc__ or "").strip(), kinds, seed, plant, plan)
        return plant

    return register


def patch(stack: ExitStack, owner: Any, name: str, replacement: Any) -> Any:
    """Replace an attribute for the run; returns what it was."""
    before = getattr(owner, name)
    stack.enter_context(mock.patch.object(owner, name, replacement))
    return before


def _no(*_args: Any, **_kwargs: Any) -> None:
    """Does nothing."""


async def _not(*_args: Any, **_kwargs: Any) -> None:
    """Does nothing, asynchronously."""


# ------------------------------------------------------------------------------------------------- dispatch


@planted("race A", ("loss", "ledger", "settle"), 0)
def _(stack: ExitStack) -> None:
    """Parked, and presence is not read again: who came meanwhile waits for his next reconnect."""
    from fastim.dispatch.router import Router

    patch(stack, Router, "nudge_arrived", _not)


@planted("stale presence", ("loss", "ledger", "settle", "push"), 0)
def _(stack: ExitStack) -> None:
    """The route of the first look-up is used for ever."""
    from fastim.dispatch.router import Router
    from fastim.presence.base import NOWHERE

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


@planted("nobody recovers", ("ledger", "loss"), 0)
def _(stack: ExitStack) -> None:
    """After a crash nobody takes up what lay above the settled mark."""
    from fastim.dispatch.settled import SettledMark

    async def recover(self: Any) -> bool:
        head = await self._store.head_msg_id()
        if head:
            await self._store.settle(head)
        self._reached = self._stored = self._position = head
        return bool(head)

    patch(stack, SettledMark, "recover", recover)


@planted("mark moves before the routing is durable", ("ledger", "loss"), 0)
def _(stack: ExitStack) -> None:
    """The settled mark follows append; what the inboxes hold is taken for done."""
    from fastim.bus.memory import MemoryBus

    patch(stack, MemoryBus, "committed", lambda self, topic, group: self.published(topic))


@planted("auto-commit", ("ledger", "loss"), 0)
def _(stack: ExitStack) -> None:
    """Records count as settled when they are read."""
    from fastim.bus.memory import MemoryReader

    read, settle = MemoryReader.read, MemoryReader.settle

    async def read_and_settle(self: Any, max_records: int) -> Any:
        records = await read(self, max_records)
        for record in records:
            settle(self, record)
        return records

    patch(stack, MemoryReader, "read", read_and_settle)
    patch(stack, MemoryReader, "settle", _no)


@planted("dropped when the user is elsewhere", ("ledger", "loss"), 0)
def _(stack: ExitStack) -> None:
    """Nobody is attached: the message is not parked, it is dropped."""
    from fastim.dispatch.router import Plan

    patch(stack, Plan, "park", _no)


@planted("now > 0 expires", ("expiry", "loss", "settle"), 0)
def _(stack: ExitStack) -> None:
    """A deadline of 0 is compared like any other."""
    from fastim import model
    from fastim.dispatch import push, router

    def wrong(loss_time_ms: int, wall_ms: int) -> bool:
        return wall_ms > loss_time_ms

    for owner in (model, router, push):
        patch(stack, owner, "is_expired", wrong)


@planted("answered before the commit", ("loss",), 0)
def _(stack: ExitStack) -> None:
    """SENT leaves while the transaction is still under way, with the ids that it will surely get."""
    from fastim.dispatch.worker import SubmitWorker

    del SubmitWorker
