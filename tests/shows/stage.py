"""What every show needs: a server with a vendor, phones on it, and figures that fail by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.server import Server
from tests.kill.ledger import server_settings
from tests.kill.log import ClientLog
from tests.kill.phone import Phone
from tests.kill.until import until
from tests.kill.vendor import WebhookServer
from tests.leaks import planted

SECRET = planted("webhook")


class Skipped(Exception):
    """This machine cannot show it; the text says what is absent."""


class Broken(Exception):
    """The show could not go on; the text holds the end of the server's log."""


def require(name: str, present: bool) -> None:
    """Raises Skipped when something is absent, Broken when FASTIM_REQUIRE names it."""
    if present:
        return
    if name in os.environ.get("FASTIM_REQUIRE", "").split(","):
        raise Broken(f"{name} is required (FASTIM_REQUIRE) and was not found")
    raise Skipped(f"{name} was not found")


@dataclass
class Show:
    """Figures and failures of one part."""

    name: str
    failures: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)

    def check(self, good: bool, text: str) -> None:
        print(f"{self.name}: {'ok  ' if good else 'FAIL'} {text}", flush=True)
        if not good:
            self.failures.append(text)


@dataclass
class Stage:
    """A server, its vendor, and the phones of one part."""

    server: Server
    vendor: WebhookServer
    directory: Path
    phones: list[Phone] = field(default_factory=list)
    logs: dict[str, ClientLog] = field(default_factory=dict)

    async def phone(self, user: str, *, port: int = 0) -> Phone:
        """The SDK on `user`'s only device, connected; the same store and log each time."""
        if user not in self.logs:
            self.logs[user] = ClientLog(self.directory, user, "d0")
        log = self.logs[user]
        phone = Phone(
            self.server, self.server.token(user), "d0", self.directory / f"{user}.db", log, port=port
        )
        self.phones.append(phone)
        await phone.start()
        if not await until(lambda: phone.connected, 10):
            raise Broken(f"{user} could not connect\n{self.server.log_tail()}")
        return phone

    def shown(self, user: str, conv: str) -> list[str]:
        """client_ids on the user's screen in this conversation."""
        return [seen.client_id for seen in self.logs[user].record.shown if seen.conv == conv]

    async def sent(self, user: str, client_id: str, within_s: float = 10.0) -> tuple[int, int]:
        """(msg_id, moment of SENT) of a message that `user` handed over."""
        sub = self.logs[user].record.submitted[client_id]
        if not await until(lambda: bool(sub.msg_id or sub.refused), within_s) or sub.refused:
            raise Broken(f"{user}'s message was not accepted: {sub}\n{self.server.log_tail()}")
        return sub.msg_id, sub.sent_ms


@contextlib.asynccontextmanager
async def stage(
    settings: Mapping[str, Any] | None = None, *, prepare: Callable[[Path], None] | None = None
) -> AsyncIterator[Stage]:
    """prepare: called with the future data directory before the server exists."""
    directory = Path(tempfile.mkdtemp(prefix="fastim-show-"))
    if prepare is not None:
        prepare(directory / "data")
    async with WebhookServer(SECRET.encode()) as vendor:
        server = Server(directory, server_settings(vendor.url, SECRET, settings))
        here = Stage(server, vendor, directory)
        try:
            await asyncio.to_thread(server.start)
            yield here
        finally:
            for phone in here.phones:
                await phone.abort()
            for log in here.logs.values():
                log.close()
            await asyncio.to_thread(server.end)
            shutil.rmtree(directory, ignore_errors=True)


async def finish(show: Show, here: Stage) -> None:
    """Close the phones, stop the server in order, and let the audit have the last word."""
    for phone in here.phones:
        await phone.close()
    here.phones.clear()
    show.check(await asyncio.to_thread(here.server.stop) == 0, "the server stops cleanly")
    code, totals = await asyncio.to_thread(here.server.audit)
    show.check(code == 0, f"audit ends with {code}: {totals}")
