"""Which implementation a URL means: the only place that names those of store, bus and presence.

What a cluster needs is imported when it is asked for: one process with everything in it does without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastim.app.ground import Ends
from fastim.bus.base import Bus
from fastim.bus.memory import MemoryBus
from fastim.clock import Clock
from fastim.config import Config
from fastim.errors import UsageError
from fastim.presence.base import PresenceStore
from fastim.presence.memory import MemoryPresence
from fastim.store.base import MessageStore
from fastim.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from fastim.bus.kafka import KafkaSecurity


async def open_store(config: Config, *, read_only: bool = False) -> MessageStore:
    """Raises UsageError for what somebody configured, StoreUnavailable."""
    if not config.on_servers["store"]:
        return await SqliteStore.open(config.store_path, read_only=read_only)
    try:
        from fastim.store.postgres import PostgresStore
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    return await PostgresStore.open(config.store_urls, pool_size=config.store.pool_size, read_only=read_only)


def make_bus(config: Config, instance: str, on_gap: Callable[[str], None], ends: Ends) -> Bus:
    """Connects with its first use. instance: the same over restarts, and no other process has it.

    on_gap: told of a topic of which records vanished before this process had read them.
    """
    if not config.on_servers["bus"]:
        return MemoryBus(bound=config.bus.bound_records)
    try:
        from fastim.bus.kafka import KafkaBus
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    # Every rebalance in ten lines, and nothing that the reader does not say itself.
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    bus = KafkaBus(
        config.bus_url, security=kafka_security(config), instance=instance,
        replication=config.bus.replication, on_gap=lambda gap: on_gap(gap.topic),
    )  # fmt: skip
    ends.push("bus", bus.close)
    return bus


def kafka_security(config: Config) -> KafkaSecurity:
    """How connections to the brokers are secured."""
    from fastim.bus.kafka import KafkaSecurity

    bus = config.bus
    return KafkaSecurity(
        tls=bus.tls, ca_file=bus.tls_ca, cert_file=bus.tls_cert, key_file=bus.tls_key, sasl=bus.sasl,
        user=bus.user, password=bus.password.get_secret_value(),
    )  # fmt: skip


def make_presence(config: Config, clock: Clock, boot: int) -> PresenceStore:
    """boot: of the node in this process, 0 without. Connects with its first use."""
    if not config.on_servers["presence"]:
        # A generation is never below one that an earlier process used.
        return MemoryPresence(clock, boot << 32)
    try:
        from fastim.presence.redis import RedisPresence
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    return RedisPresence(config.presence_url, clock)


def _not_installed(error: ModuleNotFoundError) -> UsageError:
    return UsageError(f"{error.name} is not installed; servers need the extra fastim[cluster]")
