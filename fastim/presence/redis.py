"""Presence between processes: Redis 7 or Valkey, one server or a cluster.

Hides keys, scripts, and what makes an entry valid without anybody removing it. All of it is one comparison:
**an entry counts while its node's lease lives, has the entry's boot, and was opened below the entry's
generation** (a room's place: by exactly that opening). Generations come from one counter, kept with the
leases and never below the server's clock, so a lease that is opened again begins above everything that an
earlier one carried, and what a flush or a failover forgot is never given out a second time.

 leases            one hash: node -> boot|opened|ends_ms, and "" -> the newest generation
 u:<user>          one hash: device -> generation|boot|since_ms|class|node|session, and "" -> grace_until_ms
 r:<room>          one hash: node -> opened|stamp|boot|members
 epoch:{n}         one per server: a random name, gone when the server was flushed

attach is two steps, because in a cluster the leases and the user are on different servers: `admit` gives a
generation to a node whose lease lives, `attach` writes under it. A lease that ends in between leaves an entry
that nobody counts; of two racing attaches the higher generation stands, and the lower is told so and admitted
again. An attach of which nobody learned how it ended is taken back by its generation with the next renew.

renew also asks every server for its epoch; one that was flushed, restarted or replaced answers another, and
the node registers again (the leases of a cluster live on one server, the attachments on all).

Keys of users and rooms end by themselves after keep_ms; renew lengthens those that this process still holds,
a few at a time, so what dead nodes left behind does not stay for ever.

I1  the contract (P1-P6)                    tests/contract/test_presence_redis.py, on one server and a cluster
I2  a flush or restart is seen by the next renew, on whichever server     tests/presence/test_redis_outages.py
I3  generations go on across flush, restart and a clock set back          same
Source: docs/adr/0090-redis-presence.md
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Final

from fastim.clock import Clock, SystemClock
from fastim.errors import PresenceUnavailable, UsageError
from fastim.presence.base import Attachment, Location, RoomNode, Watcher
from fastim.presence.changes import Box, Interest, Subject, subjects_of
from fastim.presence.feed import Feed
from fastim.presence.scripts import SCRIPTS
from fastim.presence.shards import Command, Shards, Target

_KEEP_MS: Final = 86_400_000
_MOST_KEPT: Final = 500
"""Keys lengthened and attaches taken back per renew."""
_TRIES: Final = 4
"""Attaches of one device that race each other: each round one of them is through."""

_OPEN: Final = SCRIPTS["lease_open"]
_RENEW: Final = SCRIPTS["lease_renew"]
_END: Final = SCRIPTS["lease_end"]
_READ: Final = SCRIPTS["lease_read"]
_ADMIT: Final = SCRIPTS["admit"]
_ATTACH: Final = SCRIPTS["attach"]
_DETACH: Final = SCRIPTS["detach"]
_ENTER: Final = SCRIPTS["enter"]
_LEAVE: Final = SCRIPTS["leave"]
_EPOCH: Final = SCRIPTS["epoch"]

Leases = dict[str, tuple[int, int]]
"""node -> (boot, opened)"""


class _Lease:
    """What this process knows of a lease that it opened."""

    __slots__ = ("boot", "ends_mono_ms", "epochs", "opened")

    def __init__(self, boot: int, opened: int, ends_mono_ms: int, epochs: dict[int, bytes]) -> None:
        self.boot = boot
        self.opened = opened
        self.ends_mono_ms = ends_mono_ms
        """At the earliest: counted from before it was asked for."""
        self.epochs = epochs


class RedisPresence:
    """The PresenceStore of a cluster. All calls come from one event loop; connects with the first of them."""

    def __init__(
        self,
        url: str,
        clock: Clock | None = None,
        *,
        deadline_ms: int = 2_000,
        keep_ms: int = _KEEP_MS,
        poll_ms: int = 1_000,
    ) -> None:
        """deadline_ms: of every call. poll_ms: how late a watcher is told of a lease that ended.

        Raises UsageError for a URL that it cannot follow (see fastim.presence.shards).
        """
        target = Target(url)
        self._clock = clock or SystemClock()
        self._keep_ms = keep_ms
        self._shards = Shards(target, deadline_ms / 1000)
        self._prefix = target.prefix.encode()
        self._leases_key = self._prefix + b"leases"
        self._read_leases = Command.of(_READ, self._leases_key)
        self._leases_raw: list[bytes] = []
        self._leases: Leases = {}
        """What _leases_raw says."""
        self._mine: dict[str, _Lease] = {}
        self._generation = 0
        """The highest seen."""
        self._stamp = 0
        self._held: dict[tuple[bytes, str], tuple[int, int]] = {}
        """(key, device or "") of what this process put there -> (when its key was last lengthened, mono ms;
        generation or 0); the longest ago first."""
        self._owed: dict[tuple[str, str], int] = {}
        """(user, device) -> generation of an attach that may stand without a session."""
        self._feed = Feed(
            self._shards, self._channel, self._leases_key, self._state, poll_ms / 1000, deadline_ms / 1000
        )

    # ------------------------------------------------------------------------------------------- leases

    async def open_lease(self, node: str, boot: int, ttl_ms: int) -> None:
        # First: what is lost after this is known to be lost, whatever is written meanwhile.
        epochs = await self._epochs()
        ends_mono_ms = self._clock.mono_ms() + ttl_ms
        command = Command.of(_OPEN, self._leases_key, node, boot, ttl_ms, self._generation)
        ((granted, opened),) = await self._shards.ask([command])
        if not granted:
            self._lose(node, boot)
            raise PresenceUnavailable(f"{node} boot {opened} has the lease; this is boot {boot}")
        self._generation = max(self._generation, opened)
        self._mine[node] = _Lease(boot, opened, ends_mono_ms, epochs)

    async def renew(self, node: str, boot: int, ttl_ms: int) -> bool:
        ends_mono_ms = self._clock.mono_ms() + ttl_ms
        (opened,) = await self._shards.ask([Command.of(_RENEW, self._leases_key, node, boot, ttl_ms)])
        lease = self._mine.get(node)
        if lease is None or (lease.boot, lease.opened) != (boot, opened):
            self._lose(node, boot)
            return False
        lease.ends_mono_ms = ends_mono_ms
        epochs = await self._epochs()
        lost = any(lease.epochs.get(n, epoch) != epoch for n, epoch in epochs.items())
        lease.epochs = epochs
        if lost:
            self._lose(node, boot)
            return False
        await self._keep()
        return True

    async def end_lease(self, node: str, boot: int) -> None:
        self._lose(node, boot)
        await self._shards.ask([Command.of(_END, self._leases_key, node, boot)])

    async def nodes(self) -> list[tuple[str, int]]:
        (raw,) = await self._shards.ask([self._read_leases])
        return [(node, boot) for node, (boot, _) in self._live(raw).items()]

    def _lose(self, node: str, boot: int) -> None:
        """This process may not build on the lease any more."""
        if node in self._mine and self._mine[node].boot == boot:
            del self._mine[node]

    async def _epochs(self) -> dict[int, bytes]:
        """What every server says of itself."""
        tags = list(await self._shards.masters())
        name = secrets.token_hex(8)
        asked = [Command.of(_EPOCH, b"%sepoch:{%d}" % (self._prefix, n), name) for n in tags]
        return dict(zip(tags, await self._shards.ask(asked), strict=True))

    async def _keep(self) -> None:
        """Take back what is owed, and lengthen keys that have used up a third of their time."""
        owed = list(self._owed.items())[:_MOST_KEPT]
        commands = [self._detach_command(user, device, gen, 0) for (user, device), gen in owed]
        mono_ms = self._clock.mono_ms()
        due: list[tuple[bytes, str]] = []
        for held, (kept_mono_ms, _) in self._held.items():
            if kept_mono_ms + self._keep_ms // 3 > mono_ms or len(due) == _MOST_KEPT:
                break
            due.append(held)
        commands += [Command(b"PEXPIRE", key, self._keep_ms) for key, _ in due]
        if not commands:
            return
        await self._shards.ask(commands)
        for whose, generation in owed:
            if self._owed.get(whose) == generation:
                del self._owed[whose]
        for held in due:
            if held in self._held:
                self._hold(*held, self._held[held][1])

    def _hold(self, key: bytes, device: str, generation: int) -> None:
        self._held.pop((key, device), None)
        self._held[key, device] = self._clock.mono_ms(), generation

    def _let_go(self, key: bytes, device: str, generation: int) -> None:
        if self._held.get((key, device), (0, -1))[1] == generation:
            del self._held[key, device]

    def _live(self, raw: list[bytes]) -> Leases:
        if raw != self._leases_raw:
            leases: Leases = {}
            for node, lease in zip(raw[::2], raw[1::2], strict=True):
                boot, opened = _numbers(lease, 2)
                leases[node.decode()] = boot, opened
            self._leases_raw, self._leases = raw, leases
        return self._leases

    # -------------------------------------------------------------------------------------- attachments

    async def attach(
        self, user: str, device: str, device_class: str, node: str, boot: int, session: str
    ) -> tuple[Attachment, tuple[Attachment, ...]]:
        key = self._user_key(user)
        for _ in range(_TRIES):
            generation = await self._admit(node, boot)
            since_ms = self._clock.wall_ms()
            entry = f"{boot}|{since_ms}|{device_class}|{node}|{session}"
            command = Command.of(_ATTACH, key, device, generation, entry, self._keep_ms)
            try:
                ((stands, old),) = await self._shards.ask([command])
            except BaseException:
                # Perhaps it stands there, and no session knows of it.
                self._owed[user, device] = generation
                raise
            if stands:
                break
        else:
            raise PresenceUnavailable(f"{user} {device} is attached by others all the time")
        self._owed.pop((user, device), None)
        self._hold(key, device, generation)
        new = Attachment(user, device, device_class, node, boot, session, generation, since_ms)
        return new, await self._replaced(user, device, old)

    async def detach(self, user: str, device: str, generation: int, grace_until_ms: int = 0) -> bool:
        (entry,) = await self._shards.ask([self._detach_command(user, device, generation, grace_until_ms)])
        self._let_go(self._user_key(user), device, generation)
        if entry is None:
            return False
        gone = _attachment(user, device, entry)
        lease = self._mine.get(gone.node)
        # Of a node that is not of this process: whoever detaches for it has its word that it stood there.
        return lease is None or lease.boot != gone.boot or lease.opened < generation

    async def locate(self, users: Sequence[str]) -> dict[str, Location]:
        if not users:
            return {}
        asked = list(dict.fromkeys(users))
        commands = [self._read_leases, *(Command(b"HGETALL", self._user_key(user)) for user in asked)]
        raw, *entries = await self._shards.ask(commands)
        leases = self._live(raw)
        wall_ms = self._clock.wall_ms()
        found: dict[str, Location] = {}
        for user, fields in zip(asked, entries, strict=True):
            if fields:
                location = _location(user, fields, leases, wall_ms)
                if location.attachments or location.grace_until_ms:
                    found[user] = location
        return found

    async def _admit(self, node: str, boot: int) -> int:
        command = Command.of(_ADMIT, self._leases_key, node, boot, self._generation)
        (generation,) = await self._shards.ask([command])
        if not generation:
            raise PresenceUnavailable(f"{node} boot {boot} has no live lease")
        self._generation = max(self._generation, generation)
        return int(generation)

    async def _replaced(self, user: str, device: str, entry: bytes) -> tuple[Attachment, ...]:
        """What stood there, if it counted."""
        if not entry:
            return ()
        old = _attachment(user, device, entry)
        mine = self._mine.get(old.node)
        if mine is not None and mine.boot == old.boot:
            return (old,) if mine.opened < old.generation else ()
        try:
            (raw,) = await self._shards.ask([self._read_leases])
        except PresenceUnavailable:
            return (old,)  # telling a session that may be gone to close does no harm
        return (old,) if _counts(old, self._live(raw)) else ()

    def _detach_command(self, user: str, device: str, generation: int, grace_until_ms: int) -> Command:
        return Command.of(_DETACH, self._user_key(user), device, generation, grace_until_ms)

    # -------------------------------------------------------------------------------------------- rooms

    async def enter(self, room: str, node: str, boot: int, members: int) -> None:
        if members < 1:
            raise UsageError(f"members is {members}; at least 1, else leave")
        lease = self._mine.get(node)
        if lease is None or lease.boot != boot or lease.ends_mono_ms <= self._clock.mono_ms():
            raise PresenceUnavailable(f"{node} boot {boot} has no live lease")
        key = self._room_key(room)
        self._stamp += 1
        word = f"{boot}|{members}"
        command = Command.of(_ENTER, key, node, lease.opened, self._stamp, word, self._keep_ms)
        await self._shards.ask([command])
        self._hold(key, "", 0)

    async def leave(self, room: str, node: str, boot: int) -> None:
        key = self._room_key(room)
        self._stamp += 1
        await self._shards.ask([Command.of(_LEAVE, key, node, boot, self._stamp)])
        self._let_go(key, "", 0)

    async def room_nodes(self, rooms: Sequence[str]) -> dict[str, tuple[RoomNode, ...]]:
        if not rooms:
            return {}
        asked = list(dict.fromkeys(rooms))
        commands = [self._read_leases, *(Command(b"HGETALL", self._room_key(room)) for room in asked)]
        raw, *entries = await self._shards.ask(commands)
        leases = self._live(raw)
        found: dict[str, tuple[RoomNode, ...]] = {}
        for room, fields in zip(asked, entries, strict=True):
            places = []
            for name, entry in zip(fields[::2], fields[1::2], strict=True):
                opened, _, boot, members = _numbers(entry, 4)
                node = name.decode()
                if leases.get(node) == (boot, opened):
                    places.append(RoomNode(node, boot, members))
            if places:
                found[room] = tuple(places)
        return found

    # ----------------------------------------------------------------------------------------- watching

    def watch(self) -> Watcher:
        return _RedisWatcher(self._feed.interest, self._feed)

    async def close(self) -> None:
        await self._feed.close()
        await self._shards.close()

    def flows(self) -> dict[str, int]:
        """Counters of this process; they only grow."""
        return self._shards.flows()

    async def _state(self) -> set[tuple[object, ...]]:
        """Whatever, once gone from here, means that entries may have vanished without a word."""
        (raw,) = await self._shards.ask([self._read_leases])
        state: set[tuple[object, ...]] = {(node, *lease) for node, lease in self._live(raw).items()}
        state |= set((await self._epochs()).items())
        return state

    def _channel(self, subject: Subject) -> bytes:
        kind, name = subject
        return self._user_key(name) if kind == "user" else self._room_key(name)

    def _user_key(self, user: str) -> bytes:
        return b"%su:%b" % (self._prefix, user.encode())

    def _room_key(self, room: str) -> bytes:
        return b"%sr:%b" % (self._prefix, room.encode())


class _RedisWatcher(Box):
    def __init__(self, interest: Interest, feed: Feed) -> None:
        super().__init__(interest)
        self._feed = feed

    async def watch(self, users: Iterable[str] = (), rooms: Iterable[str] = ()) -> None:
        subjects = subjects_of(users, rooms)
        self.add(subjects)
        await self._feed.follow(subjects)


def _numbers(entry: bytes, count: int) -> list[int]:
    try:
        numbers = [int(word) for word in entry.split(b"|")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise PresenceUnavailable(f"Redis holds {entry[:80]!r} where {count} numbers should be")
    return numbers


def _attachment(user: str, device: str, entry: bytes) -> Attachment:
    try:
        generation, boot, since_ms, device_class, node, session = entry.decode().split("|", 5)
        return Attachment(
            user, device, device_class, node, int(boot), session, int(generation), int(since_ms)
        )
    except ValueError:
        raise PresenceUnavailable(f"Redis holds {entry[:80]!r} where an attachment should be") from None


def _counts(attachment: Attachment, leases: Leases) -> bool:
    boot, opened = leases.get(attachment.node, (0, 0))
    return boot == attachment.boot and opened < attachment.generation


def _location(user: str, fields: list[bytes], leases: Leases, wall_ms: int) -> Location:
    attachments = []
    grace_until_ms = 0
    for device, entry in zip(fields[::2], fields[1::2], strict=True):
        if device:
            attachment = _attachment(user, device.decode(), entry)
            if _counts(attachment, leases):
                attachments.append(attachment)
        else:
            (until_ms,) = _numbers(entry, 1)
            grace_until_ms = until_ms if until_ms > wall_ms else 0
    return Location(tuple(attachments), grace_until_ms)
