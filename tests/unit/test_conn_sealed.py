"""Sealing in the core: a real CoreConnection behind a real listener, and peers that break every rule of it.

What is sealed rightly goes on as in clear (tests/unit/test_conn.py); what is not ends the connection with
4509 and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from fastim._core.frame import split
from fastim._core.sealed import MAX_INNER_BYTES, SealedStream
from fastim.errors import UsageError
from fastim.protocol import Error, HistoryItem, Keys, Msg, Op, Ping, Rekey, Sealed, decode, encode
from fastim.sealing import Offer, SealKeys, StaticKey
from tests.unit.conn_world import (
    AUTH,
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    Client,
    Owner,
    World,
    until,
    ws,
)

STATIC = StaticKey.generate("k1")
PING_FRAME = encode(Ping())
Forge = Callable[[bytes], bytes]


def command(text: str) -> bytes:
    """A frame that reaches the owner."""
    return msgpack.packb([int(Op.READ), text, 1])


class Answering:
    """What the node does with REKEY."""

    def __init__(self, owner: Owner, frames: int = 1_000_000) -> None:
        self.owner = owner
        self.keys = SealKeys([STATIC], frames=frames)
        self.refused: UsageError | None = None
        owner.on = self.on_command

    def on_command(self, op: int, frame: bytes) -> None:
        if op == Op.REKEY:
            rekey = decode(op, frame)
            assert isinstance(rekey, Rekey)
            keys, agreed = self.keys.answer(rekey)
            link = self.owner.link
            link.send(encode(keys))
            try:
                link.set_keys(keys.key_id, *agreed.server(self.keys.frames))
            except UsageError as error:
                self.refused = error


class Tunnel:
    """The client's end, sealed."""

    def __init__(self, client: Client, stream: SealedStream, answering: Answering) -> None:
        self.client = client
        self.stream = stream
        self.answering = answering
        self.owner = client.owner
        self.link = client.owner.link
        self.frames: list[bytes] = []

    def say(self, *frames: bytes) -> bytes:
        """One packet of whole frames; what was written."""
        sealed = self.stream.seal(b"".join(frames))
        self.client.raw(ws(BINARY, sealed))
        return sealed

    async def packet(self) -> bytes:
        """The next packet of the server."""
        sealed = await self.client.packet()
        assert [op for op, _, _ in split(sealed)] == [Op.SEALED_DOWN]
        return self.stream.open(sealed)

    async def message(self) -> Any:
        packet = await self.packet()
        return decode(msgpack.unpackb(packet)[0], packet)

    async def closed_without_a_word(self, code: int = 4509) -> None:
        """A close frame with the code and nothing else, and the owner told."""
        assert await self.client.frame() == (CLOSE, struct.pack(">H", code))
        self.client.raw(ws(CLOSE, struct.pack(">H", code)))
        await self.client.eof()
        await until(lambda: self.owner.closed)
        assert self.owner.closed == [(code, True)]


async def agree(
    world: World, *, auth: bool = True, frames: int = 1_000_000, key_id: int = 1, receive_bytes: int = 0
) -> Tunnel:
    client = await world.connect(auth=False, receive_bytes=receive_bytes)
    answering = Answering(client.owner, frames)
    offer = Offer(STATIC.seal_key(), key_id)
    client.send(encode(offer.rekey))
    keys = await client.message()
    assert isinstance(keys, Keys)
    halves = offer.accept(keys).client(frames)
    tunnel = Tunnel(client, SealedStream(key_id, *halves, client=True), answering)
    if auth:
        tunnel.say(AUTH)
        await until(lambda: client.owner.link.authenticated)
    return tunnel


