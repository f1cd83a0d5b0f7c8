"""A local store that fails, and an app that does not keep up: what the worker does then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from fastim import protocol as p
from fastim.client import Client, Disconnected, MemoryLocalStore, Message, SqliteLocalStore
from fastim.client.localstore import Batch, Placed, Snapshot
from fastim.errors import StoreUnavailable
from tests.unit.client_script import CONV, Hurry, Peer, ScriptedServer, msg, next_event, sent, until


class FailingStore(SqliteLocalStore):
    """The real store on a disk that is full, or broken for good, while the test says so."""

    failing: Callable[[], StoreUnavailable] | None = None
    refused = 0

    def _check(self) -> None:
        if self.failing is not None:
            self.refused += 1
            raise self.failing()

    async def open(self, device: str) -> Snapshot:
        self._check()
        return await super().open(device)

    async def commit(self, batch: Batch) -> list[Placed]:
        self._check()
        return await super().commit(batch)


def full() -> StoreUnavailable:
    return StoreUnavailable("disk full")


async def test_nothing_is_acknowledged_while_the_store_is_full_and_all_of_it_is_shown_afterwards(
    tmp_path: Path,
) -> None:
    store = FailingStore(tmp_path / "local.db")
    async with (
        ScriptedServer() as server,
        Client(server.url, "token", "d0", store=store, rng=Hurry()) as client,
    ):
        peer = await server.login()
        await peer.send(msg(1, 1))
        await peer.acked(1)
        store.failing = full
        await peer.send(msg(2, 2))
        await peer.wait_closed()
        assert p.Ack(2) not in peer.all
        with pytest.raises(StoreUnavailable, match="disk full"):
            await client.send(CONV, "x")
        assert client.unsent() == []
        store.failing = None
        peer = await server.peer()
        auth = await peer.hello(1)
        assert (auth.session, auth.tag) == ("s1", 1)
        await peer.send(msg(2, 2))
        await peer.acked(2)
        events = client.events()
        assert [(await next_event(events, Message)).seq for _ in range(2)] == [1, 2]
        await client.send(CONV, "y")


async def test_a_store_that_failed_is_tried_until_it_works_and_the_app_hears_why_it_is_offline(
    tmp_path: Path,
) -> None:
    store = FailingStore(tmp_path / "local.db")
    async with (
        ScriptedServer() as server,
        Client(server.url, "token", "d0", store=store, rng=Hurry()) as client,
    ):
        peer = await server.login()
        await client.wait_connected()
        store.failing = full
        await peer.send(msg(1, 1))
        gone = await next_event(client.events(), Disconnected)
        assert "disk full" in gone.reason
        assert not gone.final
        await until(lambda: store.refused >= 3)
        store.failing = None
        await (await server.peer()).hello(0, session="s2")


async def test_auth_never_claims_what_could_not_be_stored(tmp_path: Path) -> None:
    store = FailingStore(tmp_path / "local.db")
    async with (
        ScriptedServer() as server,
        Client(server.url, "token", "d0", store=store, rng=Hurry()) as client,
    ):
        peer = await server.login()
        await peer.send(msg(1, 1))
        await peer.acked(1)
        store.failing = full
        await peer.send(*(msg(tag, tag) for tag in range(2, 40)), p.Level(40, 77))
        await peer.wait_closed()
        await until(lambda: store.refused >= 3)
        store.failing = None
        auth = await (await server.peer()).expect(p.Auth)
        assert (auth.tag, auth.user_cursor) == (1, 0)
        assert client.conversations()[0].head == 1


async def test_a_store_that_is_broken_for_good_fails_the_client_loudly(tmp_path: Path) -> None:
    store = FailingStore(tmp_path / "local.db")
    async with (
        ScriptedServer() as server,
        Client(server.url, "token", "d0", store=store, rng=Hurry()) as client,
    ):
        peer = await server.login()
        await client.wait_connected()
        store.failing = lambda: StoreUnavailable("malformed", temporary=False)
        await peer.send(msg(1, 1))
        with pytest.raises(StoreUnavailable, match="malformed"):
            await next_event(client.events(), Message)


async def test_accepted_messages_do_not_go_out_again_after_the_store_failed(tmp_path: Path) -> None:
    store = FailingStore(tmp_path / "local.db")
    async with (
        ScriptedServer() as server,
        Client(server.url, "token", "d0", store=store, rng=Hurry()) as client,
    ):
        peer = await server.login()
        outgoing = await client.send(CONV, "x")
        send = await peer.expect(p.Send)
        store.failing = full
        await peer.send(sent(1, send, 1))
        await peer.wait_closed()
        store.failing = None
        peer = await server.login(2)
        again = await peer.expect(p.Send)
        assert again.items[0].client_id == outgoing.client_id, (
            "its place was not stored, so it is asked again"
        )
        await peer.send(sent(1, again, 1))
        assert await outgoing.accepted() is outgoing
        await peer.acked(1)
        assert client.unsent() == []


# ------------------------------------------------------------------------------------------ an app too slow


async def stream(peer: Peer, head: int) -> int:
    """Send 1..head as a server does: at most 128 unacknowledged. Returns the last tag."""
    tag = acked = 0
    while acked < head:
        while tag < head and tag - acked < 128:
            tag += 1
            await peer.send(msg(tag, tag))
        acked = (await peer.expect(p.Ack)).tag
    return tag


async def test_an_app_that_takes_nothing_costs_bounded_memory_and_gets_everything_later() -> None:
    store = MemoryLocalStore(max_waiting=50)
    async with (
        ScriptedServer() as server,
        Client(server.url, "token", "d0", store=store, rng=Hurry()) as client,
    ):
        peer = await server.login()
        streaming = asyncio.create_task(stream(peer, 400))
        await until(lambda: store._newest >= 50)
        outgoing = await client.send("g:other", "x")
        send = await peer.expect(p.Send)
        await peer.send(sent(0, send, 1))
        assert await outgoing.accepted() is outgoing, "SENT is taken while messages wait"
        assert len(store._feed) <= 50 + 256 + 1
        events = client.events()
        seqs = []
        while len(seqs) < 400:
            message = await next_event(events, Message)
            if message.conv == CONV:
                seqs.append(message.seq)
        assert seqs == list(range(1, 401))
        await streaming


async def test_a_durable_store_takes_everything_whatever_the_app_does(tmp_path: Path) -> None:
    store = SqliteLocalStore(tmp_path / "local.db")
    async with ScriptedServer() as server, Client(server.url, "token", "d0", store=store) as client:
        peer = await server.login()
        await stream(peer, 3_000)
        events = client.events()
        assert [(await next_event(events, Message)).seq for _ in range(3_000)] == list(range(1, 3_001))


async def test_many_sends_at_once_share_commits(tmp_path: Path) -> None:
    store = FailingStore(tmp_path / "local.db")
    commits = 0
    original = store._commit

    def counted(batch: Batch) -> list[Placed]:
        nonlocal commits
        commits += 1
        return original(batch)

    store._commit = counted  # type: ignore[method-assign]
    async with ScriptedServer() as server, Client(server.url, "token", "d0", store=store) as client:
        await asyncio.gather(*(client.send(f"g:{n}", "x") for n in range(500)))
        assert commits < 20
        assert len(client.unsent()) == 500
        assert [one.conv for one in client.unsent()] == [f"g:{n}" for n in range(500)]
        await server.login()
