"""A full disk under load: a retryable error, connections stay, it resumes by itself, nothing is lost.

The data directory is a small tmpfs; a ballast file fills it while people talk, and is deleted again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import subprocess
import time
from pathlib import Path

from fastim import protocol
from fastim.api.shapes import new_client_id
from fastim.model import Kind
from tests.kill import check
from tests.kill.log import wall_ms
from tests.kill.phone import Phone
from tests.kill.raw import RawClient
from tests.kill.until import until
from tests.shows.stage import Show, Stage, finish, require, stage

TMPFS_MB = 96
PAIRS = 3
BODY = b"d" * 16_384
RESUME_LIMIT_S = 10.0
REFUSED_WITHIN_S = 30.0


def mount(data: Path) -> None:
    data.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MB}m", "tmpfs", str(data)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        data.rmdir()
        require("tmpfs", False)


def unmount(data: Path) -> None:
    subprocess.run(["umount", str(data)], capture_output=True, check=False)
    shutil.rmtree(data.parent, ignore_errors=True)


def fill(ballast: Path) -> int:
    """Write until nothing fits any more; returns the bytes."""
    size = 0
    with contextlib.closing(os.fdopen(os.open(ballast, os.O_WRONLY | os.O_CREAT), "wb", buffering=0)) as file:
        for step in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    wrote = file.write(b"\0" * step)
                    if not wrote:
                        raise OSError(errno.ENOSPC, "short")
                    size += wrote
    return size


class Prober:
    """A raw client that sends one message after the other and remembers every answer with its moment."""

    def __init__(self, here: Stage) -> None:
        self._token = here.server.token("rob")
        self._port = here.server.ws_port
        self.dropped = False
        """The server ended the connection."""
        self.answers: list[tuple[float, str, bool, int]] = []
        """(moment, "sent" or the error's code, retryable, retry_after_ms)"""

    def since(self, moment: float, word: str) -> list[tuple[float, str, bool, int]]:
        return [answer for answer in self.answers if answer[0] >= moment and answer[1] == word]

    async def run(self) -> None:
        """Until cancelled. The same client_id is repeated until it is accepted."""
        async with RawClient("127.0.0.1", self._port, self._token, "d0") as client:
            client_id = new_client_id(wall_ms())
            looked = 0
            while True:
                client.send(protocol.Send("p:ann0:rob", [protocol.SendItem(client_id, int(Kind.TEXT), BODY)]))
                await asyncio.sleep(0.2)
                self.dropped = self.dropped or client.closed.is_set()
                frames, looked = client.frames[looked:], len(client.frames)
                for frame in frames:
                    now = time.monotonic()
                    if isinstance(frame, protocol.Error):
                        self.answers.append((now, frame.code, frame.retryable, frame.retry_after_ms))
                    elif isinstance(frame, protocol.Sent):
                        if any(item.client_id == client_id for item in frame.items):
                            client_id = new_client_id(wall_ms())
                        self.answers.append((now, "sent", False, 0))
                client.ack()


async def disk(show: Show, quick: bool) -> None:
    require("root", os.geteuid() == 0)
    require("mount", shutil.which("mount") is not None)
    mounted: list[Path] = []

    def prepare(data: Path) -> None:
        mount(data)
        mounted.append(data)

    try:
        async with stage(prepare=prepare) as here:
            await _show(show, here, 3.0 if quick else 15.0)
    finally:
        for data in mounted:
            unmount(data)


async def _show(show: Show, here: Stage, full_s: float) -> None:
    users = [f"{name}{n}" for n in range(PAIRS) for name in ("ann", "bob")]
    phones = {user: await here.phone(user) for user in users}
    prober, pid = Prober(here), here.server.pid
    talking = [asyncio.create_task(_talk(user, phone)) for user, phone in phones.items()]
    probing = asyncio.create_task(prober.run())
    try:
        calm = time.monotonic()
        show.check(await until(lambda: bool(prober.since(calm, "sent")), 10), "before: messages are accepted")
        await asyncio.sleep(2.0)
        ballast = here.server.data / "ballast"
        size = await asyncio.to_thread(fill, ballast)
        full = time.monotonic()
        refused = await until(lambda: bool(prober.since(full, "unavailable")), REFUSED_WITHIN_S)
        took = time.monotonic() - full
        show.check(refused, f"full (a ballast of {size / 1e6:.0f} MB): refused after {took:.1f} s")
        await asyncio.sleep(full_s)
        errors = [answer for answer in prober.answers if answer[0] >= full and answer[1] != "sent"]
        good = all(code == "unavailable" and again and after for _, code, again, after in errors)
        show.check(good and bool(errors), f"{len(errors)} refusals, all unavailable, retryable, with a time")
        free = time.monotonic()
        ballast.unlink()
        back = await until(lambda: bool(prober.since(free, "sent")), RESUME_LIMIT_S)
        took = time.monotonic() - free
        show.check(
            back, f"room again: the first message is accepted after {took:.1f} s; {RESUME_LIMIT_S:.0f}"
        )
        await asyncio.sleep(2.0)
    finally:
        for task in (*talking, probing):
            task.cancel()
        await asyncio.gather(*talking, probing, return_exceptions=True)
    await _account(show, here, pid, prober)


async def _talk(user: str, phone: Phone) -> None:
    low, high = sorted((user, _other(user)))
    n = 0
    while True:
        n += 1
        await phone.send(f"p:{low}:{high}", BODY, 0, n)
        await asyncio.sleep(0.1)


def _other(user: str) -> str:
    return ("bob" if user.startswith("ann") else "ann") + user[3:]


async def _account(show: Show, here: Stage, pid: int, prober: Prober) -> None:
    """Everything arrives; nobody was disconnected; the ledger agrees."""
    records = [log.record for log in here.logs.values()]
    members = {f"p:ann{n}:bob{n}": (f"ann{n}", f"bob{n}") for n in range(PAIRS)}
    level = [(record.user, record.device) for record in records]

    def complete() -> bool:
        open_ = any(not sub.msg_id for record in records for sub in record.submitted.values())
        return not open_ and not check.judge(records, members, level, wall_ms()).count("lost")

    show.check(await until(complete, 60), "every message that was handed over is accepted and shown")
    verdict = check.judge(records, members, level, wall_ms())
    counts = " ".join(f"{kind}={verdict.count(kind)}" for kind in ("lost", "duplicates", "inversions"))
    show.check(verdict.good, f"{verdict.sizes['accepted']} accepted: {counts}")
    dropped = [record.user for record in records if any(what == "lost" for _, what in record.lives)]
    show.check(
        not dropped and not prober.dropped and here.server.pid == pid and here.server.starts == 1,
        f"no connection was lost ({dropped or 'none'}), no restart",
    )
    await finish(show, here)