async def renew(tunnel: Tunnel, key_id: int = 2) -> None:
    """REKEY, and both keys of the client's changed when KEYS has come."""
    offer = Offer(STATIC.seal_key(), key_id)
    tunnel.say(encode(offer.rekey))
    while True:
        packet = await tunnel.packet()
        op, start, _ = split(packet)[-1]
        if op == Op.KEYS:
            break
    keys = decode(op, packet[start:])
    assert isinstance(keys, Keys)
    tunnel.stream.renew(key_id, *offer.accept(keys).client(tunnel.answering.keys.frames))


# ------------------------------------------------------------------------------------------------ fine


async def test_after_the_agreement_everything_is_sealed_both_ways() -> None:
    async with World() as world:
        tunnel = await agree(world, auth=False)
        assert tunnel.link.sealed
        assert not tunnel.link.authenticated
        tunnel.say(AUTH)
        await until(lambda: tunnel.link.authenticated)
        tunnel.say(command("one"), PING_FRAME)
        assert (await tunnel.message()).last_tag == 0
        assert [op for op, _ in tunnel.owner.commands] == [Op.REKEY, Op.AUTH, Op.READ]
        tunnel.link.send(command("down"))
        assert await tunnel.packet() == command("down")


async def test_the_frames_of_one_tick_are_one_sealed_packet() -> None:
    async with World() as world:
        tunnel = await agree(world)
        for number in range(5):
            tunnel.link.send(command(str(number)))
        assert await tunnel.packet() == b"".join(command(str(number)) for number in range(5))
        for number in range(70):
            tunnel.link.send(command(str(number)))
        assert len(split(await tunnel.packet())) == 64
        assert len(split(await tunnel.packet())) == 6


async def test_every_size_arrives_as_it_was() -> None:
    async with World() as world:
        tunnel = await agree(world)
        sizes = [
            2,
            85,
            88,
            90,
            91,
            92,
            93,
            125,
            126,
            2_000,
            2_029,
            2_048,
            60_000,
            65_400,
            65_499,
            65_500,
            65_501,
        ]
        for size in sizes:
            frame = (
                b"\x92\x06" + b"\xc6" + (size - 7).to_bytes(4, "big") + bytes(size - 7)
                if size > 8
                else PING_FRAME
            )
            tunnel.link.send(frame)
            assert await tunnel.packet() == frame
            tunnel.say(frame)
            if size > 8:
                await until(lambda frame=frame: tunnel.owner.commands[-1][1] == frame)  # type: ignore[misc]
            else:
                await tunnel.message()
        assert MAX_INNER_BYTES == 65_501
        with pytest.raises(UsageError, match="65,502 bytes; limits 2 and 65,501"):
            tunnel.link.send(bytes(65_502))
        assert not tunnel.link.closed


async def test_a_sealed_message_may_come_in_fragments() -> None:
    async with World() as world:
        tunnel = await agree(world)
        sealed = tunnel.stream.seal(command("in pieces"))
        cuts = [0, 1, 5, 19, 20, len(sealed) - 3, len(sealed)]
        parts = [sealed[a:b] for a, b in itertools.pairwise(cuts)]
        for number, part in enumerate(parts):
            tunnel.client.raw(ws(CONT if number else BINARY, part, fin=number == len(parts) - 1))
        await until(lambda: tunnel.owner.commands[-1][1] == command("in pieces"))


async def test_large_packets_and_short_writes_keep_the_order() -> None:
    """The kernel takes what it likes; the counter never has a hole."""
    async with World(hard_bytes=1 << 26) as world:
        tunnel = await agree(world, receive_bytes=4_096)
        rng = random.Random(5)
        wanted = []
        for number in range(400):
            size = rng.choice((10, 200, 5_000, 65_000))
            frame = msgpack.packb([int(Op.READ), str(number), bytes(size)])
            wanted.append(frame)
            tunnel.link.send(frame)
            if number % 7 == 0:
                await asyncio.sleep(0)
        assert tunnel.link.buffered_bytes() > 100_000
        got = b""
        while len(got) < sum(map(len, wanted)):
            got += await tunnel.packet()
        assert got == b"".join(wanted)


