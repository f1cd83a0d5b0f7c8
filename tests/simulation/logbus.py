"""A bus that behaves as Kafka does: partitions, offsets, groups whose members come and go, lost answers.

`Broker` lives on the servers' loop and forgets nothing. `LogBus` is one process's client (bus.base.Bus):

- publish: one request a partition, in order per client and partition; the answer may be lost, and while the
  broker is away a record may still arrive seconds later (Bus.B7)
- a group shares partitions: a member that is silent for SESSION_S loses them, one that lives gives them up
  after what it has in hand (or HANDOVER_S); commits of a former owner are refused
- an inbox is read alone, by offset, and Kafka refuses nobody's commit there: a reader that has not committed
  for SURE_S looks first
- commits come COMMIT_S after settling; what was settled and not committed is read again (B3)

The broker notes whoever moves a committed offset back.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

from fastim.bus.base import Outgoing, Record
from fastim.bus.records import encode
from fastim.bus.window import SettleWindow
from fastim.errors import BusUnavailable, UsageError
from tests.simulation.loop import SimLoop
from tests.simulation.servers import Line, Outage

SESSION_S: Final = 5.0
BEAT_S: Final = 1.0
HANDOVER_S: Final = 1.0
COMMIT_S: Final = 0.2
SURE_S: Final = 2.0
INBOX: Final = "inbox."


class Share:
    """A partition for as long as a reader has it."""

    def __init__(self, partition: int, position: int, membership: int) -> None:
        self.partition = partition
        self.membership = membership
        self.window = SettleWindow(position)
        self.stored = self.tried = position
        """What the broker has, and what it was told: the answer may have been lost."""
        self.live = True


class Group:
    """Who reads which partition of a topic."""

    def __init__(self, count: int) -> None:
        self.committed = [0] * count
        self.owners: list[LogReader | None] = [None] * count
        self.members: dict[LogReader, float] = {}
        """Member -> when it was last heard."""


class Broker:
    def __init__(self, loop: SimLoop, told: Callable[[str], None]) -> None:
        self.loop = loop
        self.told = told
        self.topics: dict[str, list[list[tuple[str, bytes]]]] = {}
        self.groups: dict[tuple[str, str], Group] = {}
        self.readers: dict[str, list[LogReader]] = defaultdict(list)
        """Of inboxes, the open ones."""
        self.on_open: Callable[[LogReader], None] = lambda reader: None
        self.members = 0
        """Readers there ever were."""

    def group(self, topic: str, name: str) -> Group:
        key = (topic, name)
        if key not in self.groups:
            self.groups[key] = Group(len(self.topics[topic]))
        return self.groups[key]

    def ensure(self, topic: str, partitions: int) -> None:
        known = self.topics.setdefault(topic, [[] for _ in range(partitions)])
        if len(known) != partitions:
            raise UsageError(f"{topic} has {len(known)} partitions, not {partitions}")

    def append(self, topic: str, partition: int, records: list[tuple[str, bytes]]) -> bool:
        """False: there is no such topic."""
        found = self.topics.get(topic)
        if found is None:
            return False
        found[partition] += records
        for (name, _), group in self.groups.items():
            owner = group.owners[partition] if name == topic else None
            if owner is not None:
                owner.wake_later()
        for reader in self.readers.get(topic, ()):
            reader.wake_later()
        return True

    def delete(self, topic: str) -> None:
        if self.topics.pop(topic, None) is not None:
            self.groups = {key: group for key, group in self.groups.items() if key[0] != topic}
            for reader in self.readers.pop(topic, ()):
                reader.lose_topic()

    def lag(self, topic: str, group: str) -> int:
        if topic not in self.topics:
            return 0
        committed = self.group(topic, group).committed
        return sum(len(log) - committed[number] for number, log in enumerate(self.topics[topic]))

    def passed(self, topic: str, group: str, ends: Sequence[int]) -> bool:
        if topic not in self.topics:
            return not any(ends)
        return all(done >= end for done, end in zip(self.group(topic, group).committed, ends, strict=True))

    def commit(self, reader: LogReader, partition: int, membership: int, offset: int) -> bool:
        if reader.topic not in self.topics:
            return False
        group = self.group(reader.topic, reader.group)
        if not reader.alone and (group.owners[partition] is not reader or membership != reader.membership):
            return False
        if offset < group.committed[partition]:
            self.told(
                f"{reader.topic}/{partition} was committed at {group.committed[partition]}, now at {offset}"
            )
        group.committed[partition] = offset
        return True

    # ---------------------------------------------------------------------------------------------- groups

    def join(self, reader: LogReader) -> None:
        group = self.group(reader.topic, reader.group)
        if not group.members:
            self.loop.call_later(BEAT_S, self._watch, reader.topic, reader.group)
        group.members[reader] = self.loop.time()
        reader.membership += 1
        self._share_out(reader.topic, group)

    def leave(self, reader: LogReader) -> None:
        if reader.topic in self.topics:
            group = self.group(reader.topic, reader.group)
            if group.members.pop(reader, None) is not None:
                self._share_out(reader.topic, group)

    def beat(self, reader: LogReader) -> bool:
        """False: the group has gone on without this member."""
        group = self.group(reader.topic, reader.group)
        if reader not in group.members:
            return False
        group.members[reader] = self.loop.time()
        return True

    def give_up(self, reader: LogReader, partition: int) -> None:
        group = self.group(reader.topic, reader.group)
        if group.owners[partition] is reader:
            group.owners[partition] = None
            self._share_out(reader.topic, group)

    def _watch(self, topic: str, name: str) -> None:
        group = self.groups.get((topic, name))
        if group is None or not group.members:
            return
        silent = [one for one, heard in group.members.items() if heard < self.loop.time() - SESSION_S]
        for reader in silent:
            del group.members[reader]
        if silent:
            self._share_out(topic, group)
        if group.members:
            self.loop.call_later(BEAT_S, self._watch, topic, name)

    def _share_out(self, topic: str, group: Group) -> None:
        members = sorted(group.members, key=lambda reader: reader.number)
        for partition, owner in enumerate(group.owners):
            wanted = members[partition % len(members)] if members else None
            if owner is not None and owner not in group.members:
                owner = group.owners[partition] = None
            if owner is None and wanted is not None:
                group.owners[partition] = wanted
                wanted.later(wanted.assigned, partition, group.committed[partition], wanted.membership)
            elif owner is not None and owner is not wanted:
                owner.later(owner.revoke, partition)


class LogReader:
    """One member of a group, or an inbox's reader (`alone`)."""

    def __init__(self, bus: LogBus, topic: str, group: str, max_unsettled: int, number: int) -> None:
        self.bus = bus
        self.topic = topic
        self.group = group
        self.number = number
        self.alone = topic.startswith(INBOX)
        self.closed = False
        self.membership = 0
        """The broker's count of its joins: what belongs to an earlier one is refused."""
        self._max_unsettled = max_unsettled
        self._shares: dict[int, Share] = {}
        self._unsettled = 0
        self._failure: BusUnavailable | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._opened = False
        self._commit_set = False
        self._sure_at = -1e9
        self._committing = asyncio.Lock()

    # -- the port

    async def read(self, max_records: int) -> list[Record]:
        if not self._opened:
            self._opened = True
            await self._open()
        while not self.closed:
            if self._failure is not None:
                raise self._failure
            records = await self._fetch(max_records)
            if records:
                return records
            if self.closed or self._failure is not None:
                continue
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return []

    def settle(self, record: Record) -> None:
        self.settle_all([record])

    def settle_all(self, records: Sequence[Record]) -> None:
        for record in records:
            share = self.bus.share_of(record)
            if share.live:
                full = self._unsettled >= self._max_unsettled
                share.window.settle(record.offset)
                self._unsettled -= 1
                if full:
                    self._wake()
                self._commit_soon()

    async def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._wake()
        with contextlib.suppress(BusUnavailable):
            await self._commit()
        self._drop()
        broker = self.bus.broker
        if self.alone:
            if self in broker.readers.get(self.topic, ()):
                broker.readers[self.topic].remove(self)
        else:
            self.bus.tell(broker.leave, self)

    # -- opening, fetching

    async def _open(self) -> None:
        broker = self.bus.broker
        while True:
            try:
                if self.alone:
                    known = await self.bus.ask(self._committed)
                    if known is None:
                        raise BusUnavailable(f"there is no topic {self.topic}", temporary=False)
                    broker.readers[self.topic].append(self)
                    broker.on_open(self)
                    self.assigned(0, known, 0)
                else:
                    await self.bus.ask(lambda: broker.join(self))
                    self.bus.loop.call_later(BEAT_S, self._beat)
                return
            except BusUnavailable as error:
                if not error.temporary:
                    raise
                await asyncio.sleep(0.2)

    def _committed(self) -> int | None:
        broker = self.bus.broker
        return broker.group(self.topic, self.group).committed[0] if self.topic in broker.topics else None

    async def _fetch(self, most: int) -> list[Record]:
        """One request for everything of ours; nothing when there is nothing to be had."""
        room = min(most, self._max_unsettled - self._unsettled)
        logs = self.bus.broker.topics.get(self.topic)
        if room <= 0 or logs is None:
            return []
        if not any(len(logs[one.partition]) > one.window.next_offset for one in self._shares.values()):
            return []
        try:
            await self.bus.ask(lambda: None)
        except BusUnavailable:
            self.bus.loop.call_later(0.2, self._wake)
            return []
        records: list[Record] = []
        for share in list(self._shares.values()):
            first = share.window.next_offset
            found = logs[share.partition][first : first + room - len(records)]
            if not found or self.closed:
                continue
            share.window.hand_out(range(first, first + len(found)))
            for offset, (key, value) in enumerate(found, first):
                record = Record(self.topic, share.partition, offset, key, value)
                self.bus.out[id(record)] = (record, share)
                records.append(record)
        self._unsettled += len(records)
        return records

    def later(self, what: Callable[..., None], *args: Any) -> None:
        """From the broker: one trip away, and only while the process lives."""
        if not self.bus.loop.dead and not self.closed:
            self.bus.loop.call_later(self.bus.line.trip_s(), what, *args)

    def wake_later(self) -> None:
        self.later(self._wake)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- partitions come and go

    def assigned(self, partition: int, committed: int, membership: int) -> None:
        if not self.closed:
            self._shares[partition] = Share(partition, committed, membership)
            self._wake()

    def revoke(self, partition: int) -> None:
        if partition in self._shares and not self.closed:
            self.bus.loop.spawn(self._give_up(self._shares[partition]), f"revoke {self.topic}/{partition}")

    async def _give_up(self, share: Share) -> None:
        until = self.bus.loop.time() + HANDOVER_S
        while share.live and share.window.unsettled and self.bus.loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        with contextlib.suppress(BusUnavailable):
            await self._commit()
        if share.live:
            self._drop_share(share)
            broker = self.bus.broker
            self.bus.tell(broker.give_up, self, share.partition)

    def _beat(self) -> None:
        if not self.closed:
            self.bus.loop.spawn(self._heartbeat(), f"beat {self.topic}")

    async def _heartbeat(self) -> None:
        broker = self.bus.broker
        try:
            if not await self.bus.ask(lambda: broker.beat(self)) and not self.closed:
                # The group has gone on without us: what is in hand is somebody else's now.
                self._drop()
                await self.bus.ask(lambda: broker.join(self))
        except BusUnavailable:
            pass
        self.bus.loop.call_later(BEAT_S, self._beat)

    def lose_topic(self) -> None:
        def gone() -> None:
            self._failure = BusUnavailable(f"there is no topic {self.topic}", temporary=False)
            self._wake()

        if not self.bus.loop.dead and not self.closed:
            self.bus.loop.call_later(self.bus.line.rng.choice((0.01, 1.0, 4.0)), gone)

    def _drop(self) -> None:
        for share in list(self._shares.values()):
            self._drop_share(share)

    def _drop_share(self, share: Share) -> None:
        share.live = False
        self._unsettled -= share.window.unsettled
        if self._shares.get(share.partition) is share:
            del self._shares[share.partition]
        self._wake()

    # -- commits

    def _commit_soon(self) -> None:
        if not self._commit_set and not self.closed:
            self._commit_set = True
            self.bus.loop.call_later(COMMIT_S, self._commit_now)

    def _commit_now(self) -> None:
        self._commit_set = False
        if not self.closed:
            self.bus.loop.spawn(self._commit_patiently(), f"commit {self.topic}")

    async def _commit_patiently(self) -> None:
        try:
            await self._commit()
        except BusUnavailable:
            self._commit_soon()

    async def _commit(self) -> None:
        async with self._committing:
            await self._commit_all()

    async def _commit_all(self) -> None:
        broker, loop = self.bus.broker, self.bus.loop
        for share in list(self._shares.values()):
            offset = share.window.committed
            if offset <= share.stored or not share.live:
                continue
            if self.alone and loop.time() - self._sure_at > SURE_S and not await self._is_alone(share):
                return
            began = loop.time()
            share.tried = offset
            if await self.bus.ask(
                lambda share=share, offset=offset: broker.commit(
                    self, share.partition, share.membership, offset
                )
            ):
                share.stored = offset
                self._sure_at = began

    async def _is_alone(self, share: Share) -> bool:
        while True:
            began = self.bus.loop.time()
            known = await self.bus.ask(self._committed)
            if known is None or known > share.tried:
                self._failure = BusUnavailable(f"another reader has taken over {self.topic}", temporary=False)
                self._wake()
                return False
            if self.bus.loop.time() - began < 1.0:
                self._sure_at = began
                return True


