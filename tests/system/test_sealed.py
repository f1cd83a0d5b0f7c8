"""Sealed connections: the SDK against the real server, what stands between the two, and the node's rules.

The rules of a single frame are in tests/unit/test_conn_sealed.py; ten million frames are in tests/attack.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from fastim._core.frame import split
from fastim._core.sealed import SealedStream
from fastim.client import (
    Client,
    Connected,
    Disconnected,
    Event,
    LocalStore,
    MemoryLocalStore,
    Message,
    SealKey,
    SharedKey,
)
from fastim.client.sealed import sealed_dial
from fastim.client.wire import Dial, DialError, Receiver, Wire, dial, tls_context
from fastim.clock import SystemClock
from fastim.dispatch.ledger import audit
from fastim.node.limits import NodeLimits
from fastim.protocol import (
    MAX_PACKET_BYTES,
    MAX_SEALED_BYTES,
    Auth,
    Error,
    Frame,
    Hello,
    Keys,
    Op,
    Ping,
    Pong,
    Rekey,
    decode,
    encode,
)
from fastim.sealing import Offer, SealKeys, StaticKey
from tests.kill.raw import split as decode_packet
from tests.system.node_world import NodeWorld, Peer, node_world
from tests.system.served import Served
from tests.system.test_chat import Person
from tests.system.test_client import CONV, Home, level, messages, settled, texts
from tests.unit.client_script import Hurry, next_event, now_ms, until

STATIC = StaticKey.generate("k1")


class Box:
    """Whoever ends TLS between client and server: reads, counts, and touches what it likes."""

    def __init__(self, below: Dial) -> None:
        self._below = below
        self.up: list[bytes] = []
        self.down: list[bytes] = []
        self.wires = 0
        self.stamps: dict[tuple[int, int], list[tuple[int, int]]] = {}
        """(wire, op of SEALED or SEALED_DOWN) -> (key_id, counter) of its frames."""
        self.touch: Callable[[bytes], bytes] | None = None
        """What becomes of the next packet to the server."""

    async def dial(self, receiver: Receiver) -> Wire:
        self.wires += 1
        box, number = self, self.wires

        class Tap:
            def on_packet(self, packet: bytes) -> None:
                box.down.append(packet)
                box.stamp(number, packet)
                receiver.on_packet(packet)

            def on_closed(self, code: int, reason: str) -> None:
                receiver.on_closed(code, reason)

        wire = await self._below(Tap())
        send = wire.send

        def tapped(packet: bytes) -> None:
            box.up.append(packet)
            box.stamp(number, packet)
            touch, box.touch = box.touch, None
            send(packet if touch is None else touch(packet))

        wire.send = tapped  # type: ignore[method-assign]
        return wire

    def stamp(self, number: int, packet: bytes) -> None:
        op, key_id, counter = msgpack.unpackb(packet)[:3]
        if op in (Op.SEALED, Op.SEALED_DOWN):
            self.stamps.setdefault((number, op), []).append((key_id, counter))

    def ops(self, packets: list[bytes]) -> list[int]:
        return [op for packet in packets for op, _, _ in split(packet)]

    def rekeys(self) -> list[Rekey]:
        """What was asked for in clear: once per connection."""
        found = [decode(op, packet[a:b]) for packet in self.up for op, a, b in split(packet)]
        return [frame for frame in found if isinstance(frame, Rekey)]


class SealedHome(Home):
    """A server with keys, over TLS or in clear, and clients that come through a Box."""

    def __init__(self, directory: Path, *, tls: bool = False, **node: Any) -> None:
        super().__init__(directory, plain=not tls, **node)
        self._tls = tls

    @property
    def seal(self) -> SealKey:
        assert self.app.node.seals is not None
        return self.app.node.seals.public[0]

    def box(self) -> Box:
        host, port = self.address
        if not self._tls:
            return Box(lambda receiver: dial(f"ws://{host}:{port}/v1/ws", receiver, None))
        context = tls_context(self.app.dev_cert)
        return Box(lambda receiver: dial(f"wss://{host}:{port}/v1/ws", receiver, context))

    def sealed(
        self,
        user: str,
        box: Box | None = None,
        *,
        store: LocalStore | None = None,
        seal: SealKey | None = None,
        device: str = "d0",
        on_event: Callable[[Event], None] | None = None,
        **limits: int,
    ) -> Client:
        """limits: of the keys, see sealed_dial."""
        host, port = self.address
        below = (box or self.box()).dial
        wanted = seal or self.seal
        scheme = "wss" if self._tls else "ws"
        common: dict[str, Any] = {
            "store": store or MemoryLocalStore(), "rng": Hurry(), "on_event": on_event,
        }  # fmt: skip
        if self._tls:
            common["ssl"] = tls_context(self.app.dev_cert)
        url = f"{scheme}://{host}:{port}"
        if limits:
            return Client(
                url, self.token(user), device,
                dial=sealed_dial(below, wanted, SystemClock(), **limits), **common,
            )  # fmt: skip
        return Client(url, self.token(user), device, dial=below, seal=wanted, **common)


@contextlib.asynccontextmanager
async def at_sealed_home(directory: Path, **options: Any) -> AsyncIterator[SealedHome]:
    home = SealedHome(directory, **options)
    await home.start()
    try:
        yield home
    finally:
        await home.stop()


def file(directory: Path, name: str, content: bytes) -> str:
    path = directory / name
    path.write_bytes(content)
    return str(path)


# ------------------------------------------------------------------------------------------ both ends


@pytest.mark.parametrize("tls", [True, False], ids=["over TLS", "on loopback"])
async def test_two_people_talk_and_the_box_between_learns_nothing(tmp_path: Path, tls: bool) -> None:
    async with at_sealed_home(tmp_path, tls=tls) as home:
        box = home.box()
        async with home.sealed("alice", box) as alice, home.sealed("bob", box) as bob:
            await level(alice, bob)
            for n in range(20):
                await (await alice.send(CONV, f"ping {n}")).accepted()
                await (await bob.send(CONV, f"pong {n}")).accepted()
            for person in (alice, bob):
                assert texts(await messages(person, 40)) == [
                    f"{word} {n}" for n in range(20) for word in ("ping", "pong")
                ]
            await settled(home)
        everything = b"".join(box.up + box.down)
        for word in (b"ping", b"pong", home.token("alice").encode()[:40], b"p:alice:bob", b"alice"):
            assert word not in everything
        assert box.ops(box.up).count(Op.REKEY) == 2
        assert set(box.ops(box.up)) == {Op.REKEY, Op.SEALED}
        assert set(box.ops(box.down)) == {Op.KEYS, Op.SEALED_DOWN}
        assert (await audit(home.app.ground.store, now_ms())).states["acked"] == 40


async def test_sealed_and_clear_clients_talk_to_each_other(tmp_path: Path) -> None:
    async with at_sealed_home(tmp_path) as home, home.sealed("alice") as alice, home.client("bob") as bob:
        await level(alice, bob)
        await (await alice.send(CONV, "sealed")).accepted()
        await (await bob.send(CONV, "in clear")).accepted()
        assert texts(await messages(alice, 2)) == texts(await messages(bob, 2)) == ["sealed", "in clear"]


async def test_the_largest_message_fits_a_sealed_packet(tmp_path: Path) -> None:
    async with at_sealed_home(tmp_path) as home, home.sealed("alice") as alice, home.sealed("bob") as bob:
        await level(alice, bob)
        people = [f"{n:064}" for n in range(50)]
        for n in range(3):
            outgoing = await alice.send(CONV, bytes([n]) * 61_440, "custom", mentions=people)
            await outgoing.accepted()
        assert [len(message.body) for message in await messages(bob, 3)] == [61_440] * 3


async def test_a_hot_resume_agrees_anew_and_loses_nothing(tmp_path: Path) -> None:
    async with at_sealed_home(tmp_path) as home:
        box = home.box()
        seen: list[Event] = []

        def connected() -> list[int]:
            return [event.resumed for event in seen if isinstance(event, Connected)]

        async with home.client("alice") as alice, home.sealed("bob", box, on_event=seen.append) as bob:
            await level(alice, bob)
            for n in range(30):
                await (await alice.send(CONV, f"message {n}")).accepted()
                if n % 10 == 5:
                    # Lost without a word, as when a phone changes its network.
                    assert bob._connection is not None
                    bob._connection.abort("the network is gone")
                    await (await alice.send(CONV, "meanwhile")).accepted()
                    await until(lambda wires=2 + n // 10: len(connected()) == wires)  # type: ignore[misc]
            await until(lambda: sum(isinstance(event, Message) for event in seen) == 33)
        found = [event.text for event in seen if isinstance(event, Message)]
        assert [text for text in found if text != "meanwhile"] == [f"message {n}" for n in range(30)]
        assert connected() == [0, 1, 1, 1]
        rekeys = box.rekeys()
        assert len(rekeys) == box.wires == 4
        assert len({rekey.ephemeral for rekey in rekeys}) == 4


async def test_new_keys_under_traffic_lose_nothing(tmp_path: Path) -> None:
    async with at_sealed_home(tmp_path) as home:
        home.app.node.limits = msgspec.structs.replace(home.app.node.limits, rekey_least_ms=0)
        box = home.box()
        limits = {"rekey_frames": 7, "rekey_least_ms": 0}
        # The first REKEY may not come before HELLO.
        async with home.sealed("alice", box, **limits) as alice, home.sealed("bob", box, **limits) as bob:
            await level(alice, bob)
            for n in range(80):
                sending = [await person.send(CONV, f"{n}") for person in (alice, bob)]
                for outgoing in sending:
                    await outgoing.accepted()
            for person in (alice, bob):
                found = texts(await messages(person, 160))
                assert found == [str(n) for n in range(80) for _ in range(2)]
            await settled(home)
        assert box.wires == 2, "no connection was lost"
        assert len(box.stamps) == 4
        for stamps in box.stamps.values():
            key_ids = [key_id for key_id, _ in stamps]
            assert key_ids == sorted(key_ids)
            assert key_ids[-1] > 5
            # The counter goes on when the key changes, and has no holes.
            assert [counter for _, counter in stamps] == list(range(1, len(stamps) + 1))


async def test_a_pre_shared_key_is_mixed_in(tmp_path: Path) -> None:
    secret = bytes(range(32))
    node = {
        "seal_keys": [{"name": "2026-01", "file": file(tmp_path, "seal.pem", STATIC.pem())}],
        "seal_shared": [{"name": "factory", "file": file(tmp_path, "psk", secret.hex().encode())}],
    }
    async with at_sealed_home(tmp_path, **node) as home:
        public = STATIC.public
        good = SealKey("2026-01", public, SharedKey("factory", secret))
        async with home.sealed("alice", seal=good) as alice:
            await level(alice)
        for bad in (
            SealKey("2026-01", public, SharedKey("factory", bytes(32))),
            SealKey("2026-01", public, SharedKey("another", secret)),
        ):
            box = home.box()
            async with home.sealed("alice", box, seal=bad) as alice:
                event = await next_event(alice.events(), Disconnected)
                assert (event.final, event.retry_in_s) == (False, 60.0)
            assert set(box.ops(box.up)) == {Op.REKEY}


async def test_a_client_that_knows_another_key_sends_no_token(tmp_path: Path) -> None:
    async with at_sealed_home(tmp_path) as home:
        box = home.box()
        imposter = SealKey(home.seal.name, StaticKey.generate("x").public)
        async with home.sealed("alice", box, seal=imposter) as alice:
            event = await next_event(alice.events(), Disconnected)
        assert not event.final
        assert "does not hold the static key 'dev'" in event.reason
        assert box.ops(box.up) == [Op.REKEY]


async def test_a_server_that_requires_it_takes_no_auth_in_clear(tmp_path: Path) -> None:
    async with at_sealed_home(tmp_path, require_sealed=True) as home:
        async with home.client("alice") as alice:
            event = await next_event(alice.events(), Disconnected)
            assert (event.final, event.code, event.refused) == (True, 4509, "seal_required")
        async with home.sealed("alice") as alice:
            await level(alice)


async def test_whoever_touches_frames_ends_connections_and_loses_no_message(tmp_path: Path) -> None:
    """Each kind of tampering ends one connection; the SDK comes back, and nothing is lost or shown twice."""
    rng = random.Random(3)
    held: list[bytes] = []

    def flipped(packet: bytes) -> bytes:
        at = rng.randrange(len(packet))
        return packet[:at] + bytes([packet[at] ^ 1 << rng.randrange(8)]) + packet[at + 1 :]

    def replayed(packet: bytes) -> bytes:
        return held[-1]

    def cut(packet: bytes) -> bytes:
        return packet[:-1]

    def clear(packet: bytes) -> bytes:
        return encode(Ping())

    async with at_sealed_home(tmp_path) as home:
        box = home.box()
        async with home.sealed("alice", box) as alice, home.client("bob") as bob:
            await level(alice, bob)
            sent = 0
            for touch in (flipped, replayed, cut, clear) * 3:
                await (await alice.send(CONV, f"{sent}")).accepted()
                sent += 1
                wires = box.wires
                held.append(next(p for p in reversed(box.up) if split(p)[0][0] == Op.SEALED))
                box.touch = touch
                outgoing = await alice.send(CONV, f"{sent}")
                sent += 1
                await until(lambda wires=wires: box.wires > wires)  # type: ignore[misc]
                await outgoing.accepted()
            assert texts(await messages(bob, sent)) == [str(n) for n in range(sent)]
        assert home.app.access.hub.counters()["bad_seals"] >= 12


async def test_whoever_has_keys_made_and_says_nothing_counts_as_a_failure(tmp_path: Path) -> None:
    class Ear:
        def __init__(self) -> None:
            self.packets: list[bytes] = []

        def on_packet(self, packet: bytes) -> None:
            self.packets.append(packet)

        def on_closed(self, code: int, reason: str) -> None:
            pass

    async with at_sealed_home(tmp_path, failures_per_minute=5) as home:
        for _ in range(20):
            async with home.sealed("alice") as alice:
                await level(alice)
        url = f"ws://127.0.0.1:{home.address[1]}/v1/ws"
        for _ in range(5):
            ear = Ear()
            wire = await dial(url, ear, None)
            wire.send(encode(Offer(home.seal, 1).rekey))
            await until(lambda ear=ear: bool(ear.packets))  # type: ignore[misc]
            wire.close(1000)
            await wire.gone()
            await until(lambda: home.app.listener.connections == 0)
        with pytest.raises(DialError, match="429"):
            await dial(url, Ear(), None)


# ------------------------------------------------------------------------------------ the node's rules


class Sealing:
    """A client's end of a link without a socket, that seals by hand."""

    def __init__(self, world: NodeWorld, seal: SealKey) -> None:
        self.world = world
        self.seal = seal
        self.peer = world.dial()
        self.stream: SealedStream | None = None
        self.offers: dict[int, Offer] = {}
        self.peer.take = self.take  # type: ignore[method-assign]

    def take(self, packet: bytes) -> None:
        """As Peer.take, with KEYS taken as they come."""
        if self.stream is not None:
            packet = self.stream.open(packet)
        for frame in decode_packet(packet):
            self.peer.frames.append(frame)
            if isinstance(frame, Keys):
                agreed = self.offers[frame.key_id].accept(frame)
                if self.stream is None:
                    self.stream = SealedStream(frame.key_id, *agreed.client(), client=True)
                else:
                    self.stream.renew(frame.key_id, *agreed.client())

    def say(self, *frames: Frame) -> None:
        packet = b"".join(encode(frame) for frame in frames)
        self.peer.link.receive(self.stream.seal(packet) if self.stream is not None else packet)

    async def rekey(self, key_id: int = 1, *, clear: bool = False) -> None:
        offer = self.offers[key_id] = Offer(self.seal, key_id)
        if clear:
            self.peer.link.receive(encode(offer.rekey))
        else:
            self.say(offer.rekey)
        await self.world.quiet()

    async def login(self, user: str = "bob") -> None:
        self.say(Auth(1, 1, user, "phone"))
        await self.world.quiet()

    def ended(self, code: str) -> None:
        """Refused, and closed."""
        errors = self.peer.of(Error)
        assert [(error.op, error.code) for error in errors] == [(Op.REKEY, code)]
        assert self.peer.close_code == 4509


