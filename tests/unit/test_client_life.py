"""When the client comes back, when it does not, and what it says: against a scripted server."""

from __future__ import annotations

import asyncio
import base64
import json
import time

import pytest

from fastim import protocol as p
from fastim.client import Client, Connected, Disconnected, Message
from fastim.client.life import token_ends_ms
from fastim.errors import UsageError
from tests.unit.client_script import CONV, Hurry, ScriptedServer, hello, msg, next_event, now_ms, until


def client_of(server: ScriptedServer, token: object = "token") -> Client:
    return Client(server.url, token, "d0", rng=Hurry())  # type: ignore[arg-type]


def jwt(ends_s: float) -> str:
    claims = base64.urlsafe_b64encode(json.dumps({"exp": int(ends_s)}).encode()).decode().rstrip("=")
    return f"head.{claims}.signature"


async def never_again(server: ScriptedServer) -> None:
    """No further connection comes; with Hurry a client that means to come back does so in 10 ms."""
    before = server.accepted
    await asyncio.sleep(0.1)
    assert server.accepted == before


@pytest.mark.parametrize("code", [1000, 1001, 1012, 1013, 4000, 4008, 4408, 4410])
async def test_after_a_close_that_means_it_the_client_comes_back_and_resumes(code: int) -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        await peer.send(msg(1, 1), p.Level(2, 7))
        await peer.acked(2)
        await peer.close(code)
        peer = await server.peer()
        auth = await peer.hello(1)
        assert (auth.session, auth.tag, auth.user_cursor) == ("s1", 2, 7)
        await peer.send(msg(3, 2))
        events = client.events()
        assert [(await next_event(events, Message)).seq for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("code", [1002, 1003, 1009, 4503, 4505, 4507, 4509])
async def test_after_a_close_that_says_stay_away_the_client_stays_away_and_tells(code: int) -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        await peer.close(code, "because")
        gone = await next_event(client.events(), Disconnected)
        assert (gone.code, gone.reason, gone.final) == (code, "because", True)
        await never_again(server)
        client.reconnect()
        await server.login(2)
        await client.wait_connected()


async def test_a_reset_is_answered_with_a_new_connection() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        peer.abort()
        gone = await next_event(client.events(), Disconnected)
        assert (gone.code, gone.final, gone.retry_in_s) == (1006, False, 0.01)
        await server.login(1)


async def test_a_server_that_is_down_is_tried_until_it_is_up() -> None:
    async with ScriptedServer() as server:
        await server.stop()
        async with client_of(server) as client:
            gone = await next_event(client.events(), Disconnected)
            assert (gone.code, gone.final) == (0, False)
            await server.listen()
            await server.login()
            assert (await next_event(client.events(), Connected)).session == "s1"


async def test_a_refused_token_is_final_for_a_fixed_one() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.peer()
        await peer.expect(p.Auth)
        await peer.send(p.Error(int(p.Op.AUTH), "unauthenticated", "the token is not valid"))
        await peer.close(4501)
        gone = await next_event(client.events(), Disconnected)
        assert (gone.code, gone.final, gone.refused) == (4501, True, "unauthenticated")
        await never_again(server)
        client.reconnect("a better token")
        assert (await (await server.peer()).hello()).token == "a better token"


async def test_a_refused_token_is_tried_once_more_when_there_is_a_source_of_fresh_ones() -> None:
    tokens = iter(["first", "second", "third"])
    async with ScriptedServer() as server, client_of(server, lambda: next(tokens)) as client:
        for token in ("first", "second"):
            peer = await server.peer()
            assert (await peer.expect(p.Auth)).token == token
            await peer.send(p.Error(int(p.Op.AUTH), "unauthenticated", "the token is not valid"))
            await peer.close(4501)
        events = client.events()
        while not (await next_event(events, Disconnected)).final:
            pass
        await never_again(server)


async def test_an_auth_that_came_too_late_is_no_refusal() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        await (await server.peer()).close(4501, "no AUTH in time")
        await server.login()
        await client.wait_connected()


async def test_a_token_that_ended_on_a_live_connection_is_replaced_if_there_is_a_source() -> None:
    tokens = iter(["first", "second"])

    async def fetch() -> str:
        return next(tokens)

    async with ScriptedServer() as server, client_of(server, fetch):
        peer = await server.login()
        await peer.send(p.Kicked("token_expired"))
        await peer.close(4501)
        assert (await (await server.peer()).hello(2)).token == "second"


async def test_a_token_that_ended_is_final_without_a_source() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        await peer.send(p.Kicked("token_expired"))
        await peer.close(4501)
        gone = await next_event(client.events(), Disconnected)
        assert (gone.code, gone.reason, gone.final) == (4501, "token_expired", True)


async def test_a_kicked_client_says_why() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        await peer.send(p.Kicked("single_device", "phone-2"))
        await peer.close(4503)
        gone = await next_event(client.events(), Disconnected)
        assert (gone.code, gone.reason, gone.final) == (4503, "single_device", True)


async def test_a_source_of_tokens_that_fails_is_asked_again() -> None:
    asked = 0

    def fetch() -> str:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise OSError("the login server is away")
        return "token"

    async with ScriptedServer() as server, client_of(server, fetch) as client:
        gone = await next_event(client.events(), Disconnected)
        assert gone.reason == "no token: the login server is away"
        await server.login()


async def test_a_token_is_renewed_before_it_ends_and_again_when_the_server_says_until_when() -> None:
    tokens = iter([jwt(time.time() + 2), jwt(time.time() + 900), jwt(time.time() + 1_900)])
    async with ScriptedServer() as server, client_of(server, lambda: next(tokens)):
        peer = await server.login()
        first = await peer.expect(p.Refresh)
        assert first.token != peer.all[0].token  # type: ignore[attr-defined]
        await peer.send(p.Refreshed(now_ms() + 1_300))
        assert (await peer.expect(p.Refresh)).token != first.token


async def test_a_fixed_token_is_never_renewed() -> None:
    async with ScriptedServer() as server, client_of(server, jwt(time.time() + 1)):
        peer = await server.login()
        await asyncio.sleep(1.2)
        assert not any(isinstance(frame, p.Refresh) for frame in peer.all)


@pytest.mark.parametrize(
    ("token", "ends_ms"),
    [
        (jwt(1_700_000_000), 1_700_000_000_000),
        ("opaque", 0),
        ("a.b.c", 0),
        ("a..c", 0),
        ("a.e30.c", 0),
        ("a.bnVsbA.c", 0),
        ("a.e.c", 0),
        ("é.é.é", 0),
    ],
)
def test_when_a_token_ends_is_read_without_believing_it(token: str, ends_ms: int) -> None:
    assert token_ends_ms(token) == ends_ms


async def test_goaway_is_followed_within_its_window_with_a_goodbye() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        await peer.send(msg(1, 1), p.Goaway(5_000, "restart"))
        await peer.wait_closed()
        assert peer.socket.close_code == 1000
        auth = await (await server.peer()).hello(2)
        assert auth.session == "s1"
        gone = await next_event(client.events(), Disconnected)
        assert (gone.final, gone.retry_in_s) == (False, 0.0)


async def test_lost_frames_end_the_session_and_a_new_one_is_asked_for() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        await peer.send(msg(1, 1))
        await peer.acked(1)
        await peer.send(p.Pong(now_ms(), 5, 0))
        peer = await server.peer()
        auth = await peer.hello(0, session="s2")
        assert (auth.session, auth.tag) == ("", 0)
        gone = await next_event(client.events(), Disconnected)
        assert "tag 1 of 5 arrived" in gone.reason
        await peer.send(msg(1, 1), msg(2, 2))
        await peer.acked(2)


async def test_a_bad_frame_of_the_server_ends_the_connection_and_is_told() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        await peer.socket.send(p.encode(msg(1, 1))[:-1] + b"\xc0")
        gone = await next_event(client.events(), Disconnected)
        assert not gone.final
        await server.login()


async def test_a_frame_of_the_future_changes_nothing() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        await peer.socket.send(b"\x93\x7e\x01\x02" + p.encode(msg(1, 1)))
        assert (await next_event(client.events(), Message)).seq == 1


async def test_a_probe_is_answered() -> None:
    async with ScriptedServer() as server, client_of(server):
        peer = await server.login()
        await peer.send(p.Probe())
        await peer.expect(p.Ping)


async def test_a_silent_server_is_left_and_found_again() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.peer()
        peer.answers_pings = False
        await peer.expect(p.Auth)
        await peer.send(hello(heartbeat_ms=20))
        gone = await next_event(client.events(), Disconnected)
        assert (gone.reason, gone.final) == ("the server is silent", False)
        assert isinstance(peer.all[-1], p.Ping)
        await server.login(1)


async def test_another_users_token_does_not_touch_the_store() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        await peer.send(msg(1, 1))
        await peer.acked(1)
        await peer.close(1012)
        peer = await server.login(0, user="mallory")
        await peer.send(msg(1, 2))
        events = client.events()
        while not (gone := await next_event(events, Disconnected)).final:
            pass
        assert "belongs to 'alice'; the token is of 'mallory'" in gone.reason
        assert client.user == "alice"
        assert client.conversations()[0].head == 1
        await never_again(server)


async def test_what_was_under_way_when_the_connection_was_lost_is_sent_again_with_the_same_id() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        peer = await server.login()
        outgoing = await client.send(CONV, "x")
        await peer.expect(p.Send)
        peer.abort()
        peer = await server.login(1)
        send = await peer.expect(p.Send)
        assert send.items[0].client_id == outgoing.client_id


async def test_a_client_can_be_closed_while_it_waits_dials_or_is_stopped() -> None:
    async with ScriptedServer() as server:
        client = client_of(server)
        await client.start()
        await client.close()
        async with client_of(server) as client:
            peer = await server.peer()
            while peer.closed.is_set():
                peer = await server.peer()
            await peer.hello()
            await peer.close(4503)
            await next_event(client.events(), Disconnected)
        await server.stop()
        async with client_of(server) as client:
            await next_event(client.events(), Disconnected)


def test_arguments_that_can_never_work_are_refused() -> None:
    with pytest.raises(UsageError, match="token is a int"):
        Client("ws://localhost:1", 5, "d0")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="plain ws"):
        Client("ws://chat.example.org", "t", "d0")


async def test_connected_follows_the_connection() -> None:
    async with ScriptedServer() as server, client_of(server) as client:
        assert not client.connected
        peer = await server.login()
        await client.wait_connected()
        peer.abort()
        await until(lambda: not client.connected)
        await server.login(1)
        await client.wait_connected()
