"""The devices of a kill run: each lives through its spells and writes everything down.

The SDK (phone.Phone) is torn down without a word and opened again on the same local store; in between a raw
client may take the device's place, deaf or mute. The raw client acknowledges nothing and shows nothing, so
the next life of the SDK finds the durable cursor where the last one left it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

from bench.server import Server
from tests.kill.log import ClientLog
from tests.kill.people import Cast, DevicePlan
from tests.kill.phone import Phone
from tests.kill.raw import RawClient, Refused
from tests.leaks import MARK


class Device:
    """One (user, device) from the beginning to the end of the run."""

    def __init__(
        self, server: Server, plan: DevicePlan, logs: Path, stores: Path, rng: random.Random
    ) -> None:
        self.plan = plan
        self.log = ClientLog(logs, plan.user, plan.device)
        self._server = server
        self._token = server.token(plan.user)
        self._store = stores / f"{plan.user}.{plan.device}.db"
        self._rng = rng
        self._life: asyncio.Task[None] | None = None
        self._calm = asyncio.Event()
        self._sent = 0
        self.phone: Phone | None = None
        """None while the app is closed or a raw client has its place."""

    @property
    def key(self) -> tuple[str, str]:
        return self.plan.user, self.plan.device

    @property
    def connected(self) -> bool:
        return self.phone is not None and self.phone.connected

    @property
    def comes_back(self) -> bool:
        return self.plan.manner in ("steady", "shaky")

    async def send(self, conv: str, loss_time_ms: int) -> bool:
        """Hand a message to the app; False when it is closed."""
        if self.phone is None:
            return False
        self._sent += 1
        await self.phone.send(
            conv, f"{MARK} {self.plan.user} {self._sent}".encode(), loss_time_ms, self._sent
        )
        return True

    async def open(self) -> None:
        if self.phone is None:
            phone = Phone(self._server, self._token, self.plan.device, self._store, self.log)
            await phone.start()
            self.phone = phone

    async def shut(self, what: str) -> None:
        """The app is gone: killed (mostly), or closed in order."""
        phone, self.phone = self.phone, None
        self.log.write("life", what=what)
        if phone is not None:
            if self._rng.random() < 0.7:
                await phone.abort()
            else:
                await phone.close()

    def live(self) -> None:
        """Begin the spells."""
        self._life = asyncio.create_task(self._live(), name=f"life {self.plan.user}/{self.plan.device}")

    async def calm(self, *, leave_open: bool = True) -> None:
        """No more spells; back on the SDK if this device comes back at all."""
        self._calm.set()
        if self._life is not None:
            await self._life
            self._life = None
        if leave_open and self.comes_back:
            await self.open()

    async def end(self) -> None:
        await self.calm(leave_open=False)
        if self.phone is not None:
            await self.phone.close()
            self.phone = None
        self.log.close()

    async def appear(self) -> None:
        """Connect for a moment without the SDK, so that the server knows the user."""
        await self._raw("arrives", 0.1, deaf=False)

    async def _rest(self, low_s: float, high_s: float) -> None:
        """Some time, cut short by calm()."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._calm.wait(), self._rng.uniform(low_s, high_s))

    async def _live(self) -> None:
        if self.plan.manner == "gone":
            await self._raw("gone", 0.2, deaf=False)
            return
        while not self._calm.is_set():
            match self.plan.manner:
                case "mute":
                    await self._raw("mute", self._rng.uniform(20, 60), deaf=False)
                    await self._rest(0.2, 1.0)
                case "steady":
                    await self._rest(8, 40)
                    if not self._calm.is_set():
                        await self.shut("restart")
                        await self._rest(0.0, 0.5)
                        await self.open()
                case _:
                    await self._rest(2, 10)
                    if not self._calm.is_set():
                        await self._spell(self._rng.choice(("offline", "restart", "deaf", "mute", "cut")))

    async def _spell(self, what: str) -> None:
        if what == "cut":
            self.log.write("life", what=what)
            if self.phone is not None:
                self.phone.cut()
            return
        await self.shut(what)
        match what:
            case "offline":
                await self._rest(0.5, 12)
            case "restart":
                await self._rest(0.0, 0.3)
            case _:
                await self._raw(what, self._rng.uniform(2, 14), deaf=what == "deaf")
        await self.open()

    async def _raw(self, what: str, for_s: float, *, deaf: bool) -> None:
        """Be somebody who never acknowledges, until the time is over or the server ends it."""
        try:
            async with RawClient(
                "127.0.0.1", self._server.ws_port, self._token, self.plan.device, shrink=deaf
            ) as client:
                self.log.write("life", what=f"{what} connected")
                if deaf:
                    client.deaf()
                ended = asyncio.create_task(client.closed.wait())
                calm = asyncio.create_task(self._calm.wait())
                await asyncio.wait({ended, calm}, timeout=for_s, return_when=asyncio.FIRST_COMPLETED)
                for task in (ended, calm):
                    task.cancel()
                await asyncio.gather(ended, calm, return_exceptions=True)
                self.log.write("life", what=f"{what} ended", code=client.close_code)
        except Refused as refused:
            self.log.write("life", what=f"{what} refused", why=str(refused))
            await self._rest(0.2, 0.6)


def make(server: Server, cast: Cast, logs: Path, stores: Path, rng: random.Random) -> list[Device]:
    return [
        Device(server, plan, logs, stores, random.Random(f"{rng.random()} {plan.user} {plan.device}"))
        for plan in cast.devices
    ]
