"""Power cuts under the embedded store: python -m tests.system.power [--cuts 1000] [--seed 1]

One run is recorded, write by write, through a VFS. Then, for each of many points of the recording, the files
are rebuilt as a cut at that point may leave them (unsynced writes lost, kept or torn at a sector), the store
is opened on them, and everything that a call had returned before the point must be there. The same with
synchronous=NORMAL must lose something, or the test could not see a loss.
Source: promises.md P2.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import apsw

from fastim.errors import FastimError
from fastim.model import Fate
from fastim.store.base import (
    AppendFrame,
    AppendItem,
    AppendStatus,
    DueRequest,
    Flush,
    Park,
    Settled,
)
from fastim.store.sqlite import SqliteStore, files
from tests.simulation.disk import SECTOR, _apply, ram_directory

T = TypeVar("T")
NOW = 1_790_000_000_000
CONVS = ("p:alice:bob", "p:bob:carol", "g:team")
MEMBERS = {
    "p:alice:bob": ("alice", "bob"),
    "p:bob:carol": ("bob", "carol"),
    "g:team": ("alice", "bob", "carol"),
}
_numbers = itertools.count(1)


async def inline(work: Callable[[], T]) -> T:
    return work()


# ------------------------------------------------------------------------------------------------ recording


class Recorder(apsw.VFS):
    """Everything that reaches the disk, in order: (what, file, offset or size, data)."""

    def __init__(self) -> None:
        self.name = f"recorder-{next(_numbers)}"
        self.operations: list[tuple[str, str, int, bytes]] = []
        super().__init__(self.name, "unix")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return _RecordedFile(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self.operations.append(("delete", Path(filename).name, 0, b""))


class _RecordedFile(apsw.VFSFile):
    def __init__(self, recorder: Recorder, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        super().__init__("unix", name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self.file = Path(path).name if path else ""
        self.operations = recorder.operations

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self.operations.append(("write", self.file, offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self.operations.append(("truncate", self.file, newsize, b""))

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self.operations.append(("sync", self.file, 0, b""))


@dataclass
class Recording:
    """The operations, and what was promised by when: (operations before the call returned, fact)."""

    operations: list[tuple[str, str, int, bytes]]
    promises: list[tuple[int, tuple[Any, ...]]] = field(default_factory=list)


async def record(seed: int, steps: int, synchronous: str) -> Recording:
    """A life of the store with small checkpoints, so that cuts fall into those as well."""
    rng = random.Random(seed)
    recorder = Recorder()
    recording = Recording(recorder.operations)
    directory = Path(ram_directory())
    with mock.patch.object(files, "CHECKPOINT_PAGES", 60):
        store = await SqliteStore.open(directory, runner=inline, vfs=recorder.name, synchronous=synchronous)
        life = _Life(store, rng, recording)
        await life.begin()
        for _ in range(steps):
            await life.step()
        await store.close()
    recorder.unregister()
    shutil.rmtree(directory)
    return recording


class _Life:
    """What clients and dispatch do, and what they were told."""

    def __init__(self, store: SqliteStore, rng: random.Random, recording: Recording) -> None:
        self.store = store
        self.rng = rng
        self.recording = recording
        self.number = 0
        self.now = NOW
        self.heads: dict[str, int] = {}

    def promise(self, *fact: Any) -> None:
        self.recording.promises.append((len(self.recording.operations), fact))

    async def begin(self) -> None:
        for user in ("alice", "bob", "carol"):
            await self.store.register_device(user, "phone", "app", NOW)
            self.promise("device", user)
        await self.store.create_group("team", "alice", MEMBERS["g:team"], NOW)
        self.promise("group", "g:team")
        self.heads["g:team"] = 1

    async def step(self) -> None:
        self.now += self.rng.choice((0, 5, 100))
        await self.rng.choices((self.append, self.flush, self.read, self.settle, self.park), (6, 3, 1, 1, 1))[
            0
        ]()

    async def append(self) -> None:
        frames = []
        for _ in range(self.rng.randint(1, 4)):
            conv = self.rng.choice(CONVS)
            items = []
            for _ in range(self.rng.randint(1, 3)):
                self.number += 1
                body = b"%d " % self.number * self.rng.choice((1, 20, 200))
                items.append(AppendItem(self.number.to_bytes(16, "big"), 1, body))
            frames.append(AppendFrame(conv, self.rng.choice(MEMBERS[conv]), tuple(items)))
        for frame, result in zip(frames, await self.store.append(frames, self.now), strict=True):
            for item, stored in zip(frame.items, result.items, strict=True):
                assert stored.status == AppendStatus.STORED
                self.promise("message", frame.conv, stored.seq, stored.msg_id, item.client_id, item.body)
                self.heads[frame.conv] = stored.seq

    async def flush(self) -> None:
        conv = self.rng.choice(sorted(self.heads))
        user = self.rng.choice(MEMBERS[conv])
        start = (await self.store.position(user, "phone", conv)).cursor
        to_seq = min(start + self.rng.randint(1, 5), self.heads[conv])
        due = DueRequest(user, conv, to_seq + 1, self.now + 1_000)
        await self.store.flush(
            Flush((Settled(user, "phone", conv, start + 1, to_seq, Fate.ACKED),), (due,), "n1", self.now)
        )
        self.promise("cursor", user, conv, to_seq)

    async def read(self) -> None:
        conv = self.rng.choice(sorted(self.heads))
        user = self.rng.choice(MEMBERS[conv])
        mark, _ = await self.store.read(user, conv, self.rng.randint(1, self.heads[conv]), self.now)
        self.promise("read", user, conv, mark)

    async def settle(self) -> None:
        """Everything that is not acked yet gets a due row first, as a recovery does."""
        head = await self.store.head_msg_id()
        due = [
            DueRequest(user, found.conv, found.from_seq, self.now)
            for found in await self.store.unsettled(head)
            for user in found.members
        ]
        await self.store.flush(Flush((), tuple(due), "n1", self.now))
        await self.store.settle(head)
        self.promise("settled", head)

    async def park(self) -> None:
        conv = self.rng.choice(sorted(self.heads))
        user = self.rng.choice(MEMBERS[conv])
        if (await self.store.park([Park(user, conv, 1, 1 << 50, True, self.now, 10_000)], self.now))[0]:
            self.promise("parked", user, conv, self.heads[conv])


# ------------------------------------------------------------------------------------------------ cutting


class Platter:
    """The disk along the recording: what is safe, and what was written since."""

    def __init__(self) -> None:
        self.images: dict[str, bytearray] = {}
        self.since: dict[str, list[tuple[int, bytes | None]]] = {}

    def take(self, what: str, file: str, offset: int, data: bytes) -> None:
        if what == "delete":
            self.images.pop(file, None)
            self.since.pop(file, None)
            return
        image = self.images.setdefault(file, bytearray())
        since = self.since.setdefault(file, [])
        if what == "sync":
            for at, written in since:
                _apply(image, at, written)
            since.clear()
        else:
            since.append((offset, data if what == "write" else None))

    def cut(self, rng: random.Random, target: Path) -> None:
        keep = rng.choice((0.0, 0.5, 0.9, 1.0))
        for file, safe in self.images.items():
            image = bytearray(safe)
            for offset, data in self.since[file]:
                if rng.random() < keep:
                    if data is not None and rng.random() < 0.3:
                        data = data[: rng.randrange(0, len(data) + 1, SECTOR)]
                    _apply(image, offset, data)
            (target / file).write_bytes(image)


async def judge(recording: Recording, point: int, directory: Path) -> list[str]:
    """What is wrong with what a cut before operation `point` left."""
    try:
        store = await SqliteStore.open(directory, runner=inline)
    except FastimError as error:
        return [f"it does not open: {error}"]
    try:
        found = await _missing(recording, point, store)
        found += await _inconsistent(store)
    except FastimError as error:
        return [f"it does not answer: {error}"]
    finally:
        await store.close()
    return found


async def _missing(recording: Recording, point: int, store: SqliteStore) -> list[str]:
    messages: dict[tuple[str, int], Any] = {}
    after = 0
    while page := await store.scan(after, 1_000):
        messages.update(((m.conv, m.seq), m) for m in page)
        after = page[-1].msg_id
    settled = await store.settled_mark()
    kept: dict[tuple[Any, ...], int] = {}
    wrong = []
    for returned, (what, *fact) in recording.promises:
        if returned > point:
            break
        if what == "message":
            conv, seq, msg_id, client_id, body = fact
            message = messages.get((conv, seq))
            if message is None or (message.msg_id, message.client_id, message.body) != (
                msg_id,
                client_id,
                body,
            ):
                wrong.append(f"{conv}/{seq} was returned and is not there")
        elif what in ("cursor", "read"):
            kept[what, *fact[:2]] = fact[2]
        elif what == "settled" and settled < fact[0]:
            wrong.append(f"the settled mark was {fact[0]} and is {settled}")
        elif what == "group" and not await store.members(fact[0]):
            wrong.append(f"{fact[0]} is gone")
        elif what == "device" and not await store.devices(fact[0]):
            wrong.append(f"{fact[0]} has no device any more")
    for (what, user, conv), mark in kept.items():
        if what == "cursor":
            now = (await store.position(user, "phone", conv)).cursor
        else:
            now = (await store.read(user, conv, 0, NOW))[0]
        if now < mark:
            wrong.append(f"the {what} of {user} in {conv} was {mark} and is {now}")
    return wrong


async def _inconsistent(store: SqliteStore) -> list[str]:
    """Checks that need no promise."""
    wrong = []
    writer = store._writer
    assert writer is not None
    verdict = writer.sql.value("PRAGMA integrity_check")
    if verdict != "ok":
        wrong.append(f"integrity_check: {verdict}")
    seqs: dict[str, int] = {}
    after = 0
    while page := await store.scan(after, 1_000):
        for message in page:
            if message.seq != seqs.get(message.conv, 0) + 1:
                wrong.append(f"{message.conv} has a hole before {message.seq}")
            seqs[message.conv] = message.seq
        after = page[-1].msg_id
    for user in ("alice", "bob", "carol"):
        wrong += [
            f"unread of {user} in {conv} is {kept}, counted {n}"
            for conv, kept, n in await store.recount(user)
        ]
        behind = {item.conv: item.head for item in (await store.behind(user, "phone", 0, 100)).items}
        for conv, head in seqs.items():
            if user not in MEMBERS[conv]:
                continue
            cursor = (await store.position(user, "phone", conv)).cursor
            if cursor < head and behind.get(conv) != head:
                wrong.append(f"{user} is behind in {conv} and is not told")
    obligations, _ = await store.obligations(0, 10_000, NOW)
    wrong += [
        f"{one.conv}/{one.seq} for {one.user} is LOST" for one in obligations if one.state.name == "LOST"
    ]
    frame = AppendFrame("p:alice:bob", "alice", (AppendItem(b"after the cut...", 1, b"x"),))
    (stored,) = (await store.append([frame], NOW))[0].items
    known = stored.status == AppendStatus.STORED
    if known and (stored.seq != seqs.get("p:alice:bob", 0) + 1 or stored.msg_id <= after):
        wrong.append(f"the next message got {stored}")
    return wrong


@dataclass
class Outcome:
    cuts: int
    promises: int
    bad: list[tuple[int, list[str]]] = field(default_factory=list)
    """(operation, what is wrong)"""


async def try_cuts(seed: int, cuts: int, steps: int, synchronous: str = "FULL") -> Outcome:
    """Cut one recording at `cuts` of its operations."""
    rng = random.Random(seed * 7 + 1)
    recording = await record(seed, steps, synchronous)
    operations = recording.operations
    outcome = Outcome(min(cuts, len(operations)), len(recording.promises))
    points = sorted(rng.sample(range(len(operations)), outcome.cuts))
    platter = Platter()
    done = 0
    for point in points:
        for operation in operations[done:point]:
            platter.take(*operation)
        done = point
        target = Path(ram_directory())
        platter.cut(rng, target)
        wrong = await judge(recording, point, target)
        if wrong:
            outcome.bad.append((point, wrong))
        shutil.rmtree(target)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.monotonic()
    full = asyncio.run(try_cuts(args.seed, args.cuts, args.steps))
    normal = asyncio.run(try_cuts(args.seed, min(args.cuts, 200), args.steps, "NORMAL"))
    for point, wrong in full.bad[:10]:
        print(f"cut at operation {point}: {wrong[:3]}")
    print(f"{full.promises} promises, {time.monotonic() - start:.0f} s")
    print(f"synchronous=NORMAL: {len(normal.bad)} of {normal.cuts} cuts lose something (it must be seen)")
    print(f"synchronous=FULL: {len(full.bad)} of {full.cuts} cuts lose something")
    return 0 if not full.bad and normal.bad else 1


if __name__ == "__main__":
    sys.exit(main())
