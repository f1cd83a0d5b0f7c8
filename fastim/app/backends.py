"""Which implementation a URL means: the only place that names those of store, bus and presence.

What a cluster needs is imported when it is asked for: one process with everything in it does without.
"""

from __future__ import annotations

from fastim.app.ground import Ground
from fastim.bus.base import Bus
from fastim.bus.memory import MemoryBus
from fastim.clock import Clock
from fastim.config import Config
from fastim.errors import UsageError
from fastim.presence.base import PresenceStore
from fastim.presence.memory import MemoryPresence
from fastim.store.base import MessageStore
from fastim.store.sqlite import SqliteStore


async def open_store(config: Config, *, read_only: bool = False) -> MessageStore:
    """Raises UsageError for what somebody configured, StoreUnavailable."""
    if not config.on_servers["store"]:
        return await SqliteStore.open(config.store_path, read_only=read_only)
    try:
        from fastim.store.postgres import PostgresStore
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    return await PostgresStore.open(config.store_urls, pool_size=config.store.pool_size, read_only=read_only)


async def open_bus(ground: Ground, name: str) -> Bus:
    """name: of this process. Raises UsageError, BusUnavailable."""
    return MemoryBus(bound=ground.config.bus.bound_records)


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
