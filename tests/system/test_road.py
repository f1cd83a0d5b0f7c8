"""The whole road with real sockets: listener, core, node, bus, dispatch, store, vendor, and raw clients."""

from __future__ import annotations

import asyncio
import random
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import websockets

from fastim import protocol as p
from fastim._core.acks import AckTable
from fastim._core.conn import CoreHub
from fastim._core.wheel import Wheel
from fastim.auth import Algorithm, Authenticator, Scope, SigningKey, mint
from fastim.bus.memory import MemoryBus
from fastim.clock import SystemClock
from fastim.dispatch.ledger import audit
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.service import Dispatch
from fastim.node.limits import NodeLimits
from fastim.node.server import Listener, ListenerConfig
from fastim.node.service import Node, encode_error
from fastim.node.tls import dev_certificate, make_server_context
from fastim.node.upgrade import FailureLimit
from fastim.presence.memory import MemoryPresence
from fastim.protocol import (
    Ack,
    Auth,
    Changes,
    CloseCode,
    Convs,
    Error,
    Frame,
    Goaway,
    Hello,
    History,
    HistoryPage,
    Level,
    Msg,
    Ping,
    Pong,
    Pull,
    Read,
    ReadMark,
    Send,
    SendItem,
    Sent,
    Skip,
)
from fastim.store.sqlite import SqliteStore
from tests.faults.recording_vendor import RecordingVendor
from tests.kill.raw import RawClient, Refused, split
from tests.leaks import MARK
from tests.system.dispatch_world import client_id

CONV = "p:alice:bob"
KEY = SigningKey("test", "k1", Algorithm.HS256, secrets.token_bytes(32))
FAST = NodeLimits(
    ack_timeout_ms=3_000, probe_ms=1_000, sweep_ms=25, grace_ms=150, reset_due_ms=50, slow_ms=4_000,
    lease_ms=60_000, rate_per_s=100_000, rate_burst=100_000,
)  # fmt: skip
IMPATIENT = {"ack_timeout_ms": 300, "probe_ms": 100}
FAST_DISPATCH = DispatchLimits(
    backoff_ms=(60, 120, 500), first_due_ms=30, due_poll_ms=20, mark_interval_ms=50, push_collapse_ms=100,
    reconnect_window_ms=100,
)  # fmt: skip
_DEADLINE_S = 8.0


def token(user: str) -> str:
    return mint(KEY, user, (Scope.CLIENT,), audience="fastim", ttl_s=600, now_s=int(time.time()))


async def until(condition: Callable[[], Any], what: str = "") -> None:
    end = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"never came true: {what or condition}"
        await asyncio.sleep(0.002)


class Client(RawClient):
    """A raw client that can resume, and whose words are short."""

    def __init__(self, road: Road, user: str, device: str = "phone", **auth: Any) -> None:
        super().__init__("127.0.0.1", road.port, token(user), device, ping_s=0)
        self.auth = auth

    def send(self, *frames: Frame) -> None:
        super().send(*[msgspec.structs.replace(f, **self.auth) if isinstance(f, Auth) else f for f in frames])

    def of(self, kind: type[Any]) -> list[Any]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    def seqs(self, conv: str = CONV) -> list[int]:
        """As a client sees them: what is not above everything before is a repeat."""
        found: list[int] = []
        for frame in self.messages(conv):
            if not found or frame.seq > found[-1]:
                found.append(frame.seq)
        return found

    def say(self, number: int, body: bytes = MARK.encode(), conv: str = CONV, **more: Any) -> None:
        self.send(Send(conv, [SendItem(client_id(number), more.pop("kind", 1), body, **more)]))

    async def get(self, kind: type[Any], count: int = 1) -> list[Any]:
        assert await self.wait_for(lambda: len(self.of(kind)) >= count), f"no {kind.__name__}: {self.frames}"
        return self.of(kind)

    async def get_seqs(self, seqs: list[int], conv: str = CONV) -> None:
        assert await self.wait_for(lambda: self.seqs(conv) == seqs), f"{self.seqs(conv)} for {seqs}"

    def resume(self) -> dict[str, Any]:
        """What AUTH says to go on with this session: everything that was read is stored."""
        assert self.hello is not None
        tags = [frame.tag for frame in self.frames if isinstance(frame, Msg | Sent | Skip | Level)]
        levels = [level.user_cursor for level in self.of(Level)]
        return {
            "session": self.hello.session,
            "tag": max(tags, default=0),
            "user_cursor": max(levels, default=0),
        }


