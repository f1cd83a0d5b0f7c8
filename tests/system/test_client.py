"""The SDK against the real server, over real sockets: what people do, and what networks do to them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bench.server import free_ports
from fastim.app import App
from fastim.auth import mint
from fastim.client import (
    Client,
    Connected,
    Delivery,
    Disconnected,
    Event,
    Gone,
    LocalStore,
    MemoryLocalStore,
    Message,
    ReadMark,
    SqliteLocalStore,
)
from fastim.config import load
from fastim.dispatch.ledger import audit
from fastim.errors import PeerError
from fastim.model import Kind, SkipReason
from tests.faults.proxy import Proxy
from tests.unit.client_script import Hurry, events_until, next_event, now_ms, until

CONV = "p:alice:bob"


class Home:
    """A server on one port, which can be stopped and started again on its data, and clients for it."""

    def __init__(self, directory: Path, **node: Any) -> None:
        self.directory = directory
        self._ws_port, api_port = free_ports(2)
        limits = {"rate_per_s": 100_000, "rate_burst": 100_000, "drain_window_ms": 50, **node}
        self._settings = {
            "dev": True,
            "data_dir": str(directory / "data"),
            "node": {"listen": f"127.0.0.1:{self._ws_port}", "plain": True, **limits},
            "api": {"listen": f"127.0.0.1:{api_port}"},
            "dispatch": {"unknown_users": "refuse"},
        }
        self.fatal: list[BaseException] = []
        self.app: App

    async def start(self) -> None:
        self.app = App(load(self._settings), on_fatal=self.fatal.append)
        await self.app.start()

    async def stop(self) -> None:
        await self.app.stop(window_ms=50)
        assert self.fatal == []

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self._ws_port

    def token(self, user: str, ttl_s: int = 600) -> str:
        assert self.app.dev_key is not None
        return mint(self.app.dev_key, user, audience="fastim", ttl_s=ttl_s, now_s=int(time.time()))

    def client(
        self,
        user: str,
        device: str = "d0",
        store: LocalStore | None = None,
        port: int = 0,
        token: object = "",
    ) -> Client:
        url = f"ws://127.0.0.1:{port or self._ws_port}"
        bearer: Any = token or self.token(user)
        return Client(url, bearer, device, store=store or MemoryLocalStore(), rng=Hurry())

    def durable(self, name: str) -> SqliteLocalStore:
        return SqliteLocalStore(self.directory / f"{name}.db")

    async def introduce(self, *users: str) -> None:
        """Somebody who was never here cannot be written to."""
        for user in users:
            async with self.client(user, "introduction") as client:
                await level(client)


@contextlib.asynccontextmanager
async def at_home(directory: Path, **node: Any) -> AsyncIterator[Home]:
    home = Home(directory, **node)
    await home.start()
    try:
        yield home
    finally:
        await home.stop()


async def level(*clients: Client) -> None:
    async with asyncio.timeout(10):
        for client in clients:
            await client.wait_level()


async def messages(client: Client, count: int) -> list[Message]:
    """The next `count` messages."""
    seen: list[Event] = []
    async with asyncio.timeout(20):
        async for event in client.events():
            if isinstance(event, Message):
                seen.append(event)
                if len(seen) == count:
                    break
    return [event for event in seen if isinstance(event, Message)]


def texts(found: list[Message]) -> list[str]:
    return [message.text for message in found]


async def settled(home: Home) -> None:
    """Until no obligation is in flight."""
    async with asyncio.timeout(20):
        while (await audit(home.app.ground.store, now_ms())).in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# ------------------------------------------------------------------------------------------- conversations


async def test_two_people_talk_and_both_see_the_same_conversation(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home, home.client("alice") as alice, home.client("bob") as bob:
        await level(alice, bob)
        for n in range(20):
            first = await alice.send(CONV, f"ping {n}")
            await first.accepted()
            second = await bob.send(CONV, f"pong {n}")
            await second.accepted()
        for person in (alice, bob):
            found = await messages(person, 40)
            assert [message.seq for message in found] == list(range(1, 41))
            assert texts(found) == [f"{word} {n}" for n in range(20) for word in ("ping", "pong")]
        await settled(home)
        report = await audit(home.app.ground.store, now_ms())
        assert (report.states["acked"], report.obligations) == (40, 40)


async def test_unread_and_marks_go_round(tmp_path: Path) -> None:
    async with (
        at_home(tmp_path) as home,
        home.client("alice") as alice,
        home.client("bob") as bob,
        home.client("bob", "tablet") as tablet,
    ):
        await level(alice, bob, tablet)
        outgoing = [await alice.send(CONV, f"{n}") for n in range(1, 6)]
        for person in (bob, tablet):
            await messages(person, 5)
            assert [(row.unread, row.preview) for row in person.conversations()] == [(5, "5")]
        await bob.read(CONV, 3)
        assert bob.conversations()[0].unread == 2
        assert await next_event(alice.events(), ReadMark) == ReadMark(CONV, "bob", 3)
        await until(lambda: [one.state for one in outgoing] == [Delivery.READ] * 3 + [Delivery.SENT] * 2)
        await until(lambda: tablet.conversations()[0].unread == 2)
        assert (await home.app.ground.store.unread("bob"))[0] == 2
        assert alice.conversations()[0].unread == 0


async def test_messages_for_somebody_who_is_away_come_in_order_when_he_is_back(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home, home.client("alice") as alice:
        await home.introduce("bob")
        await level(alice)
        for n in range(300):
            await alice.send(CONV, f"{n}")
        for outgoing in alice.unsent():
            await outgoing.accepted()
        async with home.client("bob", store=home.durable("bob")) as bob:
            found = await messages(bob, 300)
            assert texts(found) == [f"{n}" for n in range(300)]
            await level(bob)
        await (await alice.send(CONV, "one more")).accepted()
        async with home.client("bob", store=home.durable("bob")) as bob:
            assert texts(await messages(bob, 1)) == ["one more"]


async def test_a_group_of_three_and_a_service(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home:
        people = ("alice", "bob", "carol")
        await home.introduce(*people)
        await home.app.ground.store.create_group("team", "alice", list(people), now_ms())
        async with home.client("alice") as alice, home.client("bob") as bob, home.client("carol") as carol:
            await level(alice, bob, carol)
            for n, person in enumerate((alice, bob, carol)):
                await (await person.send("g:team", f"I am {n}")).accepted()
            for person in (alice, bob, carol):
                found = [message for message in await messages(person, 4) if not message.is_control]
                assert texts(found) == ["I am 0", "I am 1", "I am 2"]
                (row,) = person.conversations()
                assert (row.conv, row.head) == ("g:team", 4)


async def test_the_senders_other_device_sees_what_was_sent(tmp_path: Path) -> None:
    async with (
        at_home(tmp_path) as home,
        home.client("alice", "phone") as phone,
        home.client("alice", "desk") as desk,
    ):
        await home.introduce("bob")
        await level(phone, desk)
        outgoing = await phone.send(CONV, "from the phone")
        (found,) = await messages(desk, 1)
        assert (found.sender, found.text, found.client_id) == ("alice", "from the phone", outgoing.client_id)
        await desk.send(CONV, "from the desk")
        assert texts(await messages(phone, 2)) == ["from the phone", "from the desk"]


async def test_the_same_device_elsewhere_replaces_this_one_for_good(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home, home.client("alice") as first:
        await level(first)
        async with home.client("alice") as second:
            await level(second)
            gone = await next_event(first.events(), Disconnected)
            assert (gone.code, gone.final) == (4507, True)
            assert second.connected


async def test_a_new_device_starts_where_the_others_are_and_pages_history(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home, home.client("alice") as alice:
        await home.introduce("bob")
        async with home.client("bob") as bob:
            await level(alice, bob)
            for n in range(1, 121):
                await alice.send(CONV, f"{n}")
            await messages(bob, 120)
        await settled(home)
        async with home.client("bob", "new", store=home.durable("new")) as new:
            await level(new)
            (row,) = new.conversations()
            assert (row.head, row.unread, row.preview) == (120, 120, "120")
            pages, before = [], 0
            while True:
                page = await new.history(CONV, before, 50)
                pages.append(len(page.messages))
                if not page.more:
                    break
                before = page.messages[0].seq
            assert pages == [50, 50, 20]
            await alice.send(CONV, "live")
            assert texts(await messages(new, 1)) == ["live"]
            whole = await new.history(CONV, limit=121)
            assert texts(whole.messages) == [*(f"{n}" for n in range(1, 121)), "live"]


# ---------------------------------------------------------------------------------------------- refusals


async def test_what_the_server_refuses_says_why_and_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home, home.client("alice") as alice:
        await home.introduce("bob")
        await level(alice)
        with pytest.raises(PeerError, match="unknown_user"):
            await (await alice.send("p:alice:nobody", "hello?")).accepted()
        with pytest.raises(PeerError, match=r"forbidden|not_member|unknown_group"):
            await (await alice.send("g:secret", "hello?")).accepted()
        first = await alice.send(CONV, "before")
        late = await alice.send(CONV, "too late", loss_time_ms=now_ms() - 1)
        last = await alice.send(CONV, "after")
        with pytest.raises(PeerError, match="expired"):
            await late.accepted()
        assert [(await one.accepted()).seq for one in (first, last)] == [1, 2]
        assert [one.code for one in alice.unsent()][-1] == "expired"
        with pytest.raises(PeerError, match="forbidden"):
            await alice.history("g:secret")


async def test_the_same_client_id_is_stored_once_and_other_content_is_a_conflict(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home, home.client("alice") as alice:
        await home.introduce("bob")
        await level(alice)
        first = await (await alice.send(CONV, "once", client_id=bytes(16))).accepted()
        again = await (await alice.send(CONV, "once", client_id=bytes(16))).accepted()
        assert (first.seq, first.msg_id) == (again.seq, again.msg_id)
        with pytest.raises(PeerError, match="conflict"):
            await (await alice.send(CONV, "twice", client_id=bytes(16))).accepted()
        assert texts((await alice.history(CONV)).messages) == ["once"]


async def test_a_message_that_expired_before_it_could_be_shown_is_a_gap(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home, home.client("alice") as alice:
        await home.introduce("bob")
        await level(alice)
        soon = await alice.send(CONV, "soon gone", ttl_ms=300)
        await soon.accepted()
        await (await alice.send(CONV, "stays")).accepted()
        await asyncio.sleep(0.35)
        async with home.client("bob") as bob:
            seen = await events_until(bob.events(), lambda seen: any(isinstance(e, Message) for e in seen))
            shown = [event for event in seen if isinstance(event, Message | Gone)]
            assert shown[0] == Gone(CONV, 1, 1, SkipReason.EXPIRED)
            assert isinstance(shown[1], Message)
            assert shown[1].text == "stays"
        await settled(home)


async def test_a_large_message_of_another_kind_goes_through(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home, home.client("alice") as alice, home.client("bob") as bob:
        await level(alice, bob)
        body = bytes(range(256)) * 240
        for _ in range(5):
            await alice.send(CONV, body, "custom", mentions=["bob"])
        found = await messages(bob, 5)
        assert all(message.body == body and message.kind == Kind.CUSTOM for message in found)
        assert bob.conversations()[0].mention_seq == 5


async def test_sending_faster_than_allowed_is_only_slower(tmp_path: Path) -> None:
    async with at_home(tmp_path, rate_per_s=50, rate_burst=20) as home, home.client("alice") as alice:
        await home.introduce("bob")
        await level(alice)
        outgoing = [await alice.send(CONV, f"{n}") for n in range(60)]
        async with asyncio.timeout(20):
            assert [(await one.accepted()).seq for one in outgoing] == list(range(1, 61))


# ------------------------------------------------------------------------------------------- connections


async def test_a_cut_connection_is_resumed_hot_and_nothing_is_missing_or_twice(tmp_path: Path) -> None:
    async with (
        at_home(tmp_path) as home,
        Proxy(*home.address) as proxy,
        home.client("alice") as alice,
        home.client("bob", port=proxy.port) as bob,
    ):
        await level(alice, bob)
        connected: list[int] = []
        shown: list[str] = []

        async def watch() -> None:
            async for event in bob.events():
                if isinstance(event, Message):
                    shown.append(event.text)
                elif isinstance(event, Connected):
                    connected.append(event.resumed)

        watching = asyncio.create_task(watch())
        for n in range(300):
            await alice.send(CONV, f"{n}")
            if n % 60 == 30:
                proxy.cut()
            await asyncio.sleep(0.002)
        await until(lambda: len(shown) >= 300)
        assert shown == [f"{n}" for n in range(300)]
        assert connected[1:] == [1] * (len(connected) - 1)
        assert len(connected) >= 5
        await settled(home)
        await bob.close()
        await watching


async def test_a_dead_radio_is_found_out_and_the_message_comes_over_the_next_connection(
    tmp_path: Path,
) -> None:
    async with (
        at_home(tmp_path, probe_ms=200, ack_timeout_ms=600) as home,
        Proxy(*home.address) as proxy,
        home.client("alice") as alice,
        home.client("bob", port=proxy.port) as bob,
    ):
        await level(alice, bob)
        proxy.drop()
        await (await alice.send(CONV, "anybody there?")).accepted()
        bob.reconnect()  # nothing to do: the SDK believes that it is connected
        # The server has closed the half-open connection; the person moves and gets another network.
        await until(lambda: home.app.node.connections == 1)
        proxy.cut()
        assert texts(await messages(bob, 1)) == ["anybody there?"]
        await settled(home)


async def test_a_server_that_restarts_gets_what_was_written_meanwhile(tmp_path: Path) -> None:
    async with (
        at_home(tmp_path) as home,
        home.client("alice", store=home.durable("alice")) as alice,
        home.client("bob", store=home.durable("bob")) as bob,
    ):
        await level(alice, bob)
        await (await alice.send(CONV, "before")).accepted()
        assert texts(await messages(bob, 1)) == ["before"]
        await home.stop()
        await until(lambda: not alice.connected and not bob.connected)
        waiting = [await alice.send(CONV, f"offline {n}") for n in range(40)]
        assert all(one.state is Delivery.QUEUED for one in waiting)
        await home.start()
        async with asyncio.timeout(20):
            assert [(await one.accepted()).seq for one in waiting] == list(range(2, 42))
        assert texts(await messages(bob, 40)) == [f"offline {n}" for n in range(40)]
        await settled(home)


async def test_an_outbox_is_kept_when_the_app_is_killed_and_sent_by_its_next_life(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home:
        await home.introduce("bob")
        async with Proxy(*home.address) as proxy:
            proxy.refused = True
            alice = home.client("alice", store=home.durable("alice"), port=proxy.port)
            await alice.start()
            ids = [(await alice.send(CONV, f"{n}")).client_id for n in range(5)]
            await alice.abort()
        async with home.client("alice", store=home.durable("alice")) as alice:
            found = await messages(alice, 5)
            assert [message.client_id for message in found] == ids
            assert texts(found) == [f"{n}" for n in range(5)]
            assert alice.unsent() == []


async def test_an_app_that_sleeps_is_bounded_and_wakes_up_to_everything(tmp_path: Path) -> None:
    store = MemoryLocalStore(max_waiting=40)
    async with (
        at_home(tmp_path) as home,
        home.client("alice") as alice,
        home.client("bob", store=store) as bob,
    ):
        await level(alice, bob)
        for n in range(600):
            await alice.send(CONV, f"{n}")
        for outgoing in alice.unsent():
            await outgoing.accepted()
        reply = await bob.send(CONV, "I am here")
        async with asyncio.timeout(5):
            await reply.accepted()
        assert len(store._feed) < 40 + 300
        found = await messages(bob, 601)
        assert [message.seq for message in found] == list(range(1, 602))


async def test_a_token_is_renewed_on_the_living_connection(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home:
        asked = 0

        def fetch() -> str:
            nonlocal asked
            asked += 1
            return home.token("alice", ttl_s=2 if asked == 1 else 600)

        async with home.client("alice", token=fetch) as alice:
            await level(alice)
            await until(lambda: asked == 2)
            await asyncio.sleep(1.0)  # beyond the end of the first token
            assert alice.connected
            events = await events_until(alice.events(), lambda seen: bool(seen))
            assert not any(isinstance(event, Disconnected) for event in events)


async def test_a_token_of_nobody_is_refused_for_good(tmp_path: Path) -> None:
    async with at_home(tmp_path) as home, home.client("alice", token="x.y.z") as alice:
        gone = await next_event(alice.events(), Disconnected)
        assert (gone.code, gone.final, gone.refused) == (4501, True, "unauthenticated")


async def test_a_burst_far_above_the_window_arrives_in_order_on_two_devices(tmp_path: Path) -> None:
    async with (
        at_home(tmp_path) as home,
        home.client("alice") as alice,
        home.client("bob", store=home.durable("one")) as one,
        home.client("bob", "tablet", store=home.durable("two")) as two,
    ):
        await level(alice, one, two)
        await asyncio.gather(*(alice.send(CONV, f"{n}") for n in range(2_000)))
        for device in (one, two):
            assert texts(await messages(device, 2_000)) == [f"{n}" for n in range(2_000)]
        await settled(home)
        report = await audit(home.app.ground.store, now_ms())
        assert (report.states["acked"], report.obligations) == (2_000, 2_000)
