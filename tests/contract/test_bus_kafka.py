"""The Kafka bus keeps the bus contract on a real broker; and what only it promises."""

from __future__ import annotations

import pytest

from fastim.bus.base import Bus
from fastim.bus.kafka import KafkaBus
from tests.contract.bus import BusContract


class TestKafkaBus(BusContract):
    @pytest.fixture(autouse=True)
    def _broker(self, kafka: str) -> None:
        self.url = kafka

    def bus(self) -> KafkaBus:
        return KafkaBus(self.url)

    async def close(self, bus: Bus) -> None:
        assert isinstance(bus, KafkaBus)
        await bus.close()