async def test_msg_and_acks_end_in_the_core_when_sealed_too() -> None:
    async with World() as world:
        tunnel = await agree(world)
        slot = world.acks.open()
        tunnel.link.bind(slot)
        world.acks.insert(slot, 1, 77, "item", 10, 1_000)
        tail = encode(HistoryItem(77, "p:a:b", 1, 1, 1, "a", bytes(16), 1, 1, 0, 0, b"hello"))[1:]
        tunnel.link.send_msg(1, False, tail)
        found = await tunnel.message()
        assert isinstance(found, Msg)
        assert (found.tag, found.msg_id, found.body) == (1, 77, b"hello")
        tunnel.say(b"\x92\x03\x01")
        await until(lambda: world.acked)
        assert world.hub.counters()["ack_frames"] == 1
        tunnel.link.bind(-1)
        world.acks.close(slot)


async def test_websockets_control_frames_stay_outside() -> None:
    async with World() as world:
        tunnel = await agree(world)
        tunnel.client.raw(ws(PING, b"are you there"))
        assert await tunnel.client.frame() == (PONG, b"are you there")
        tunnel.link.send(command("before"))
        tunnel.link.close(4410, "drained")
        assert await tunnel.packet() == command("before")
        assert await tunnel.client.closing() == (4410, b"drained")


# --------------------------------------------------------------------------------------------- refused


def flip(at: int, bit: int = 0) -> Forge:
    def forge(sealed: bytes) -> bytes:
        touched = bytearray(sealed)
        touched[at] ^= 1 << bit
        return bytes(touched)

    return forge


