"""Cancel presence calls at random moments, and check that no reply ever reaches the wrong call.

    python -m tests.presence.cancels --url redis://127.0.0.1:6379/0 [--cancels 100000] [--quick] [--cut-s 1]

Every user has a session, every room a count and every call a question of its own, so a reply that belongs to
another call cannot look right. The last line is the figure: mixed replies, 0 or the command fails. It also
fails when too few of the cancelled calls had their command on the wire already: those are the dangerous ones.

--cut-s resets the connection every so often, through a proxy (one server only).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import uvloop

from fastim.errors import PresenceUnavailable
from fastim.presence.base import RoomNode
from fastim.presence.redis import RedisPresence
from fastim.presence.shards import Target
from tests.faults.proxy import Proxy
from tests.presence.servers import through, with_prefix

FULL, QUICK = 100_000, 10_000
_USERS = 300
_AT_ONCE = 24
_LEASE_MS = 60_000
_LEAST_ON_THE_WIRE = 0.15
_NODE, _BOOT = "n1", 7


class Mixed(AssertionError):
    """A call got what was not its own."""


class Cancels:
    """Counts what happened."""

    def __init__(self, presence: RedisPresence, rng: random.Random) -> None:
        self.presence = presence
        self.rng = rng
        self.cancelled = self.answered = self.away = 0
        self.mixed: list[str] = []
        self._users = [f"user{number}" for number in range(_USERS)]
        self._rooms = [f"room{number}" for number in range(_USERS)]
        self._calls: list[Callable[[], Awaitable[None]]] = [
            self._locate, self._locate, self._locate, self._attach, self._detach_nobody, self._rooms_of,
            self._enter, self._nodes, self._renew,
        ]  # fmt: skip

    async def prepare(self) -> None:
        await self.presence.open_lease(_NODE, _BOOT, _LEASE_MS)
        for user in self._users:
            await self.presence.attach(user, "phone", "app", _NODE, _BOOT, f"s-{user}")
        for number, room in enumerate(self._rooms):
            await self.presence.enter(room, _NODE, _BOOT, number + 1)

    async def run(self, cancels: int) -> None:
        async def worker() -> None:
            while self.cancelled < cancels and not self.mixed:
                await self._one()

        await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))

    async def _one(self) -> None:
        call = asyncio.ensure_future(self.rng.choice(self._calls)())
        for _ in range(self.rng.choice((0, 1, 2, 3, 4, 5, 7, 9, 12, 30))):
            await asyncio.sleep(0)
            if call.done():
                break
        call.cancel()
        try:
            await call
            self.answered += 1
        except asyncio.CancelledError:
            self.cancelled += 1
        except PresenceUnavailable:
            self.away += 1
        except Exception as error:
            self.mixed.append(repr(error))

    def _expect(self, what: str, got: object, wanted: object) -> None:
        if got != wanted:
            raise Mixed(f"{what}: {got}, not {wanted}")

    # -------------------------------------------------------------------------------------- the calls

    async def _locate(self) -> None:
        users = self.rng.sample(self._users, self.rng.choice((1, 1, 2, 40)))
        self._expect("locate", await self._phones(users), {user: f"s-{user}" for user in users})

    async def _phones(self, users: list[str]) -> dict[str, str]:
        """The sessions of the phones; pads may come and go, but each only at its user's."""
        found: dict[str, str] = {}
        for user, location in (await self.presence.locate(users)).items():
            for attachment in location.attachments:
                if attachment.device == "phone":
                    found[user] = attachment.session
                else:
                    self._expect("locate", attachment.session, f"p-{user}")
        return found

    async def _attach(self) -> None:
        user = self.rng.choice(self._users)
        new, replaced = await self.presence.attach(user, "pad", "pad", _NODE, _BOOT, f"p-{user}")
        self._expect("attach", {new.session, *(old.session for old in replaced)}, {f"p-{user}"})
        self._expect("attach", all(old.generation < new.generation for old in replaced), True)

    async def _detach_nobody(self) -> None:
        user = self.rng.choice(self._users)
        self._expect("detach", await self.presence.detach(user, "phone", 1), False)

    async def _rooms_of(self) -> None:
        numbers = self.rng.sample(range(_USERS), self.rng.choice((1, 3)))
        found = await self.presence.room_nodes([self._rooms[number] for number in numbers])
        wanted = {self._rooms[number]: (RoomNode(_NODE, _BOOT, number + 1),) for number in numbers}
        self._expect("room_nodes", found, wanted)

    async def _enter(self) -> None:
        number = self.rng.randrange(_USERS)
        await self.presence.enter(self._rooms[number], _NODE, _BOOT, number + 1)

    async def _nodes(self) -> None:
        self._expect("nodes", await self.presence.nodes(), [(_NODE, _BOOT)])

    async def _renew(self) -> None:
        self._expect("renew", await self.presence.renew(_NODE, _BOOT, _LEASE_MS), True)

    async def verify(self) -> None:
        """What stands at the end, asked in peace."""
        wanted = {user: f"s-{user}" for user in self._users}
        try:
            self._expect("at the end", await self._phones(self._users), wanted)
        except Mixed as error:
            self.mixed.append(str(error))


@asynccontextmanager
async def _cutting(proxy: Proxy, every_s: float) -> AsyncIterator[None]:
    async def cut() -> None:
        while True:
            await asyncio.sleep(every_s)
            proxy.cut()

    task = asyncio.create_task(cut(), name="cuts")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def storm(url: str, cancels: int, seed: int, cut_s: float = 0.0) -> tuple[Cancels, float]:
    """Cancel so many calls. Returns the counts, and which share of the cancelled were on the wire."""
    async with Proxy(*Target(url).seeds[0]) as proxy:
        presence = RedisPresence(with_prefix(through(url, proxy.port) if cut_s else url))
        try:
            counts = Cancels(presence, random.Random(seed))
            await counts.prepare()
            if cut_s:
                async with _cutting(proxy, cut_s):
                    await counts.run(cancels)
            else:
                await counts.run(cancels)
            for _ in range(3):  # the last cut may not be noticed yet
                try:
                    await counts.verify()
                    break
                except PresenceUnavailable:
                    continue
            return counts, presence.flows()["abandoned"] / max(1, counts.cancelled)
        finally:
            await presence.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.presence.cancels", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--url", default=os.environ.get("FASTIM_REDIS", "redis://127.0.0.1:6379/0"))
    parser.add_argument("--cancels", type=int, default=FULL)
    parser.add_argument("--quick", action="store_const", dest="cancels", const=QUICK)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cut-s", type=float, default=0.0)
    asked = parser.parse_args()
    started = time.monotonic()
    counts, on_the_wire = uvloop.run(storm(asked.url, asked.cancels, asked.seed, asked.cut_s))
    took_s = time.monotonic() - started
    print(
        f"{counts.cancelled:,} calls cancelled in {took_s:.1f} s, {on_the_wire:.0%} of them on the wire; "
        f"{counts.answered:,} answered, {counts.away:,} unavailable"
    )
    for mixed in counts.mixed[:5]:
        print(f"  {mixed[:300]}")
    print(f"mixed replies: {len(counts.mixed)}")
    return 1 if counts.mixed or on_the_wire < _LEAST_ON_THE_WIRE else 0


if __name__ == "__main__":
    sys.exit(main())
