"""An app on the SDK, in a process of its own, to be killed: it draws what it is handed, and says a number.

    python -m tests.system.client_app URL TOKEN STORE SCREEN SAYINGS PEER_CONV

SCREEN is what the person has seen, one line per message, written before the app goes on. SAYINGS is how many
messages the person wants to have said in the end; each has a client_id that follows from its number, because
the person remembers what he wanted to say when the app is killed under him.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import uvloop

from fastim.client import Client, Connected, Disconnected, Message, SqliteLocalStore
from fastim.errors import UsageError


def saying_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


class App:
    def __init__(self, url: str, token: str, store: str, screen: str, sayings: int, conv: str) -> None:
        self._client = Client(url, token, "d0", store=SqliteLocalStore(store))
        self._path = Path(screen)
        self._drawn = set(self._path.read_text().splitlines()) if self._path.exists() else set()
        self._screen = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._sayings = sayings
        self._conv = conv

    async def run(self) -> None:
        async with self._client as client:
            talking = asyncio.create_task(self._talk(client))
            async for event in client.events():
                if isinstance(event, Message):
                    self._draw(event)
                elif isinstance(event, Connected | Disconnected):
                    print(type(event).__name__, flush=True)
            await talking

    def _draw(self, message: Message) -> None:
        line = f"{message.seq} {message.sender} {message.text}"
        if message.again and line in self._drawn:
            print("again, and it was drawn", flush=True)
            return
        os.write(self._screen, f"{line}\n".encode())

    async def _talk(self, client: Client) -> None:
        for number in range(1, self._sayings + 1):
            with contextlib.suppress(UsageError):  # it waits in the outbox
                await client.send(self._conv, f"saying {number}", client_id=saying_id(number))
            await asyncio.sleep(0.002)
        print("said everything", flush=True)


def main() -> None:
    url, token, store, screen, sayings, conv = sys.argv[1:]
    uvloop.run(App(url, token, store, screen, int(sayings), conv).run())


if __name__ == "__main__":
    main()
