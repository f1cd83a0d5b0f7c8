"""Errors that need several processes: adoption, fences, memberships, offsets, presence between nodes."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import ExitStack
from typing import Any

import msgspec

from fastim.dispatch.adoption import Adopter, Vigil, _Adoption
from fastim.dispatch.router import Router
from fastim.dispatch.service import Dispatch
from fastim.errors import BusUnavailable
from fastim.node.fence import Fence
from fastim.node.flush import Flusher
from fastim.node.service import Node
from fastim.presence.base import NOWHERE, Location
from fastim.presence.memory import MemoryPresence
from fastim.store.base import Flush, FlushResult
from fastim.store.sqlite import SqliteStore
from tests.simulation.logbus import Broker, LogBus, LogReader
from tests.simulation.planted.stage import (
    GONE,
    B,
    cluster_stage,
    does_nothing,
    from_a,
    patch,
    when,
)
from tests.simulation.planted.stage import planted as planted_in
from tests.simulation.scenario import FaultPlan, SendPlan

N1, D1, D2 = 0, 0, 1
LOST = ("loss", "ledger", "settle", "push")


def planted(name: str, kinds: tuple[str, ...], seed: int, plan: Any) -> Any:
    return planted_in(name, kinds, seed, plan, "cluster")


def dead_with_its_inbox(*more: FaultPlan, **options: Any) -> Any:
    """b's connection to n1 is dead and nobody knows; a message waits there for its ack; n1 is killed."""
    return cluster_stage(
        FaultPlan(4.9, "half_open", 0.0, B),
        FaultPlan(6.5, "node_kill", number=N1),
        *more,
        sends=(from_a(5.5),),
        offline=(5.0, GONE),
        end_s=30.0,
        **options,
    )


def while_dispatch_waits_for_presence(*more: FaultPlan) -> Any:
    """The message is stored and answered; where b is comes a second later. b is gone for good."""
    return cluster_stage(
        FaultPlan(5.0, "slow_presence", 4.0, number=40),
        *more,
        sends=(from_a(5.5),),
        offline=(2.0, GONE),
        end_s=25.0,
    )


# ------------------------------------------------------------------------------------------- adoption


@planted("no adopter", LOST, 1, dead_with_its_inbox())
def _(stack: ExitStack) -> None:
    """Nobody looks after the inboxes of dead nodes."""

    async def look(self: Any) -> None:
        pass

    patch(stack, Adopter, "look", look)


@planted("the adopter starts at the end", LOST, 1, dead_with_its_inbox())
def _(stack: ExitStack) -> None:
    """It reads what comes from now on instead of what the node had not settled."""
    committed = LogReader._committed

    def end(self: Any) -> Any:
        log = self.bus.broker.topics.get(self.topic)
        return len(log[0]) if log and self.bus.loop.name.startswith("d") else committed(self)

    patch(stack, LogReader, "_committed", end)


@planted("the adopter drops what it reads", LOST, 1, dead_with_its_inbox())
def _(stack: ExitStack) -> None:
    """The inbox is read and deleted; the messages are in the store, that must be enough."""

    async def fold(self: Any, records: Any) -> None:
        pass

    patch(stack, _Adoption, "_fold", fold)


@planted(
    "settled before the requeue is durable",
    LOST,
    1,
    dead_with_its_inbox(triggers=(when("fences n1 boot 1", 1, "adopter_kill", 1.5),)),
)
def _(stack: ExitStack) -> None:
    """The adopter commits the offset when it has read, and writes the due rows a moment later."""
    fold, reader = _Adoption._fold, LogBus.reader

    def remember(self: Any, topic: str, group: str, *, max_unsettled: int) -> Any:
        made = reader(self, topic, group, max_unsettled=max_unsettled)
        self.planted_reader = made
        return made

    async def late(self: Any, records: Any) -> None:
        self._bus.planted_reader.settle_all(records)
        await asyncio.sleep(3.0)
        await fold(self, records)

    patch(stack, LogBus, "reader", remember)
    patch(stack, _Adoption, "_fold", late)
    patch(stack, _Adoption, "_settle", does_nothing)


@planted(
    "the boot ends with the claim",
    LOST,
    1,
    dead_with_its_inbox(triggers=(when("fences n1 boot 1", 1, "adopter_kill"),)),
)
def _(stack: ExitStack) -> None:
    """Who has claimed a boot will surely finish it: it is taken off the list at once."""
    claim = _Adoption.claim

    async def claim_and_end(self: Any) -> bool:
        done = await claim(self)
        if done:
            await self._store.end_boot(*self._start)
        return done

    patch(stack, _Adoption, "claim", claim_and_end)