@contextlib.asynccontextmanager
async def sealed_world(path: Path, **limits: Any) -> AsyncIterator[tuple[NodeWorld, Sealing]]:
    async with node_world(path, **limits) as world:
        world.node.seals = SealKeys([STATIC])
        yield world, Sealing(world, STATIC.seal_key())


async def test_hello_says_how_large_a_packet_may_be(tmp_path: Path) -> None:
    async with sealed_world(tmp_path) as (world, client):
        await client.rekey()
        await client.login()
        assert client.peer.hello.max_packet_bytes == MAX_SEALED_BYTES
        assert (await world.connect("alice")).hello.max_packet_bytes == MAX_PACKET_BYTES


async def test_keys_are_agreed_once_before_auth(tmp_path: Path) -> None:
    async with sealed_world(tmp_path) as (_, client):
        await client.rekey(1)
        await client.rekey(2)
        client.ended("bad_seal")


async def test_no_keys_are_agreed_between_auth_and_hello(tmp_path: Path) -> None:
    async with sealed_world(tmp_path, rekey_least_ms=0) as (world, client):
        await client.rekey(1)
        world.presence.hold("attach")
        client.say(Auth(1, 1, "bob", "phone"))
        await client.rekey(2)
        client.ended("bad_seal")
        world.presence.let_go("attach")
        await world.quiet()


