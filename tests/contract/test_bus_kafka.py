"""The Kafka bus keeps the bus contract on a real broker; and what only it promises.

What happens when brokers go away is in test_bus_kafka_outage.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from fastim import observe
from fastim.bus.base import Bus, Outgoing
from fastim.bus.kafka import Gap, KafkaBus, KafkaSecurity
from fastim.bus.memory import MemoryBus
from fastim.bus.records import ReadNotice, decode_submit
from fastim.errors import BusUnavailable, UsageError
from tests.contract.bus import BusContract, fresh_topic, outgoing, read_exactly, values

DEADLINE_S = 15.0


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@asynccontextmanager
async def opened(url: str, topic: str = "", partitions: int = 1, **options: Any) -> AsyncIterator[KafkaBus]:
    """A bus of its own, with the topic if one is named; the topic stays."""
    bus = KafkaBus(url, **options)
    try:
        if topic:
            await bus.ensure(topic, partitions)
        yield bus
    finally:
        await bus.close()


def brokers(url: str) -> str:
    return url.removeprefix("kafka://")


async def drop_before(url: str, topic: str, offset: int) -> None:
    """What retention does: the records below are gone."""
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers(url))
    await admin.start()
    await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(offset)})
    await admin.close()


async def commit(url: str, topic: str, group: str, offset: int) -> None:
    """As a program of somebody else."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=brokers(url), group_id=group, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    consumer.assign([TopicPartition(topic, 0)])
    await consumer.start()
    await consumer.commit({TopicPartition(topic, 0): offset})
    await consumer.stop()


def alarms(what: str) -> float:
    return observe.BUS_ALARMS.labels(what)._value.get()


class TestKafkaBus(BusContract):
    @pytest.fixture(autouse=True)
    def _broker(self, kafka: str) -> None:
        self.url = kafka

    def bus(self) -> KafkaBus:
        return KafkaBus(self.url)

    async def close(self, bus: Bus) -> None:
        assert isinstance(bus, KafkaBus)
        await bus.close()


# ------------------------------------------------------------------------------------------------ publishing


async def test_a_record_object_travels_as_its_bytes(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic) as bus:
        notice = ReadNotice("p:alice:bob", "alice", 7, "s1", False)
        await bus.publish([Outgoing(topic, "alice", notice)])
        reader = bus.reader(topic, "g", max_unsettled=10)
        (record,) = await read_exactly(reader, 1)
        assert type(record.value) is bytes
        assert decode_submit(record.value) == notice


async def test_a_key_has_the_partition_it_always_had(kafka: str) -> None:
    topic = fresh_topic()
    expected = {"p:alice:bob": 5, "g:1": 4, "s:carol": 13, "p:李雷:韩梅梅": 2, "": 0}
    async with opened(kafka, topic, 16) as bus:
        await bus.publish([Outgoing(topic, key, b"") for key in expected])
        reader = bus.reader(topic, "g", max_unsettled=10)
        found = {record.key: record.partition for record in await read_exactly(reader, len(expected))}
    memory = MemoryBus()
    await memory.ensure(topic, 16)
    embedded = memory.reader(topic, "g", max_unsettled=10)
    await memory.publish([Outgoing(topic, key, b"") for key in expected])
    assert found == {r.key: r.partition for r in await read_exactly(embedded, len(expected))} == expected


async def test_publishes_that_nobody_waited_for_keep_the_order_of_their_calls(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka) as maker:
        await maker.ensure(topic)
    async with opened(kafka) as bus:  # which has never heard of the topic
        await asyncio.gather(*(bus.publish(outgoing(topic, str(n))) for n in range(300)))
        reader = bus.reader(topic, "g", max_unsettled=1000)
        assert values(await read_exactly(reader, 300)) == [str(n) for n in range(300)]


