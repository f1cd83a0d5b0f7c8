"""kill -9 of an app on the SDK, again and again, on one local store: nothing twice, lost, or out of order."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastim.app import App
from fastim.auth import mint
from fastim.client import Client, MemoryLocalStore
from fastim.config import load
from tests.system.served import ROOT, environment
from tests.unit.client_script import Hurry, until

CONV = "p:alice:bob"
KILLS = 12
SAYINGS = 150


class Process:
    """One life of the app. `log` holds what it says."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tests.system.client_app", *arguments],
                stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(),
            )  # fmt: skip

    def says(self, words: str) -> bool:
        said = self._log.read_text()
        assert self._child.poll() is None, said
        return words in said

    def kill(self) -> None:
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()


class World:
    """A server, Bob who talks all the time, and Alice's app, which is killed."""

    def __init__(self, directory: Path, app: App) -> None:
        assert app.dev_key is not None
        now_s = int(time.time())
        token = {
            user: mint(app.dev_key, user, audience="fastim", ttl_s=600, now_s=now_s)
            for user in ("alice", "bob")
        }
        url = f"ws://127.0.0.1:{app.listener.addresses[0][1]}"
        self.screen = directory / "screen"
        self._arguments = [
            url, token["alice"], str(directory / "alice.db"), str(self.screen), str(SAYINGS), CONV,
        ]  # fmt: skip
        self._log = directory / "said"
        self.process = Process(self._arguments, self._log)
        self.bob = Client(
            url, token["bob"], "d0", store=MemoryLocalStore(), on_event=lambda event: None, rng=Hurry()
        )
        self.sent = 0

    def restart(self) -> None:
        self.process.kill()
        self.process = Process(self._arguments, self._log)

    async def talk(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self.sent += 1
            await self.bob.send(CONV, f"from bob {self.sent}")
            await asyncio.sleep(0.003)

    async def live(self, rng: random.Random) -> int:
        """Until everything was said and everything is on the screen; returns how many messages that is."""
        await self.bob.start()
        # Both have to have been there once before anybody may write to them.
        await until(lambda: self.bob.connected and self.process.says("Connected"))
        stop = asyncio.Event()
        talking = asyncio.create_task(self.talk(stop))
        for _ in range(KILLS):
            await asyncio.sleep(rng.uniform(0.0, 0.4))
            self.restart()
            if rng.random() < 0.7:
                await until(lambda: self.process.says("Connected"))
        await until(lambda: self.process.says("said everything"))
        stop.set()
        await talking
        for outgoing in self.bob.unsent():
            await outgoing.accepted()
        head = self.sent + SAYINGS
        await until(lambda: self.screen.read_text().count("\n") >= head)
        return head


async def test_an_app_that_is_killed_again_and_again_shows_and_says_everything_once_and_in_order(
    tmp_path: Path,
) -> None:
    fatal: list[BaseException] = []
    node = {"listen": "127.0.0.1:0", "plain": True, "rate_per_s": 100_000, "rate_burst": 100_000}
    settings = {
        "dev": True,
        "data_dir": str(tmp_path / "data"),
        "node": node,
        "api": {"listen": "127.0.0.1:0"},
    }
    app = App(load(settings), on_fatal=fatal.append)
    await app.start()
    world = World(tmp_path, app)
    try:
        head = await world.live(random.Random(7))
    finally:
        world.process.kill()
        await world.bob.close()
        await app.stop(window_ms=0)
    assert fatal == []
    lines = [line.split(" ", 2) for line in world.screen.read_text().splitlines()]
    assert [int(seq) for seq, _, _ in lines] == list(range(1, head + 1))
    for user, words, count in (("bob", "from bob", world.sent), ("alice", "saying", SAYINGS)):
        said = [text for _, sender, text in lines if sender == user]
        assert said == [f"{words} {number}" for number in range(1, count + 1)]
