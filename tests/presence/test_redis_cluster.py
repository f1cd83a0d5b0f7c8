"""A cluster whose slots move and whose masters change: presence follows, and watchers look again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

from fastim.errors import PresenceUnavailable
from fastim.presence.base import NOWHERE
from fastim.presence.shards import Address, Target
from tests.contract.presence import locate, sessions, told
from tests.presence.servers import asked, free_port, presence_at, server
from tests.servers import Servers

LEASE_MS = 60_000


def until(holds: Callable[[], object], what: str, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)


class Cluster:
    """Moves slots by hand, step by step."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seeds = Target(url).seeds

    def owner(self, slot: int) -> Address:
        with asked(self.url) as redis:
            for first, last, master, *_ in redis.execute_command("CLUSTER SLOTS"):
                if first <= slot <= last:
                    return master[0], master[1]
        raise AssertionError(f"nobody has slot {slot}")

    def other(self, than: Address) -> Address:
        return next(seed for seed in self.seeds if seed != than)

    def identity(self, at: Address) -> str:
        with asked(self.url, at) as redis:
            return str(redis.execute_command("CLUSTER MYID"))

    def begin(self, slot: int, source: Address, target: Address) -> None:
        """From now on the source asks clients to ask the target for keys that it does not have."""
        for at, state, peer in ((target, "IMPORTING", source), (source, "MIGRATING", target)):
            with asked(self.url, at) as redis:
                redis.execute_command("CLUSTER SETSLOT", slot, state, self.identity(peer))

    def end(self, slot: int, source: Address, target: Address) -> None:
        with asked(self.url, source) as redis:
            keys = redis.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000)
            if keys:
                redis.execute_command("MIGRATE", *target, "", 0, 2000, "KEYS", *keys)
        for at in (target, source, *self.seeds):
            with asked(self.url, at) as redis:
                redis.execute_command("CLUSTER SETSLOT", slot, "NODE", self.identity(target))


@pytest.fixture
def cluster(own_servers: Servers) -> Cluster:
    return Cluster(own_servers.start("valkey")["FASTIM_VALKEY"])


async def test_a_slot_is_followed_before_during_and_after_it_moves(cluster: Cluster) -> None:
    async with presence_at(cluster.url) as presence:
        await presence.open_lease("n1", 1, LEASE_MS)
        slot = key_slot(b"fastim:u:alice")
        source = cluster.owner(slot)
        target = cluster.other(source)
        first, _ = await presence.attach("alice", "phone", "app", "n1", 1, "s1")
        cluster.begin(slot, source, target)
        assert await sessions(presence, "alice") == {"s1"}, "the source still has her"
        await presence.detach("alice", "phone", first.generation)
        assert await locate(presence, "alice") == NOWHERE, "asked of the target"
        await presence.attach("alice", "phone", "app", "n1", 1, "s2")
        with asked(cluster.url, source) as at_source:
            assert at_source.execute_command("CLUSTER COUNTKEYSINSLOT", slot) == 0
        assert await sessions(presence, "alice") == {"s2"}
        cluster.end(slot, source, target)
        assert await sessions(presence, "alice") == {"s2"}
        _, replaced = await presence.attach("alice", "phone", "app", "n1", 1, "s3")
        assert [old.session for old in replaced] == ["s2"]


async def test_the_slot_of_the_leases_may_move_too(cluster: Cluster) -> None:
    async with presence_at(cluster.url) as presence:
        await presence.open_lease("n1", 1, LEASE_MS)
        await presence.attach("alice", "phone", "app", "n1", 1, "s1")
        slot = key_slot(b"fastim:leases")
        source = cluster.owner(slot)
        target = cluster.other(source)
        cluster.begin(slot, source, target)
        assert await presence.nodes() == [("n1", 1)]
        cluster.end(slot, source, target)
        assert await presence.renew("n1", 1, LEASE_MS)
        assert await sessions(presence, "alice") == {"s1"}