@planted(
    "a claim never ends",
    LOST,
    1,
    dead_with_its_inbox(triggers=(when("fences n1 boot 1", 1, "adopter_kill"),)),
)
def _(stack: ExitStack) -> None:
    """The adopter is dead, and nobody finishes what it began."""
    fence = SqliteStore.fence

    async def for_ever(self: Any, node: str, boot: int, holder: str, now_ms: int, _claim_ms: int) -> bool:
        return await fence(self, node, boot, holder, now_ms, 10**12)

    patch(stack, SqliteStore, "fence", for_ever)


@planted("two adopters", ("adopters",), 1, dead_with_its_inbox())
def _(stack: ExitStack) -> None:
    """Whoever asks for a claim gets it."""
    fence = SqliteStore.fence

    async def to_all(self: Any, *args: Any) -> bool:
        await fence(self, *args)
        return True

    patch(stack, SqliteStore, "fence", to_all)


@planted("two dispatchers of one name", ("adopters",), 1, dead_with_its_inbox())
def _(stack: ExitStack) -> None:
    """Claims are told apart by the holder, and both are called the same."""
    init = Dispatch.__init__

    def named_alike(self: Any, *args: Any, **more: Any) -> None:
        init(self, *args, **(more | {"holder": "dispatch"}))

    patch(stack, Dispatch, "__init__", named_alike)


@planted(
    "boots are known from presence",
    LOST,
    1,
    dead_with_its_inbox(
        FaultPlan(6.6, "presence_flush"),
        FaultPlan(6.6, "dispatch_kill", number=D1),
        FaultPlan(6.6, "dispatch_kill", number=D2),
    ),
)
def _(stack: ExitStack) -> None:
    """A dispatcher adopts the nodes that it has seen alive; after a flush and a restart it has seen none."""
    look = Vigil.look

    def of_the_living(self: Any, asked: int, answered: int, boots: Any, live: Any) -> Any:
        seen = self.__dict__.setdefault("planted_seen", set())
        seen.update(live or ())
        return look(self, asked, answered, [one for one in boots if (one.node, one.boot) in seen], live)

    patch(stack, Vigil, "look", of_the_living)


# --------------------------------------------------------------------------------- who is dead, who is not


@planted(
    "a flush is taken for a death",
    ("fence",),
    1,
    cluster_stage(FaultPlan(23.0, "presence_flush"), sends=(from_a(24.0),), end_s=40.0),
)
def _(stack: ExitStack) -> None:
    """A lease that is missing at one look belongs to a dead node."""
    look = Vigil.look

    def at_once(self: Any, asked: int, answered: int, boots: Any, live: Any) -> Any:
        look(self, asked, answered, boots, live)
        return [
            (one.node, one.boot) for one in boots if live is not None and (one.node, one.boot) not in live
        ]

    patch(stack, Vigil, "look", at_once)


@planted(
    "silence is taken for absence",
    ("fence",),
    1,
    cluster_stage(FaultPlan(5.0, "presence_away", 9.0), sends=(from_a(6.0),), end_s=30.0),
)
def _(stack: ExitStack) -> None:
    """Presence does not answer, so no lease is alive."""
    look = Vigil.look

    def nobody(self: Any, asked: int, answered: int, boots: Any, live: Any) -> Any:
        return look(self, asked, answered, boots, live or frozenset())

    patch(stack, Vigil, "look", nobody)


@planted(
    "a flushed lease stays flushed",
    ("fence",),
    1,
    cluster_stage(FaultPlan(23.0, "presence_flush"), sends=(from_a(24.0),), end_s=45.0),
)
def _(stack: ExitStack) -> None:
    """A node opens its lease once, at its start."""
    renew = Node.renew_lease

    async def only_renew(self: Any) -> None:
        if await self._presence.renew(self.name, self.boot, self.limits.lease_ms):
            await renew(self)

    patch(stack, Node, "renew_lease", only_renew)


@planted(
    "only the lease comes back",
    ("loss", "ledger"),
    1,
    cluster_stage(FaultPlan(5.0, "presence_flush"), sends=(from_a(9.0),), end_s=20.0),
)
def _(stack: ExitStack) -> None:
    """After a flush the node opens its lease, and attaches nobody."""

    async def nobody(self: Any, session: Any) -> None:
        pass

    patch(stack, Node, "_register_again", nobody)


