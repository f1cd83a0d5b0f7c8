"""The embedded store answers every call as the naive one does, whatever came before.

Ids and versions differ between the two (they are compared through the timeline); everything else must agree.
The projector runs after almost every commit here, so that its rows and the tail are mixed in all ways.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastim.errors import PeerError
from fastim.model import Fate, Flag, Kind, Message
from fastim.store.base import (
    AppendFrame,
    AppendItem,
    DueFiring,
    DueRequest,
    Flush,
    MessageStore,
    Park,
    Settled,
)
from fastim.store.sqlite import SqliteStore, tail
from tests.reference.naive_store import NaiveStore
from tests.simulation.disk import ram_directory

T = TypeVar("T")
NOW = 1_790_000_000_000
USERS = ("alice", "bob", "carol", "dave")
DEVICES = ("phone", "pad")
CONVS = {
    "p:alice:bob": ("alice", "bob"),
    "p:bob:carol": ("bob", "carol"),
    "g:team": ("alice", "bob", "carol"),
    "s:dave": ("dave",),
    "p:alice:dave": ("alice", "dave"),
}


async def inline(work: Callable[[], T]) -> T:
    """The runner of a simulation: no threads."""
    return work()


def difference(left: Any, right: Any, path: str = "") -> str:
    """Where two plain values part."""
    if isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right):
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            if one != other:
                return difference(one, other, f"{path}.{number}")
    return f"{path}: {left!r} is {right!r}"


def plain(value: Any, ids: dict[int, tuple[str, int]]) -> Any:
    """Without what may differ: ids become (conv, seq), versions and push ids disappear."""
    if isinstance(value, int) and value in ids:
        return ids[value]
    if isinstance(value, msgspec.Struct):
        hidden = {"version", "push_id"}
        if isinstance(value, Message) and value.kind == Kind.MEMBER:
            hidden.add("client_id")
        names = [name for name in value.__struct_fields__ if name not in hidden]
        return (type(value).__name__, tuple((name, plain(getattr(value, name), ids)) for name in names))
    if isinstance(value, list | tuple):
        return tuple(plain(item, ids) for item in value)
    return value


class Pair:
    """One call, two stores."""

    def __init__(self, real: SqliteStore, rng: random.Random, directory: Path) -> None:
        self.real = real
        self.naive = NaiveStore()
        self.rng = rng
        self.directory = directory
        self.now = NOW
        self.number = 0
        self.claimed: list[tuple[str, str, str, int]] = []
        self.pushes: list[tuple[str, Any, Any]] = []
        self.ids: tuple[dict[int, tuple[str, int]], ...] = ({}, {})

    async def both(
        self, call: Callable[[MessageStore], Awaitable[Any]], same: bool = True
    ) -> tuple[Any, Any]:
        """The answers of both; they must agree."""
        answers = []
        for store in (self.real, self.naive):
            try:
                answers.append(await call(store))
            except PeerError as error:
                answers.append(error.code)
        await self.learn_ids()
        if same:
            left, right = (plain(answer, ids) for answer, ids in zip(answers, self.ids, strict=True))
            assert left == right, difference(left, right)
        return answers[0], answers[1]

    async def learn_ids(self) -> None:
        for store, ids in zip((self.real, self.naive), self.ids, strict=True):
            for message in await store.scan(0, 1_000):
                ids[message.msg_id] = (message.conv, message.seq)

    # -- what happens

    async def act(self) -> None:
        rng = self.rng
        self.now += rng.choice((0, 1, 50, 700, 3_000, -40))
        action = rng.choices(
            (
                self.append, self.settle_some, self.ask_due, self.read, self.claim, self.fire, self.park,
                self.push, self.finish, self.register, self.mark, self.reopen,
            ),
            (10, 8, 4, 3, 3, 3, 3, 2, 2, 1, 1, 0.4),
        )[0]  # fmt: skip
        await action()

    def member(self) -> tuple[str, str]:
        conv = self.rng.choice(list(CONVS))
        return conv, self.rng.choice(CONVS[conv])

    def head(self, conv: str) -> int:
        return sum(message.conv == conv for message in self.naive.state.messages)

    def span(self, conv: str) -> tuple[int, int]:
        first = self.rng.randint(1, self.head(conv) + 1)
        return first, first + self.rng.choice((0, 0, 1, 3))

    async def append(self) -> None:
        rng = self.rng
        frames = []
        for _ in range(rng.choice((1, 1, 2, 4))):
            conv, sender = self.member()
            if rng.random() < 0.05:
                sender = "mallory"
            items = tuple(self.item() for _ in range(rng.choice((1, 1, 2, 3))))
            read = rng.choice((0, 0, 0, rng.randint(1, self.head(conv) + 2)))
            frames.append(AppendFrame(conv, sender, items, read, rng.random() < 0.8))
        await self.both(lambda store: store.append(frames, self.now), same=False)
        left, right = [
            [[(i.status, i.seq, i.cseq, i.ts_ms, i.loss_time_ms) for i in r.items] for r in answer]
            for answer in await self.again(frames)
        ]
        assert left == right

    async def again(self, frames: list[AppendFrame]) -> tuple[Any, Any]:
        """Every append is sent twice: the second answers tell what the first did, repeats included."""
        return await self.both(lambda store: store.append(frames, self.now), same=False)

    def item(self) -> AppendItem:
        rng = self.rng
        if rng.random() < 0.15 and self.number:
            number = rng.randint(1, self.number)
        else:
            self.number += 1
            number = self.number
        loss = rng.choice((0, 0, 0, self.now + 60, self.now + 2_000, self.now - 1))
        # What a client_id carries follows from it, but for a conflict now and then.
        steady = random.Random(number)
        flags = steady.choice((0, 0, Flag.NO_PUSH, Flag.MENTION_ALL, Flag.SILENT))
        if number != self.number:
            loss = 0
        mentions = steady.choice(((), (), ("bob",), ("alice", "carol")))
        body = b"%d" % (number if rng.random() < 0.95 else 0)
        return AppendItem(
            number.to_bytes(16, "big"), steady.choice((Kind.TEXT, Kind.CARD)), body, loss, int(flags),
            mentions, steady.choice((0, 0, 0, 900)), not flags & Flag.SILENT,
        )  # fmt: skip

    async def settle_some(self) -> None:
        rng = self.rng
        settled = []
        for _ in range(rng.choice((1, 1, 2, 4))):
            conv, user = self.member()
            if not self.head(conv):
                continue
            device = rng.choice(DEVICES)
            where = self.naive._behind(user, device, conv)
            first, last = self.span(conv)
            if rng.random() < 0.7:
                first = where.cursor + 1
                last = first + rng.choice((0, 1, 4))
            fate = rng.choice((Fate.ACKED, Fate.ACKED, Fate.ACKED, Fate.EXPIRED))
            settled.append(Settled(user, device, conv, first, min(last, self.head(conv)), fate))
        due = tuple(self.request() for _ in range(rng.choice((0, 0, 1, 2))))
        flush = Flush(tuple(settled), due, "n1", self.now)

        async def call(store: MessageStore) -> list[Any]:
            return sorted((await store.flush(flush)).gaps, key=lambda gap: (*gap[:2], gap[2].conv))

        await self.both(call)

    def request(self) -> DueRequest:
        conv, user = self.member()
        at = self.now + self.rng.choice((0, 50, 1_000))
        return DueRequest(user, conv, self.span(conv)[0], at, self.rng.random() < 0.3)

    async def ask_due(self) -> None:
        flush = Flush((), tuple(self.request() for _ in range(self.rng.choice((1, 3)))), "d", self.now)
        await self.both(lambda store: store.flush(flush))

    async def read(self) -> None:
        conv, user = self.member()
        seq = self.rng.randint(0, self.head(conv) + 2)
        if self.rng.random() < 0.1:
            user = "mallory"
        await self.both(lambda store: store.read(user, conv, seq, self.now))

    async def claim(self) -> None:
        holder, claim_ms = self.rng.choice(("d1", "d2")), self.rng.choice((100, 5_000))

        async def call(store: MessageStore) -> list[Any]:
            return sorted(
                await store.claim_due(holder, self.now, claim_ms, 100), key=lambda r: (r.user, r.conv)
            )

        rows, _ = await self.both(call)
        self.claimed += [(holder, row.user, row.conv, row.attempt) for row in rows]

    async def fire(self) -> None:
        if not self.claimed:
            return
        holder, user, conv, attempt = self.claimed.pop(self.rng.randrange(len(self.claimed)))
        firing = DueFiring(
            user, conv, attempt + self.rng.choice((0, 1, 1)), self.now + self.rng.choice((1, 800))
        )
        await self.both(lambda store: store.fire_due(holder, [firing], self.now))

    async def park(self) -> None:
        parks = []
        for _ in range(self.rng.choice((1, 2))):
            conv, user = self.member()
            first, last = self.span(conv)
            to_seq = self.rng.choice((last, 1 << 50))
            at = self.now + self.rng.choice((0, 0, 2_000))
            parks.append(Park(user, conv, first, to_seq, self.rng.random() < 0.7, at, 5_000))
        await self.both(lambda store: store.park(parks, self.now))

    async def push(self) -> None:
        holder, claim_ms = self.rng.choice(("d1", "d2")), self.rng.choice((100, 5_000))

        async def call(store: MessageStore) -> list[Any]:
            rows = await store.claim_push(holder, self.now, claim_ms, 100)
            return sorted(rows, key=lambda r: (r.user, r.conv))

        left, right = await self.both(call)
        self.pushes += [(holder, one, other) for one, other in zip(left, right, strict=True)]

    async def finish(self) -> None:
        if not self.pushes:
            return
        holder, one, other = self.pushes.pop(self.rng.randrange(len(self.pushes)))
        retry = self.rng.choice((0, 0, self.now + 300))
        await self.real.finish_push(holder, one, self.now, retry_at_ms=retry)
        await self.naive.finish_push(holder, other, self.now, retry_at_ms=retry)

    async def register(self) -> None:
        user, device = self.rng.choice(USERS), self.rng.choice(DEVICES)
        await self.both(lambda store: store.register_device(user, device, "app", self.now))

    async def mark(self) -> None:
        messages = self.naive.state.messages
        if messages:
            number = self.rng.randrange(len(messages))
            await self.naive.settle(messages[number].msg_id)
            await self.real.settle((await self.real.scan(0, 1_000))[number].msg_id)

    async def reopen(self) -> None:
        await self.real.close()
        self.real = await SqliteStore.open(self.directory, runner=inline)

    # -- what may be asked

    async def look(self) -> None:
        """Everything that a reader can see."""
        now = self.now
        for user in USERS:
            await self.both(lambda store, user=user: store.unread(user))  # type: ignore[misc]
            await self.both(lambda store, user=user: store.recount(user))  # type: ignore[misc]
            await self.both(lambda store, user=user: store.devices(user))  # type: ignore[misc]
            for device in DEVICES:
                await self.look_at_lists(user, device)
        for conv, members in CONVS.items():
            for user in members:
                await self.both(
                    lambda store, user=user, conv=conv: store.stream(  # type: ignore[misc]
                        user, conv, 0, now, limit=1_000, max_bytes=1 << 20
                    )
                )
                await self.both(
                    lambda store, user=user, conv=conv: store.history(  # type: ignore[misc]
                        user, conv, before_seq=4, after_seq=0, from_ms=0, to_ms=0, limit=2, now_ms=now
                    )
                )
        await self.both(lambda store: store.scan(0, 1_000))
        await self.both(lambda store: store.next_due_ms())
        await self.both(lambda store: store.next_push_ms())
        await self.both(self.unsettled)
        await self.both(self.states)
        await self.both(self.traces)

    async def look_at_lists(self, user: str, device: str) -> None:
        async def behind(store: MessageStore) -> list[Any]:
            found: list[Any] = []
            since, more = 0, True
            while more:
                page = await store.behind(user, device, since, 2)
                found += page.items
                since, more = page.version, page.more
            assert since == await store.version(user)
            return sorted(found, key=lambda item: item.conv)

        async def conversations(store: MessageStore) -> list[Any]:
            found: list[Any] = []
            since, more = 0, True
            while more:
                page = await store.conversations(user, device, since, 2, self.now)
                found += page.items
                since, more = page.version, page.more
            assert [item.version for item in found] == sorted(item.version for item in found)
            return sorted(found, key=lambda item: item.conv)

        # Their order is the versions', which one batch may give in another order.
        await self.both(behind)
        await self.both(conversations)

    async def states(self, store: MessageStore) -> list[Any]:
        found, after = [], 0
        while True:
            page, after = await store.obligations(after, 7, self.now)
            found += [(one.conv, one.seq, one.user, one.state) for one in page]
            if not after:
                return found

    async def unsettled(self, store: MessageStore) -> list[Any]:
        return sorted(await store.unsettled(1 << 53), key=lambda found: found.conv)

    async def traces(self, store: MessageStore) -> list[Any]:
        """The fates of each message without their ranges, which may be cut differently."""
        found = []
        for message in await store.scan(0, 1_000):
            trace = await store.trace(message.msg_id, self.now)
            assert trace is not None
            fates = sorted({(f.user, f.device, f.fate, f.node) for f in trace.fates})
            found.append(
                (message.conv, message.seq, fates, sorted(trace.due, key=lambda r: r.user), trace.cursors)
            )
        return found


@contextmanager
def eager_projector(rng: random.Random) -> Iterator[None]:
    """Rounds of every size, slices of one conversation."""
    with (
        mock.patch.object(tail, "PROJECT_MESSAGES", rng.choice((1, 4, 30))),
        mock.patch.object(tail, "SLICE_ROWS", rng.choice((1, 3))),
    ):
        yield


async def compare(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    ram = Path(ram_directory())
    with eager_projector(rng):
        pair = Pair(await SqliteStore.open(ram, runner=inline), rng, ram)
        try:
            for user in USERS[: rng.choice((2, 4))]:
                await pair.both(lambda store, user=user: store.register_device(user, "phone", "app", NOW))  # type: ignore[misc]
            await pair.both(lambda store: store.create_group("team", "bob", CONVS["g:team"], NOW))
            for step in range(steps):
                await pair.act()
                if step % 8 == 7:
                    await pair.look()
            await pair.look()
        finally:
            await pair.real.close()
            shutil.rmtree(ram)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9))
def test_the_embedded_store_answers_like_the_naive_one(seed: int) -> None:
    asyncio.run(compare(seed, 40))


@pytest.mark.parametrize("seed", range(2))
def test_it_does_so_over_a_long_life(seed: int) -> None:
    asyncio.run(compare(seed, 200))
