"""A node under random clients, deliveries and faults, against what each client may and must see.

No dispatch: its Delivers may be lost, and nobody nudges. So the end is a connection of every device, which
must bring it level whatever was lost before.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from fastim.bus.base import Outgoing
from fastim.bus.records import Deliver, Nudge, Reply
from fastim.bus.records import encode as encode_record
from fastim.model import Message
from fastim.protocol import (
    Ack,
    Acks,
    Changes,
    Frame,
    Hello,
    Level,
    Msg,
    Ping,
    Pull,
    Sent,
    SentItem,
    Skip,
    Sync,
    encode_msg_tail,
)
from tests.system.node_world import NodeWorld, Peer, node_world

USERS = ("ann", "bob")
CONVS = ("p:ann:bob", "g:team", "p:ann:cleo", "p:bob:cleo")
MEMBERS = {"p:ann:bob": ("ann", "bob"), "g:team": ("ann", "bob", "cleo"), "p:ann:cleo": ("ann", "cleo"),
           "p:bob:cleo": ("bob", "cleo")}  # fmt: skip


STEPS = {
    "send": 30, "own": 8, "ack": 40, "connect": 12, "leave": 2, "vanish": 4, "time": 8, "pull": 4, "sync": 2,
    "nudge": 4, "fault": 3, "heal": 6,
}  # fmt: skip
FAULTS = (
    "store.flush", "store.stream", "store.position", "store.conversations", "store.register_device",
    "store.unread", "presence.attach", "presence.detach", "presence.locate", "bus.publish",
)  # fmt: skip


class Device:
    """A client that keeps the protocol, and checks what a server owes it at every frame."""

    def __init__(self, user: str, name: str, run: Run) -> None:
        self.user, self.name, self.run = user, name, run
        self.peer: Peer | None = None
        self.seen = 0
        self.session, self.tag, self.cursor = "", 0, 0
        self.last: dict[str, int] = {}
        self.held: dict[str, dict[int, int]] = {}
        """conv -> from_seq -> to_seq of what came behind a hole"""
        self.new_tag = 0
        self.ids: list[int] = []

    @property
    def connected(self) -> bool:
        """With HELLO: before, a client says nothing."""
        return self.peer is not None and self.peer.link.state == "open" and bool(self.peer.of(Hello))

    def connect(self, resume: bool) -> None:
        if self.peer is not None:
            self.read()
        self.peer = self.run.world.dial()
        self.seen = self.new_tag = 0
        self.ids.clear()
        for held in self.held.values():
            held.clear()
        more = {"session": self.session, "tag": self.tag} if resume else {}
        self.run.world.auth(self.peer, self.user, self.name, user_cursor=self.cursor, **more)

    def read(self) -> None:
        assert self.peer is not None
        while self.seen < len(self.peer.frames):
            frame = self.peer.frames[self.seen]
            self.seen += 1
            if self.seen == 1 and not isinstance(frame, Hello):
                assert self.peer.close_code, f"{frame} came before HELLO"
            self.take(frame)

    def take(self, frame: Frame) -> None:
        if isinstance(frame, Hello):
            if frame.resumed != 1:
                self.tag = 0
            self.session = frame.session
            self.new_tag = self.tag
        tag = getattr(frame, "tag", 0)
        if tag:
            assert tag > self.new_tag, f"tag {tag} after {self.new_tag}"
            self.new_tag = tag
        if isinstance(frame, Changes):
            for change in frame.items:
                if not self.last.get(change.conv):
                    # Nothing was ever shown here: a new device starts where the others stand.
                    self.last[change.conv] = change.cursor
                    self.hold(change.conv, change.cursor, change.cursor)
        elif isinstance(frame, Msg):
            self.run.check_message(self, frame)
            self.ids.append(frame.msg_id)
            self.hold(frame.conv, frame.seq, frame.seq)
        elif isinstance(frame, Skip):
            self.hold(frame.conv, frame.from_seq, frame.to_seq)
        elif isinstance(frame, Sent):
            for item in frame.items:
                self.hold(frame.conv, item.seq, item.seq)
        elif isinstance(frame, Level):
            self.run.check_level(self, frame)
            if not self.holds:
                self.cursor = max(self.cursor, frame.user_cursor)
        if tag and not self.holds:
            self.tag = self.new_tag

    @property
    def holds(self) -> bool:
        return any(self.held.values())

    def hold(self, conv: str, first: int, last: int) -> None:
        held = self.held.setdefault(conv, {})
        held[first] = max(last, held.get(first, 0))
        at = self.last.setdefault(conv, 0)
        for start in sorted(held):
            if start > at + 1:
                break
            at = max(at, held.pop(start))
        self.last[conv] = at

    def has(self, conv: str, seq: int) -> bool:
        if seq <= self.last.get(conv, 0):
            return True
        return any(first <= seq <= last for first, last in self.held.get(conv, {}).items())

    def ack(self, rng: random.Random, *, all_of_it: bool = False) -> None:
        """Cumulative, or one by one, or an older tag."""
        assert self.peer is not None
        self.read()
        how = 0 if all_of_it else rng.randrange(4)
        if how == 1 and self.ids:
            self.peer.say(Acks(rng.sample(self.ids, rng.randrange(1, len(self.ids) + 1))[:256]))
        elif how == 2 and self.tag > 1:
            self.peer.say(Ack(rng.randrange(1, self.tag + 1)))
        elif self.tag:
            self.peer.say(Ack(self.tag))

    def pull(self) -> None:
        assert self.peer is not None
        for conv, held in self.held.items():
            if held:
                first = self.last.get(conv, 0) + 1
                self.peer.say(Pull(conv, first, max(first, min(held) - 1)))


class Run:
    """One seed."""

    def __init__(self, world: NodeWorld, rng: random.Random, lossy: bool) -> None:
        self.world, self.rng, self.lossy = world, rng, lossy
        self.truth: dict[str, list[Message]] = {conv: [] for conv in CONVS}
        self.devices = [Device(user, name, self) for user in USERS for name in ("phone", "laptop")]

    def check_message(self, device: Device, frame: Msg) -> None:
        message = self.truth[frame.conv][frame.seq - 1]
        assert (message.msg_id, message.body) == (frame.msg_id, frame.body)
        assert device.user in MEMBERS[frame.conv]

    def check_level(self, device: Device, level: Level) -> None:
        """C2: whatever changed up to the version was sent before."""
        for conv, messages in self.truth.items():
            if device.user in MEMBERS[conv]:
                for message in messages:
                    if message.msg_id <= level.user_cursor:
                        assert device.has(conv, message.seq), (device.user, device.name, conv, message.seq)

    async def step(self) -> None:
        rng, world = self.rng, self.world
        device = rng.choice(self.devices)
        match rng.choices(list(STEPS), list(STEPS.values()))[0]:
            case "send":
                await self.send(rng.choice(CONVS), rng.choice(("ann", "bob", "cleo")))
            case "own" if device.connected:
                await self.own(device)
            case "ack" if device.connected:
                device.ack(rng)
            case "connect" if not device.connected or rng.random() < 0.2:
                device.connect(resume=rng.random() < 0.7)
            case "leave" if device.connected:
                device.peer.leave()  # type: ignore[union-attr]
            case "vanish" if device.connected:
                device.peer.vanish()  # type: ignore[union-attr]
            case "pull" if device.connected:
                device.pull()
            case "sync" if device.connected:
                device.peer.say(Sync(device.cursor))  # type: ignore[union-attr]
            case "nudge":
                await self.publish(Nudge(device.user, rng.choice(CONVS), 1))
            case "time":
                await self.time(rng.randrange(1, 12))
            case "fault":
                name, call = rng.choice(FAULTS).split(".")
                port = {"store": world.store, "presence": world.presence, "bus": world.bus}[name]
                if rng.random() < 0.5:
                    port.failing[call] = rng.randrange(1, 4)
                elif call not in port._gates:
                    port.late = rng.random() < 0.5
                    port.hold(call)
            case "heal":
                self.heal()
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        if rng.random() < 0.1:
            await world.quiet()

    async def time(self, sweeps: int) -> None:
        for _ in range(sweeps):
            self.world.clock.passed_ms += 250
            self.world.node.sweep(self.world.clock.mono_ms())
            for one in self.devices:
                if one.connected and self.rng.random() < 0.5:
                    one.peer.say(Ping())  # type: ignore[union-attr]
            await asyncio.sleep(0)

    def heal(self) -> None:
        for port in (self.world.store, self.world.presence, self.world.bus):
            port.heal()

    async def publish(self, record: Nudge | Reply | Deliver) -> None:
        await self.world.real_bus.publish([Outgoing(self.world.node.inbox, "k", encode_record(record))])

    async def store(self, conv: str, sender: str) -> list[Message]:
        if sender not in MEMBERS[conv]:
            return []
        bodies = [b"%d" % self.rng.getrandbits(64) for _ in range(self.rng.randrange(1, 4))]
        messages = await self.world.append(conv, sender, *bodies)
        self.truth[conv] += messages
        return messages

    async def deliver(self, messages: list[Message], skip: str) -> None:
        for m in messages:
            if self.lossy and self.rng.random() < 0.1:
                continue
            users = [user for user in MEMBERS[m.conv] if user in USERS]
            tail = encode_msg_tail(m)
            await self.publish(Deliver(m.conv, m.seq, m.msg_id, m.loss_time_ms, m.sender, users, skip, tail))

    async def send(self, conv: str, sender: str) -> None:
        await self.deliver(await self.store(conv, sender), "")

    async def own(self, device: Device) -> None:
        """Answered with SENT, as dispatch does: before the Delivers."""
        session = self.world.node.pool.of_device(device.user, device.name)
        conv = self.rng.choice(CONVS)
        if session is None or device.user not in MEMBERS[conv]:
            return
        messages = await self.store(conv, device.user)
        items = [SentItem(m.client_id, m.msg_id, m.seq, m.ts_ms) for m in messages]
        await self.publish(Reply(session.id, device.user, conv, 1, items, []))
        await self.deliver(messages, session.id)

    def frames(self) -> int:
        return sum(len(device.peer.frames) for device in self.devices if device.peer is not None)

    async def end(self) -> None:
        """Faults stop; every device connects and acknowledges: all is level, settled and accounted."""
        world = self.world
        self.heal()
        await world.quiet()
        for device in self.devices:
            device.connect(resume=self.rng.random() < 0.5)
        await world.pass_ms(500)  # whoever waits for the store is looked at by the sweep
        for _ in range(400):
            for device in self.devices:
                device.read()
                if not device.connected:
                    device.connect(resume=False)
                if device.connected:
                    device.ack(self.rng, all_of_it=True)
                    device.pull()
            frames = self.frames()
            await world.quiet()
            due = [key for key in await world.due() if key[0] in USERS]
            if frames == self.frames() and not due and not any(device.holds for device in self.devices):
                break
            if frames == self.frames():
                # Acks were lost, or came too late to count: dispatch has the node stream from the cursor.
                for user, conv in due:
                    await self.publish(Nudge(user, conv, 1))
                await world.quiet()
            if frames == self.frames():
                # A window full of what lies above a hole: it has to time out.
                await self.time(36)
        for device in self.devices:
            device.read()
            for conv in CONVS:
                if device.user in MEMBERS[conv]:
                    assert device.last.get(conv, 0) == len(self.truth[conv]), (device.user, device.name, conv)
        for user in USERS:
            for conv in CONVS:
                assert set(await world.states(conv, user)) <= {"acked"}, (user, conv)
        assert world.unsettled == 0
        assert {key: row for key, row in (await world.due()).items() if key[0] in USERS} == {}


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("seed", range(10))
async def test_whatever_happens_every_device_comes_level(tmp_path: Path, seed: int, lossy: bool) -> None:
    rng = random.Random(seed * 2 + lossy)
    async with node_world(
        tmp_path, window_messages=rng.choice((2, 4, 128)), page_messages=rng.choice((2, 64)),
        page_conversations=rng.choice((1, 100)), retry_first_ms=1, retry_most_ms=2, resume_ttl_ms=20_000,
        idle_ms=10_000_000, slow_ms=rng.choice((10_000, 10_000_000)),
    ) as world:  # fmt: skip
        await world.known("ann", "bob", "cleo")
        await world.real_store.create_group("team", "ann", ["bob", "cleo"], world.clock.wall_ms())
        run = Run(world, rng, lossy)
        run.truth["g:team"] += await world.real_store.scan(0, 10)
        for _ in range(150):
            await run.step()
        await run.end()