@planted(
    "zombie",
    ("zombie",),
    1,
    cluster_stage(FaultPlan(5.0, "node_pause", 13.0, number=N1), sends=(from_a(19.0),), end_s=40.0),
)
def _(stack: ExitStack) -> None:
    """A node that slept through its adoption goes on as if nothing had happened."""

    async def nothing(self: Any) -> None:
        self._clear = True

    async def read_inbox(self: Any, reader: Any) -> None:
        with contextlib.suppress(Exception):
            await self.delivery.run(reader)
        await asyncio.Event().wait()

    patch(stack, Fence, "ask", nothing)
    patch(stack, Node, "_read_inbox", read_inbox)


@planted(
    "generation ignored",
    ("loss", "ledger"),
    1,
    cluster_stage(
        FaultPlan(5.0, "half_open", 0.0, B),
        sends=(from_a(30.0), from_a(45.0)),
        offline=(5.01, 8.0),
        placed={"a": "n2"},
        end_s=60.0,
    ),
)
def _(stack: ExitStack) -> None:
    """A detach that comes late takes the newer attachment of the device away."""
    detach = MemoryPresence.detach

    async def whatever(self: Any, user: str, device: str, generation: int, grace_until_ms: int = 0) -> bool:
        found = self._by_user.get(user, {}).get(device)
        newest = generation if found is None else found.generation
        return await detach(self, user, device, newest, grace_until_ms)

    patch(stack, MemoryPresence, "detach", whatever)


@planted(
    "stale presence in a cluster",
    LOST,
    1,
    cluster_stage(FaultPlan(5.0, "node_kill", number=N1), sends=(from_a(3.0), from_a(25.0)), end_s=40.0),
)
def _(stack: ExitStack) -> None:
    """A cache before presence, which all dispatchers share, keeps what it was told first."""
    locate = Router.locate
    known: dict[str, Location] = {}

    async def remembered(self: Any, users: Any) -> Any:
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
    "presence away is offline in a cluster",
    ("loss", "ledger"),
    1,
    cluster_stage(FaultPlan(5.0, "presence_away", 2.0), sends=(from_a(5.5),), end_s=20.0),
)
def _(stack: ExitStack) -> None:
    """Presence does not answer: everybody is taken for offline, parked and forgotten."""
    locate = Router.locate

    async def nobody(self: Any, users: Any) -> dict[str, Location]:
        return await locate(self, users) or {}

    patch(stack, Router, "locate", nobody)


# --------------------------------------------------------------------------------------- offsets, memberships


@planted(
    "commit past unsettled",
    LOST,
    1,
    cluster_stage(
        FaultPlan(4.9, "half_open", 0.0, B),
        FaultPlan(6.5, "node_kill", number=N1),
        sends=(from_a(5.5), SendPlan(5.8, None, "system", "s:a", 0)),
        offline=(5.0, GONE),
        placed={"a": "n1", "b": "n1"},
        end_s=30.0,
    ),
)
def _(stack: ExitStack) -> None:
    """The offset follows the newest settled record; an older one is still out."""
    settle_all, commit = LogReader.settle_all, LogReader._commit_all

    def newest(self: Any, records: Any) -> None:
        settle_all(self, records)
        for share in self._shares.values():
            last = max((one.offset for one in records if one.partition == share.partition), default=-1)
            share.planted = max(last + 1, getattr(share, "planted", 0))

    async def commit_newest(self: Any) -> None:
        for share in self._shares.values():
            share.window.committed = max(share.window.committed, getattr(share, "planted", 0))
        await commit(self)

    patch(stack, LogReader, "settle_all", newest)
    patch(stack, LogReader, "_commit_all", commit_newest)


@planted(
    "auto-commit of submit",
    LOST,
    1,
    while_dispatch_waits_for_presence(
        FaultPlan(6.2, "dispatch_kill", number=D1), FaultPlan(6.2, "dispatch_kill", number=D2)
    ),
)
def _(stack: ExitStack) -> None:
    """Records count as settled when they are read."""
    read, settle_all = LogReader.read, LogReader.settle_all

    async def read_and_settle(self: Any, most: int) -> Any:
        records = await read(self, most)
        if not self.alone:
            settle_all(self, records)
        return records

    def only_alone(self: Any, records: Any) -> None:
        if self.alone:
            settle_all(self, records)

    patch(stack, LogReader, "read", read_and_settle)
    patch(stack, LogReader, "settle_all", only_alone)


