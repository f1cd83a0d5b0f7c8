"""Redis away, slow, restarted, flushed or full: clear errors, no call without an end, healing by renew."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from fastim.errors import PresenceUnavailable
from fastim.presence.base import NOWHERE, Change, PresenceStore, Watcher
from fastim.presence.redis import RedisPresence
from fastim.presence.shards import Target
from tests.contract.presence import locate, places, sessions, told
from tests.faults.proxy import Proxy
from tests.presence.servers import asked, free_port, presence_at, server, through, with_prefix
from tests.servers import Servers

DEADLINE_MS = 400
LEASE_MS = 60_000
USERS = [f"user{number}" for number in range(60)]


@pytest.fixture
def own_redis(own_servers: Servers) -> str:
    return own_servers.start("redis")["FASTIM_REDIS"]


@pytest.fixture
def own_valkey(own_servers: Servers) -> str:
    return own_servers.start("valkey")["FASTIM_VALKEY"]


async def register(presence: PresenceStore) -> None:
    """What a node does at its start, and when renew says that something is lost."""
    await presence.open_lease("n1", 1, LEASE_MS)
    for user in USERS:
        await presence.attach(user, "phone", "app", "n1", 1, f"s-{user}")
    await presence.enter("lobby", "n1", 1, len(USERS))


async def all_there(presence: PresenceStore) -> bool:
    found = await presence.locate(USERS)
    here = {user: [a.session for a in found[user].attachments] for user in found}
    return here == {user: [f"s-{user}"] for user in USERS} and len(await places(presence, "lobby")) == 1


async def resynced(watcher: Watcher) -> Change:
    """Wait until the watcher is told to look again."""
    async with asyncio.timeout(10):
        while True:
            change = await watcher.changes()
            if change.resync:
                return change


def every_call(presence: PresenceStore) -> dict[str, Callable[[], Awaitable[object]]]:
    return {
        "open_lease": lambda: presence.open_lease("n1", 1, LEASE_MS),
        "renew": lambda: presence.renew("n1", 1, LEASE_MS),
        "nodes": presence.nodes,
        "attach": lambda: presence.attach("alice", "phone", "app", "n1", 1, "s1"),
        "detach": lambda: presence.detach("alice", "phone", 1),
        "locate": lambda: presence.locate(USERS),
        "enter": lambda: presence.enter("lobby", "n1", 1, 1),
        "leave": lambda: presence.leave("lobby", "n1", 1),
        "room_nodes": lambda: presence.room_nodes(["lobby"]),
        "watch": lambda: presence.watch().watch(["alice"]),
        "end_lease": lambda: presence.end_lease("n1", 1),
    }


async def all_fail_in_time(presence: PresenceStore) -> None:
    for name, call in every_call(presence).items():
        started = time.monotonic()
        with pytest.raises(PresenceUnavailable) as error:
            await call()
        assert error.value.temporary, name
        assert time.monotonic() - started < DEADLINE_MS / 1000 + 0.3, name


async def back(presence: PresenceStore, within_s: float = 5.0) -> None:
    """Wait until presence answers."""
    async with asyncio.timeout(within_s):
        while True:
            with contextlib.suppress(PresenceUnavailable):
                await presence.nodes()
                return
            await asyncio.sleep(0.05)


# ------------------------------------------------------------------------------------- flushed, restarted


async def test_a_flush_is_seen_by_the_next_renew_and_registering_again_heals(own_redis: str) -> None:
    async with presence_at(own_redis) as presence:
        await register(presence)
        before = (await locate(presence, USERS[0])).attachments[0].generation
        with asked(own_redis) as redis:
            redis.flushall()
        assert await locate(presence, USERS[0]) == NOWHERE
        assert not await presence.renew("n1", 1, LEASE_MS)
        await register(presence)
        assert await all_there(presence)
        assert await presence.renew("n1", 1, LEASE_MS)
        assert (await locate(presence, USERS[0])).attachments[0].generation > before


async def test_a_flush_of_any_server_of_a_cluster_is_seen_by_the_next_renew(own_valkey: str) -> None:
    async with presence_at(own_valkey) as presence:
        await register(presence)
        for seed in Target(own_valkey).seeds:
            assert await presence.renew("n1", 1, LEASE_MS)
            with asked(own_valkey, seed) as redis:
                assert redis.dbsize() > 0
                redis.flushall()
            assert not await all_there(presence)
            assert not await presence.renew("n1", 1, LEASE_MS)
            await register(presence)
            assert await all_there(presence)


async def test_after_a_flush_another_process_begins_above_all_generations(own_redis: str) -> None:
    async with presence_at(own_redis) as old, presence_at(own_redis) as new:
        await register(old)
        stood = await old.locate(USERS)
        before = max(a.generation for location in stood.values() for a in location.attachments)
        with asked(own_redis) as redis:
            redis.flushall()
        await new.open_lease("n2", 1, LEASE_MS)
        attachment, _ = await new.attach(USERS[0], "phone", "app", "n2", 1, "s")
        assert attachment.generation > before


@pytest.mark.parametrize("kind", ["redis", "valkey.1", "valkey.3"])
async def test_a_restarted_server_heals_without_a_restart_of_ours(own_servers: Servers, kind: str) -> None:
    url = next(iter(own_servers.start(kind.partition(".")[0]).values()))
    async with presence_at(url, deadline_ms=DEADLINE_MS) as presence:
        await register(presence)
        own_servers.kill(kind)
        with pytest.raises(PresenceUnavailable):
            await presence.renew("n1", 1, LEASE_MS)
        own_servers.start(kind.partition(".")[0])
        await back(presence)
        async with asyncio.timeout(10):
            while True:
                try:
                    assert not await presence.renew("n1", 1, LEASE_MS)
                    await register(presence)
                    break
                except PresenceUnavailable:
                    await asyncio.sleep(0.05)
        assert await all_there(presence)


async def test_watchers_look_again_after_a_flush_and_after_a_restart(own_servers: Servers) -> None:
    url = own_servers.start("redis")["FASTIM_REDIS"]
    async with presence_at(url, poll_ms=100, deadline_ms=DEADLINE_MS) as presence:
        await register(presence)
        watcher = presence.watch()
        await watcher.watch([USERS[0]])
        with asked(url) as redis:
            redis.flushall()
        await resynced(watcher)
        await register(presence)
        own_servers.kill("redis")
        await asyncio.sleep(0.2)
        own_servers.start("redis")
        await resynced(watcher)
        await back(presence)
        await presence.open_lease("n1", 1, LEASE_MS)
        await presence.attach(USERS[0], "phone", "app", "n1", 1, "s")
        await told(watcher, user=USERS[0])


# ---------------------------------------------------------------------------------------- away, silent


async def test_while_the_server_is_gone_every_call_says_so_in_time_and_then_works_again(
    own_servers: Servers,
) -> None:
    url = own_servers.start("redis")["FASTIM_REDIS"]
    async with presence_at(url, deadline_ms=DEADLINE_MS) as presence:
        await register(presence)
        own_servers.stop("redis")
        await all_fail_in_time(presence)
        own_servers.start("redis")
        await back(presence)
        await register(presence)
        assert await all_there(presence)


async def test_while_the_server_stands_still_every_call_ends_by_its_deadline(own_servers: Servers) -> None:
    url = own_servers.start("redis")["FASTIM_REDIS"]
    async with presence_at(url, deadline_ms=DEADLINE_MS) as presence:
        await register(presence)
        own_servers.pause("redis")
        try:
            await all_fail_in_time(presence)
        finally:
            own_servers.resume("redis")
        await back(presence)
        await register(presence)
        assert await all_there(presence)


async def test_one_server_of_a_cluster_that_stands_still_ends_calls_by_their_deadline(
    own_servers: Servers,
) -> None:
    url = own_servers.start("valkey")["FASTIM_VALKEY"]
    async with presence_at(url, deadline_ms=DEADLINE_MS) as presence:
        await register(presence)
        own_servers.pause("valkey.2")
        try:
            for _ in range(3):
                started = time.monotonic()
                with pytest.raises(PresenceUnavailable):
                    await presence.locate(USERS)
                assert time.monotonic() - started < DEADLINE_MS / 1000 + 0.3
        finally:
            own_servers.resume("valkey.2")
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await all_there(presence)
                    break
                except PresenceUnavailable:
                    await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def proxied(url: str, **options: int) -> AsyncIterator[tuple[RedisPresence, Proxy]]:
    async with Proxy(*Target(url).seeds[0]) as proxy:
        behind = with_prefix(through(url, proxy.port))
        async with presence_at(behind, deadline_ms=DEADLINE_MS, **options) as presence:
            yield presence, proxy


async def test_a_line_that_swallows_everything_ends_calls_by_their_deadline(redis_server: str) -> None:
    async with proxied(redis_server) as (presence, proxy):
        await register(presence)
        proxy.drop()
        with pytest.raises(PresenceUnavailable, match="no answer within"):
            await presence.locate(USERS)
        assert await all_there(presence), "on a connection of its own"


async def test_many_calls_at_once_during_an_outage_all_end(redis_server: str) -> None:
    async with proxied(redis_server) as (presence, proxy):
        await register(presence)
        proxy.stall()
        started = time.monotonic()
        calls = [presence.locate([user]) for user in USERS for _ in range(10)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PresenceUnavailable}
        assert time.monotonic() - started < DEADLINE_MS / 1000 + 0.5
        assert await all_there(presence)


async def test_watchers_look_again_after_a_lost_connection(redis_server: str) -> None:
    async with proxied(redis_server, poll_ms=100) as (presence, proxy):
        await register(presence)
        watcher = presence.watch()
        await watcher.watch([USERS[0]])
        for _ in range(3):
            proxy.cut()
            await resynced(watcher)
        await presence.attach(USERS[0], "phone", "app", "n1", 1, "s")
        assert (await told(watcher, user=USERS[0])).users == {USERS[0]}


async def test_watchers_look_again_after_a_silent_line(redis_server: str) -> None:
    async with proxied(redis_server, poll_ms=100) as (presence, proxy):
        await register(presence)
        watcher = presence.watch()
        await watcher.watch([USERS[0]])
        proxy.drop()
        await resynced(watcher)
        await presence.attach(USERS[0], "phone", "app", "n1", 1, "s")
        await told(watcher, user=USERS[0])


async def test_what_could_not_be_watched_is_watched_when_the_server_is_back(redis_server: str) -> None:
    async with proxied(redis_server, poll_ms=100) as (presence, proxy):
        await presence.open_lease("n1", 1, LEASE_MS)
        proxy.refused = True
        proxy.cut()
        watcher = presence.watch()
        with pytest.raises(PresenceUnavailable, match="not subscribed within"):
            await watcher.watch([USERS[0]])
        proxy.refused = False
        await resynced(watcher)
        await watcher.watch([USERS[0]])
        await presence.attach(USERS[0], "phone", "app", "n1", 1, "s")
        await told(watcher, user=USERS[0])


# ------------------------------------------------------------------------------ an attach nobody learned of


async def attach_and_give_up(presence: RedisPresence, proxy: Proxy, url: str, user: str) -> None:
    """Cancel an attach whose entry stands already."""
    for link in proxy.live():
        link.delay_s = 0.1
    attaching = asyncio.create_task(presence.attach(user, "phone", "app", "n1", 1, "s-lost"))
    key = f"{presence._prefix.decode()}u:{user}"
    with asked(url) as redis:
        async with asyncio.timeout(5):
            while True:
                if redis.hexists(key, "phone"):
                    break
                await asyncio.sleep(0.005)
    attaching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attaching
    for link in proxy.live():
        link.delay_s = 0.0


async def test_an_attach_that_was_given_up_is_taken_back_by_the_next_renew(redis_server: str) -> None:
    async with proxied(redis_server) as (presence, proxy):
        await presence.open_lease("n1", 1, LEASE_MS)
        await attach_and_give_up(presence, proxy, redis_server, "alice")
        assert await sessions(presence, "alice") == {"s-lost"}
        assert await presence.renew("n1", 1, LEASE_MS)
        assert await locate(presence, "alice") == NOWHERE


async def test_taking_back_leaves_what_the_device_did_next(redis_server: str) -> None:
    async with proxied(redis_server) as (presence, proxy):
        await presence.open_lease("n1", 1, LEASE_MS)
        await attach_and_give_up(presence, proxy, redis_server, "alice")
        _, replaced = await presence.attach("alice", "phone", "app", "n1", 1, "s-next")
        assert [old.session for old in replaced] == ["s-lost"]
        assert await presence.renew("n1", 1, LEASE_MS)
        assert await sessions(presence, "alice") == {"s-next"}


# ------------------------------------------------------------------------------------------------- full


async def test_a_full_server_still_says_who_is_there_and_lets_go(
    need: Callable[..., None], tmp_path: Path
) -> None:
    need("redis-server")
    port = free_port()
    with server("redis-server", tmp_path / "redis", "--port", str(port)):
        url = f"redis://127.0.0.1:{port}/0"
        async with presence_at(url) as presence:
            await register(presence)
            stays = (await locate(presence, USERS[0])).attachments[0]
            with asked(url) as redis:
                redis.config_set("maxmemory", 1)
            with pytest.raises(PresenceUnavailable, match="OutOfMemory"):
                await presence.attach("late", "phone", "app", "n1", 1, "s")
            assert await presence.renew("n1", 1, LEASE_MS)
            assert await all_there(presence)
            assert await presence.detach(USERS[0], "phone", stays.generation)
            await presence.leave("lobby", "n1", 1)
            with asked(url) as redis:
                redis.config_set("maxmemory", 0)
            await presence.attach("late", "phone", "app", "n1", 1, "s")
