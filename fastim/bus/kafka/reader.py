"""One member of a group reading one topic: positions, settling, commits, partitions that come and go.

Hides aiokafka's consumer. A task of the reader keeps one alive: it connects, commits, looks whether the topic
is still there and whether retention comes near, and starts anew when the consumer has failed. read() takes
from the consumer without a task in between.

 assigned ─▶ placed at the committed offset ─▶ handed out ─▶ settled ─▶ committed (the low watermark)
     └─▶ revoked: up to handover_s for what is out to be settled, commit, and the rest is given back

R1  a position is always chosen here, never by "earliest" or "latest": what retention or a truncated log took
    away is told as a Gap
R2  settle() of a record whose partition was taken away has no effect, even if the partition came back
R3  in `alone` mode (inboxes: no group management, hence no fencing by Kafka) a commit that follows a pause
    is preceded by a look: when somebody else has committed since, the reader ends, and the offset never goes
    back
    all in tests/contract/test_bus_kafka.py
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from aiokafka import (  # type: ignore[import-untyped]
    AIOKafkaConsumer,
    ConsumerRebalanceListener,
    OffsetAndMetadata,
    TopicPartition,
)
from aiokafka.coordinator.assignors.roundrobin import (  # type: ignore[import-untyped]
    RoundRobinPartitionAssignor,
)
from aiokafka.errors import (  # type: ignore[import-untyped]
    ConsumerStoppedError,
    IllegalGenerationError,
    IllegalStateError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)

from fastim import observe
from fastim.bus.base import Record
from fastim.bus.kafka.clerk import FAILURES, Clerk, calm
from fastim.bus.window import SettleWindow
from fastim.errors import BusUnavailable, UsageError

_log = logging.getLogger(__name__)

_POLL_MS: Final = 1000
_ANSWER_S: Final = 1.0
"""An answer that took longer is too old to act upon."""
_AGAIN_S: Final = 0.2
_ALARM_SHARE: Final = 0.1
"""Of the retention: an older unsettled record is an alarm."""


class Gap(msgspec.Struct, frozen=True):
    """Records that the group had not settled and nobody can read any more: rebuild from the store."""

    topic: str
    group: str
    partition: int
    first: int
    end: int
    """One more than the last offset that is gone. Below `first` when the log itself was cut short."""

    def __str__(self) -> str:
        if self.end < self.first:
            return f"{self.topic}/{self.partition} ends at {self.end}, {self.group} had read to {self.first}"
        return (
            f"{self.topic}/{self.partition}: offsets {self.first} to {self.end - 1} are gone ({self.group})"
        )


class ReaderLimits(msgspec.Struct, frozen=True, kw_only=True):
    session_timeout_s: float
    """A member that was silent for so long loses its partitions."""
    commit_interval_s: float
    handover_s: float
    """How long a rebalance waits for what is out at this reader to be settled."""
    stop_s: float
    """How long a commit is tried before its next turn; in close(), for good; and leaving the group."""
    sure_s: float
    """An `alone` reader that has not committed for so long looks first whether it still is alone."""
    look_s: float
    """How often the topic's existence and the distance to retention are looked at."""


class _Share:
    """A partition for as long as this reader has it; a partition that comes back is another share."""

    __slots__ = ("alarmed", "live", "moments", "partition", "stored", "window")

    def __init__(self, partition: int, committed: int, start: int) -> None:
        self.partition = partition
        self.window = SettleWindow(start)
        self.stored = committed
        """What the broker holds; -1: nothing."""
        self.live = True
        self.moments: deque[tuple[int, int]] = deque()
        """(first offset, its wall_ms) of the batches that are not wholly settled."""
        self.alarmed = False


class _Read(Record, frozen=True, gc=False):
    """A record that knows whose it is: settling must not reach a later owner of the partition (R2)."""

    share: _Share