async def test_what_is_published_meanwhile_shares_a_request(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic) as bus:
        await bus.publish(outgoing(topic, "first"))
        producer = bus.writer._producer
        assert producer is not None
        sent: list[int] = []
        send_batch = producer.raw.send_batch

        async def counting(builder: Any, *args: Any, **kwargs: Any) -> Any:
            sent.append(builder.record_count())
            return await send_batch(builder, *args, **kwargs)

        producer.raw.send_batch = counting
        await asyncio.gather(*(bus.publish(outgoing(topic, str(n))) for n in range(200)))
        assert sum(sent) == 200
        assert len(sent) <= 3


async def test_records_larger_than_a_batch_travel_in_several(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic, batch_bytes=16_384) as bus:
        await bus.publish([Outgoing(topic, "k", bytes([n]) * 60_000) for n in range(8)])
        reader = bus.reader(topic, "g", max_unsettled=100)
        assert [record.value[0] for record in await read_exactly(reader, 8)] == list(range(8))


async def test_a_record_no_broker_takes_is_unavailable_for_good(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic) as bus:
        with pytest.raises(BusUnavailable) as error:
            await bus.publish([Outgoing(topic, "k", bytes(2_000_000))])
        assert not error.value.temporary
        await bus.publish(outgoing(topic, "small"))


async def test_publishing_goes_on_with_another_producer_when_sequence_numbers_are_in_doubt(
    kafka: str,
) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic) as bus:
        await bus.publish(outgoing(topic, "a"))
        producer = bus.writer._producer
        assert producer is not None
        producer.raw._txn_manager.increment_sequence_number(TopicPartition(topic, 0), 5)
        with pytest.raises(BusUnavailable, match="OutOfOrderSequence"):
            await bus.publish(outgoing(topic, "b"))
        await bus.publish(outgoing(topic, "c"))
        assert bus.writer.replaced == 1
        reader = bus.reader(topic, "g", max_unsettled=10)
        assert values(await read_exactly(reader, 2)) == ["a", "c"]


async def test_a_publisher_learns_that_its_topic_was_deleted_elsewhere(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic) as bus, opened(kafka) as other:
        await bus.publish(outgoing(topic, "a"))
        await other.delete(topic)

        async def publish_on() -> None:
            while True:  # the broker forgets the topic a moment later
                await bus.publish(outgoing(topic, "b"))

        with pytest.raises(BusUnavailable) as error:
            await asyncio.wait_for(publish_on(), DEADLINE_S)
        assert not error.value.temporary


async def test_a_cancelled_publish_leaves_the_bus_as_it_was(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic) as bus:
        publishing = asyncio.ensure_future(bus.publish(outgoing(topic, "a")))
        await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        await bus.publish(outgoing(topic, "b"))
        reader = bus.reader(topic, "g", max_unsettled=10)
        assert values(await read_exactly(reader, 2)) == ["a", "b"]
        assert bus.writer.pending_bytes == 0


async def test_an_inbox_has_one_partition(kafka: str) -> None:
    async with opened(kafka) as bus:
        with pytest.raises(UsageError, match="an inbox has 1"):
            await bus.ensure(fresh_topic("inbox"), 2)


# ----------------------------------------------------------------------------------------------- rebalances


async def test_a_reader_that_joins_takes_over_what_the_first_did_not_settle(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic, 2, handover_s=0.2) as one, opened(kafka) as two:
        first = one.reader(topic, "g", max_unsettled=100)
        await one.publish([Outgoing(topic, f"k{n}", str(n).encode()) for n in range(20)])
        held = await read_exactly(first, 20)
        second = two.reader(topic, "g", max_unsettled=100)
        moved = await asyncio.wait_for(second.read(100), DEADLINE_S)
        (partition,) = {record.partition for record in moved}
        moved += await read_exactly(second, sum(r.partition == partition for r in held) - len(moved))
        assert [r.offset for r in moved] == [r.offset for r in held if r.partition == partition]
        first.settle_all(held)  # of both partitions: no effect any more
        for record in moved:
            second.settle(record)
        stayed = await read_exactly(first, 20 - len(moved))
        assert {record.partition for record in stayed} == {1 - partition}
        first.settle_all(stayed)
        await until(lambda: bool(first.committed()))
        assert await one.lag(topic, "g") <= len(moved)
        await second.close()
        assert await one.lag(topic, "g") == 0