async def test_watchers_look_again_when_a_slot_moved_and_hear_from_its_new_place(cluster: Cluster) -> None:
    async with presence_at(cluster.url, poll_ms=100) as presence, presence_at(cluster.url) as there:
        await there.open_lease("n1", 1, LEASE_MS)
        watcher = presence.watch()
        await watcher.watch(["alice", "bob"])
        slot = key_slot(b"fastim:u:alice")
        source = cluster.owner(slot)
        target = cluster.other(source)
        cluster.begin(slot, source, target)
        cluster.end(slot, source, target)
        assert (await told(watcher, user="")).resync
        await there.attach("alice", "phone", "app", "n1", 1, "s1")
        assert "alice" in (await told(watcher, user="alice")).users
        await there.attach("bob", "phone", "app", "n1", 1, "s1")
        assert "bob" in (await told(watcher, user="bob")).users


async def test_a_slot_that_nobody_has_is_unavailable(cluster: Cluster) -> None:
    async with presence_at(cluster.url, deadline_ms=400) as presence:
        await presence.open_lease("n1", 1, LEASE_MS)
        slot = key_slot(b"fastim:u:alice")
        with asked(cluster.url, cluster.owner(slot)) as owner:
            owner.execute_command("CLUSTER DELSLOTS", slot)
        with pytest.raises(PresenceUnavailable):
            await locate(presence, "alice")


@contextlib.contextmanager
def replica_of(cluster: Cluster, master: Address, directory: Path) -> Iterator[Address]:
    """One more process, in step with a master."""
    with asked(cluster.url, master) as it:
        program = it.info("server")["executable"]
        bus_port = it.config_get("cluster-port")["cluster-port"]
    port, my_bus_port = free_port(), free_port()
    settings = ["--cluster-enabled", "yes", "--port", str(port), "--cluster-port", str(my_bus_port),
                "--cluster-node-timeout", "2000"]  # fmt: skip
    replica = ("127.0.0.1", port)
    with server(program, directory, *settings), asked(cluster.url, replica) as it:
        it.execute_command("CLUSTER MEET", *master, bus_port)
        until(
            lambda: cluster.identity(master) in str(it.execute_command("CLUSTER NODES")), "the replica joins"
        )
        until(lambda: it.cluster("info")["cluster_state"] == "ok", "the replica knows the cluster")
        it.execute_command("CLUSTER REPLICATE", cluster.identity(master))
        until(lambda: it.info("replication").get("master_link_status") == "up", "the replica is in step")
        yield replica


def has_taken_over(cluster: Cluster, replica: Address) -> bool:
    with asked(cluster.url, replica) as it:
        return bool(it.execute_command("ROLE")[0] == "master")


@pytest.mark.parametrize("orderly", [True, False])
async def test_a_replica_that_takes_over_is_followed_and_asks_for_registering_again(
    cluster: Cluster, own_servers: Servers, tmp_path: Path, orderly: bool
) -> None:
    users = [f"user{number}" for number in range(30)]
    master = cluster.seeds[0]
    with replica_of(cluster, master, tmp_path / "replica") as replica:
        async with presence_at(cluster.url, poll_ms=100, deadline_ms=500) as presence:
            await presence.open_lease("n1", 1, LEASE_MS)
            for user in users:
                await presence.attach(user, "phone", "app", "n1", 1, f"s-{user}")
            watcher = presence.watch()
            await watcher.watch(users)
            assert await presence.renew("n1", 1, LEASE_MS)
            if orderly:
                with asked(cluster.url, replica) as it:
                    it.execute_command("CLUSTER FAILOVER")
            else:
                own_servers.kill("valkey.1")
            until(lambda: has_taken_over(cluster, replica), "the replica takes over")
            taken_over = time.monotonic()
            async with asyncio.timeout(10):
                while True:
                    try:
                        if not await presence.renew("n1", 1, LEASE_MS):
                            break
                    except PresenceUnavailable:
                        await asyncio.sleep(0.05)
            await presence.open_lease("n1", 1, LEASE_MS)
            assert len(await presence.locate(users)) == len(users), "the replica had it all"
            assert time.monotonic() - taken_over < 10
            while not (await told(watcher)).resync:
                pass
            await presence.attach(users[0], "phone", "app", "n1", 1, "s")
            await told(watcher, user=users[0])
