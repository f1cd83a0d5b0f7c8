"""What every Bus must keep (promises B1-B7 of fastim.bus.base), whatever carries the records.

A backend's test module inherits BusContract and gives `bus()`, and `close()` where there is something to
close. Topics are named afresh by every test, so that one real broker may serve the whole suite.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fastim.bus.base import Bus, Outgoing, Reader, Record
from fastim.errors import BusUnavailable, UsageError

_NAMES = itertools.count(1)
_READ_S = 10.0
_QUIET_S = 0.05
"""How long a reader that must get nothing is watched; too short can only hide a fault, never invent one."""


def fresh_topic(prefix: str = "contract") -> str:
    """A name that no other test uses, in this process or another."""
    return f"{prefix}.{os.getpid()}.{next(_NAMES)}"


def outgoing(topic: str, *values: str, key: str = "k") -> list[Outgoing]:
    """Records of one key."""
    return [Outgoing(topic, key, value.encode()) for value in values]


def values(records: list[Record]) -> list[str]:
    return [record.value.decode() for record in records]


async def read_exactly(reader: Reader, count: int) -> list[Record]:
    """Read until `count` records came."""
    records: list[Record] = []
    while len(records) < count:
        records += await asyncio.wait_for(reader.read(count - len(records)), _READ_S)
    return records


async def nothing_to_read(reader: Reader) -> bool:
    """Whether a read stays waiting."""
    try:
        await asyncio.wait_for(reader.read(1), _QUIET_S)
    except TimeoutError:
        return True
    return False


class BusContract:
    """Inherit, and give `bus()`."""

    def bus(self) -> Bus:
        raise NotImplementedError

    async def close(self, bus: Bus) -> None:
        """Whatever bus() opened."""

    @asynccontextmanager
    async def fresh(self, partitions: int = 1) -> AsyncIterator[tuple[Bus, str]]:
        bus = self.bus()
        try:
            topic = fresh_topic()
            await bus.ensure(topic, partitions)
            yield bus, topic
            await bus.delete(topic)
        finally:
            await self.close(bus)

    # --------------------------------------------------------------------------------- B1, B6: order, groups

    async def test_records_of_one_key_are_read_in_publish_order(self) -> None:
        async with self.fresh(partitions=3) as (bus, topic):
            reader = bus.reader(topic, "g", max_unsettled=100)
            for number in range(20):
                await bus.publish([Outgoing(topic, f"k{k}", f"{k}:{number}".encode()) for k in range(5)])
            got = values(await read_exactly(reader, 100))
            for k in range(5):
                assert [v for v in got if v.startswith(f"{k}:")] == [f"{k}:{number}" for number in range(20)]
            await reader.close()

    async def test_one_publish_keeps_the_order_of_its_records(self) -> None:
        async with self.fresh() as (bus, topic):
            reader = bus.reader(topic, "g", max_unsettled=100)
            await bus.publish(outgoing(topic, *map(str, range(100))))
            assert values(await read_exactly(reader, 100)) == [str(n) for n in range(100)]
            await reader.close()

    async def test_a_record_arrives_as_it_was_published(self) -> None:
        async with self.fresh() as (bus, topic):
            reader = bus.reader(topic, "g", max_unsettled=100)
            body = bytes(range(256)) * 4
            await bus.publish([Outgoing(topic, "p:alice:bob", body)])
            (record,) = await read_exactly(reader, 1)
            assert (record.topic, record.partition) == (topic, 0)
            assert (record.key, record.value) == ("p:alice:bob", body)
            await reader.close()

    async def test_offsets_of_a_partition_grow_by_one(self) -> None:
        async with self.fresh() as (bus, topic):
            reader = bus.reader(topic, "g", max_unsettled=100)
            await bus.publish(outgoing(topic, "a", "b"))
            await bus.publish(outgoing(topic, "c"))
            offsets = [record.offset for record in await read_exactly(reader, 3)]
            assert offsets == [offsets[0], offsets[0] + 1, offsets[0] + 2]
            await reader.close()

    async def test_two_groups_each_see_every_record(self) -> None:
        async with self.fresh() as (bus, topic):
            first = bus.reader(topic, "g1", max_unsettled=100)
            second = bus.reader(topic, "g2", max_unsettled=100)
            await bus.publish(outgoing(topic, "a", "b", "c"))
            assert values(await read_exactly(first, 3)) == ["a", "b", "c"]
            assert values(await read_exactly(second, 3)) == ["a", "b", "c"]
            await first.close()
            await second.close()

    async def test_two_readers_of_a_group_see_each_record_once(self) -> None:
        async with self.fresh(partitions=4) as (bus, topic):
            first = bus.reader(topic, "g", max_unsettled=1000)
            second = bus.reader(topic, "g", max_unsettled=1000)
            await bus.publish([Outgoing(topic, f"k{n}", str(n).encode()) for n in range(200)])
            got: list[str] = []
            complete = asyncio.Event()

            async def collect(reader: Reader) -> None:
                while True:
                    records = await reader.read(16)
                    got.extend(values(records))
                    for record in records:
                        reader.settle(record)
                    if len(got) >= 200:
                        complete.set()

            tasks = [asyncio.ensure_future(collect(reader)) for reader in (first, second)]
            await asyncio.wait_for(complete.wait(), _READ_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert sorted(got, key=int) == [str(n) for n in range(200)]
            await first.close()
            await second.close()

    async def test_a_new_group_starts_at_the_first_record_of_a_topic_nobody_has_read(self) -> None:
        async with self.fresh() as (bus, topic):
            await bus.publish(outgoing(topic, "a", "b"))
            reader = bus.reader(topic, "late", max_unsettled=100)
            assert values(await read_exactly(reader, 2)) == ["a", "b"]
            await reader.close()

    # ----------------------------------------------------------------------------------- B3, B4, B5: settling

    async def test_an_unsettled_record_is_read_again_by_the_next_reader(self) -> None:
        async with self.fresh() as (bus, topic):
            await bus.publish(outgoing(topic, "a", "b", "c"))
            first = bus.reader(topic, "g", max_unsettled=100)
            records = await read_exactly(first, 3)
            first.settle(records[0])
            await first.close()
            second = bus.reader(topic, "g", max_unsettled=100)
            assert values(await read_exactly(second, 2)) == ["b", "c"]
            await second.close()

    async def test_settled_records_are_not_read_again(self) -> None:
        async with self.fresh() as (bus, topic):
            await bus.publish(outgoing(topic, "a", "b"))
            first = bus.reader(topic, "g", max_unsettled=100)
            for record in await read_exactly(first, 2):
                first.settle(record)
            await first.close()
            second = bus.reader(topic, "g", max_unsettled=100)
            assert await nothing_to_read(second)
            await bus.publish(outgoing(topic, "c"))
            assert values(await read_exactly(second, 1)) == ["c"]
            await second.close()

    async def test_settling_out_of_order_never_commits_past_an_unsettled_record(self) -> None:
        async with self.fresh() as (bus, topic):
            await bus.publish(outgoing(topic, "a", "b", "c"))
            first = bus.reader(topic, "g", max_unsettled=100)
            a, b, c = await read_exactly(first, 3)
            first.settle(c)
            first.settle(b)
            assert bus.committed(topic, "g") <= a.offset
            await first.close()
            second = bus.reader(topic, "g", max_unsettled=100)
            assert "a" in values(await read_exactly(second, 1))
            await second.close()

    async def test_settling_the_oldest_record_commits_all_that_were_settled_behind_it(self) -> None:
        async with self.fresh() as (bus, topic):
            await bus.publish(outgoing(topic, "a", "b", "c"))
            reader = bus.reader(topic, "g", max_unsettled=100)
            a, b, c = await read_exactly(reader, 3)
            reader.settle(b)
            reader.settle(a)
            assert bus.committed(topic, "g") == c.offset
            reader.settle(c)
            assert bus.committed(topic, "g") == bus.published(topic)
            assert await bus.lag(topic, "g") == 0
            await reader.close()

    async def test_a_batch_is_settled_at_once_and_commits_no_further_than_what_is_still_out(self) -> None:
        async with self.fresh() as (bus, topic):
            await bus.publish(outgoing(topic, "a", "b", "c", "d"))
            reader = bus.reader(topic, "g", max_unsettled=100)
            a, b, c, d = await read_exactly(reader, 4)
            reader.settle_all([a, d])
            assert bus.committed(topic, "g") == b.offset
            with pytest.raises(UsageError):
                reader.settle_all([b, a])
            reader.settle_all([])
            reader.settle_all([b, c])
            assert bus.committed(topic, "g") == bus.published(topic)
            await reader.close()
            reader.settle_all([a, b])

    async def test_settling_a_record_twice_is_refused(self) -> None:
        async with self.fresh() as (bus, topic):
            await bus.publish(outgoing(topic, "a", "b"))
            reader = bus.reader(topic, "g", max_unsettled=100)
            _, b = await read_exactly(reader, 2)
            reader.settle(b)
            with pytest.raises(UsageError):
                reader.settle(b)
            await reader.close()

    async def test_settling_after_close_has_no_effect(self) -> None:
        async with self.fresh() as (bus, topic):
            await bus.publish(outgoing(topic, "a"))
            first = bus.reader(topic, "g", max_unsettled=100)
            (record,) = await read_exactly(first, 1)
            await first.close()
            first.settle(record)
            second = bus.reader(topic, "g", max_unsettled=100)
            assert values(await read_exactly(second, 1)) == ["a"]
            await second.close()

    async def test_at_most_max_unsettled_records_are_out(self) -> None:
        async with self.fresh(partitions=2) as (bus, topic):
            await bus.publish([Outgoing(topic, f"k{n}", str(n).encode()) for n in range(50)])
            reader = bus.reader(topic, "g", max_unsettled=8)
            records = await read_exactly(reader, 8)
            assert await nothing_to_read(reader)
            reader.settle(records[3])
            assert len(await asyncio.wait_for(reader.read(50), _READ_S)) == 1
            await reader.close()

    async def test_a_waiting_read_goes_on_when_a_record_is_settled(self) -> None:
        async with self.fresh() as (bus, topic):
            await bus.publish(outgoing(topic, "a", "b"))
            reader = bus.reader(topic, "g", max_unsettled=1)
            (a,) = await read_exactly(reader, 1)
            waiting = asyncio.ensure_future(reader.read(10))
            await asyncio.sleep(0)
            reader.settle(a)
            assert values(await asyncio.wait_for(waiting, _READ_S)) == ["b"]
            await reader.close()

    async def test_a_cancelled_read_loses_no_record(self) -> None:
        async with self.fresh() as (bus, topic):
            reader = bus.reader(topic, "g", max_unsettled=100)
            waiting = asyncio.ensure_future(reader.read(10))
            await asyncio.sleep(0)
            waiting.cancel()
            await bus.publish(outgoing(topic, "a"))
            await asyncio.gather(waiting, return_exceptions=True)
            assert values(await read_exactly(reader, 1)) == ["a"]
            await reader.close()

    # ------------------------------------------------------------------------------------- readers and topics

    async def test_a_waiting_read_gets_what_is_published(self) -> None:
        async with self.fresh() as (bus, topic):
            reader = bus.reader(topic, "g", max_unsettled=100)
            waiting = asyncio.ensure_future(reader.read(10))
            await asyncio.sleep(0)
            await bus.publish(outgoing(topic, "a"))
            assert values(await asyncio.wait_for(waiting, _READ_S)) == ["a"]
            await reader.close()

    async def test_closing_ends_a_waiting_read_with_nothing(self) -> None:
        async with self.fresh() as (bus, topic):
            reader = bus.reader(topic, "g", max_unsettled=100)
            waiting = asyncio.ensure_future(reader.read(10))
            await asyncio.sleep(0)
            await reader.close()
            assert await asyncio.wait_for(waiting, _READ_S) == []
            assert await reader.read(10) == []

    async def test_a_second_reader_takes_over_when_the_first_closes(self) -> None:
        async with self.fresh() as (bus, topic):
            first = bus.reader(topic, "g", max_unsettled=100)
            second = bus.reader(topic, "g", max_unsettled=100)
            await bus.publish(outgoing(topic, "a", "b"))
            await first.close()
            assert values(await read_exactly(second, 2)) == ["a", "b"]
            await second.close()

    async def test_lag_is_published_minus_committed(self) -> None:
        async with self.fresh() as (bus, topic):
            reader = bus.reader(topic, "g", max_unsettled=100)
            await bus.publish(outgoing(topic, "a", "b", "c"))
            a, _, c = await read_exactly(reader, 3)
            reader.settle(a)
            reader.settle(c)
            assert await bus.lag(topic, "g") == 2
            await reader.close()

    async def test_ends_are_passed_once_everything_below_them_is_settled(self) -> None:
        async with self.fresh(partitions=2) as (bus, topic):
            assert await bus.ends(topic) == (0, 0)
            assert await bus.passed(topic, "g", (0, 0))
            await bus.publish(outgoing(topic, *(str(n) for n in range(10))))
            ends = await bus.ends(topic)
            assert sum(ends) == 10
            reader = bus.reader(topic, "g", max_unsettled=100)
            *settled, last = await read_exactly(reader, 10)
            reader.settle_all(settled)
            assert not await bus.passed(topic, "g", ends)
            await bus.publish(outgoing(topic, "later"))
            reader.settle(last)
            assert await bus.passed(topic, "g", ends)
            assert not await bus.passed(topic, "g", await bus.ends(topic))
            await reader.close()

    async def test_topic_that_does_not_exist_has_no_ends_and_has_passed_none(self) -> None:
        async with self.fresh() as (bus, topic):
            assert await bus.ends(f"{topic}.missing") == ()
            assert await bus.passed(f"{topic}.missing", "g", ())
            assert not await bus.passed(f"{topic}.missing", "g", (1,))

    async def test_ensure_twice_is_harmless_and_with_another_count_refused(self) -> None:
        async with self.fresh(partitions=2) as (bus, topic):
            await bus.ensure(topic, 2)
            with pytest.raises(UsageError):
                await bus.ensure(topic, 3)

    async def test_publishing_to_a_missing_topic_is_unavailable_for_good(self) -> None:
        async with self.fresh() as (bus, topic):
            with pytest.raises(BusUnavailable) as error:
                await bus.publish(outgoing(f"{topic}.missing", "a"))
            assert not error.value.temporary

    async def test_deleting_a_topic_ends_its_readers(self) -> None:
        async with self.fresh() as (bus, topic):
            reader = bus.reader(topic, "g", max_unsettled=100)
            waiting = asyncio.ensure_future(reader.read(10))
            await asyncio.sleep(0)
            await bus.delete(topic)
            assert await asyncio.wait_for(waiting, _READ_S) == []
            with pytest.raises(BusUnavailable):
                await bus.publish(outgoing(topic, "a"))

    async def test_an_unknown_topic_has_published_and_committed_nothing(self) -> None:
        bus = self.bus()
        assert bus.published("contract.nowhere") == 0
        assert bus.committed("contract.nowhere", "g") == 0
        await self.close(bus)
