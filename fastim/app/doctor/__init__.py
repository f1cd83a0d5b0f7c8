"""`fastim doctor`: is what this configuration names there, and is it set up so that the promises hold?

One line for each thing that was looked at, good or bad, and what to do about a bad one. It only looks: no
topic is made, no schema is changed.

    local      file descriptors, the data directory, certificates
    kafka, redis, postgres, sqlite     the backends
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastim.app.doctor.local import examine_local, examine_sqlite
from fastim.app.doctor.report import DEADLINE_S, Finding, bounded
from fastim.config import Config, Role

__all__ = ["DEADLINE_S", "Finding", "examine"]


async def examine(config: Config, role: Role) -> AsyncIterator[Finding]:
    """Everything that a process of this role depends on."""
    for finding in examine_local(config, role):
        yield finding
    if config.embedded:
        for finding in examine_sqlite(config):
            yield finding
        return
    from fastim.app.doctor.kafka import examine_kafka
    from fastim.app.doctor.postgres import examine_postgres
    from fastim.app.doctor.redis import examine_redis

    async for finding in bounded("bus", config.bus_url, examine_kafka(config)):
        yield finding
    async for finding in bounded("presence", config.presence_url, examine_redis(config)):
        yield finding
    for number, url in enumerate(config.store_urls, 1):
        async for finding in bounded(f"store {number}", url, examine_postgres(config, number, url)):
            yield finding