class LogBus:
    """The Bus of one process."""

    def __init__(self, broker: Broker, client: SimLoop, outage: Outage, rng: random.Random) -> None:
        self.broker = broker
        self.loop = client
        self.line = Line(client, broker.loop, outage, rng)
        self.out: dict[int, tuple[Record, Share]] = {}
        """Whose the records are that were handed out."""
        self._floor: dict[tuple[str, int], float] = defaultdict(float)

    async def ask(self, question: Callable[[], Any]) -> Any:
        async def answer() -> Any:
            return question()

        return await self.line.call(answer, late=False)

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        """One way; nobody waits."""
        self.broker.loop.call_later(self.line.trip_s(), what, *args)

    def share_of(self, record: Record) -> Share:
        return self.out.pop(id(record))[1]

    async def ensure(self, topic: str, partitions: int = 1) -> None:
        await self.ask(lambda: self.broker.ensure(topic, partitions))

    async def publish(self, records: Sequence[Outgoing]) -> None:
        requests: dict[tuple[str, int], list[tuple[str, bytes]]] = {}
        for out in records:
            topic = self.broker.topics.get(out.topic)
            if topic is None:
                raise BusUnavailable(f"there is no topic {out.topic}", temporary=False)
            value = out.value if type(out.value) is bytes else encode(out.value)
            where = (out.topic, zlib.crc32(out.key.encode()) % len(topic))
            requests.setdefault(where, []).append((out.key, value))
        answers = [self._request(*where, found) for where, found in requests.items()]
        error = None
        for answer in answers:
            try:
                if not await answer:
                    error = BusUnavailable("the topic is gone", temporary=False)
            except BusUnavailable as failed:
                error = error or failed
        if error is not None:
            raise error

    def _request(self, topic: str, partition: int, records: list[tuple[str, bytes]]) -> asyncio.Future[bool]:
        """Behind what this client sent before to the same partition."""
        line, server, rng = self.line, self.broker.loop, self.line.rng
        done: asyncio.Future[bool] = self.loop.create_future()
        late_s = 0.0
        if line.outage.away:
            self.loop.call_later(line.trip_s(), _fail, done, line.outage.error("away, by the nemesis"))
            if rng.random() < 0.6:
                return done
            late_s = rng.choice((0.0, 0.5, 3.0))
        at = max(self._floor[topic, partition], server.time() + line.trip_s() + late_s)
        self._floor[topic, partition] = at

        def arrive() -> None:
            taken = self.broker.append(topic, partition, records)
            if self.loop.dead or done.done():
                return
            if line.outage.away:
                self.loop.call_later(line.trip_s(), _fail, done, line.outage.error("the answer is lost"))
            else:
                self.loop.call_later(line.trip_s(), _succeed, done, taken)

        server.call_at(at, arrive)
        return done

    def reader(self, topic: str, group: str, *, max_unsettled: int) -> LogReader:
        self.broker.members += 1
        return LogReader(self, topic, group, max_unsettled, self.broker.members)

    async def lag(self, topic: str, group: str) -> int:
        return int(await self.ask(lambda: self.broker.lag(topic, group)))

    async def ends(self, topic: str) -> tuple[int, ...]:
        found = await self.ask(lambda: self.broker.topics.get(topic, ()))
        return tuple(len(log) for log in found)

    async def passed(self, topic: str, group: str, ends: Sequence[int]) -> bool:
        return bool(await self.ask(lambda: self.broker.passed(topic, group, ends)))

    def published(self, topic: str) -> int:
        return 0

    def committed(self, topic: str, group: str) -> int:
        return 0

    async def delete(self, topic: str) -> None:
        await self.ask(lambda: self.broker.delete(topic))


def _succeed(done: asyncio.Future[bool], taken: bool) -> None:
    if not done.done():
        done.set_result(taken)


def _fail(done: asyncio.Future[bool], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