async def test_a_session_in_clear_agrees_on_no_keys(tmp_path: Path) -> None:
    async with sealed_world(tmp_path) as (_, client):
        await client.login()
        assert client.peer.of(Hello)
        await client.rekey(1)
        client.ended("bad_seal")


async def test_new_keys_are_had_once_a_second_and_with_a_higher_id(tmp_path: Path) -> None:
    async with sealed_world(tmp_path) as (world, client):
        await client.rekey(5)
        await client.login()
        for key_id in (6, 9):
            await world.pass_ms(NodeLimits().rekey_least_ms)
            await client.rekey(key_id)
            client.say(Ping())
            await world.quiet()
        assert [keys.key_id for keys in client.peer.of(Keys)] == [5, 6, 9]
        assert len(client.peer.of(Pong)) == 2
        await client.rekey(10)
        client.ended("bad_seal")


@pytest.mark.parametrize("key_id", [0, 4, 5])
async def test_a_key_id_that_does_not_grow_is_refused(tmp_path: Path, key_id: int) -> None:
    async with sealed_world(tmp_path) as (world, client):
        await client.rekey(5)
        await client.login()
        await world.pass_ms(1_000)
        await client.rekey(key_id)
        client.ended("bad_seal")


async def test_a_node_without_keys_says_so_and_a_session_goes_on(tmp_path: Path) -> None:
    async with node_world(tmp_path) as world:
        client = Sealing(world, STATIC.seal_key())
        await client.rekey()
        client.ended("unsupported")
        peer: Peer = await world.connect("alice")
        peer.say(Offer(STATIC.seal_key(), 1).rekey)
        await world.quiet()
        assert peer.codes == ["unsupported"]
        assert peer.close_code == 0