class KafkaReader:
    """Made by KafkaBus.reader(). alone: assigned by itself instead of by the group."""

    def __init__(
        self,
        topic: str,
        group: str,
        max_unsettled: int,
        options: dict[str, Any],
        limits: ReaderLimits,
        clerk: Clerk,
        *,
        alone: bool,
        instance: str | None,
        on_gap: Callable[[Gap], None] | None,
        on_end: Callable[[KafkaReader], None],
    ) -> None:
        self.topic = topic
        self.group = group
        self._kafka_group = f"{group}.{topic}"
        self._max_unsettled = max_unsettled
        self._options = options
        self._limits = limits
        self._clerk = clerk
        self._alone = alone
        self._instance = instance
        self._on_gap = on_gap
        self._on_end = on_end
        self._consumer: Any = None
        self._shares: dict[int, _Share] = {}
        self._unplaced: set[int] = set()
        self._unsettled = 0
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._broken = asyncio.Event()
        self._closed = False
        self._failure: BusUnavailable | None = None
        self._gaps: deque[Gap] = deque()
        self._sure_at = 0.0
        self._retention_ms: int | None = None
        self._reading = False
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name=f"kafka.reader {topic}")

    # -------------------------------------------------------------------------------------------- the port

    async def read(self, max_records: int) -> list[Record]:
        """See the port. While brokers are away it waits; it raises for what will not pass by itself."""
        if max_records < 1:
            raise UsageError(f"max_records is {max_records}; at least 1")
        if self._reading:
            raise UsageError(f"a second read() waits on one reader of {self.topic}")
        self._reading = True
        try:
            while not self._closed:
                if self._failure is not None:
                    raise BusUnavailable(self._failure.detail, temporary=self._failure.temporary)
                if self._gaps:
                    raise BusUnavailable(str(self._gaps.popleft()))
                room = min(max_records, self._max_unsettled - self._unsettled)
                if self._consumer is None or room <= 0:
                    await self._wait()
                elif self._unplaced:
                    await self._place()
                elif records := await self._fetch(room):
                    return records
            return []
        finally:
            self._reading = False

    def settle(self, record: Record) -> None:
        """See the port. No effect either once the record's partition was taken away."""
        share = self._share_of(record)
        if share.live:
            share.window.settle(record.offset)
            self._settled(1)

    def settle_all(self, records: Sequence[Record]) -> None:
        """See the port."""
        by_share: dict[int, tuple[_Share, list[int]]] = {}
        for record in records:
            share = self._share_of(record)
            if share.live:
                by_share.setdefault(id(share), (share, []))[1].append(record.offset)
        for share, offsets in by_share.values():
            share.window.settle_all(offsets)
            self._settled(len(offsets))

    async def close(self) -> None:
        """Commit what is settled, give the rest back, leave the group. Takes at most 2 x stop_s."""
        if not self._closed:
            self.end()
        if not self._keeper.done():
            self._keeper.cancel()
        await asyncio.wait((self._keeper,))

    # --------------------------------------------------------------------------------------------- the bus

    def end(self) -> None:
        """read() returns [] from now on; the keeper stops the consumer."""
        self._closed = True
        self._wake()
        self._broken.set()
        self._on_end(self)

    @property
    def done(self) -> asyncio.Task[None]:
        return self._keeper

    def committed(self) -> dict[int, int]:
        """Everything below is settled, by partition: what this process knows, ahead of what Kafka holds."""
        return {number: share.window.committed for number, share in self._shares.items()}

    # ------------------------------------------------------------------------------------- reading, settling

    async def _fetch(self, room: int) -> list[Record]:
        try:
            found = await self._consumer.getmany(timeout_ms=_POLL_MS, max_records=room)
        except OffsetOutOfRangeError as error:
            self._unplaced.update(tp.partition for tp in error.args[0])
            return []
        except NoOffsetForPartitionError:
            return []  # aiokafka looked before we placed it
        except (*FAILURES, ConsumerStoppedError, IllegalStateError) as error:
            if not self._closed:
                _log.warning("%s: the reader of %s starts anew: %r", self.topic, self.group, error)
                self._broken.set()
                self._consumer = None
            return []
        if self._closed or self._unplaced:
            return []  # of a partition that was just assigned: placing it seeks back
        records: list[Record] = []
        for tp, messages in found.items():
            share = self._shares.get(tp.partition)
            if share is not None and share.live:
                records += self._hand_out(share, messages)
        return records

    def _hand_out(self, share: _Share, messages: list[Any]) -> list[_Read]:
        first = messages[0]
        if first.offset < share.window.next_offset:
            return []  # fetched before a seek
        share.window.hand_out([message.offset for message in messages])
        share.moments.append((first.offset, first.timestamp))
        self._unsettled += len(messages)
        topic, number = self.topic, share.partition
        return [
            _Read(topic, number, message.offset, message.key.decode(), message.value, share)
            for message in messages
        ]

    def _share_of(self, record: Record) -> _Share:
        if type(record) is not _Read or record.topic != self.topic:
            raise UsageError(f"{record.topic}/{record.partition}@{record.offset} is not out at this reader")
        return record.share

    def _settled(self, count: int) -> None:
        if self._unsettled >= self._max_unsettled:
            self._wake()
        self._unsettled -= count
        if not self._unsettled and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # -------------------------------------------------------------------------------------------- positions

    async def _place(self) -> None:
        """Choose where to read each partition that is new, or whose position is no longer in the log."""
        wanted = sorted(self._unplaced)
        consumer = self._consumer
        try:
            ends = await self._clerk.ends(self.topic, wanted)
            committed = await self._clerk.committed(self.topic, self._kafka_group, wanted)
        except BusUnavailable:
            return
        if consumer is not self._consumer:
            return
        for number in wanted:
            tp = TopicPartition(self.topic, number)
            if number not in self._unplaced or tp not in consumer.assignment():
                continue
            share = self._shares.get(number)
            known = committed.get(number, -1)
            position = max(known, 0) if share is None else share.window.next_offset
            begin, end = ends[number]
            start = min(max(position, begin), end)
            if share is None:
                self._shares[number] = _Share(number, known, start)
            else:
                share.window.next_offset = start
            consumer.seek(tp, start)
            self._unplaced.discard(number)
            if start != position:
                self._tell(Gap(self.topic, self.group, number, position, start))

    def _tell(self, gap: Gap) -> None:
        _log.error("records are lost to their reader: %s", gap)
        observe.BUS_ALARMS.labels("gap").inc()
        if self._on_gap is not None:
            self._on_gap(gap)
        else:
            self._gaps.append(gap)

    # ------------------------------------------------------------------------------------------- rebalances

    async def revoked(self) -> None:
        """The group shares anew. What is out has a moment to be settled; then it is given back."""
        if self._unsettled and not self._closed:
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._drained,), timeout=self._limits.handover_s)
            self._drained = None
        with contextlib.suppress(TimeoutError, *FAILURES, IllegalStateError):
            async with asyncio.timeout(self._limits.handover_s):
                await self._commit()
        self._give_back()

    def assigned(self, partitions: set[int]) -> None:
        self._unplaced = set(partitions)
        self._wake()

    def _give_back(self) -> None:
        for share in self._shares.values():
            share.live = False
        self._shares.clear()
        self._unplaced.clear()
        self._unsettled = 0
        self._wake()

    # ---------------------------------------------------------------------------------------------- keeping

    async def _keep(self) -> None:
        """Until the reader ends: a consumer, and a new one when it has failed."""
        try:
            while not self._closed and self._failure is None:
                self._broken.clear()
                try:
                    if await self._clerk.partitions(self.topic) is None:
                        self._fail(f"there is no topic {self.topic}")
                        break
                    await self._open()
                    await self._tend()
                except (*FAILURES, BusUnavailable) as error:
                    _log.warning("%s: the reader of %s tries again: %r", self.topic, self.group, error)
                await self._shut()
                await asyncio.sleep(_AGAIN_S)
        except asyncio.CancelledError:
            if not self._closed:
                raise
        finally:
            await self._shut()

    async def _open(self) -> None:
        limits = self._limits
        session_ms = int(limits.session_timeout_s * 1000)
        consumer = AIOKafkaConsumer(
            **self._options,
            group_id=self._kafka_group,
            group_instance_id=self._instance,
            auto_offset_reset="none",
            enable_auto_commit=False,
            session_timeout_ms=session_ms,
            rebalance_timeout_ms=max(session_ms, int(limits.handover_s * 3000)),
            heartbeat_interval_ms=max(50, min(500, session_ms // 5)),
            # A reader that is full asks for nothing, however long: it is alive, its store is not.
            max_poll_interval_ms=2**31 - 1,
            partition_assignment_strategy=(RoundRobinPartitionAssignor,),
            fetch_max_wait_ms=500,
            retry_backoff_ms=50,
        )
        calm(consumer._client)
        if self._alone:
            consumer.assign([TopicPartition(self.topic, 0)])
        else:
            consumer.subscribe([self.topic], listener=_Listener(self))
        try:
            await consumer.start()
        except BaseException:
            await self._stop(consumer)
            raise
        self._consumer = consumer
        if self._alone:
            self._sure_at = 0.0
            self.assigned({0})
        self._wake()

    async def _tend(self) -> None:
        """Commit, and look after what nobody waits for, until the consumer fails or the reader ends."""
        consumer = self._consumer
        look_at = time.monotonic() + self._limits.look_s
        while not self._broken.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.commit_interval_s):
                    await self._broken.wait()
            # Metadata of a consumer that fetches in vain is fresh.
            gone = consumer.partitions_for_topic(self.topic) is None
            if gone or time.monotonic() >= look_at:
                look_at = time.monotonic() + self._limits.look_s
                await self._look()
            if not self._broken.is_set():
                await self._commit_soon()

    async def _commit_soon(self) -> None:
        try:
            async with asyncio.timeout(self._limits.stop_s):
                await self._commit()
        except (IllegalGenerationError, RebalanceInProgressError, UnknownMemberIdError):
            pass  # the group shares anew: whoever gets the partitions reads from the last commit
        except (*FAILURES, IllegalStateError) as error:
            _log.warning("%s: %s cannot commit yet: %r", self.topic, self.group, error)

    async def _commit(self) -> None:
        shares = [share for share in self._shares.values() if share.window.committed > share.stored]
        consumer = self._consumer
        if not shares or consumer is None:
            return
        if self._alone and not await self._is_alone(shares[0]):
            return
        marks = {share.partition: share.window.committed for share in shares}
        began = time.monotonic()
        offsets = {TopicPartition(self.topic, n): OffsetAndMetadata(at, "") for n, at in marks.items()}
        # One attempt: AIOKafkaConsumer.commit() repeats for ever, and cancelled it leaves a task behind.
        coordinator = consumer._coordinator
        await coordinator.ensure_coordinator_known()
        await coordinator._do_commit_offsets(None, offsets)
        for share in shares:
            share.stored = marks[share.partition]
        self._sure_at = began

    async def _is_alone(self, share: _Share) -> bool:
        """Whether nobody else has committed this inbox since we did (R3)."""
        if time.monotonic() - self._sure_at < self._limits.sure_s:
            return True
        while True:
            began = time.monotonic()
            found = await self._clerk.committed(self.topic, self._kafka_group, [share.partition])
            if found.get(share.partition, -1) > share.stored:
                self._fail(f"another reader has taken over {self.topic}")
                return False
            if time.monotonic() - began < _ANSWER_S:
                self._sure_at = began
                return True  # else the process may have been stopped while the answer was on its way

    async def _look(self) -> None:
        """Is the topic still there, and does the oldest unsettled record come near the end of its days?"""
        with contextlib.suppress(BusUnavailable):
            if await self._clerk.partitions(self.topic) is None:
                self._fail(f"there is no topic {self.topic}")
                return
            if self._retention_ms is None:
                self._retention_ms = await self._clerk.retention_ms(self.topic)
        if self._retention_ms:
            self.check_retention(self._retention_ms, time.time() * 1000)

    def check_retention(self, retention_ms: int, wall_ms: float) -> None:
        """Alarm once for a partition whose oldest unsettled record is older than a tenth of the retention."""
        for share in self._shares.values():
            moments = share.moments
            while len(moments) > 1 and moments[1][0] <= share.window.committed:
                moments.popleft()
            if moments and share.window.committed >= share.window.next_offset:
                moments.clear()
            age_ms = wall_ms - moments[0][1] if moments else 0
            late = age_ms > retention_ms * _ALARM_SHARE
            if late and not share.alarmed:
                observe.BUS_ALARMS.labels("retention").inc()
                _log.error(
                    "%s/%d: the oldest unsettled record of %s is %d s old, Kafka keeps it for %d s",
                    self.topic, share.partition, self.group, age_ms / 1000, retention_ms / 1000,
                )  # fmt: skip
            share.alarmed = late

    def _fail(self, detail: str) -> None:
        self._failure = BusUnavailable(detail, temporary=False)
        self._broken.set()
        self._wake()

    async def _shut(self) -> None:
        """Commit what is settled, give the rest back, stop the consumer."""
        consumer = self._consumer
        if consumer is not None and self._failure is None:
            with contextlib.suppress(TimeoutError, *FAILURES, IllegalStateError):
                async with asyncio.timeout(self._limits.stop_s):
                    await self._commit()
        self._consumer = None
        self._give_back()
        if consumer is not None:
            await self._stop(consumer)

    async def _stop(self, consumer: Any) -> None:
        with contextlib.suppress(TimeoutError, *FAILURES):
            async with asyncio.timeout(self._limits.stop_s):
                await consumer.stop()


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """aiokafka calls it between two generations of the group."""

    def __init__(self, reader: KafkaReader) -> None:
        self._reader = reader

    async def on_partitions_revoked(self, revoked: set[Any]) -> None:
        await self._reader.revoked()

    async def on_partitions_assigned(self, assigned: set[Any]) -> None:
        self._reader.assigned({tp.partition for tp in assigned})
