"""The bus inside one process: lists, offsets and futures on one event loop.

Hides how partitions are shared among the readers of a group, and when memory is freed. A partition is a list
of records from `base` on. Each group has a SettleWindow per partition (it also knows the next offset to hand
out), and one owner among its readers. When readers join, a partition moves only after its owner has settled
what it holds, so B1 and B6 hold across the move; when a reader closes, the partition goes back to the
committed offset (B3). What every group has committed is freed; a topic without a group keeps its records.

A record lives as long as the process (B2): the system's promise rests on the store's settled mark.
publish() never waits: a publisher and a reader take turns on the loop, and readers wake once per batch.

I1  the committed offset of a group never goes back             tests/contract/bus.py
I2  a partition holds at most 2 x uncommitted + 128 records     tests/contract/test_bus_memory.py
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import Final

from fastim.bus.base import Outgoing, Record
from fastim.bus.window import SettleWindow
from fastim.errors import BusUnavailable, UsageError

_TRIM_RECORDS: Final = 64
"""Freed records are cut off a list in steps of at least this many (and at least half of it)."""


class MemoryBus:
    """The embedded Bus. All calls come from one event loop.

    bound: most uncommitted records a topic may hold; publish then raises BusUnavailable(temporary). 0 = none.
    """

    def __init__(self, *, bound: int = 0) -> None:
        self._bound = bound
        self._topics: dict[str, _Topic] = {}

    async def ensure(self, topic: str, partitions: int = 1) -> None:
        if partitions < 1:
            raise UsageError(f"{topic} is asked for with {partitions} partitions; at least 1")
        known = self._topics.get(topic)
        if known is None:
            self._topics[topic] = _Topic(topic, partitions)
        elif len(known.partitions) != partitions:
            raise UsageError(f"{topic} has {len(known.partitions)} partitions, not {partitions}")

    async def publish(self, records: Sequence[Outgoing]) -> None:
        """All of them or, raising BusUnavailable, none. Cost: one Record and one list append each."""
        topics = self._topics
        touched: dict[str, _Topic] = {}
        if self._bound:
            self._check_bound(records)
        for out in records:
            name = out.topic
            if name not in touched:
                topic = topics.get(name)
                if topic is None:
                    raise BusUnavailable(f"there is no topic {name}", temporary=False)
                touched[name] = topic
        for out in records:
            topic = touched[out.topic]
            key = out.key
            number = zlib.crc32(key.encode()) % topic.count if topic.count > 1 else 0
            partition = topic.partitions[number]
            offset = partition.next
            partition.next = offset + 1
            partition.log.append(Record(out.topic, number, offset, key, out.value))
        for topic in touched.values():
            topic.wake()

    def reader(self, topic: str, group: str, *, max_unsettled: int) -> MemoryReader:
        """Raises BusUnavailable (not temporary) for a topic that does not exist."""
        if max_unsettled < 1:
            raise UsageError(f"max_unsettled is {max_unsettled}; at least 1")
        found = self._topics.get(topic)
        if found is None:
            raise BusUnavailable(f"there is no topic {topic}", temporary=False)
        return found.join(group, max_unsettled)

    async def lag(self, topic: str, group: str) -> int:
        found = self._topics.get(topic)
        if found is None:
            return 0
        shares = found.groups.get(group)
        if shares is None:
            return sum(partition.next for partition in found.partitions)
        return sum(share.partition.next - share.window.committed for share in shares.shares)

    async def ends(self, topic: str) -> tuple[int, ...]:
        found = self._topics.get(topic)
        return () if found is None else tuple(partition.next for partition in found.partitions)

    async def passed(self, topic: str, group: str, ends: Sequence[int]) -> bool:
        found = self._topics.get(topic)
        members = None if found is None else found.groups.get(group)
        if members is None:
            return not any(ends)
        return all(share.window.committed >= end for share, end in zip(members.shares, ends, strict=True))

    def published(self, topic: str) -> int:
        found = self._topics.get(topic)
        return 0 if found is None else found.partitions[0].next

    def committed(self, topic: str, group: str) -> int:
        found = self._topics.get(topic)
        members = None if found is None else found.groups.get(group)
        return 0 if members is None else members.shares[0].window.committed

    async def delete(self, topic: str) -> None:
        found = self._topics.pop(topic, None)
        if found is not None:
            found.end()

    def held(self, topic: str) -> int:
        """Records in memory for the topic."""
        found = self._topics.get(topic)
        return 0 if found is None else sum(len(partition.log) for partition in found.partitions)

    def topics(self) -> list[str]:
        """The names of the topics that exist."""
        return list(self._topics)

    def _check_bound(self, records: Sequence[Outgoing]) -> None:
        wanted: dict[str, int] = {}
        for out in records:
            wanted[out.topic] = wanted.get(out.topic, 0) + 1
        for name, count in wanted.items():
            topic = self._topics.get(name)
            if topic is not None and (held := topic.uncommitted()) + count > self._bound:
                raise BusUnavailable(f"{name} holds {held:,} records; limit {self._bound:,}")


class MemoryReader:
    """One member of a group. Made by MemoryBus.reader()."""

    def __init__(self, topic: _Topic, group: _Group, max_unsettled: int) -> None:
        self._topic = topic
        self._group = group
        self._max_unsettled = max_unsettled
        self._waiter: asyncio.Future[None] | None = None
        self.closed = False
        self.unsettled = 0
        self.shares: list[_Share] = []
        """The partitions this reader may take records from."""

    async def read(self, max_records: int) -> list[Record]:
        if max_records < 1:
            raise UsageError(f"max_records is {max_records}; at least 1")
        while not self.closed:
            records = self._take(max_records)
            if records:
                return records
            if self._waiter is not None:
                raise UsageError(f"a second read() waits on one reader of {self._topic.name}")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return []

    def settle(self, record: Record) -> None:
        """No effect after the end of the reader or the topic: the record was given back or forgotten."""
        if not self.closed:
            share = self._share_of(record)
            self._settled(share, share.window.settle(record.offset), 1)

    def settle_all(self, records: Sequence[Record]) -> None:
        """See the port."""
        if self.closed:
            return
        by_partition: dict[int, list[Record]] = {}
        if self._topic.count == 1:
            by_partition[0] = list(records)
        else:
            for record in records:
                by_partition.setdefault(record.partition, []).append(record)
        for found in by_partition.values():
            if found:
                share = self._share_of(found[0])
                self._settled(share, share.window.settle_all([one.offset for one in found]), len(found))

    def _share_of(self, record: Record) -> _Share:
        share = self._group.shares[record.partition]
        if share.owner is not self:
            raise UsageError(f"{record.topic}/{record.partition}@{record.offset} is not out at this reader")
        return share

    def _settled(self, share: _Share, committed: int, count: int) -> None:
        if self.unsettled == self._max_unsettled:
            self.wake()
        self.unsettled -= count
        drained = committed == share.window.next_offset
        if drained or committed >= share.free_at:
            share.free_at = committed + _TRIM_RECORDS
            share.partition.free(self._topic.groups)
        if drained and share.next_owner is not self:
            share.move()

    async def close(self) -> None:
        if not self.closed:
            self.end()
            self._group.leave(self)

    def end(self) -> None:
        self.closed = True
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self, max_records: int) -> list[Record]:
        room = min(max_records, self._max_unsettled - self.unsettled)
        records: list[Record] = []
        for share in self.shares:
            if room <= 0:
                break
            found = share.take(room)
            if found:
                records = records + found if records else found
                room -= len(found)
        if len(self.shares) > 1:
            # The next read starts at another partition, so that a busy one cannot starve the rest.
            self.shares.append(self.shares.pop(0))
        self.unsettled += len(records)
        return records


class _Partition:
    """Records base .. next - 1 of which log holds all."""

    __slots__ = ("base", "log", "next", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.log: list[Record] = []
        self.base = 0
        self.next = 0

    def free(self, groups: dict[str, _Group]) -> None:
        """Cut off what every group has committed; amortised O(1) per record."""
        number = self.number
        low = min(group.shares[number].window.committed for group in groups.values())
        done = low - self.base
        if done == len(self.log):
            self.log.clear()
            self.base = low
        elif done >= _TRIM_RECORDS and done * 2 >= len(self.log):
            del self.log[:done]
            self.base = low


class _Share:
    """One group's view of one partition, and which reader has it.

    next_owner differs from owner while the owner still holds unsettled records of a partition that moves.
    """

    __slots__ = ("free_at", "next_owner", "owner", "partition", "window")

    def __init__(self, partition: _Partition) -> None:
        self.partition = partition
        self.window = SettleWindow(partition.base)
        self.free_at = partition.base + _TRIM_RECORDS
        """The committed offset at which looking for something to free is worth its price."""
        self.owner: MemoryReader | None = None
        self.next_owner: MemoryReader | None = None

    def take(self, room: int) -> list[Record]:
        partition = self.partition
        first = self.window.next_offset
        if first == partition.next:
            return []
        start = first - partition.base
        found = partition.log[start : start + room]
        self.window.hand_out(range(first, first + len(found)))
        return found

    def move(self) -> None:
        """Give the partition to next_owner (None: to nobody)."""
        self.owner = self.next_owner
        if self.owner is not None:
            self.owner.shares.append(self)
            self.owner.wake()


class _Group:
    """The readers of a topic that share its partitions."""

    __slots__ = ("readers", "shares")

    def __init__(self, partitions: list[_Partition]) -> None:
        self.shares = [_Share(partition) for partition in partitions]
        self.readers: list[MemoryReader] = []

    def leave(self, reader: MemoryReader) -> None:
        self.readers.remove(reader)
        for share in self.shares:
            if share.owner is reader:
                share.window.rewind()
                share.owner = None
        reader.shares.clear()
        reader.unsettled = 0
        self.assign()

    def assign(self) -> None:
        """Spread the partitions over the readers in the order in which they joined."""
        for number, share in enumerate(self.shares):
            wanted = self.readers[number % len(self.readers)] if self.readers else None
            share.next_owner = wanted
            if share.owner is wanted:
                if wanted is not None and share not in wanted.shares:
                    wanted.shares.append(share)
                    wanted.wake()
                continue
            if share.owner is not None and share in share.owner.shares:
                share.owner.shares.remove(share)
            if share.owner is None or not share.window.unsettled:
                share.move()


class _Topic:
    """Partitions and the groups that read them."""

    __slots__ = ("count", "groups", "name", "partitions")

    def __init__(self, name: str, partitions: int) -> None:
        self.name = name
        self.count = partitions
        self.partitions = [_Partition(number) for number in range(partitions)]
        self.groups: dict[str, _Group] = {}

    def join(self, name: str, max_unsettled: int) -> MemoryReader:
        group = self.groups.get(name)
        if group is None:
            group = self.groups[name] = _Group(self.partitions)
        reader = MemoryReader(self, group, max_unsettled)
        group.readers.append(reader)
        group.assign()
        return reader

    def wake(self) -> None:
        for group in self.groups.values():
            for reader in group.readers:
                reader.wake()

    def uncommitted(self) -> int:
        if not self.groups:
            return sum(len(partition.log) for partition in self.partitions)
        return sum(
            partition.next - min(g.shares[partition.number].window.committed for g in self.groups.values())
            for partition in self.partitions
        )

    def end(self) -> None:
        for group in self.groups.values():
            for reader in group.readers:
                reader.end()