async def test_a_rebalance_waits_for_what_is_about_to_be_settled(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic, 2, handover_s=10) as one, opened(kafka) as two:
        first = one.reader(topic, "g", max_unsettled=100)
        await one.publish([Outgoing(topic, f"k{n}", str(n).encode()) for n in range(20)])
        held = await read_exactly(first, 20)
        second = two.reader(topic, "g", max_unsettled=100)
        await until(lambda: first._drained is not None)
        first.settle_all(held)
        await until(lambda: second._consumer is not None)
        await one.publish([Outgoing(topic, f"k{n}", b"new") for n in range(20)])
        reading = [asyncio.ensure_future(reader.read(100)) for reader in (first, second)]
        got = [record for records in await asyncio.gather(*reading) for record in records]
        assert {record.value for record in got} == {b"new"}


async def test_settling_a_record_of_a_partition_that_left_and_came_back_has_no_effect(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic, handover_s=0.1) as one, opened(kafka) as two:
        first = one.reader(topic, "g", max_unsettled=100)
        await one.publish(outgoing(topic, "a", "b"))
        old = await read_exactly(first, 2)
        second = two.reader(topic, "g", max_unsettled=100)
        await until(lambda: not old[0].share.live)  # type: ignore[attr-defined]
        await second.close()
        new = await read_exactly(first, 2)
        first.settle_all(old)
        assert first.committed() == {0: 0}
        first.settle_all(new)
        assert first.committed() == {0: 2}


async def test_a_static_member_that_returns_disturbs_nobody(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic, 2, instance="d1") as one:
        first = one.reader(topic, "g", max_unsettled=100)
        async with opened(kafka, instance="d2") as two:
            second = two.reader(topic, "g", max_unsettled=100)
            await until(lambda: len(first._shares) + len(first._unplaced) == 1 and bool(second._unplaced))
            await one.publish([Outgoing(topic, f"k{n}", b"x") for n in range(20)])
            held = await asyncio.wait_for(first.read(100), DEADLINE_S)
            others = await asyncio.wait_for(second.read(100), DEADLINE_S)
        async with opened(kafka, instance="d2") as again:
            third = again.reader(topic, "g", max_unsettled=100)
            back = await asyncio.wait_for(third.read(100), DEADLINE_S)
            assert {r.partition for r in back} == {r.partition for r in others}
            assert held[0].share.live  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------- positions, retention


async def test_records_that_retention_took_are_told_and_reading_goes_on_behind_them(kafka: str) -> None:
    topic = fresh_topic()
    gaps: list[Gap] = []
    async with opened(kafka, topic, on_gap=gaps.append) as bus:
        await bus.publish(outgoing(topic, "a", "b", "c", "d"))
        first = bus.reader(topic, "g", max_unsettled=10)
        a, *_ = await read_exactly(first, 4)
        first.settle(a)
        await first.close()
        await drop_before(kafka, topic, 3)
        before = alarms("gap")
        second = bus.reader(topic, "g", max_unsettled=10)
        assert values(await read_exactly(second, 1)) == ["d"]
        assert gaps == [Gap(topic, "g", 0, 1, 3)]
        assert alarms("gap") == before + 1


async def test_without_anybody_to_tell_the_reader_raises_once_and_goes_on(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic) as bus:
        await bus.publish(outgoing(topic, "a", "b", "c"))
        await drop_before(kafka, topic, 2)
        reader = bus.reader(topic, "new group", max_unsettled=10)
        with pytest.raises(BusUnavailable, match="offsets 0 to 1 are gone") as error:
            await reader.read(10)
        assert error.value.temporary
        assert values(await read_exactly(reader, 1)) == ["c"]


async def test_a_log_that_ends_before_the_committed_offset_is_told_and_read_from_its_end(kafka: str) -> None:
    topic = fresh_topic()
    gaps: list[Gap] = []
    async with opened(kafka, topic, on_gap=gaps.append) as bus:
        await bus.publish(outgoing(topic, "a", "b"))
        await commit(kafka, topic, f"g.{topic}", 50)
        reader = bus.reader(topic, "g", max_unsettled=10)
        waiting = asyncio.ensure_future(reader.read(10))
        await until(lambda: bool(gaps))
        await bus.publish(outgoing(topic, "c"))
        assert values(await asyncio.wait_for(waiting, DEADLINE_S)) == ["c"]
        assert gaps == [Gap(topic, "g", 0, 50, 2)]