class Road:
    """One process: everything but the command line."""

    def __init__(self) -> None:
        self.clock = SystemClock()
        self.vendor = RecordingVendor()
        self.fatal: list[BaseException] = []
        self.tls: ssl.SSLContext | None = None
        self.directory = Path()

    async def open(self, path: Path, limits: NodeLimits, boot: int = 1) -> None:
        self.directory = path
        self.store = await SqliteStore.open(path / "store")
        self.bus = MemoryBus()
        self.presence = MemoryPresence(self.clock, boot << 32)
        self.dispatch = Dispatch(
            self.store, self.bus, self.presence, [self.vendor], clock=self.clock, rng=random.Random(1),
            limits=FAST_DISPATCH, on_fatal=self.fatal.append,
        )  # fmt: skip
        await self.dispatch.start()
        verify = Authenticator([KEY.verifier()], "fastim", self.clock).verify
        acks, wheel = AckTable(), Wheel()
        self.hub = CoreHub(asyncio.get_running_loop(), acks, wheel, encode_error=encode_error)
        self.node = Node(
            "n1", boot, store=self.store, bus=self.bus, presence=self.presence, hub=self.hub, acks=acks,
            wheel=wheel, verify=lambda text: verify(text, need=Scope.CLIENT), clock=self.clock,
            rng=random.Random(2), limits=limits, on_fatal=self.fatal.append,
        )  # fmt: skip
        await self.node.start()
        config = ListenerConfig(host="127.0.0.1", port=0, tls=self.tls, dev=True)
        self.listener = Listener(config, self.hub, self.clock, FailureLimit(10_000, self.clock))
        await self.listener.start()

    @property
    def port(self) -> int:
        return self.listener.addresses[0][1]

    async def close(self, window_ms: int = 0) -> None:
        self.node.go_away(window_ms)
        self.listener.stop_accepting()
        await self.listener.close_all(CloseCode.RESTART, "restart", window_ms)
        await self.node.stop()
        await self.dispatch.move_mark()
        await self.dispatch.stop()
        self.hub.accept = self.hub.on_fatal = None
        report = await audit(self.store, self.clock.wall_ms())
        await self.store.close()
        assert self.fatal == []
        assert report.ok, report.violations
        assert report.states["unsettled"] == 0

    async def states(self, user: str, conv: str = CONV) -> list[str]:
        found = []
        after = 0
        while True:
            page, after = await self.store.obligations(after, 1_000, self.clock.wall_ms())
            found += [one.state.name.lower() for one in page if (one.user, one.conv) == (user, conv)]
            if not after:
                return found

    async def become(self, states: list[str], user: str, conv: str = CONV) -> None:
        end = time.monotonic() + _DEADLINE_S
        while (found := await self.states(user, conv)) != states:
            assert time.monotonic() < end, f"{found} for {states}"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def road(path: Path, tls: ssl.SSLContext | None = None, **limits: Any) -> AsyncIterator[Road]:
    here = Road()
    here.tls = tls
    await here.open(path, msgspec.structs.replace(FAST, **limits))
    try:
        yield here
    finally:
        await here.close()


async def known(here: Road, *users: str) -> None:
    for user in users:
        await here.store.register_device(user, "phone", "app", here.clock.wall_ms())


# ------------------------------------------------------------------------------------------ one to one


