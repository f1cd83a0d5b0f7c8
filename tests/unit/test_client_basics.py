"""The client against a scripted server over real sockets: what an app does with it, one thing at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fastim import protocol as p
from fastim.client import (
    Client,
    Connected,
    Delivery,
    Gone,
    MemoryLocalStore,
    Message,
    ReadMark,
    SqliteLocalStore,
    StateChanged,
)
from fastim.errors import PeerError, Unavailable, UsageError
from fastim.model import SkipReason
from tests.unit.client_script import (
    CONV,
    ScriptedServer,
    events_until,
    history_item,
    msg,
    next_event,
    now_ms,
    sent,
    until,
)


async def test_a_message_is_shown_and_acknowledged() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login()
        await peer.send(msg(1, 1))
        events = client.events()
        assert (await next_event(events, Connected)).user == "alice"
        shown = await next_event(events, Message)
        assert (shown.seq, shown.text, shown.sender, shown.again) == (1, "text 1", "bob", False)
        assert await peer.expect(p.Ack) == p.Ack(1)
        assert client.connected
        assert client.user == "alice"


async def test_auth_is_the_first_frame_and_names_the_device() -> None:
    async with ScriptedServer() as server, Client(server.url, "tok", "d7", device_class="desktop"):
        peer = await server.peer()
        auth = await peer.hello()
        assert peer.all[0] is auth
        assert (auth.token, auth.device, auth.device_class) == ("tok", "d7", "desktop")
        assert (auth.session, auth.tag, auth.user_cursor) == ("", 0, 0)
        assert auth.agent.startswith("fastim-python/")
        assert peer.socket.subprotocol == p.SUBPROTOCOL


async def test_a_message_is_acknowledged_without_anybody_asking_for_events() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0"):
        peer = await server.login()
        await peer.send(msg(1, 1), msg(2, 2))
        await peer.acked(2)


async def test_send_waits_for_nothing_and_accepted_waits_for_the_server() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        outgoing = await client.send(CONV, "hello")
        assert outgoing.state is Delivery.QUEUED
        peer = await server.login()
        send = await peer.expect(p.Send)
        item = send.items[0]
        assert (send.conv, item.body, item.client_id) == (CONV, b"hello", outgoing.client_id)
        await peer.send(sent(1, send, 1))
        assert await outgoing.accepted() is outgoing
        assert (outgoing.seq, outgoing.msg_id, outgoing.state) == (1, 1_001, Delivery.SENT)
        seen = await events_until(
            client.events(), lambda seen: {StateChanged, Message} <= set(map(type, seen))
        )
        (state,) = (event for event in seen if isinstance(event, StateChanged))
        assert (state.client_id, state.state, state.seq) == (outgoing.client_id, Delivery.SENT, 1)
        (own,) = (event for event in seen if isinstance(event, Message))
        assert (own.sender, own.text, own.client_id) == (client.user, "hello", outgoing.client_id)
        await peer.acked(1)


async def test_messages_wait_while_one_send_is_under_way_and_go_together() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login()
        first = await client.send(CONV, "0")
        send = await peer.expect(p.Send)
        others = [await client.send(CONV, str(n)) for n in range(1, 40)]
        await peer.send(sent(1, send, 1))
        await first.accepted()
        second = await peer.expect(p.Send)
        assert [item.body for item in second.items] == [str(n).encode() for n in range(1, 33)]
        await peer.send(sent(2, second, 2))
        third = await peer.expect(p.Send)
        assert len(third.items) == 7
        await peer.send(sent(3, third, 34))
        for outgoing in others:
            await outgoing.accepted()
        assert [outgoing.seq for outgoing in others] == list(range(2, 41))


async def test_a_refused_message_raises_and_can_be_discarded() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login()
        outgoing = await client.send(CONV, "hello")
        await peer.expect(p.Send)
        await peer.send(
            p.Error(int(p.Op.SEND), "unknown_user", "nobody", client_id=outgoing.client_id, conv=CONV)
        )
        with pytest.raises(PeerError, match="unknown_user: nobody"):
            await outgoing.accepted()
        assert outgoing.state is Delivery.REFUSED
        assert [one.code for one in client.unsent()] == ["unknown_user"]
        await client.discard(outgoing.client_id)
        assert client.unsent() == []


async def test_the_senders_mark_reaches_read_when_the_peer_has_read() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login()
        outgoing = await client.send(CONV, "hello")
        await peer.send(sent(1, await peer.expect(p.Send), 1))
        await outgoing.accepted()
        await peer.send(p.ReadMark(CONV, "bob", 1))
        assert await next_event(client.events(), ReadMark) == ReadMark(CONV, "bob", 1)
        assert outgoing.state is Delivery.READ
        assert client.read_marks(CONV) == {"bob": 1}


async def test_a_ttl_is_a_deadline_by_the_servers_clock() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login(server_ms=now_ms() + 3_600_000)
        await client.wait_connected()
        await client.send(CONV, "soon", ttl_ms=5_000, flags=2, mentions=["bob"], read_seq=4)
        send = await peer.expect(p.Send)
        item = send.items[0]
        assert abs(item.loss_time_ms - (now_ms() + 3_605_000)) < 5_000
        assert (item.flags, item.mentions, send.read_seq) == (2, ["bob"], 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"conv": "p:bob:alice"}, "conv is 'p:bob:alice'"),
        ({"conv": "r:room"}, "rooms are not stored"),
        ({"body": bytes(61_441)}, "body is 61,441 bytes; limit 61,440"),
        ({"kind": "sonnet"}, "kind is 'sonnet'; must be one of text image"),
        ({"mentions": ["x"] * 51}, "51 mentions; limit 50"),
        ({"mentions": ["a b"]}, "mention is 'a b'"),
        ({"loss_time_ms": -1}, "loss_time_ms is -1"),
        ({"flags": 1 << 20}, "unknown bits"),
        ({"client_id": b"short"}, "client_id is 5 bytes; must be 16"),
    ],
)
async def test_what_no_server_would_take_is_refused_at_once(arguments: dict[str, object], said: str) -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        await server.login()
        with pytest.raises(UsageError, match=said):
            await client.send(**{"conv": CONV, "body": "x", **arguments})  # type: ignore[arg-type]
        assert client.unsent() == []


async def test_an_apps_own_client_id_is_taken_once() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        await client.send(CONV, "x", client_id=bytes(16))
        with pytest.raises(UsageError, match="in the outbox already"):
            await client.send(CONV, "y", client_id=bytes(16))
        await server.login()


async def test_a_full_outbox_says_so() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0", max_outbox=2) as client:
        await client.send(CONV, "1")
        await client.send(CONV, "2")
        with pytest.raises(Unavailable, match="holds 2 messages; limit 2"):
            await client.send(CONV, "3")
        await server.login()


async def test_minted_ids_are_version_7_uuids_and_differ() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        ids = [(await client.send(CONV, "x")).client_id for _ in range(20)]
        assert len(set(ids)) == 20
        for client_id in ids:
            assert client_id[6] >> 4 == 7
            assert client_id[8] >> 6 == 2
            assert abs(int.from_bytes(client_id[:6], "big") - now_ms()) < 60_000
        await server.login()


async def test_expired_messages_are_gaps_and_acknowledged() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login()
        await peer.send(msg(1, 1, loss_time_ms=now_ms() - 10), msg(2, 2))
        events = client.events()
        assert await next_event(events, Gone) == Gone(CONV, 1, 1, SkipReason.EXPIRED)
        assert (await next_event(events, Message)).seq == 2
        await peer.acked(2)


async def test_the_list_of_a_new_device_and_history_on_demand() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login()
        row = p.ConvChange(CONV, 10, 50, 1, 40, 7, 0, False, "bob", 1, 123, "the latest", 50)
        await peer.send(p.Changes(0, [row], 10, False), p.Level(1, 10))
        await peer.acked(1)
        (conv,) = client.conversations()
        assert (conv.conv, conv.head, conv.read, conv.unread, conv.preview) == (CONV, 50, 40, 7, "the latest")

        asking = asyncio.create_task(client.history(CONV, limit=3))
        ask = await peer.expect(p.History)
        assert (ask.conv, ask.before_seq, ask.limit) == (CONV, 51, 3)
        items = [history_item(seq) for seq in (48, 49, 50)]
        await peer.send(p.HistoryPage(ask.req, CONV, items, True))
        page = await asking
        assert [message.seq for message in page.messages] == [48, 49, 50]
        assert page.more

        again = await client.history(CONV, limit=3)
        assert again == page
        assert not any(isinstance(frame, p.History) for frame in peer.frames), "the second time it is here"

        asking = asyncio.create_task(client.history(CONV, before_seq=50, limit=4))
        ask = await peer.expect(p.History)
        assert (ask.before_seq, ask.limit) == (48, 2)
        await peer.send(p.HistoryPage(ask.req, CONV, items[:0], False))
        assert [message.seq for message in (await asking).messages] == [48, 49]
        assert not (await client.history(CONV, before_seq=48)).more


async def test_history_that_the_server_refuses_raises_what_it_said() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login()
        await client.wait_connected()
        asking = asyncio.create_task(client.history("g:secret"))
        ask = await peer.expect(p.History)
        await peer.send(p.Error(int(p.Op.HISTORY), "forbidden", "no", req=ask.req, conv="g:secret"))
        with pytest.raises(PeerError, match="forbidden"):
            await asking


async def test_history_offline_gives_what_is_here_or_says_that_nothing_is() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        with pytest.raises(Unavailable, match="not connected"):
            await client.history(CONV)
        with pytest.raises(UsageError, match="limit is 201; must be 1-200"):
            await client.history(CONV, limit=201)
        peer = await server.login()
        row = p.ConvChange(CONV, 1, 9, 1, 0, 0, 0, False, "b", 1, 1, "", 9)
        await peer.send(p.Changes(0, [row], 1, False))
        await peer.send(msg(1, 10))
        await peer.acked(1)
        await server.stop()
        await until(lambda: not client.connected)
        page = await client.history(CONV)
        assert ([message.seq for message in page.messages], page.more) == ([10], True)
        await server.listen()


async def test_a_history_request_fails_when_the_connection_is_lost() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login()
        await client.wait_connected()
        asking = asyncio.create_task(client.history(CONV))
        await peer.expect(p.History)
        peer.abort()
        with pytest.raises(Unavailable, match="connection was lost"):
            await asking


async def test_reading_moves_the_mark_and_tells_the_server() -> None:
    async with ScriptedServer() as server, Client(server.url, "token", "d0") as client:
        peer = await server.login()
        await peer.send(*(msg(seq, seq) for seq in range(1, 6)))
        await peer.acked(5)
        assert client.conversations()[0].unread == 5
        await client.read(CONV, 3)
        assert (client.conversations()[0].read, client.conversations()[0].unread) == (3, 2)
        assert await peer.expect(p.Read) == p.Read(CONV, 3)
        await client.read(CONV, 99, private=True)
        assert (client.conversations()[0].read, client.conversations()[0].unread) == (5, 0)
        assert await peer.expect(p.Read) == p.Read(CONV, 5, True)
        with pytest.raises(UsageError, match="not known"):
            await client.read("g:nowhere", 1)


async def test_a_mark_that_was_set_offline_is_told_at_the_next_connect(tmp_path: Path) -> None:
    async with ScriptedServer() as server:
        async with Client(server.url, "token", "d0", store=SqliteLocalStore(tmp_path / "c.db")) as client:
            peer = await server.login()
            await peer.send(msg(1, 1), msg(2, 2))
            await peer.acked(2)
            await server.stop()
            await until(lambda: not client.connected)
            await client.read(CONV, 2)
        await server.listen()
        async with Client(server.url, "token", "d0", store=SqliteLocalStore(tmp_path / "c.db")) as client:
            peer = await server.login(1)
            assert await peer.expect(p.Read) == p.Read(CONV, 2)
            assert client.conversations()[0].unread == 0


async def test_on_event_is_called_in_order_and_its_errors_stop_nothing() -> None:
    seen: list[int] = []

    async def on_event(event: object) -> None:
        if isinstance(event, Message):
            seen.append(event.seq)
            await asyncio.sleep(0)
            if event.seq == 1:
                raise ValueError("a bug of the app")

    async with ScriptedServer() as server, Client(server.url, "token", "d0", on_event=on_event) as client:
        peer = await server.login()
        await peer.send(msg(1, 1), msg(2, 2), msg(3, 3))
        await until(lambda: seen == [1, 2, 3])
        with pytest.raises(UsageError, match="on_event"):
            client.events()


async def test_events_end_when_the_client_is_closed() -> None:
    async with ScriptedServer() as server:
        client = Client(server.url, "token", "d0")
        await client.start()
        await server.login()

        async def consume() -> int:
            return len([event async for event in client.events()])

        consumer = asyncio.create_task(consume())
        await client.wait_connected()
        await client.close()
        assert await consumer >= 1
        await client.close()


async def test_close_acknowledges_what_is_stored_and_says_goodbye() -> None:
    async with ScriptedServer() as server:
        async with Client(server.url, "token", "d0") as client:
            peer = await server.login()
            await peer.send(msg(1, 1))
            assert (await next_event(client.events(), Message)).seq == 1
        await peer.wait_closed()
        assert peer.socket.close_code == 1000
        assert p.Ack(1) in peer.all


async def test_close_can_wait_for_the_outbox() -> None:
    async with ScriptedServer() as server:
        client = Client(server.url, "token", "d0")
        await client.start()
        peer = await server.login()
        outgoing = await client.send(CONV, "bye")
        closing = asyncio.create_task(client.close(drain_s=10))
        send = await peer.expect(p.Send)
        assert not closing.done()
        await peer.send(sent(1, send, 1))
        await closing
        assert outgoing.state is Delivery.SENT


async def test_accepted_of_a_closed_client_says_that_the_message_waits() -> None:
    async with ScriptedServer() as server:
        async with Client(server.url, "token", "d0") as client:
            await server.login()
            outgoing = await client.send(CONV, "x")
        with pytest.raises(Unavailable, match="in the outbox"):
            await outgoing.accepted()


async def test_who_waits_for_a_connection_hears_that_the_client_was_closed() -> None:
    async with ScriptedServer() as server:
        client = Client(server.url, "token", "d0")
        await client.start()
        waiting = [asyncio.create_task(client.wait_connected()), asyncio.create_task(client.wait_level())]
        await asyncio.sleep(0)
        await client.close()
        for waiter in waiting:
            with pytest.raises(Unavailable, match="closed"):
                await waiter
        with pytest.raises(Unavailable, match="closed"):
            await client.send(CONV, "x")


async def test_a_client_can_be_closed_from_its_own_event_handler() -> None:
    closed = asyncio.Event()

    async def on_event(event: object) -> None:
        if isinstance(event, Message):
            await client.close()
            closed.set()

    async with ScriptedServer() as server:
        client = Client(server.url, "token", "d0", on_event=on_event)
        await client.start()
        peer = await server.login()
        await peer.send(msg(1, 1))
        async with asyncio.timeout(10):
            await closed.wait()
        await peer.wait_closed()
        assert peer.socket.close_code == 1000


async def test_a_client_is_used_after_start_and_only_once() -> None:
    async with ScriptedServer() as server:
        client = Client(server.url, "token", "d0")
        with pytest.raises(UsageError, match="not started"):
            client.conversations()
        await client.start()
        with pytest.raises(UsageError, match="started once"):
            await client.start()
        await client.close()
        await server.stop()


async def test_a_new_client_may_use_a_memory_store_again() -> None:
    store = MemoryLocalStore()
    async with ScriptedServer() as server:
        async with Client(server.url, "token", "d0", store=store) as client:
            peer = await server.login()
            await peer.send(msg(1, 1))
            await next_event(client.events(), Message)
        async with Client(server.url, "token", "d0", store=store) as client:
            peer = await server.peer()
            auth = await peer.hello(1)
            assert (auth.session, auth.tag) == ("s1", 1)
            await peer.send(msg(1, 1), msg(2, 2))
            assert (await next_event(client.events(), Message)).seq == 2