async def test_a_record_left_unsettled_for_a_tenth_of_the_retention_is_an_alarm(kafka: str) -> None:
    topic = fresh_topic()
    async with opened(kafka, topic) as bus:
        await bus.publish(outgoing(topic, "a", "b"))
        reader = bus.reader(topic, "g", max_unsettled=10)
        records = await read_exactly(reader, 2)
        retention_ms = await bus.clerk.retention_ms(topic)
        assert retention_ms == 7 * 24 * 3600 * 1000
        before, now_ms = alarms("retention"), time.time() * 1000
        reader.check_retention(retention_ms, now_ms + 0.09 * retention_ms)
        assert alarms("retention") == before
        for _ in range(3):
            reader.check_retention(retention_ms, now_ms + 0.11 * retention_ms)
        assert alarms("retention") == before + 1
        reader.settle_all(records)
        reader.check_retention(retention_ms, now_ms + retention_ms)
        assert alarms("retention") == before + 1


# -------------------------------------------------------------------------------------------------- inboxes


async def test_the_next_reader_of_an_inbox_begins_where_the_first_committed(kafka: str) -> None:
    topic = fresh_topic("inbox")
    async with opened(kafka, topic) as bus:
        await bus.publish(outgoing(topic, "a", "b", "c"))
        first = bus.reader(topic, "node", max_unsettled=10)
        a, *_ = await read_exactly(first, 3)
        first.settle(a)
        await first.close()
        second = bus.reader(topic, "node", max_unsettled=10)
        assert values(await read_exactly(second, 2)) == ["b", "c"]


async def test_a_reader_whose_inbox_was_taken_over_ends_and_commits_nothing(kafka: str) -> None:
    topic = fresh_topic("inbox")
    async with opened(kafka, topic, sure_s=0) as zombie, opened(kafka) as adopter:
        await zombie.publish(outgoing(topic, "a", "b", "c"))
        old = zombie.reader(topic, "node", max_unsettled=10)
        a, *_ = await read_exactly(old, 3)
        new = adopter.reader(topic, "node", max_unsettled=10)
        new.settle_all(await read_exactly(new, 3))
        await new.close()
        old.settle(a)
        with pytest.raises(BusUnavailable, match="taken over") as error:
            await asyncio.wait_for(old.read(1), DEADLINE_S)
        assert not error.value.temporary
        await old.close()
        assert await adopter.lag(topic, "node") == 0


async def test_a_reader_learns_that_its_topic_was_deleted_elsewhere(kafka: str) -> None:
    topic = fresh_topic("inbox")
    async with opened(kafka, topic) as bus, opened(kafka) as other:
        reader = bus.reader(topic, "node", max_unsettled=10)
        await bus.publish(outgoing(topic, "a"))
        await read_exactly(reader, 1)
        await other.delete(topic)
        with pytest.raises(BusUnavailable, match="there is no topic") as error:
            await asyncio.wait_for(reader.read(1), DEADLINE_S)
        assert not error.value.temporary


async def test_a_reader_of_a_topic_that_does_not_exist_says_so(kafka: str) -> None:
    async with opened(kafka) as bus:
        reader = bus.reader(fresh_topic(), "g", max_unsettled=10)
        with pytest.raises(BusUnavailable) as error:
            await asyncio.wait_for(reader.read(1), DEADLINE_S)
        assert not error.value.temporary


# ------------------------------------------------------------------------------------------------- security


def test_a_password_is_not_shown() -> None:
    assert "hunter2" not in repr(KafkaSecurity(sasl="PLAIN", user="fastim", password="hunter2"))


def test_a_certificate_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.pem"):
        KafkaSecurity(tls=True, ca_file="nowhere.pem").options()