@pytest.mark.parametrize(
    ("rekey", "code"),
    [
        (Rekey(1, bytes(32), "k1"), "bad_seal"),
        (Rekey(1, b"\x01" + bytes(31), "k1"), "bad_seal"),
        (Rekey(1, b"\x09" + bytes(31), "k2"), "bad_seal"),
        (Rekey(1, b"\x09" + bytes(31), "k1", "factory"), "bad_seal"),
    ],
)
async def test_every_refusal_has_the_same_words(tmp_path: Path, rekey: Rekey, code: str) -> None:
    async with sealed_world(tmp_path) as (world, client):
        client.say(rekey)
        await world.quiet()
        client.ended(code)
        (error,) = client.peer.of(Error)
        assert (error.detail, error.retryable, error.retry_after_ms) == ("no keys were agreed", False, 0)


async def test_a_rekey_that_is_none_is_a_bad_frame(tmp_path: Path) -> None:
    async with sealed_world(tmp_path) as (world, client):
        client.peer.link.receive(b"\x94\x19\x01\xc4\x02\x00\x00\xa2k1")
        await world.quiet()
        client.ended("bad_frame")


async def test_a_refused_renewal_leaves_a_session_to_resume(tmp_path: Path) -> None:
    async with sealed_world(tmp_path) as (world, client):
        await client.rekey(1)
        await client.login()
        session = client.peer.hello.session
        await client.rekey(2)
        client.ended("bad_seal")
        again = await world.connect("bob", session=session)
        assert again.hello.resumed == 1


async def test_requiring_is_said_before_the_token_is_looked_at(tmp_path: Path) -> None:
    async with sealed_world(tmp_path) as (world, client):
        world.node.seals = SealKeys([STATIC], required=True)
        for token in ("bob", "bad"):
            peer = await world.connect(token)
            assert peer.codes == ["seal_required"]
            assert peer.close_code == 4509
        await client.rekey()
        await client.login()
        assert client.peer.of(Hello)


# ------------------------------------------------------------------------------------ the command line


def test_a_development_server_prints_its_key_and_chat_seals_towards_it(tmp_path: Path) -> None:
    server = Served(tmp_path)
    try:
        found = re.search(r"^  Seal key   (dev:[0-9a-f]{64})$", server.announced(), re.MULTILINE)
        assert found is not None
        with Person(server, "alice", "--seal", found[1]) as alice, Person(server, "bob") as bob:
            alice.says("/open bob", "sealed up to the server")
            bob.hears("(p:alice:bob) alice: sealed up to the server")
            assert alice.leaves() == 0
            assert bob.leaves() == 0
        assert (server.data / "dev-seal-key.pem").stat().st_mode & 0o777 == 0o600
    finally:
        server.end()
