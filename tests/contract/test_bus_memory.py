"""The memory bus keeps the bus contract; and what only it promises: freed memory, a bound, all or nothing."""

from __future__ import annotations

import pytest

from fastim.bus.base import Bus, Outgoing
from fastim.bus.memory import MemoryBus
from fastim.errors import BusUnavailable
from tests.contract.bus import BusContract, outgoing, read_exactly, values


class TestMemoryBus(BusContract):
    def bus(self) -> Bus:
        return MemoryBus()

    async def test_what_every_group_has_committed_is_freed(self) -> None:
        bus = MemoryBus()
        await bus.ensure("t")
        fast = bus.reader("t", "fast", max_unsettled=1000)
        slow = bus.reader("t", "slow", max_unsettled=1000)
        for _ in range(50):
            await bus.publish(outgoing("t", *map(str, range(20))))
            for record in await read_exactly(fast, 20):
                fast.settle(record)
        assert bus.held("t") == 1000
        for record in await read_exactly(slow, 1000):
            slow.settle(record)
        assert bus.held("t") == 0

    async def test_memory_stays_within_twice_what_is_uncommitted(self) -> None:
        bus = MemoryBus()
        await bus.ensure("t")
        reader = bus.reader("t", "g", max_unsettled=1000)
        out = []
        most = 0
        for _ in range(500):
            await bus.publish(outgoing("t", *"0123456789"))
            out += await read_exactly(reader, 10)
            while len(out) > 100:
                reader.settle(out.pop(0))
            most = max(most, bus.held("t"))
        assert most <= 2 * 110 + 128

    async def test_a_topic_without_a_group_keeps_its_records(self) -> None:
        bus = MemoryBus()
        await bus.ensure("t")
        await bus.publish(outgoing("t", *map(str, range(500))))
        assert bus.held("t") == 500

    async def test_publish_stores_all_records_or_none(self) -> None:
        bus = MemoryBus()
        await bus.ensure("t")
        with pytest.raises(BusUnavailable):
            await bus.publish([*outgoing("t", "a"), *outgoing("missing", "b")])
        assert bus.published("t") == 0

    async def test_a_full_topic_refuses_until_its_readers_commit(self) -> None:
        bus = MemoryBus(bound=3)
        await bus.ensure("t")
        reader = bus.reader("t", "g", max_unsettled=10)
        await bus.publish(outgoing("t", "a", "b", "c"))
        with pytest.raises(BusUnavailable) as error:
            await bus.publish(outgoing("t", "d"))
        assert error.value.temporary
        a, *_ = await read_exactly(reader, 3)
        reader.settle(a)
        await bus.publish(outgoing("t", "d"))
        assert values(await read_exactly(reader, 1)) == ["d"]

    async def test_a_partition_moves_to_a_new_reader_only_once_its_records_are_settled(self) -> None:
        bus = MemoryBus()
        await bus.ensure("t", 2)
        first = bus.reader("t", "g", max_unsettled=100)
        await bus.publish([Outgoing("t", f"k{n}", b"x") for n in range(20)])
        held = await read_exactly(first, 20)
        second = bus.reader("t", "g", max_unsettled=100)
        await bus.publish([Outgoing("t", f"k{n}", b"y") for n in range(20)])
        moved = {record.partition for record in held} - {r.partition for r in await first.read(100)}
        (partition,) = moved
        for record in held:
            if record.partition == partition:
                first.settle(record)
        got = await second.read(100)
        assert {record.partition for record in got} == {partition}
        assert {record.value for record in got} == {b"y"}