async def test_two_clients_exchange_messages_and_everything_is_accounted(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob:
        alice.say(1, b"hello")
        (sent,) = await alice.get(Sent)
        assert [(i.client_id, i.seq) for i in sent.items] == [(client_id(1), 1)]
        (message,) = await bob.get(Msg)
        assert (message.body, message.sender, message.seq, message.msg_id) == (
            b"hello", "alice", 1, sent.items[0].msg_id,
        )  # fmt: skip
        bob.ack()
        await here.become(["acked"], "bob")
        bob.say(2, b"hello yourself")
        (answer,) = await alice.get(Msg)
        assert (answer.body, answer.seq) == (b"hello yourself", 2)
        alice.ack()
        await here.become(["acked"], "alice")
        assert (await here.store.position("alice", "phone", CONV)).cursor == 2
        assert here.vendor.sent == []


async def test_a_resent_message_is_answered_again_and_delivered_once(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob:
        alice.say(1, b"one")
        alice.say(1, b"one")
        alice.say(1, b"another")
        sents = await alice.get(Sent, 2)
        assert {item.seq for sent in sents for item in sent.items} == {1}
        (error,) = await alice.get(Error)
        assert (error.code, error.client_id, error.retryable) == ("conflict", client_id(1), False)
        alice.say(2, b"two")
        await bob.get_seqs([1, 2])
        bob.ack()
        alice.ack()


async def test_a_frame_of_32_messages_is_stored_in_order(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob:
        alice.send(Send(CONV, [SendItem(client_id(n), 1, b"%d" % n) for n in range(32)]))
        await bob.get_seqs(list(range(1, 33)))
        assert [m.body for m in bob.messages(CONV)] == [b"%d" % n for n in range(32)]
        bob.ack()
        await here.become(["acked"] * 32, "bob")


# ------------------------------------------------------------------------------------- devices and groups


async def test_a_group_of_three_with_two_devices(tmp_path: Path) -> None:
    async with road(tmp_path) as here:
        await here.store.create_group("team", "alice", ["bob", "carol"], here.clock.wall_ms())
        async with (
            Client(here, "alice") as alice, Client(here, "alice", "laptop") as laptop,
            Client(here, "bob") as bob, Client(here, "carol") as carol,
        ):  # fmt: skip
            alice.say(1, b"hi all", "g:team")
            await alice.get(Sent)
            for client in (laptop, bob, carol):
                await client.get_seqs([1, 2], "g:team")
                client.ack()
            assert alice.seqs("g:team") == [1]
            alice.ack()
            for user in ("bob", "carol"):
                await here.become(["acked"], user, "g:team")
            bob.say(2, b"hi alice", "g:team")
            for client in (alice, laptop, carol):
                assert await client.wait_for(lambda one=client: one.seqs("g:team")[-1:] == [3])
                client.ack()
            bob.ack()


async def test_the_first_device_settles_and_the_second_gets_it_all_the_same(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice:
        async with Client(here, "bob") as phone, Client(here, "bob", "laptop") as laptop:
            alice.say(1)
            await laptop.get_seqs([1])
            laptop.ack()
            await here.become(["acked"], "bob")
            await phone.get_seqs([1])
            phone.ack()
        async with Client(here, "bob", "tablet") as tablet:
            await tablet.get(Level)
            assert tablet.seqs() == []
            assert tablet.of(Changes)[0].items[0].cursor == 1
            tablet.ack()


# ------------------------------------------------------------------------------------------- coming back


async def test_a_hot_resume_goes_on_under_the_same_tags(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice:
        async with Client(here, "bob") as bob:
            await bob.get(Level)
            for number in range(1, 4):
                alice.say(number)
            await bob.get_seqs([1, 2, 3])
            tags = {m.seq: m.tag for m in bob.messages(CONV)}
            again_with = bob.resume() | {"tag": tags[1]}
            bob.abort()
        async with Client(here, "bob", **again_with) as bob:
            assert bob.hello is not None
            assert bob.hello.resumed == 1
            await bob.get(Level)
            assert [(m.seq, m.tag, m.dup) for m in bob.messages(CONV)] == [
                (2, tags[2], True), (3, tags[3], True),
            ]  # fmt: skip
            alice.say(4)
            await bob.get_seqs([2, 3, 4])
            bob.ack()
            await here.become(["acked"] * 4, "bob")


async def test_a_hot_resume_with_nothing_under_way_takes_late_acks(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice:
        async with Client(here, "bob") as bob:
            alice.say(1)
            await bob.get_seqs([1])
            await bob.get(Level)
            bob.ack()
            await here.become(["acked"], "bob")
            again_with = bob.resume()
        async with Client(here, "bob", **again_with) as bob:
            assert bob.hello is not None
            assert bob.hello.resumed == 1
            bob.send(Ack(again_with["tag"]), Ping())
            await bob.get(Pong)
            assert bob.close_code == 0
            assert bob.seqs() == []


async def test_a_cold_resume_brings_what_is_missing(tmp_path: Path) -> None:
    async with road(tmp_path, resume_ttl_ms=30) as here, Client(here, "alice") as alice:
        async with Client(here, "bob") as bob:
            await bob.get(Level)
            bob.ack()
            alice.say(1)
            await bob.get_seqs([1])
            bob.ack()
            await here.become(["acked"], "bob")
            again_with = bob.resume()
        await until(lambda: here.node.sessions == 1, "the session has ended")
        alice.say(2)
        await alice.get(Sent, 2)
        async with Client(here, "bob", **again_with) as bob:
            assert bob.hello is not None
            assert (bob.hello.resumed, bob.hello.badge) == (2, 2)
            await bob.get(Level)
            assert bob.seqs() == [2]
            bob.ack()
            await here.become(["acked", "acked"], "bob")


async def test_the_process_starts_again_and_nothing_is_missing(tmp_path: Path) -> None:
    here = Road()
    await here.open(tmp_path, FAST)
    async with Client(here, "alice") as alice, Client(here, "bob") as bob:
        for number in range(1, 6):
            alice.say(number)
        await bob.get_seqs([1, 2, 3, 4, 5])
        (tag,) = [m.tag for m in bob.messages(CONV) if m.seq == 2]
        bob.send(Ack(tag))
        await here.become(["acked"] * 2 + ["unsettled"] * 3, "bob")
        again_with = bob.resume()
        await here.close()
        assert await bob.wait_for(lambda: bob.close_code)
        assert (len(bob.of(Goaway)), bob.close_code) == (1, CloseCode.RESTART)
    await here.open(tmp_path, FAST, boot=2)
    async with Client(here, "bob", **again_with) as bob:
        assert bob.hello is not None
        assert bob.hello.resumed == 2
        await bob.get_seqs([3, 4, 5])
        bob.ack()
        await here.become(["acked"] * 5, "bob")
    await here.close()


async def test_the_same_device_replaces_its_older_connection(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as older:
        alice.say(1)
        await older.get_seqs([1])
        async with Client(here, "bob") as newer:
            assert await older.wait_for(lambda: older.close_code)
            assert older.close_code == CloseCode.REPLACED
            await newer.get_seqs([1])
            alice.say(2)
            await newer.get_seqs([1, 2])
            newer.ack()
            await here.become(["acked", "acked"], "bob")


# ------------------------------------------------------------------------------------ not there, not acking


async def test_a_user_who_is_away_is_parked_pushed_and_synced(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice:
        await known(here, "bob")
        for number in range(1, 4):
            alice.say(number)
        await alice.get(Sent, 3)
        await here.become(["parked"] * 3, "bob")
        await until(lambda: here.vendor.sent, "the vendor was called")
        async with Client(here, "bob") as bob:
            await bob.get(Level)
            assert bob.seqs() == [1, 2, 3]
            bob.ack()
            await here.become(["acked"] * 3, "bob")


async def test_a_goodbye_waits_for_its_grace_before_anybody_is_rung(tmp_path: Path) -> None:
    async with road(tmp_path, grace_ms=600) as here, Client(here, "alice") as alice:
        async with Client(here, "bob") as bob:
            await bob.get(Level)
            bob.ack()
            bob._send_ws(8, (1000).to_bytes(2, "big"))
            assert await bob.wait_for(lambda: bob.close_code)
        await until(lambda: here.node.connections == 1)
        left = time.monotonic()
        alice.say(1)
        await here.become(["due"], "bob")
        await here.become(["parked"], "bob")
        assert time.monotonic() - left > 0.4


async def test_a_client_that_reads_and_never_acks_is_parked_after_its_attempts(tmp_path: Path) -> None:
    async with (
        road(tmp_path, idle_ms=60_000, **IMPATIENT) as here, Client(here, "alice") as alice,
        Client(here, "bob") as bob,
    ):  # fmt: skip
        alice.say(1)
        await bob.get_seqs([1])
        await here.become(["parked"], "bob")
        await until(lambda: here.vendor.sent, "the vendor was called")
        repeats = len(bob.messages())
        assert 2 <= repeats <= 4
        await asyncio.sleep(0.7)  # longer than any of its timers: it stays quiet
        assert len(bob.messages()) == repeats
        assert bob.close_code == 0
        await acks(bob)
        alice.say(2)
        await here.become(["acked", "acked"], "bob")


async def acks(client: Client) -> bool:
    """From now on the client acknowledges whatever comes."""

    async def loop() -> None:
        while not client.closed.is_set():
            client.ack()
            await asyncio.sleep(0.01)

    client._tasks.append(asyncio.create_task(loop(), name="acks"))
    return True


async def test_a_dead_socket_is_found_and_its_message_parked(tmp_path: Path) -> None:
    async with (
        road(tmp_path, **IMPATIENT) as here, Client(here, "alice") as alice, Client(here, "bob") as bob,
    ):  # fmt: skip
        await bob.get(Level)
        bob.ack()
        bob.deaf()
        alice.say(1)
        await here.become(["parked"], "bob")
        await until(lambda: here.node.connections == 1)
        async with Client(here, "bob") as again:
            await again.get_seqs([1])
            again.ack()
            await here.become(["acked"], "bob")


async def test_expired_messages_leave_no_hole_and_are_never_shown(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice:
        await known(here, "bob")
        alice.say(1, b"kept")
        alice.say(2, b"gone soon", loss_time_ms=here.clock.wall_ms() + 50)
        alice.say(3, b"kept")
        await alice.get(Sent, 3)
        await asyncio.sleep(0.06)  # past the deadline, by its meaning
        alice.say(4, b"too late", loss_time_ms=here.clock.wall_ms() - 1)
        (error,) = await alice.get(Error)
        assert (error.code, error.client_id) == ("expired", client_id(4))
        async with Client(here, "bob") as bob:
            await bob.get(Level)
            assert [m.body for m in bob.messages(CONV)] == [b"kept", b"kept"]
            assert [(s.from_seq, s.to_seq, s.reason) for s in bob.of(Skip)] == [(2, 2, 1)]
            bob.ack()
            await here.become(["acked", "expired", "acked"], "bob")


# ------------------------------------------------------------------------------------- holes and windows


async def test_a_pull_fills_a_hole(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob:
        for number in range(1, 6):
            alice.say(number)
        await bob.get_seqs([1, 2, 3, 4, 5])
        bob.send(Pull(CONV, 2, 3))
        assert await bob.wait_for(lambda: [m.seq for m in bob.messages(CONV)][5:] == [2, 3, 4, 5])
        assert all(m.dup for m in bob.messages(CONV)[5:])
        bob.ack()
        await here.become(["acked"] * 5, "bob")


async def test_a_full_window_pulls_and_goes_live_again(tmp_path: Path) -> None:
    async with (
        road(tmp_path, window_messages=8) as here,
        Client(here, "alice") as alice,
        Client(here, "bob") as bob,
    ):
        for start in range(0, 96, 32):
            alice.send(Send(CONV, [SendItem(client_id(n), 1, b"%d" % n) for n in range(start, start + 32)]))
        await alice.get(Sent, 3)
        await bob.get_seqs([1, 2, 3, 4, 5, 6, 7])  # and LEVEL
        await acks(bob)
        await bob.get_seqs(list(range(1, 97)))
        await here.become(["acked"] * 96, "bob")
        alice.say(97)
        await bob.get_seqs(list(range(1, 98)))


async def test_large_messages_fill_the_window_by_bytes(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob:
        for number in range(1, 13):
            alice.say(number, bytes(61_000))
            await alice.get(Sent, number)
        assert await bob.wait_for(lambda: len(bob.seqs()) == 4)
        await acks(bob)
        await bob.get_seqs(list(range(1, 13)))
        await here.become(["acked"] * 12, "bob")


# -------------------------------------------------------------------------------------- read, lists, history


async def test_read_marks_unread_and_lists(tmp_path: Path) -> None:
    async with (
        road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob,
        Client(here, "bob", "laptop") as laptop,
    ):  # fmt: skip
        for number in range(1, 4):
            alice.say(number, b"message %d" % number)
        await bob.get_seqs([1, 2, 3])
        bob.send(Convs(1))
        (page,) = [c for c in await bob.get(Changes, 2) if c.req == 1]
        (state,) = page.items
        assert (state.conv, state.head, state.unread, state.preview) == (CONV, 3, 3, "message 3")
        bob.send(Read(CONV, 2))
        assert (await bob.get(ReadMark))[0] == ReadMark(CONV, "bob", 2, 1)
        for other in (alice, laptop):
            assert (await other.get(ReadMark))[0] == ReadMark(CONV, "bob", 2, -1)
        bob.send(Read(CONV, 3, True))
        await laptop.get(ReadMark, 2)
        assert len(alice.of(ReadMark)) == 1
        assert await here.store.unread("bob") == (0, [])
        for client in (alice, bob, laptop):
            client.ack()


async def test_history_is_paged_and_moves_no_cursor(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice:
        await known(here, "bob")
        for number in range(1, 8):
            alice.say(number, b"%d" % number)
        await alice.get(Sent, 7)
        alice.send(History(1, CONV, limit=3), History(2, CONV, after_seq=5))
        pages = {page.req: page for page in await alice.get(HistoryPage, 2)}
        assert ([m.seq for m in pages[1].messages], pages[1].more) == ([5, 6, 7], True)
        assert ([m.body for m in pages[2].messages], pages[2].more) == ([b"6", b"7"], False)
        alice.ack()


# ------------------------------------------------------------------------------------------------ refusals


async def test_what_is_not_accepted_is_refused_with_its_code(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob:
        await here.store.create_group("secret", "bob", ["carol"], here.clock.wall_ms())
        wanted = []
        for number, (code, conv, more) in enumerate(
            [
                ("unknown_kind", CONV, {"kind": 99}),
                ("too_big", CONV, {"body": bytes(61_441)}),
                ("unknown_user", "p:alice:nobody", {}),
                ("unknown_group", "g:nowhere", {}),
                ("not_member", "g:secret", {}),
                ("forbidden", "p:bob:carol", {}),
                ("forbidden", "s:bob", {}),
                ("bad_conv", "p:bob:alice", {}),
                ("expired", CONV, {"loss_time_ms": 1}),
            ],
            start=1,
        ):
            alice.say(number, more.pop("body", b"x"), conv, **more)
            wanted.append((code, client_id(number), conv))
        errors = await alice.get(Error, len(wanted))
        assert sorted((e.code, e.client_id, e.conv) for e in errors) == sorted(wanted)
        alice.say(100, b"still here")
        await bob.get_seqs([1])
        bob.ack()
        alice.ack()


async def test_too_many_messages_are_rate_limited_and_pass_later(tmp_path: Path) -> None:
    async with road(tmp_path, rate_per_s=50, rate_burst=5) as here, Client(here, "alice") as alice:
        await known(here, "bob")
        for number in range(8):
            alice.say(number)
        errors = await alice.get(Error, 3)
        assert {(e.code, e.retryable) for e in errors} == {("rate_limited", True)}
        await asyncio.sleep(max(e.retry_after_ms for e in errors) / 1000 + 0.02)
        for number in range(5, 7):
            alice.say(number)
        await alice.get(Sent, 7)
        alice.ack()


async def test_operations_that_are_not_served_leave_the_connection_open(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice:
        alice.send(
            p.Join(1, "lobby"), p.Leave(2, "lobby"), p.Signal(CONV, 1), p.Recall(CONV, client_id(1), 1),
            p.Edit(CONV, client_id(1), 1, b""), p.Delete(3, CONV, [1]), p.Clear(4, CONV, 1),
            p.Setting(5, "k"), p.Block(6, "bob", True), p.Watch(7, ["bob"]), p.Unwatch(8, ["bob"]),
            p.Received(CONV, 1), p.Rekey(1, bytes(32), "k"), Ping(),
        )  # fmt: skip
        await alice.get(Pong)
        assert [e.code for e in alice.of(Error)] == ["unsupported"] * 13
        assert sorted(e.req for e in alice.of(Error) if e.req) == list(range(1, 9))


@pytest.mark.parametrize("bad", ["", "nonsense", "a.b.c"])
async def test_a_bad_token_is_refused_with_the_same_words(tmp_path: Path, bad: str) -> None:
    async with road(tmp_path) as here:
        client = Client(here, "alice", token=bad)
        with pytest.raises(Refused):
            async with client:
                pass
        (error,) = client.of(Error)
        assert (error.code, error.detail) == ("unauthenticated", "the token is not valid")
        assert client.close_code == CloseCode.AUTH


MALFORMED: list[bytes] = [
    b"",
    b"\x00",
    b"\xc1",
    b"\x91",
    b"\x91\xc0",
    b"\x93\x03",
    b"\x92\x03\xff",
    b"\x92\x03\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff\x05",
    b"\x92\x04\xdc\xff\xff",
    b"\x93\x05\xa3p:a\x91\x93",
    b"\x91" * 64 + b"\x02",
    b"\xc7\x01\x05\x00",
    bytes(range(256)),
    b"\x92\x08\xcb" + bytes(8),
    b"\x94\x05\xa2\xff\xfe\x90\x00",
    b"\x92\x01\xa0",
]


@pytest.mark.parametrize("payload", MALFORMED)
async def test_a_malformed_packet_ends_its_own_connection_only(tmp_path: Path, payload: bytes) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob:
        async with Client(here, "mallory") as mallory:
            alice.say(1)
            mallory._send_ws(2, payload)
            mallory.send(Ping())
            assert await mallory.wait_for(lambda: mallory.close_code or mallory.of(Pong))
            if mallory.close_code:
                assert mallory.close_code == CloseCode.BAD_FRAME
            alice.say(2)
            await bob.get_seqs([1, 2])
        assert (alice.close_code, bob.close_code) == (0, 0)
        bob.ack()
        alice.ack()
        await here.become(["acked", "acked"], "bob")


async def test_websocket_rules_that_are_broken_end_their_own_connection_only(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob:
        breaks: list[tuple[Callable[[Client], None], int]] = [
            (lambda one: one._send_ws(1, b"text"), CloseCode.TEXT_REFUSED),
            (lambda one: one._send_ws(2 | 0x40, b"\x91\x02"), CloseCode.PROTOCOL),
            (lambda one: one._send_ws(0, b"continues nothing"), CloseCode.PROTOCOL),
            (lambda one: one.send(Ack(10_000)), CloseCode.BAD_FRAME),
        ]
        for number, (broken, code) in enumerate(breaks, start=1):
            async with Client(here, f"mallory{number}") as mallory:
                broken(mallory)
                assert await mallory.wait_for(lambda one=mallory: one.close_code)
                assert mallory.close_code == code
            alice.say(number)
            assert await bob.wait_for(lambda count=number: len(bob.seqs()) == count)
        bob.ack()
        alice.ack()


async def test_random_bytes_from_many_peers_never_reach_a_bystander(tmp_path: Path) -> None:
    rng = random.Random(20)
    async with road(tmp_path) as here, Client(here, "alice") as alice, Client(here, "bob") as bob:
        for number in range(1, 41):
            async with Client(here, f"mallory{number % 4}") as mallory:
                good = p.encode(Send(CONV, [SendItem(client_id(number), 1, b"x")]))
                for _ in range(5):
                    raw = bytearray(good * rng.randrange(1, 3))
                    for _ in range(rng.randrange(1, 6)):
                        raw[rng.randrange(len(raw))] = rng.randrange(256)
                    mallory._send_ws(2, bytes(raw[: rng.randrange(1, len(raw) + 1)]))
            alice.say(number)
        await bob.get_seqs(list(range(1, 41)))
        bob.ack()
        alice.ack()
        await here.become(["acked"] * 40, "bob")


# ------------------------------------------------------------------------------------------------------ TLS


async def test_the_road_over_tls_with_an_independent_client(tmp_path: Path) -> None:
    cert, key = dev_certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(cert))
    async with road(tmp_path, make_server_context(cert, key)) as here:
        url = f"wss://localhost:{here.port}{'/v1/ws'}"
        async with (
            websockets.connect(url, ssl=trusting, subprotocols=["fastim.v1"], compression=None) as alice,  # type: ignore[list-item]
            websockets.connect(url, ssl=trusting, subprotocols=["fastim.v1"], compression=None) as bob,  # type: ignore[list-item]
        ):
            for user, socket in (("alice", alice), ("bob", bob)):
                assert socket.subprotocol == "fastim.v1"
                await socket.send(p.encode(Auth(1, 1, token(user), "phone")))
                await _frames_until(socket, Level)
            await alice.send(p.encode(Send(CONV, [SendItem(client_id(1), 1, "你好".encode())])))
            (sent,) = [f for f in await _frames_until(alice, Sent) if isinstance(f, Sent)]
            (message,) = [f for f in await _frames_until(bob, Msg) if isinstance(f, Msg)]
            assert (message.body.decode(), message.msg_id) == ("你好", sent.items[0].msg_id)
            await bob.send(p.encode(Ack(message.tag)))
            await here.become(["acked"], "bob")


async def _frames_until(socket: Any, kind: type[Frame]) -> list[Frame]:
    found: list[Frame] = []
    async with asyncio.timeout(_DEADLINE_S):
        while not any(isinstance(frame, kind) for frame in found):
            found += split(await socket.recv())
    return found


# ------------------------------------------------------------------------------------------ all of it at once


class Person:
    """A device that keeps the protocol: acks what it has, drops repeats, pulls holes, resumes hot or cold."""

    def __init__(self, user: str, rng: random.Random) -> None:
        self.user = user
        self.rng = rng
        self.last: dict[str, int] = {}
        self.held: dict[str, dict[int, bytes]] = {}
        self.shown: dict[str, list[bytes]] = {}
        self.waiting: dict[bytes, tuple[str, bytes]] = {}
        self.session, self.tag, self.cursor = "", 0, 0
        self.numbers = 0
        self.bodies: list[bytes] = []

    async def live(self, here: Road, convs: list[str], seconds: float, connections: int) -> None:
        for turn in range(connections):
            last = turn + 1 == connections
            auth = {} if self.rng.random() < 0.3 else {"session": self.session, "tag": self.tag}
            try:
                async with Client(here, self.user, user_cursor=self.cursor, **auth) as client:
                    assert client.hello is not None
                    if client.hello.resumed != 1:
                        self.tag = 0
                        for held in self.held.values():
                            held.clear()
                    self.session = client.hello.session
                    await self._talk(client, convs, seconds, last)
            except Refused:
                continue

    async def _talk(self, client: Client, convs: list[str], seconds: float, last: bool) -> None:
        done = 0
        sent_at = 0.0
        end = time.monotonic() + seconds * (0.3 + self.rng.random())
        while not client.closed.is_set():
            now = time.monotonic()
            if now >= end and (not last or self._settled(client, done)):
                break
            if now < end and len(self.waiting) < 1 and self.rng.random() < 0.5:
                self._write(convs)
            if self.waiting and now - sent_at > 0.2:
                sent_at = now
                for number, (conv, body) in self.waiting.items():
                    client.send(Send(conv, [SendItem(number, 1, body)]))
            while done < len(client.frames):
                self._take(client, client.frames[done])
                done += 1
            if self.tag:
                client.send(Ack(self.tag))
            await asyncio.sleep(0.005)
        if self.rng.random() < 0.5:
            client.abort()

    def _settled(self, client: Client, done: int) -> bool:
        return (
            not self.waiting
            and not any(self.held.values())
            and bool(client.of(Level))
            and done == len(client.frames)
        )

    def _write(self, convs: list[str]) -> None:
        self.numbers += 1
        number = f"{self.user:>8}{self.numbers:08}".encode()[:16]
        body = number
        self.waiting[number] = (self.rng.choice(convs), body)
        self.bodies.append(body)

    def _take(self, client: Client, frame: Frame) -> None:
        if isinstance(frame, Sent):
            for item in frame.items:
                self.waiting.pop(item.client_id, None)
                self._hold(frame.conv, item.seq, item.client_id)
        elif isinstance(frame, Msg):
            self._hold(frame.conv, frame.seq, frame.body)
        elif isinstance(frame, Changes):
            for change in frame.items:
                self.last.setdefault(change.conv, change.cursor)
        elif isinstance(frame, Level):
            self.cursor = max(self.cursor, frame.user_cursor)
        tag = getattr(frame, "tag", 0)
        if tag:
            self.tag = max(self.tag, tag) if not any(self.held.values()) else self.tag
        for conv, held in self.held.items():
            if held:
                client.send(Pull(conv, self.last.get(conv, 0) + 1, min(held) - 1))

    def _hold(self, conv: str, seq: int, body: bytes) -> None:
        held = self.held.setdefault(conv, {})
        last = self.last.setdefault(conv, 0)
        if seq <= last:
            return
        held[seq] = body
        while self.last[conv] + 1 in held:
            self.last[conv] += 1
            self.shown.setdefault(conv, []).append(held.pop(self.last[conv]))


async def test_people_who_come_and_go_see_everything_once_and_in_order(tmp_path: Path) -> None:
    rng = random.Random(77)
    async with road(tmp_path, window_messages=8, resume_ttl_ms=400, devices_per_user=2) as here:
        users = ["ann", "bob", "cleo"]
        await here.store.create_group("team", "ann", ["bob", "cleo"], here.clock.wall_ms())
        await known(here, *users)
        convs = {
            user: ["g:team", *(p_conv(user, other) for other in users if other != user)] for user in users
        }
        people = [Person(user, random.Random(rng.random())) for user in users]
        await asyncio.gather(*[one.live(here, convs[one.user], 0.4, 6) for one in people])
        for _ in range(2):  # what is left is sent, then everybody comes level
            await asyncio.gather(*[one.live(here, convs[one.user], 0.0, 1) for one in people])
        timeline: dict[str, list[bytes]] = {}
        after = 0
        while page := await here.store.scan(after, 500):
            for message in page:
                timeline.setdefault(message.conv, []).append(message.body)
            after = page[-1].msg_id
        assert sum(len(one.bodies) for one in people) > 20
        for one in people:
            for conv in convs[one.user]:
                assert one.shown.get(conv, []) == timeline.get(conv, []), (one.user, conv)
        for user in users:
            for conv in convs[user]:
                await here.become(["acked"] * len(await here.states(user, conv)), user, conv)


def p_conv(a: str, b: str) -> str:
    return f"p:{min(a, b)}:{max(a, b)}"


async def test_a_hello_says_who_it_is_and_what_holds(tmp_path: Path) -> None:
    async with road(tmp_path) as here, Client(here, "alice") as alice:
        hello = alice.hello
        assert isinstance(hello, Hello)
        assert (hello.user, hello.device, hello.version, hello.resumed) == ("alice", "phone", 1, 0)
        assert (hello.window_messages, hello.heartbeat_ms) == (128, 10_000)
        assert abs(hello.server_ms - here.clock.wall_ms()) < 5_000
