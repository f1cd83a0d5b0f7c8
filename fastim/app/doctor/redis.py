"""Redis or Valkey: each server that the URL names."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio.connection import Connection
from redis.exceptions import RedisError

from fastim.app.doctor.report import DEADLINE_S, Finding, skew
from fastim.config import Config
from fastim.presence.shards import Target


async def examine_redis(config: Config) -> AsyncIterator[Finding]:
    """Version, role, cluster, eviction, clock."""
    target = Target(config.presence_url)
    for host, port in target.seeds:
        subject = "presence" if len(target.seeds) == 1 else f"presence {host}:{port}"
        conn = target.connection((host, port), DEADLINE_S)
        try:
            async for finding in _server(conn, subject, target.cluster):
                yield finding
        except (RedisError, OSError) as error:
            yield Finding(False, subject, f"{host}:{port} does not answer: {str(error).splitlines()[0]}")
        finally:
            await conn.disconnect()


async def _server(conn: Connection, subject: str, cluster: bool) -> AsyncIterator[Finding]:
    await conn.connect()  # type: ignore[no-untyped-call]
    info = _info(await _ask(conn, "INFO"))
    version = info.get("redis_version", "?")
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {version}"
    major = int(version.partition(".")[0]) if version[:1].isdigit() else 0
    if major < 7:
        yield Finding(False, subject, f"{name}; fastim is made for 7 and above")
    else:
        yield Finding(True, subject, f"{name} answers at {conn.host}:{conn.port}")
    if (info.get("cluster_enabled") == "1") != cluster:
        wanted = "redis+cluster://" if not cluster else "redis://"
        yield Finding(
            False, subject, f"presence.url and the server differ about being a cluster; use {wanted}"
        )
    elif cluster:
        state = _info(await _ask(conn, "CLUSTER", "INFO"))
        good = state.get("cluster_state") == "ok"
        text = f"the cluster is {state.get('cluster_state')}, {state.get('cluster_size')} masters"
        yield Finding(good, subject, text if good else f"{text}; some slots have no server")
    elif info.get("role") != "master":
        yield Finding(False, subject, f"it is a {info.get('role')}; presence.url must name the master")
    policy = info.get("maxmemory_policy", "?")
    if info.get("maxmemory", "0") != "0" and policy != "noeviction":
        yield Finding(
            False, subject, f"maxmemory-policy is {policy}: it would forget who is connected; use noeviction"
        )
    else:
        yield Finding(True, subject, f"maxmemory-policy {policy}, {info.get('used_memory_human', '?')} used")
    asked_ms = time.time() * 1000
    seconds, micros = await _ask(conn, "TIME")
    yield skew(subject, int(seconds) * 1000 + int(micros) / 1000, asked_ms, time.time() * 1000)


async def _ask(conn: Connection, *words: str) -> Any:
    await conn.send_command(*words)
    return await conn.read_response()


def _info(raw: bytes | str) -> dict[str, str]:
    text = raw.decode() if isinstance(raw, bytes) else raw
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