FORGERIES: dict[str, Forge] = {
    "op": flip(1),
    "key id": flip(6),
    "counter": flip(15),
    "length": flip(18),
    "first byte of the box": flip(19),
    "last byte of the tag": flip(-1),
    "a byte cut off its end": lambda sealed: sealed[:-1],
    "a byte cut off its start": lambda sealed: sealed[1:],
    "half of it": lambda sealed: sealed[: len(sealed) // 2],
    "the header only": lambda sealed: sealed[:19],
    "nothing": lambda sealed: b"",
    "a byte more": lambda sealed: sealed + b"\xc0",
    "twice in a packet": lambda sealed: sealed + sealed,
    "with a frame in clear behind it": lambda sealed: sealed + PING_FRAME,
    "with a frame in clear before it": lambda sealed: PING_FRAME + sealed,
    "an element more": lambda sealed: b"\x95" + sealed[1:] + b"\xc0",
    "the integers written otherwise": lambda sealed: msgpack.packb(msgpack.unpackb(sealed)),
    "a text for a box": lambda sealed: b"\x94\x18\x01\x02\xb4" + b"x" * 20,
    "an empty box": lambda sealed: b"\x94\x18\x01\x02\xc4\x00",
    "in clear": lambda sealed: PING_FRAME,
    "AUTH in clear": lambda sealed: AUTH,
    "REKEY in clear": lambda sealed: encode(Offer(STATIC.seal_key(), 2).rekey),
    "no msgpack": lambda sealed: b"\xc1" * 40,
}


@pytest.mark.parametrize("authenticated", [True, False], ids=["session", "before AUTH"])
@pytest.mark.parametrize("name", FORGERIES)
async def test_a_forged_frame_ends_the_connection_without_a_word(name: str, authenticated: bool) -> None:
    async with World() as world:
        tunnel = await agree(world, auth=authenticated)
        known = len(tunnel.owner.commands)
        tunnel.client.raw(ws(BINARY, FORGERIES[name](tunnel.stream.seal(command("x")))))
        await tunnel.closed_without_a_word()
        assert len(tunnel.owner.commands) == known
        assert world.hub.counters()["bad_seals"] == 1


async def test_every_flipped_bit_ends_the_connection() -> None:
    async with World() as world:
        tunnel = await agree(world)
        size = len(tunnel.stream.seal(PING_FRAME))
        for bit in range(size * 8):
            tunnel = await agree(world)
            tunnel.client.raw(ws(BINARY, flip(bit // 8, bit % 8)(tunnel.stream.seal(PING_FRAME))))
            assert await tunnel.client.frame() == (CLOSE, struct.pack(">H", 4509))
            tunnel.client.reset()
        assert world.hub.counters()["bad_seals"] == size * 8
        assert world.hub.counters()["pings"] == 0


async def test_a_replayed_frame_ends_the_connection() -> None:
    async with World() as world:
        tunnel = await agree(world)
        sealed = tunnel.say(command("once"))
        await until(lambda: tunnel.owner.commands[-1][1] == command("once"))
        tunnel.client.raw(ws(BINARY, sealed))
        await tunnel.closed_without_a_word()
        assert tunnel.owner.commands.count((Op.READ, command("once"))) == 1


async def test_frames_in_another_order_end_the_connection() -> None:
    async with World() as world:
        tunnel = await agree(world)
        first, second = tunnel.stream.seal(command("1")), tunnel.stream.seal(command("2"))
        tunnel.client.raw(ws(BINARY, second) + ws(BINARY, first))
        await tunnel.closed_without_a_word()
        assert tunnel.owner.commands[-1][0] == Op.AUTH


@pytest.mark.parametrize("skipped", [1, 2, 1_000])
async def test_a_gap_in_the_counter_ends_the_connection(skipped: int) -> None:
    async with World() as world:
        tunnel = await agree(world)
        for _ in range(skipped):
            tunnel.stream.seal(b"\x91\x02")
        tunnel.say(command("behind a gap"))
        await tunnel.closed_without_a_word()


async def test_a_frame_of_another_connection_ends_this_one() -> None:
    async with World() as world:
        one, other = await agree(world), await agree(world)
        one.client.raw(ws(BINARY, other.stream.seal(command("x"))))
        await one.closed_without_a_word()
        other.stream.seal(b"")
        assert not other.link.closed


async def test_a_recorded_connection_cannot_be_played_again() -> None:
    """The server's half of the keys is new, so not even the recorded AUTH opens."""
    async with World() as world:
        client = await world.connect(auth=False)
        answering = Answering(client.owner)
        offer = Offer(STATIC.seal_key(), 1)
        client.send(encode(offer.rekey))
        stream = SealedStream(1, *offer.accept(await client.message()).client(), client=True)
        auth = Tunnel(client, stream, answering).say(AUTH)
        await until(lambda: client.owner.link.authenticated)

        again = await world.connect(auth=False)
        Answering(again.owner)
        again.send(encode(offer.rekey))
        assert isinstance(await again.message(), Keys)
        again.raw(ws(BINARY, auth))
        assert await again.frame() == (CLOSE, struct.pack(">H", 4509))
        assert not again.owner.link.authenticated


async def test_a_frame_of_the_server_does_not_come_back() -> None:
    async with World() as world:
        tunnel = await agree(world)
        tunnel.link.send(command("down"))
        down = await tunnel.client.packet()
        tunnel.client.raw(ws(BINARY, down))
        await tunnel.closed_without_a_word()


async def test_a_seal_inside_a_seal_ends_the_connection() -> None:
    async with World() as world:
        tunnel = await agree(world)
        inner = tunnel.stream.seal(command("inner"))
        tunnel = await agree(world)
        tunnel.say(command("before"), inner, command("behind"))
        await tunnel.closed_without_a_word()
        assert tunnel.owner.commands[-1] == (Op.READ, command("before"))


@pytest.mark.parametrize("authenticated", [True, False])
async def test_a_sealed_frame_without_keys_ends_the_connection(authenticated: bool) -> None:
    async with World() as world:
        client = await world.connect(auth=authenticated)
        client.send(encode(Sealed(1, 1, bytes(40))))
        assert await client.frame() == (CLOSE, struct.pack(">H", 4509))
        assert world.hub.counters()["bad_seals"] == 1


async def test_rekey_is_alone_in_its_packet() -> None:
    async with World() as world:
        client = await world.connect(auth=False)
        Answering(client.owner)
        client.send(encode(Offer(STATIC.seal_key(), 1).rekey), AUTH)
        assert isinstance(await client.message(), Keys)
        assert await client.frame() == (CLOSE, struct.pack(">H", 4509))
        assert [op for op, _ in client.owner.commands] == [Op.REKEY]


async def test_only_auth_and_rekey_are_heard_before_auth() -> None:
    async with World() as world:
        for frame in (PING_FRAME, command("early"), b"\x92\x03\x01"):
            tunnel = await agree(world, auth=False)
            tunnel.say(frame)
            error = await tunnel.message()
            assert isinstance(error, Error)
            assert error.code == "unauthenticated"
            assert (await tunnel.client.closing())[0] == 4501


async def test_what_is_wrong_inside_the_box_is_answered_inside_a_box() -> None:
    """Whoever could seal it is the client: it is told as on any connection."""
    async with World() as world:
        tunnel = await agree(world)
        tunnel.say(b"\xc1")
        error = await tunnel.message()
        assert isinstance(error, Error)
        assert (error.op, error.code) == (0, "bad_frame")
        assert (await tunnel.client.closing())[0] == 4509
        tunnel = await agree(world)
        tunnel.say(b"")
        assert (await tunnel.message()).code == "bad_frame"
        assert (await tunnel.client.closing())[0] == 4509
        assert world.hub.counters()["bad_seals"] == 0


# -------------------------------------------------------------------------------------------- new keys


async def test_new_keys_under_traffic_lose_nothing() -> None:
    """The client sends on under the old key until KEYS is there; the server's answers change at KEYS."""
    async with World() as world:
        tunnel = await agree(world)
        down: list[bytes] = []
        answering = tunnel.answering

        def echo(op: int, frame: bytes) -> None:
            answering.on_command(op, frame)
            if op == Op.READ:
                tunnel.link.send(frame)

        tunnel.owner.on = echo
        sent = 0
        for change in range(2, 12):
            offer = Offer(STATIC.seal_key(), change)
            tunnel.say(command(str(sent)))
            tunnel.say(encode(offer.rekey), command(str(sent + 1)))
            for number in range(sent + 2, sent + 7):
                tunnel.say(command(str(number)))
            sent += 7
            renewed = False
            while len(down) < sent or not renewed:
                for op, start, end in split(packet := await tunnel.packet()):
                    if op == Op.KEYS:
                        assert end == len(packet), "KEYS is the last frame of its packet"
                        keys = decode(op, packet[start:end])
                        assert isinstance(keys, Keys)
                        tunnel.stream.renew(change, *offer.accept(keys).client())
                        renewed = True
                    else:
                        down.append(packet[start:end])
        assert down == [command(str(number)) for number in range(sent)]
        assert (tunnel.stream.key_id, tunnel.link.sealed) == (11, True)


async def test_new_keys_come_at_a_lowered_limit_and_the_old_ones_end() -> None:
    async with World() as world:
        tunnel = await agree(world, frames=8)
        for key_id in range(2, 8):
            while tunnel.stream.left > 3:
                tunnel.say(PING_FRAME)
                await tunnel.packet()
            await renew(tunnel, key_id)
            assert tunnel.stream.left == 8
        tunnel.say(command("still here"))
        await until(lambda: tunnel.owner.commands[-1][1] == command("still here"))


async def test_a_client_that_asks_for_no_new_keys_is_sent_away_by_what_it_sends() -> None:
    async with World() as world:
        tunnel = await agree(world, frames=5)
        for _ in range(4):
            tunnel.say(command("x"))
        await tunnel.closed_without_a_word(4411)


async def test_a_client_that_asks_for_no_new_keys_is_sent_away_by_what_it_is_sent() -> None:
    async with World() as world:
        tunnel = await agree(world, frames=5)
        for number in range(5):
            tunnel.link.send(command(str(number)))
            assert await tunnel.packet() == command(str(number))
        tunnel.owner.quietly(tunnel.link.send, command("one too many"))
        await tunnel.closed_without_a_word(4411)
        assert world.fatal == []


async def test_keys_that_are_too_old_end_the_connection() -> None:
    async with World(keys_ms=60_000) as world:
        tunnel = await agree(world)
        assert world.later(59_000) == 0
        # A look that finds nothing sets the next one, fragment_ms later.
        assert world.later(70_000) == 1
        await tunnel.closed_without_a_word(4411)


async def test_a_second_rekey_before_the_first_was_used_ends_the_connection() -> None:
    async with World() as world:
        tunnel = await agree(world)
        tunnel.say(encode(Offer(STATIC.seal_key(), 2).rekey))
        await until(lambda: tunnel.owner.commands[-1][0] == Op.REKEY)
        tunnel.say(encode(Offer(STATIC.seal_key(), 3).rekey))
        assert await tunnel.packet()
        await tunnel.closed_without_a_word()
        assert tunnel.answering.refused is None


async def test_the_last_frames_under_an_old_key_cannot_be_dropped() -> None:
    async with World() as world:
        tunnel = await agree(world)
        offer = Offer(STATIC.seal_key(), 2)
        tunnel.say(encode(offer.rekey))
        tunnel.stream.seal(command("dropped by somebody on the way"))
        keys = await tunnel.message()
        tunnel.stream.renew(2, *offer.accept(keys).client())
        tunnel.say(command("new"))
        await tunnel.closed_without_a_word()


async def test_an_old_key_is_void_after_the_first_frame_under_the_new() -> None:
    async with World() as world:
        tunnel = await agree(world)
        offer = Offer(STATIC.seal_key(), 2)
        tunnel.say(encode(offer.rekey))
        keys = await tunnel.message()
        late = tunnel.stream.seal(command("late"))
        tunnel.stream.renew(2, *offer.accept(keys).client())
        tunnel.client.raw(ws(BINARY, late))
        tunnel.say(command("new"))
        await until(lambda: tunnel.owner.commands[-1][1] == command("new"))
        tunnel.client.raw(ws(BINARY, late))
        await tunnel.closed_without_a_word()


async def test_set_keys_on_a_link_that_has_ended_does_nothing() -> None:
    async with World() as world:
        tunnel = await agree(world)
        tunnel.link.close(1000)
        keys = SealKeys([STATIC])
        _, agreed = keys.answer(Offer(STATIC.seal_key(), 2).rekey)
        tunnel.link.set_keys(2, *agreed.server())
        await tunnel.client.closing()
        await tunnel.client.close()
        await until(lambda: tunnel.owner.closed)
        assert tunnel.link.sealed


# ------------------------------------------------------------------------------------------- bystanders


async def test_a_storm_of_forged_frames_leaves_others_alone() -> None:
    async with World() as world:
        good = await agree(world)
        rng = random.Random(11)
        for _ in range(150):
            bad = await agree(world, auth=rng.random() < 0.5)
            sealed = bytearray(bad.stream.seal(command("x" * rng.randrange(200))))
            for _ in range(rng.randrange(1, 4)):
                sealed[rng.randrange(len(sealed))] ^= rng.randrange(1, 256)
            bad.client.raw(ws(BINARY, bytes(sealed)))
            good.say(PING_FRAME)
            assert (await good.message()).last_tag == 0
            kind, payload = await bad.client.frame()
            assert (kind, payload) == (CLOSE, struct.pack(">H", 4509))
            bad.client.reset()
        assert world.hub.counters()["pings"] == 150
        assert not good.link.closed