@planted(
    "a new member starts at the latest offset",
    LOST,
    1,
    while_dispatch_waits_for_presence(
        FaultPlan(6.2, "dispatch_kill", number=D1), FaultPlan(6.2, "dispatch_kill", number=D2)
    ),
)
def _(stack: ExitStack) -> None:
    """Whoever gets a partition reads what comes from now on."""
    assigned = LogReader.assigned

    def latest(self: Any, partition: int, committed: int, membership: int) -> None:
        log = self.bus.broker.topics[self.topic][partition]
        assigned(self, partition, committed if self.alone else len(log), membership)

    patch(stack, LogReader, "assigned", latest)


@planted(
    "commits of a former member count",
    ("offsets",),
    0,
    cluster_stage(
        FaultPlan(5.3, "dispatch_pause", 7.0, number=D1),
        FaultPlan(16.3, "dispatch_pause", 7.0, number=D2),
        sends=tuple(SendPlan(5.0 + n / 10, None, "a", "p:a:b", 0) for n in range(200)),
        end_s=30.0,
    ),
)
def _(stack: ExitStack) -> None:
    """A dispatcher that lost its partitions while it slept commits what it had settled."""

    def whoever(self: Any, reader: Any, partition: int, _membership: int, offset: int) -> bool:
        if reader.topic not in self.topics:
            return False
        group = self.group(reader.topic, reader.group)
        if offset < group.committed[partition]:
            self.told(f"{reader.topic}/{partition} went back to {offset}")
        group.committed[partition] = offset
        return True

    patch(stack, Broker, "commit", whoever)


@planted(
    "idempotency ends with the process",
    ("duplicate", "error"),
    1,
    while_dispatch_waits_for_presence(
        FaultPlan(6.2, "dispatch_kill", number=D1), FaultPlan(6.2, "dispatch_kill", number=D2)
    ),
)
def _(stack: ExitStack) -> None:
    """A client_id is known for half a second: a batch that is read again is stored again."""
    append = SqliteStore.append

    async def forgetful(self: Any, frames: Any, now_ms: int) -> Any:
        known = self.__dict__.setdefault("planted_known", {})

        def forget(item: Any) -> Any:
            if now_ms - known.setdefault(item.client_id, now_ms) <= 500:
                return item
            return msgspec.structs.replace(item, client_id=now_ms.to_bytes(16, "big"))

        changed = [msgspec.structs.replace(f, items=tuple(map(forget, f.items))) for f in frames]
        return await append(self, changed, now_ms)

    patch(stack, SqliteStore, "append", forgetful)


@planted(
    "a publish that failed is forgotten",
    LOST,
    0,
    cluster_stage(
        FaultPlan(5.0, "slow_presence", 4.0, number=40),
        FaultPlan(5.9, "bus_away", 4.0),
        sends=(from_a(5.5),),
        end_s=25.0,
    ),
)
def _(stack: ExitStack) -> None:
    """The bus did not take a Deliver; the message is in the store, so somebody will find it."""

    async def careless(self: Any, records: Any) -> list[Any]:
        with contextlib.suppress(BusUnavailable):
            await self._bus.publish(records)
        return []

    patch(stack, Router, "publish", careless)


# ---------------------------------------------------------------------------------------------- the node


@planted(
    "settled before the flush in a cluster",
    LOST,
    1,
    cluster_stage(
        FaultPlan(4.9, "half_open", 0.0, B),
        FaultPlan(13.0, "store_away", 4.0),
        FaultPlan(15.5, "node_kill", number=N1),
        sends=(from_a(5.5),),
        offline=(5.0, GONE),
        end_s=30.0,
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
    "undelivered stands for the due row",
    LOST,
    1,
    cluster_stage(
        FaultPlan(4.9, "half_open", 0.0, B),
        FaultPlan(13.0, "bus_away", 3.0),
        sends=(from_a(5.5),),
        offline=(5.0, GONE),
        end_s=30.0,
    ),
)
def _(stack: ExitStack) -> None:
    """The node writes no due row: it tells dispatch, which will."""
    flush = SqliteStore.flush

    async def without_due(self: Any, wanted: Flush) -> FlushResult:
        if wanted.node.startswith("n"):
            wanted = msgspec.structs.replace(wanted, due=())
        return await flush(self, wanted)

    patch(stack, SqliteStore, "flush", without_due)
