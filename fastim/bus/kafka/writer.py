"""Publishing to Kafka: one lane per partition, one batch of it on its way at a time.

Hides the producer and its faults. What is published while a batch is on its way gathers in the next one, so
the cost is per request and not per record (create_batch/send_batch: 0.7 us a record, send(): 4.5 us), and no
record has a task, a future or a timer of its own.

 publish() ─▶ lane: the batch that fills ─▶ on its way (acks=all, idempotent) ─▶ acknowledged
                          │                         └─▶ refused, or silent past the deadline
                          └─▶ refused with everything behind it, when the one in front was

W1  the records of one partition are appended in the order of the publish() calls; whoever waits behind a
    refused batch is refused too, so that a caller who repeats cannot be overtaken by what came later
W2  publish() ends within publish_timeout_s: acknowledged, or BusUnavailable. A batch that was on its way then
    may still arrive; one that was not never does
W3  memory is bounded by max_pending_bytes: past it publish() refuses at once
W4  a producer whose sequence numbers are in doubt is replaced: after any failed batch
    all in tests/contract/test_bus_kafka.py
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final

from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]
from aiokafka.errors import (  # type: ignore[import-untyped]
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)
from aiokafka.producer.message_accumulator import BatchBuilder  # type: ignore[import-untyped]

from fastim.bus.kafka.clerk import FAILURES, calm
from fastim.errors import BusUnavailable

_AGAIN_S: Final = 0.2
_LOOK_S: Final = 0.5
"""How often a lane that waits looks whether its topic is still there."""
_RECORD_BYTES: Final = 64
"""What a record costs in memory beside its key and value, about."""
_FOR_GOOD: Final = (MessageSizeTooLargeError, RecordListTooLargeError, TopicAuthorizationFailedError)

Lost = BusUnavailable | None


class Batch:
    """Records of one partition that travel together."""

    __slots__ = ("builder", "bytes", "deadline", "done")

    def __init__(self, batch_bytes: int, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        self.builder = BatchBuilder(batch_bytes, 0)
        self.bytes = 0
        self.deadline = deadline
        """time.monotonic(), of the first record in it."""
        self.done: asyncio.Future[Lost] = loop.create_future()
        """What went wrong, as a value: nobody may be left to take an exception."""

    def end(self, lost: Lost) -> None:
        if not self.done.done():
            self.done.set_result(lost)


class Lane:
    """One partition's batches, oldest first. Its task lives while there are any."""

    def __init__(self, writer: Writer, topic: str, partition: int) -> None:
        self.writer = writer
        self.topic = topic
        self.partition = partition
        self.end_offset = 0
        """One more than the last offset that was acknowledged to this process."""
        self._queue: deque[Batch] = deque()
        self._task: asyncio.Task[None] | None = None

    def append(self, key: bytes, value: bytes, deadline: float) -> Batch:
        """Put a record behind all others. The same batch is returned for records that travel together."""
        batch = self._queue[-1] if self._queue else None
        if batch is None or batch.builder.append(timestamp=None, key=key, value=value) is None:
            batch = Batch(self.writer.batch_bytes, deadline, self.writer.loop)
            batch.builder.append(timestamp=None, key=key, value=value)
            self._queue.append(batch)
            if self._task is None:
                self._task = self.writer.spawn(self._run(), f"lane {self.topic}/{self.partition}")
        size = len(key) + len(value) + _RECORD_BYTES
        batch.bytes += size
        self.writer.pending_bytes += size
        return batch

    async def _run(self) -> None:
        closing = BusUnavailable(f"publishing to {self.topic} was given up: the bus is closing")
        try:
            while self._queue:
                producer = await self.writer.producer(self._queue[0].deadline)
                if producer is None or self._queue[0].deadline <= time.monotonic():
                    self.refuse(self.writer.too_late(self.topic))
                    break
                batch = self._queue.popleft()
                lost: Lost = closing
                try:
                    lost = await self._send(producer, batch)
                finally:
                    self._finish(batch, lost)
                if lost is not None:
                    self.refuse(lost)
        finally:
            self._task = None
            self.refuse(closing)

    def refuse(self, lost: BusUnavailable) -> None:
        """Everything that is not on its way."""
        while self._queue:
            self._finish(self._queue.popleft(), lost)

    def _finish(self, batch: Batch, lost: Lost) -> None:
        self.writer.pending_bytes -= batch.bytes
        batch.end(lost)

    async def _send(self, producer: _Producer, batch: Batch) -> Lost:
        """Until acknowledged or refused: idempotent, so aiokafka repeats it as long as that can help."""
        count = batch.builder.record_count()
        try:
            future = await producer.raw.send_batch(batch.builder, self.topic, partition=self.partition)
            producer.on_the_way.add(future)
            future.add_done_callback(producer.arrived)
            while not future.done():
                await asyncio.wait((future, producer.given_up), timeout=_LOOK_S,
                                   return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
                if not future.done() and (lost := await self._why_wait(producer)) is not None:
                    producer.on_the_way.discard(future)
                    return lost
            told = future.result()
        except (*FAILURES, AssertionError) as error:
            # The sequence numbers of what failed are spent (AssertionError: metadata lost the partition).
            self.writer.renew(producer)
            return await self.writer.judge(self.topic, error)
        if told is not None and told.offset >= 0:
            self.end_offset = told.offset + count
        return None

    async def _why_wait(self, producer: _Producer) -> Lost:
        if self._queue and self._queue[0].deadline <= time.monotonic():
            self.refuse(self.writer.too_late(self.topic))
        if producer.given_up.done():
            return BusUnavailable(f"{self.topic}: the producer was replaced; the records may exist")
        if producer.raw.client.cluster.partitions_for_topic(self.topic) is None:
            return await self.writer.missing(self.topic)
        return None


class Writer:
    """All lanes of a bus, and the producer they share."""

    def __init__(
        self,
        options: dict[str, Any],
        *,
        publish_timeout_s: float,
        batch_bytes: int,
        max_pending_bytes: int,
        count_partitions: Callable[[str], Coroutine[Any, Any, int | None]],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.batch_bytes = batch_bytes
        self.pending_bytes = 0
        self.publish_timeout_s = publish_timeout_s
        self.replaced = 0
        """Producers that were given up because of a failure."""
        self._options = options
        self._max_pending_bytes = max_pending_bytes
        self._count_partitions = count_partitions
        self._lanes: dict[str, list[Lane]] = {}
        self._resolving: dict[str, asyncio.Task[None]] = {}
        self._producer: _Producer | None = None
        self._starting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    # ------------------------------------------------------------------------------------ what the bus calls

    def lanes(self, topic: str) -> list[Lane] | None:
        """By partition; None for a topic that resolve() has not found yet."""
        return self._lanes.get(topic)

    async def resolve(self, topic: str) -> None:
        """Learn the topic's partitions. Raises BusUnavailable, not temporary when there is no such topic."""
        if self._closed:
            raise BusUnavailable("the bus is closed", temporary=False)
        task = self._resolving.get(topic)
        if task is None:
            task = self._resolving[topic] = self.spawn(self._resolve(topic), f"topic {topic}")
            task.add_done_callback(lambda done: self._resolved(topic, done))
        await asyncio.shield(task)

    def check_room(self) -> None:
        """Raises BusUnavailable when too much waits (W3), or after close."""
        if self.pending_bytes > self._max_pending_bytes:
            raise BusUnavailable(
                f"{self.pending_bytes:,} bytes wait to be published; limit {self._max_pending_bytes:,}"
            )
        if self._closed:
            raise BusUnavailable("the bus is closed", temporary=False)

    async def wait(self, batches: set[Batch], deadline: float) -> None:
        """Until all are acknowledged. Raises BusUnavailable for the first that is not."""
        waiting = {batch.done for batch in batches}
        _, late = await asyncio.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        for batch in batches:
            if batch.done.done() and (lost := batch.done.result()) is not None:
                raise BusUnavailable(lost.detail, temporary=lost.temporary)
        if late:
            raise BusUnavailable(f"no acknowledgement in {self.publish_timeout_s:g} s; the records may exist")

    def forget(self, topic: str) -> None:
        """The topic is gone: its lanes end, and metadata is asked for it no longer."""
        lost = BusUnavailable(f"there is no topic {topic}", temporary=False)
        for lane in self._lanes.pop(topic, ()):
            lane.refuse(lost)
        if self._producer is not None and self._lanes:
            self._producer.raw.client.set_topics(set(self._lanes))

    async def close(self) -> None:
        """What waits is refused; what is on its way is waited for until its request times out."""
        self._closed = True
        for lanes in self._lanes.values():
            for lane in lanes:
                lane.refuse(BusUnavailable("the bus is closed", temporary=False))
        if self._producer is not None:
            self._retire(self._producer)
            self._producer = None
        if self._starting is not None:
            self._starting.cancel()
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    # ------------------------------------------------------------------------------------ what the lanes call

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = self.loop.create_task(work, name=f"kafka.{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def producer(self, deadline: float) -> _Producer | None:
        """The one in use; None when no broker let one connect until the deadline."""
        if self._producer is None:
            if self._starting is None:
                self._starting = self.spawn(self._start(), "producer")
            await asyncio.wait((self._starting,), timeout=max(0.0, deadline - time.monotonic()))
        return self._producer

    def renew(self, broken: _Producer) -> None:
        """The next batch gets another producer. Lanes whose batch is on its way may still see its end."""
        if self._producer is broken:
            self._producer = None
            self.replaced += 1
            self._retire(broken)

    async def judge(self, topic: str, error: BaseException) -> BusUnavailable:
        """What a failed batch means to its caller."""
        lost = await self.missing(topic) if isinstance(error, KafkaError) else None
        if lost is not None:
            return lost
        detail = f"publishing to {topic} failed, the records may exist: {error!r}"
        return BusUnavailable(detail, temporary=not isinstance(error, _FOR_GOOD))

    async def missing(self, topic: str) -> Lost:
        """Not None when the brokers say that there is no such topic."""
        try:
            if await self._count_partitions(topic) is not None:
                return None
        except BusUnavailable:
            return None
        self.forget(topic)
        return BusUnavailable(f"there is no topic {topic}", temporary=False)

    def too_late(self, topic: str) -> BusUnavailable:
        return BusUnavailable(f"{topic}: no broker took the records in {self.publish_timeout_s:g} s")

    # --------------------------------------------------------------------------------------------- inside

    def _resolved(self, topic: str, done: asyncio.Task[None]) -> None:
        self._resolving.pop(topic, None)
        if not done.cancelled():
            done.exception()  # whoever asked may have gone

    async def _resolve(self, topic: str) -> None:
        count = await self._count_partitions(topic)
        if count is None:
            raise BusUnavailable(f"there is no topic {topic}", temporary=False)
        if topic not in self._lanes:
            self._lanes[topic] = [Lane(self, topic, number) for number in range(count)]

    async def _start(self) -> None:
        try:
            while True:
                raw = AIOKafkaProducer(**self._options, acks="all", enable_idempotence=True, linger_ms=0,
                                       max_batch_size=self.batch_bytes, retry_backoff_ms=50)  # fmt: skip
                calm(raw.client)
                try:
                    await raw.start()
                except FAILURES:
                    await raw.stop()
                    await asyncio.sleep(_AGAIN_S)
                    continue
                except BaseException:
                    await raw.stop()
                    raise
                self._producer = _Producer(raw, self.loop)
                if self._closed:
                    self._retire(self._producer)
                    self._producer = None
                return
        finally:
            self._starting = None

    def _retire(self, producer: _Producer) -> None:
        limit_s = self._options["request_timeout_ms"] / 1000
        self.spawn(producer.retire(limit_s), "retired producer")


class _Producer:
    """An AIOKafkaProducer, and what is on its way with it."""

    __slots__ = ("given_up", "on_the_way", "raw")

    def __init__(self, raw: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.raw = raw
        self.on_the_way: set[asyncio.Future[Any]] = set()
        self.given_up: asyncio.Future[None] = loop.create_future()

    def arrived(self, future: asyncio.Future[Any]) -> None:
        self.on_the_way.discard(future)
        if not future.cancelled():
            future.exception()  # whoever sent it may have gone

    async def retire(self, limit_s: float) -> None:
        """Wait for what is on its way as long as one request may take, then close.

        Not AIOKafkaProducer.stop(): it waits for ever for batches that nobody can take.
        """
        if self.on_the_way:
            await asyncio.wait(set(self.on_the_way), timeout=limit_s)
        self.given_up.set_result(None)
        self.raw._closed = True
        task = self.raw._sender.sender_task
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        await self.raw.client.close()
