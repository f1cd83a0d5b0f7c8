"""KafkaBus: topics, publish, readers and lag over Apache Kafka.

Keys go to partitions by the CRC-32 of their UTF-8 bytes, as in the memory bus: stable for ever, whatever a
Kafka library thinks of. Values are encoded here and handed out as bytes. A topic whose name begins with
"inbox." has one partition and one reader at a time; it is assigned without the group (no rebalance when a
node comes or goes) and fenced by boot numbers, not by Kafka. The port's group is Kafka's "<group>.<topic>":
otherwise a reader that joins at one topic would make the readers of all others share anew.

Every wait has a bound: publish() publish_timeout_s; ensure(), delete() and lag() the same; reader.close() 2 x
stop_s; close() that and one request timeout. read() waits for as long as brokers are away.

Source: architecture.md, "Ports and promises"; docs/adr/0080-kafka-bus.md
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from fastim.bus.base import Outgoing
from fastim.bus.kafka.clerk import Clerk, KafkaSecurity
from fastim.bus.kafka.reader import Gap, KafkaReader, ReaderLimits
from fastim.bus.kafka.writer import Batch, Writer
from fastim.bus.records import encode
from fastim.errors import BusUnavailable, UsageError

_SCHEME: Final = "kafka://"
_INBOX: Final = "inbox."


class KafkaBus:
    """The Bus of several processes. Made inside a running loop; connects with the first call; close() it.

    url            kafka://host:port,host:port: brokers to begin with
    security       TLS and login
    instance       a name that is stable over restarts and unique among all processes that read: its readers
                   are static members, so a restart within session_timeout_s moves no partition. Empty: none
    replication    copies of each topic that ensure() makes; 0: as the brokers have it
    on_gap         told of records that a reader will never see; without it read() raises BusUnavailable once
    """

    def __init__(
        self,
        url: str,
        *,
        security: KafkaSecurity | None = None,
        instance: str = "",
        replication: int = 0,
        on_gap: Callable[[Gap], None] | None = None,
        publish_timeout_s: float = 10.0,
        request_timeout_s: float = 5.0,
        session_timeout_s: float = 10.0,
        commit_interval_s: float = 0.2,
        handover_s: float = 1.0,
        stop_s: float = 3.0,
        sure_s: float = 2.0,
        look_s: float = 5.0,
        batch_bytes: int = 256 * 1024,
        max_pending_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._options: dict[str, Any] = {
            "bootstrap_servers": url.removeprefix(_SCHEME).rstrip("/").split(","),
            "client_id": f"fastim-{instance}" if instance else "fastim",
            "request_timeout_ms": int(request_timeout_s * 1000),
            "metadata_max_age_ms": 60_000,
            **(security or KafkaSecurity()).options(),
        }
        self._instance = instance
        self._replication = replication
        self._on_gap = on_gap
        self._publish_timeout_s = publish_timeout_s
        self._limits = ReaderLimits(
            session_timeout_s=session_timeout_s,
            commit_interval_s=commit_interval_s,
            handover_s=handover_s,
            stop_s=stop_s,
            sure_s=sure_s,
            look_s=look_s,
        )
        self.clerk = Clerk(self._options, publish_timeout_s)
        self.writer = Writer(
            self._options,
            publish_timeout_s=publish_timeout_s,
            batch_bytes=batch_bytes,
            max_pending_bytes=max_pending_bytes,
            count_partitions=self.clerk.partitions,
        )
        self._readers: list[KafkaReader] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._committed: dict[tuple[str, str], int] = {}

    async def close(self) -> None:
        """End the readers, publish nothing more, disconnect."""
        await asyncio.gather(*(reader.close() for reader in list(self._readers)))
        if self._ending:
            await asyncio.wait(set(self._ending))
        await self.writer.close()
        await self.clerk.close()

    async def ensure(self, topic: str, partitions: int = 1) -> None:
        """See the port."""
        if partitions < 1:
            raise UsageError(f"{topic} is asked for with {partitions} partitions; at least 1")
        if topic.startswith(_INBOX) and partitions != 1:
            raise UsageError(f"{topic} is asked for with {partitions} partitions; an inbox has 1")
        await self.clerk.create(topic, partitions, self._replication)
        deadline = time.monotonic() + self._publish_timeout_s
        while (found := await self.clerk.partitions(topic)) is None:
            if time.monotonic() > deadline:
                raise BusUnavailable(f"{topic} was created and did not appear")
        if found != partitions:
            raise UsageError(f"{topic} has {found} partitions, not {partitions}")
        await self.writer.resolve(topic)

    async def publish(self, records: Sequence[Outgoing]) -> None:
        """See the port. Cost: an encoding and an append each; a request carries what gathered meanwhile."""
        writer = self.writer
        writer.check_room()
        for topic in {out.topic for out in records}:
            if writer.lanes(topic) is None:
                await writer.resolve(topic)
        deadline = time.monotonic() + self._publish_timeout_s
        batches: set[Batch] = set()
        for out in records:
            lanes = writer.lanes(out.topic)
            if lanes is None:
                raise BusUnavailable(f"there is no topic {out.topic}", temporary=False)
            key = out.key.encode()
            lane = lanes[zlib.crc32(key) % len(lanes)] if len(lanes) > 1 else lanes[0]
            value = out.value
            batches.add(lane.append(key, value if type(value) is bytes else encode(value), deadline))
        if batches:
            await writer.wait(batches, deadline)

    def reader(self, topic: str, group: str, *, max_unsettled: int) -> KafkaReader:
        """See the port. A topic that does not exist: the first read() raises."""
        if max_unsettled < 1:
            raise UsageError(f"max_unsettled is {max_unsettled}; at least 1")
        alone = topic.startswith(_INBOX)
        same = sum(reader.topic == topic and reader.group == group for reader in self._readers)
        instance = None if alone or not self._instance else f"{self._instance}.{topic}.{same}"
        reader = KafkaReader(
            topic, group, max_unsettled, self._options, self._limits, self.clerk,
            alone=alone, instance=instance, on_gap=self._on_gap, on_end=self._ended,
        )  # fmt: skip
        self._readers.append(reader)
        return reader

    async def lag(self, topic: str, group: str) -> int:
        """See the port; 0 for a topic that does not exist. What this process settled counts as committed."""
        count = await self.clerk.partitions(topic)
        if count is None:
            return 0
        ends = await self.clerk.ends(topic, range(count))
        committed = await self.clerk.committed(topic, f"{group}.{topic}", range(count))
        for number, offset in self._local(topic, group).items():
            committed[number] = max(offset, committed.get(number, 0))
        self._committed[topic, group] = committed.get(0, 0)
        return sum(max(0, end - max(begin, committed.get(n, 0))) for n, (begin, end) in ends.items())

    async def ends(self, topic: str) -> tuple[int, ...]:
        """See the port."""
        count = await self.clerk.partitions(topic)
        if count is None:
            return ()
        found = await self.clerk.ends(topic, range(count))
        return tuple(found[number][1] for number in range(count))

    async def passed(self, topic: str, group: str, ends: Sequence[int]) -> bool:
        """See the port. What this process settled counts as committed."""
        if not any(ends):
            return True
        if await self.clerk.partitions(topic) is None:
            return False
        committed = await self.clerk.committed(topic, f"{group}.{topic}", range(len(ends)))
        local = self._local(topic, group)
        return all(max(committed.get(n, 0), local.get(n, 0)) >= end for n, end in enumerate(ends))

    def published(self, topic: str) -> int:
        """See the port: as far as this process has published itself."""
        lanes = self.writer.lanes(topic)
        return lanes[0].end_offset if lanes else 0

    def committed(self, topic: str, group: str) -> int:
        """See the port: what this process has settled, else what the last lag() saw."""
        return max(self._local(topic, group).get(0, 0), self._committed.get((topic, group), 0))

    async def delete(self, topic: str) -> None:
        """See the port. Readers elsewhere notice within some seconds."""
        for reader in [reader for reader in self._readers if reader.topic == topic]:
            reader.end()
        self._committed = {key: offset for key, offset in self._committed.items() if key[0] != topic}
        await self.clerk.delete(topic)
        self.writer.forget(topic)

    def _local(self, topic: str, group: str) -> dict[int, int]:
        known: dict[int, int] = {}
        for reader in self._readers:
            if reader.topic == topic and reader.group == group:
                known |= reader.committed()
        return known

    def _ended(self, reader: KafkaReader) -> None:
        self._readers.remove(reader)
        self._ending.add(reader.done)
        reader.done.add_done_callback(self._ending.discard)
