"""Redis presence keeps the presence contract, on one server and on a cluster; and what only it promises."""

from __future__ import annotations

import asyncio
import time

import pytest

from fastim.errors import PresenceUnavailable
from fastim.presence.base import NOWHERE, PresenceStore
from fastim.presence.redis import RedisPresence
from fastim.presence.shards import Target
from tests.contract.presence import PresenceContract, fresh, locate, sessions
from tests.presence.servers import asked, presence_at, with_prefix


class _OnServers(PresenceContract):
    ttl_ms = 400
    grace_ms = 300
    url: str

    def presence(self) -> PresenceStore:
        return RedisPresence(self.url, poll_ms=100)

    def peer(self, presence: PresenceStore) -> PresenceStore:
        return self.presence()

    async def advance(self, ms: int) -> None:
        await asyncio.sleep(ms / 1000)

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def keys(self, pattern: str) -> set[str]:
        """What is on all servers under the prefix of this test."""
        target = Target(self.url)
        found: set[str] = set()
        for seed in target.seeds:
            with asked(self.url, seed) as redis:
                found |= set(redis.scan_iter(target.prefix + pattern))
        return {key.removeprefix(target.prefix) for key in found}

    def reads(self) -> list[int]:
        """How often each server has read from a socket, by its own count; this question is one more."""
        counts = []
        for seed in Target(self.url).seeds:
            with asked(self.url, seed) as redis:
                redis.ping()
                counts.append(int(redis.info("stats")["total_reads_processed"]))
        return counts

    async def test_locating_many_users_is_one_round_trip_per_server(self) -> None:
        async with presence_at(self.url) as presence:
            node, users = fresh("n"), [fresh("u") for _ in range(200)]
            await presence.open_lease(node, 1, 60_000)
            for user in users:
                await presence.attach(user, "phone", "app", node, 1, "s")
            servers = len(Target(self.url).seeds)
            asking = [after - before for before, after in zip(self.reads(), self.reads(), strict=True)]
            before, trips = self.reads(), presence.flows()["round_trips"]
            assert len(await presence.locate(users)) == 200
            assert presence.flows()["round_trips"] - trips == servers
            reads = [
                after - first - own for first, after, own in zip(before, self.reads(), asking, strict=True)
            ]
            assert reads == [1] * servers

    async def test_a_beat_of_a_client_costs_nothing(self) -> None:
        async with presence_at(self.url) as presence:
            node = fresh("n")
            await presence.open_lease(node, 1, 60_000)
            for number in range(50):
                await presence.attach(fresh("u"), "phone", "app", node, 1, f"s{number}")
            assert await presence.renew(node, 1, 60_000), "from now on every server knows the scripts"
            commands = presence.flows()["commands"]
            assert await presence.renew(node, 1, 60_000)
            assert presence.flows()["commands"] - commands == 1 + len(Target(self.url).seeds)

    async def test_no_key_is_left_of_who_went_and_of_rooms_that_emptied(self) -> None:
        async with presence_at(self.url) as presence:
            node = fresh("n")
            await presence.open_lease(node, 1, 60_000)
            for number in range(20):
                new, _ = await presence.attach(f"u{number}", "phone", "app", node, 1, "s")
                await presence.enter(f"r{number}", node, 1, 2)
                assert await presence.detach(f"u{number}", "phone", new.generation)
                await presence.leave(f"r{number}", node, 1)
            assert self.keys("[ur]:*") == set()

    async def test_keys_live_as_long_as_their_node_and_not_much_longer(self) -> None:
        async with presence_at(self.url, keep_ms=300) as presence:
            node = fresh("n")
            await presence.open_lease(node, 1, 60_000)
            await presence.attach("kept", "phone", "app", node, 1, "s")
            gone, _ = await presence.attach("gone", "phone", "app", node, 1, "s")
            await presence.enter("kept", node, 1, 2)
            await presence.detach("gone", "phone", gone.generation, self.wall_ms() + 60_000)
            for _ in range(8):
                await asyncio.sleep(0.08)
                assert await presence.renew(node, 1, 60_000)
            assert await sessions(presence, "kept") == {"s"}
            assert self.keys("[ur]:*") == {"u:kept", "r:kept", "u:gone"}
            await asyncio.sleep(0.35)
            assert self.keys("[ur]:*") == {"u:gone"}, "a grace has a time of its own"

    async def test_a_server_that_forgot_the_scripts_is_given_them(self) -> None:
        async with presence_at(self.url) as presence:
            node = fresh("n")
            await presence.open_lease(node, 1, 60_000)
            for seed in Target(self.url).seeds:
                with asked(self.url, seed) as redis:
                    redis.script_flush()
            users = [fresh("u") for _ in range(10)]
            for user in users:
                await presence.attach(user, "phone", "app", node, 1, "s")
            assert len(await presence.locate(users)) == 10
            assert await presence.renew(node, 1, 60_000)

    async def test_what_nobody_can_read_is_unavailable(self) -> None:
        async with presence_at(self.url) as presence:
            target, user = Target(self.url), fresh("u")
            key = f"{target.prefix}u:{user}"
            await presence.open_lease("n1", 1, 60_000)
            await presence.attach(user, "phone", "app", "n1", 1, "s")
            address = await presence._shards.address_of(key.encode())
            for entry in (b"nonsense", b"1|2|x|app|n1|s", b"\xff"):
                with asked(self.url, address) as redis:
                    redis.hset(key, "phone", entry)
                with pytest.raises(PresenceUnavailable, match="where an attachment should be"):
                    await presence.locate([user])
            with asked(self.url, address) as redis:
                redis.delete(key)
                redis.set(key, "not a hash")
            with pytest.raises(PresenceUnavailable, match="WRONGTYPE"):
                await presence.locate([user])
            with asked(self.url, address) as redis:
                redis.delete(key)
            assert await locate(presence, user) == NOWHERE

    async def test_generations_go_on_above_what_was_seen_when_counter_and_clock_are_set_back(self) -> None:
        key = f"{Target(self.url).prefix}leases"
        async with presence_at(self.url) as presence:
            await presence.open_lease("n1", 1, 60_000)
            first, _ = await presence.attach("alice", "phone", "app", "n1", 1, "s")
            address = await presence._shards.address_of(key.encode())
            with asked(self.url, address) as redis:
                ahead = first.generation + 3_600_000 * 1024  # as if the server's clock had been an hour ahead
                redis.hset(key, "", ahead)
                second, _ = await presence.attach("alice", "phone", "app", "n1", 1, "s")
                assert second.generation == ahead + 1
                redis.delete(key)
            await presence.open_lease("n1", 1, 60_000)
            third, _ = await presence.attach("alice", "phone", "app", "n1", 1, "s")
            assert third.generation > second.generation


class TestRedisPresence(_OnServers):
    @pytest.fixture(autouse=True)
    def server(self, redis_server: str) -> None:
        self.url = with_prefix(redis_server)


class TestValkeyClusterPresence(_OnServers):
    @pytest.fixture(autouse=True)
    def server(self, valkey: str) -> None:
        self.url = with_prefix(valkey)
