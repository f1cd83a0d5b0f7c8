"""The connection core over real sockets: what fastim.node.link promises, RFC 6455, bounds, hostile peers."""

from __future__ import annotations

import asyncio
import gc
import random
import struct
import subprocess
import sys
from typing import Any, Final

import msgspec
import pytest

import fastim._core.conn as core
from fastim._core import frame as codec
from fastim._core.acks import AckTable
from fastim._core.conn import CoreConnection, CoreHub
from fastim._core.wheel import Wheel
from fastim.errors import PeerError, UsageError
from fastim.protocol import (
    MAX_ACK_IDS,
    MAX_FRAMES_PER_PACKET,
    MAX_PACKET_BYTES,
    Ack,
    Acks,
    CloseCode,
    Error,
    Level,
    Op,
    Ping,
    Pong,
    Probe,
    Refresh,
    decode,
    encode,
    encode_msg,
)
from tests.unit.conn_world import (
    AUTH,
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    Client,
    World,
    encode_error,
    until,
    ws,
    ws_close,
)

PACKETS_OF_FUZZ: Final = 20_000


def command(text: str) -> bytes:
    """A frame that nobody in the core knows."""
    return encode(Refresh(text))


# ------------------------------------------------------------------------------- what is answered in C


def test_the_core_and_the_protocol_mean_the_same_ops_and_limits() -> None:
    assert (codec.OP_ACKS, codec.OP_PONG) == (Op.ACKS, Op.PONG)
    assert (codec.MAX_ACK_IDS, codec.MAX_FRAMES) == (MAX_ACK_IDS, MAX_FRAMES_PER_PACKET)
    assert codec.MAX_PACKET_BYTES == MAX_PACKET_BYTES


def test_a_pong_built_in_c_is_byte_for_byte_the_protocols() -> None:
    edges = [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000, 0xFFFFFFFF]
    for server_ms in [*edges, 1 << 32, 1_790_000_000_000, (1 << 53) - 1]:
        for tag in edges:
            for cursor in [*edges, 1 << 32, (1 << 53) - 1]:
                assert codec.pong(server_ms, tag, cursor) == encode(Pong(server_ms, tag, cursor))


def acks_of(reader: Any, data: bytes) -> object:
    try:
        return reader(data)
    except PeerError as error:
        return error.code


@pytest.mark.parametrize(
    "data",
    [
        encode(Acks([])),
        encode(Acks([1, 2, 3])),
        encode(Acks([0, 127, 128, 255, 256, 65_535, 65_536, 1 << 32, (1 << 53) - 1])),
        encode(Acks(list(range(256)))),
        b"\xdc\x01\x01",
        b"\x92\x04\xdc\x01\x01" + b"\x01" * 257,
        b"\x92\x04\xdd\x00\x00\x00\x01\x05",
        b"\x92\xcc\x04\x91\x05",
        b"\x93\x04\x91\x05\xc0",
        b"\x91\x04",
        b"\x92\x04\x05",
        b"\x92\x04\xc0",
        b"\x92\x04\xa1x",
        b"\x92\x04\x91\xff",
        b"\x92\x04\x91\xd3" + (1 << 40).to_bytes(8, "big"),
        b"\x92\x04\x91\xcf" + (1 << 53).to_bytes(8, "big"),
        b"\x92\x04\x91\xcf" + b"\xff" * 8,
        b"\x92\x04\x91\xc3",
        b"\x92\x04\x91\x91\x01",
        b"\x92\x04\x92\x01",
        b"\x92\x04",
        b"\x92\x03\x91\x01",
        b"",
    ],
)
def test_acks_read_in_c_are_what_the_protocol_decodes(data: bytes) -> None:
    def expected(data: bytes) -> list[int]:
        found = decode(Op.ACKS, data)
        assert isinstance(found, Acks)
        return found.msg_ids

    assert acks_of(codec.parse_acks, data) == acks_of(expected, data)


async def test_ping_is_answered_in_c_with_time_last_tag_and_user_cursor() -> None:
    async with World() as world:
        client = await world.connect()
        client.send(encode(Ping()))
        first = await client.message()
        assert (first.last_tag, first.user_cursor, first.heads) == (0, 0, [])
        link = client.owner.link
        slot = world.acks.open()
        link.bind(slot)
        link.set_pong(77)
        world.acks.insert(slot, 9, 0, "item", 10, 1_000)
        client.send(encode(Ping()))
        second = await client.message()
        assert (second.last_tag, second.user_cursor) == (9, 77)
        assert second.server_ms >= first.server_ms > 1_700_000_000_000
        assert [op for op, _ in client.owner.commands] == [Op.AUTH]
        assert world.hub.counters()["pings"] == 2


async def test_acks_of_a_bound_link_resolve_without_python_and_are_drained_once_a_tick() -> None:
    async with World() as world:
        client = await world.connect()
        slot = world.acks.open()
        client.owner.link.bind(slot)
        for tag in range(1, 9):
            world.acks.insert(slot, tag, tag * 10, f"item {tag}", 1, 1_000)
        client.send(encode(Ack(2)), encode(Acks([50, 40, 50, 999])), encode(Ack(3)))
        await until(lambda: world.acked)
        assert world.acked == [[(slot, f"item {tag}") for tag in (1, 2, 5, 4, 3)]]
        assert [op for op, _ in client.owner.commands] == [Op.AUTH]
        client.send(encode(Ack(3)))
        client.send(encode(Ping()))
        await client.packet()
        assert len(world.acked) == 1, "an old tag resolves nothing, so nobody is called"
        assert world.hub.counters()["ack_frames"] == 4
        world.acks.close(slot)


async def test_acks_of_an_unbound_link_are_commands() -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        slot = world.acks.open()
        link.bind(slot)
        link.bind(-1)
        client.send(encode(Ack(1)), encode(Acks([1])))
        await until(lambda: len(client.owner.commands) == 3)
        assert client.owner.commands[1:] == [(Op.ACK, encode(Ack(1))), (Op.ACKS, encode(Acks([1])))]


async def test_only_an_open_ack_slot_can_be_bound() -> None:
    async with World() as world:
        client = await world.connect()
        for slot in (0, 5, -2, 2**31 - 1):
            with pytest.raises(UsageError, match="not open"):
                client.owner.link.bind(slot)


async def test_an_ack_of_what_was_never_sent_is_answered_and_closes() -> None:
    async with World() as world:
        client = await world.connect()
        client.owner.link.bind(world.acks.open())
        client.send(encode(Ack(7)), command("never read"))
        error = await client.message()
        assert (error.op, error.code, error.detail) == (Op.ACK, "bad_ack", "tag 7 was never sent; last 0")
        assert await client.closing() == (CloseCode.BAD_FRAME, b"bad_ack")
        assert len(client.owner.commands) == 1


async def test_a_malformed_ack_closes_and_resolves_nothing() -> None:
    async with World() as world:
        client = await world.connect()
        slot = world.acks.open()
        client.owner.link.bind(slot)
        world.acks.insert(slot, 1, 10, "item", 1, 1_000)
        client.send(b"\x92\x04\x92\x0a\xff")
        assert (await client.message()).code == "bad_frame"
        assert (await client.closing())[0] == CloseCode.BAD_FRAME
        assert world.acks.unacked(slot) == (1, 1)


# ----------------------------------------------------------------------------- L1, L2, L5: frames and order


async def test_frames_of_one_tick_leave_as_one_packet_in_order() -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        link.send(encode(Probe()))
        link.send_msg(7, True, b"\x01" * 5)
        link.send(encode(Level(8, 9)))
        assert await client.packet() == (
            encode(Probe()) + encode_msg(7, True, b"\x01" * 5) + encode(Level(8, 9))
        )
        assert {name: world.hub.counters()[name] for name in ("packets_out", "frames_out")} == {
            "packets_out": 1,
            "frames_out": 3,
        }


async def test_answers_to_one_read_leave_in_one_packet() -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        client.owner.on = lambda _op, frame: link.send(frame)
        client.raw(ws(BINARY, command("a") + command("b")) + ws(BINARY, command("c") + encode(Ping())))
        packet = await client.packet()
        assert packet.startswith(command("a") + command("b") + command("c"))
        assert world.hub.counters()["packets_out"] == 1


@pytest.mark.parametrize("seed", range(12))
async def test_packets_keep_their_bounds_whatever_the_sizes_of_the_frames(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {
        0: [2] * 200,
        1: [MAX_PACKET_BYTES, 2, MAX_PACKET_BYTES, MAX_PACKET_BYTES],
        2: [125], 3: [126], 4: [65_535], 5: [MAX_PACKET_BYTES],
        6: [2] * 64 + [123],
        7: [65_535, 1_000, 64_537],
    }.get(seed) or rng.choices([2, 3, 60, 125, 126, 127, 500, 5_000, 20_000], k=300)  # fmt: skip
    async with World(hard_bytes=1 << 24) as world:
        client = await world.connect()
        frames = [rng.randbytes(size) for size in sizes]
        for frame in frames:
            client.owner.link.send(frame)
        waiting, packets = b"".join(frames), 0
        sent = list(sizes)
        while sent:
            packet = await client.packet()
            assert 0 < len(packet) <= MAX_PACKET_BYTES
            assert waiting.startswith(packet)
            waiting = waiting[len(packet) :]
            packets += 1
            size = 0
            for _ in range(MAX_FRAMES_PER_PACKET):
                if size == len(packet):
                    break
                size += sent.pop(0)
            assert size == len(packet), "whole frames, at most 64"
        assert waiting == b""
        counters = world.hub.counters()
        assert (counters["packets_out"], counters["frames_out"]) == (packets, len(sizes))
        assert counters["bytes_out"] == sum(sizes)


async def test_a_frame_that_is_none_is_the_callers_mistake() -> None:
    async with World() as world:
        link = (await world.connect()).owner.link
        for bad in (b"", b"\x91", bytes(MAX_PACKET_BYTES + 1)):
            with pytest.raises(UsageError, match="limits 2 and 65,536"):
                link.send(bad)
        with pytest.raises(OverflowError):
            link.send_msg(1 << 32, False, b"tail")
        with pytest.raises(TypeError):
            link.send(None)  # type: ignore[arg-type]
        assert link.buffered_bytes() == 0


async def test_every_other_frame_is_one_command_in_order() -> None:
    async with World() as world:
        client = await world.connect()
        client.send(command("1"), b"\x91\x7f", command("2"))
        client.send(command("3"))
        await until(lambda: len(client.owner.commands) == 5)
        assert client.owner.commands[1:] == [
            (Op.REFRESH, command("1")),
            (127, b"\x91\x7f"),
            (Op.REFRESH, command("2")),
            (Op.REFRESH, command("3")),
        ]
        assert world.hub.counters()["frames_in"] == 5


@pytest.mark.parametrize("early", [encode(Ping()), encode(Ack(1)), encode(Acks([1])), command("x")])
async def test_nothing_but_auth_is_let_through_before_authentication(early: bytes) -> None:
    async with World() as world:
        client = await world.connect(auth=False)
        client.send(early, AUTH)
        error = await client.message()
        assert (error.op, error.code) == (early[1], "unauthenticated")
        assert (await client.closing())[0] == CloseCode.AUTH
        assert client.owner.commands == []


async def test_frames_behind_auth_wait_for_nobody() -> None:
    async with World() as world:
        client = await world.connect(auth=False)
        client.send(AUTH, command("1"), encode(Ping()))
        await client.packet()
        assert [op for op, _ in client.owner.commands] == [Op.AUTH, Op.REFRESH]


async def test_a_packet_that_is_no_frames_is_answered_and_closes() -> None:
    async with World() as world:
        client = await world.connect()
        client.send(command("1"), b"\xc1")
        error = await client.message()
        assert (error.op, error.code) == (0, "bad_frame")
        assert await client.closing() == (CloseCode.BAD_FRAME, b"bad_frame")
        assert len(client.owner.commands) == 1, "the packet is refused as a whole"


async def test_an_empty_packet_is_refused() -> None:
    async with World() as world:
        client = await world.connect()
        client.send()
        assert (await client.message()).code == "bad_frame"
        assert (await client.closing())[0] == CloseCode.BAD_FRAME


@pytest.mark.parametrize(
    ("code", "closes"),
    [
        ("unsupported", None),
        ("rate_limited", None),
        ("unauthenticated", None),
        ("bad_frame", 4509),
        ("bad_ack", 4509),
    ],
)
async def test_a_refused_command_is_answered_and_closes_only_for_broken_frames(
    code: str, closes: int | None
) -> None:
    async with World() as world:
        client = await world.connect()

        def refuse(op: int, _frame: bytes) -> None:
            if len(client.owner.commands) == 2:
                raise PeerError(code, "why", retryable=True, retry_after_ms=5)

        client.owner.on = refuse
        client.send(command("1"), command("2"))
        error = decode(Op.ERROR, await client.packet())
        assert error == Error(Op.REFRESH, code, "why", True, 5)
        if closes is None:
            await until(lambda: len(client.owner.commands) == 3)
            assert not client.owner.link.closed
        else:
            assert (await client.closing())[0] == closes
            assert len(client.owner.commands) == 2


async def test_unauthenticated_raised_by_the_owner_closes_while_it_is_so() -> None:
    async with World() as world:
        client = await world.connect(auth=False)

        def refuse(op: int, _frame: bytes) -> None:
            client.owner.link.authenticated = False
            raise PeerError("unauthenticated", "no")

        client.owner.on = refuse
        client.send(AUTH)
        assert (await client.message()).code == "unauthenticated"
        assert await client.closing() == (CloseCode.AUTH, b"unauthenticated")


# ------------------------------------------------------------------------------------------- L3, L4: the end


async def test_the_peers_close_frame_ends_the_link_with_its_code() -> None:
    async with World() as world:
        for code, told in ((1000, 1000), (1001, 1001), (4321, 4321), (None, 1005)):
            client = await world.connect()
            client.raw(ws_close(code, b"bye" if code else b""))
            assert await client.frame() == (CLOSE, struct.pack(">H", code) if code else b"")
            await client.eof()
            await until(lambda client=client: client.owner.closed)  # type: ignore[misc]
            assert client.owner.closed == [(told, True)]
            assert client.owner.link.close_code == told


async def test_an_end_of_tcp_is_orderly_and_a_reset_is_not() -> None:
    async with World() as world:
        ended = await world.connect()
        ended.writer.write_eof()
        await until(lambda: ended.owner.closed)
        assert ended.owner.closed == [(1006, True)]
        reset = await world.connect()
        reset.reset()
        await until(lambda: reset.owner.closed)
        assert reset.owner.closed == [(1006, False)]


async def test_our_close_writes_what_is_queued_first_and_keeps_our_code() -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        link.send(encode(Probe()))
        client.owner.quietly(link.close, 4410, "draining")
        assert (link.closed, link.close_code, client.owner.closed) == (True, 4410, [])
        assert await client.packet() == encode(Probe())
        assert await client.closing() == (4410, b"draining")
        client.raw(ws_close(1000))
        await client.eof()
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(4410, True)]
        assert link.slot == -1


async def test_a_peer_that_answers_our_close_with_an_end_of_tcp_is_orderly() -> None:
    async with World() as world:
        client = await world.connect()
        client.owner.link.close(1012)
        await client.closing()
        client.writer.write_eof()
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(1012, True)]


async def test_a_peer_that_never_answers_our_close_is_aborted_by_the_sweep() -> None:
    async with World(close_ms=1_000) as world:
        client = await world.connect()
        client.owner.link.close(4000)
        assert world.later(900) == 0
        assert world.later(1_100) == 1
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(4000, False)]
        await client.eof()


async def test_abort_drops_what_is_queued_and_says_1006() -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        link.send(encode(Probe()))
        client.owner.quietly(link.abort)
        assert (link.closed, link.slot, link.close_code, link.buffered_bytes()) == (True, -1, 1006, 0)
        assert client.owner.closed == [], "told at the end of the tick"
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(1006, False)]
        await client.eof()


async def test_a_slow_peer_is_given_a_quarter_of_the_time_to_answer_our_close() -> None:
    async with World() as world:
        client = await world.connect()
        client.owner.link.close(4408, "slow")
        assert world.later(200) == 0
        assert world.later(300) == 1
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(4408, False)]


async def test_abort_after_close_keeps_the_code_of_the_close() -> None:
    async with World() as world:
        client = await world.connect()
        client.owner.quietly(client.owner.link.close, 4008)
        client.owner.quietly(client.owner.link.abort)
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(4008, False)]


@pytest.mark.parametrize("how", ["close", "abort", "peer", "eof"])
async def test_after_the_end_every_method_is_a_no_op(how: str) -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        if how == "close":
            link.close(1000)
        elif how == "abort":
            link.abort()
        elif how == "peer":
            client.raw(ws_close(1000))
        else:
            client.writer.write_eof()
        await until(lambda: link.closed)
        before = world.hub.counters()
        for _ in range(2):
            link.send(encode(Probe()))
            link.send_msg(1, False, b"\xc0")
            link.bind(99)
            link.set_pong(1)
            link.close(4000, "again")
            link.abort()
            link.close(1)
            assert (link.overflow, link.buffered_bytes()) == (False, 0)
            await until(lambda: client.owner.closed)
        assert len(client.owner.closed) == 1
        assert world.hub.counters() == before
        assert link.peer.startswith("127.0.0.1:")


async def test_nothing_is_received_after_our_close() -> None:
    async with World() as world:
        client = await world.connect()
        seen = client.owner.link.last_recv_ms()
        client.owner.link.close(4000)
        client.send(command("late"))
        client.raw(ws(TEXT, b"late") + ws(PING, b"late") + ws_close(1000))
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(4000, True)]
        assert len(client.owner.commands) == 1
        assert client.owner.link.last_recv_ms() == seen
        assert await client.frame() == (CLOSE, struct.pack(">H", 4000))
        await client.eof()


@pytest.mark.parametrize("act", ["abort", "close"])
async def test_a_link_that_ends_inside_a_command_gets_no_further_frames(act: str) -> None:
    async with World() as world:
        client = await world.connect()
        owner = client.owner

        def end(_op: int, _frame: bytes) -> None:
            if act == "abort":
                owner.quietly(owner.link.abort)
            else:
                owner.quietly(owner.link.close, 4503)
            raise PeerError("bad_frame", "of a link that is gone")

        owner.on = end
        whole = command("1") + command("2")
        client.raw(ws(BINARY, whole[:3], fin=False) + ws(CONT, whole[3:]) + ws(BINARY, command("3")))
        await client.eof() if act == "abort" else await client.closing()
        await until(lambda: owner.link.closed)
        assert len(owner.commands) == 2


async def test_a_reason_is_cut_between_characters_and_a_code_is_checked() -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, -1):
            with pytest.raises(UsageError, match="close code"):
                link.close(code)
        assert not link.closed
        link.close(4000, "é" * 100)
        assert await client.closing() == (4000, "é".encode() * 61)


async def test_the_owner_is_told_after_the_acks_of_the_same_tick() -> None:
    async with World() as world:
        client = await world.connect()
        slot = world.acks.open()
        client.owner.link.bind(slot)
        world.acks.insert(slot, 1, 0, "item", 1, 1_000)
        seen: list[int] = []
        client.owner.end = lambda: seen.append(len(world.acked))
        client.raw(ws(BINARY, encode(Ack(1))) + ws_close(1000))
        await until(lambda: client.owner.closed)
        assert seen == [1]


async def test_a_link_is_found_by_its_slot_until_it_has_ended() -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        slot = link.slot
        assert world.hub.link_at(slot) is link
        assert [world.hub.link_at(other) for other in (-1, slot + 1, 1 << 40)] == [None] * 3
        assert world.wheel.count == 1
        link.abort()
        assert world.hub.link_at(slot) is None
        assert world.wheel.count == 0
        assert (await world.connect()).owner.link.slot == slot


# ----------------------------------------------------------------------------------------- bugs of our own


async def test_a_bug_in_a_command_is_reported_and_ends_its_link_only() -> None:
    async with World() as world:
        bystander = await world.connect()
        for bug in (ZeroDivisionError("bug"), KeyboardInterrupt(), asyncio.CancelledError()):
            client = await world.connect()

            def fail(op: int, frame: bytes, bug: BaseException = bug) -> None:
                raise bug

            client.owner.on = fail
            client.send(command("1"), command("2"))
            assert await client.closing() == (CloseCode.INTERNAL, b"")
            assert world.take_fatal() is bug
            assert len(client.owner.commands) == 2
        bystander.send(encode(Ping()))
        assert isinstance(await bystander.message(), Pong)


async def test_bugs_of_accept_on_closed_on_acked_and_encode_error_are_reported() -> None:
    async with World() as world:
        client = await world.connect()
        owner = client.owner
        slot = world.acks.open()
        owner.link.bind(slot)
        world.acks.insert(slot, 1, 0, "item", 1, 1_000)

        def fail(*_args: object) -> Any:
            raise LookupError("bug")

        world.hub.on_acked, kept = fail, world.hub.on_acked
        client.send(encode(Ack(1)), encode(Ping()))
        await client.packet()
        assert isinstance(world.take_fatal(), LookupError)
        world.hub.on_acked = kept
        owner.end = fail
        client.raw(ws_close(1000))
        await until(lambda: owner.closed)
        assert isinstance(world.take_fatal(), LookupError)
        world.hub.accept = fail
        refused = await world.dial()
        assert (await refused.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        assert await refused.closing() == (CloseCode.INTERNAL, b"")
        assert isinstance(world.take_fatal(), LookupError)
        world.hub.accept = world.accept


async def test_a_bound_slot_that_was_closed_is_a_bug_of_ours_and_harms_nobody_else() -> None:
    async with World() as world:
        client = await world.connect()
        slot = world.acks.open()
        client.owner.link.bind(slot)
        world.acks.close(slot)
        client.send(encode(Ping()), encode(Ack(1)))
        assert (await client.message()).last_tag == 0
        assert (await client.closing())[0] == CloseCode.INTERNAL
        assert isinstance(world.take_fatal(), UsageError)


async def test_a_failing_on_fatal_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    async with World() as world:
        client = await world.connect()

        def fail(*_args: object) -> None:
            raise LookupError("bug")

        client.owner.on = fail
        world.hub.on_fatal = fail
        client.send(command("1"))
        assert (await client.closing())[0] == CloseCode.INTERNAL
    assert [type(each.exc_value) for each in seen] == [LookupError]


async def test_a_hub_refuses_bounds_that_make_no_sense() -> None:
    loop = asyncio.get_running_loop()
    for bounds in ({"soft_bytes": 1}, {"soft_bytes": 1 << 20}, {"hard_bytes": 1 << 40}):
        with pytest.raises(UsageError, match="soft_bytes"):
            CoreHub(loop, AckTable(), Wheel(), encode_error=encode_error, **bounds)


# ---------------------------------------------------------------------------------------------- RFC 6455


@pytest.mark.parametrize("rsv", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", [BINARY, PING, PONG])
async def test_reserved_bits_are_refused(kind: int, rsv: int) -> None:
    async with World() as world:
        client = await world.connect()
        client.raw(ws(kind, command("x"), rsv=rsv))
        assert (await client.closing())[0] == CloseCode.PROTOCOL
        assert len(client.owner.commands) == 1


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (ws(TEXT, b"hello"), 1003),
        (ws(TEXT, b"hel", fin=False), 1003),
        (ws(3, b"x"), 1002),
        (ws(7, b"x"), 1002),
        (ws(11, b"x"), 1002),
        (ws(15, b"x"), 1002),
        (ws(BINARY, b"x", mask=None), 1002),
        (ws(PING, b"x" * 126), 1002),
        (ws(PONG, b"x" * 126), 1002),
        (ws(PING, b"x", fin=False), 1002),
        (ws(CLOSE, b"\x03\xe8", fin=False), 1002),
        (ws(CLOSE, b"\x03\xe8" + b"x" * 124), 1002),
        (ws(BINARY, command("x"), length_form=16), 1002),
        (ws(BINARY, command("x"), length_form=64), 1002),
        (ws(BINARY, b"", size=1 << 63), 1002),
        (ws(BINARY, b"", size=MAX_PACKET_BYTES + 1), 1009),
        (ws(BINARY, b"", size=1 << 40), 1009),
        (ws(CONT, command("x")), 1002),
        (ws(CONT, b"", fin=False), 1002),
        (ws(BINARY, b"x", fin=False) + ws(BINARY, b"x"), 1002),
        (ws(BINARY, b"x", fin=False) + ws(TEXT, b"x"), 1003),
        (ws(BINARY, bytes(40_000), fin=False) + ws(CONT, bytes(25_537), fin=False), 1009),
        (ws(BINARY, b"", fin=False) + ws(CONT, b"", fin=False) * 64, 1009),
    ],
)
async def test_what_rfc_6455_forbids_is_refused_with_its_code(bad: bytes, code: int) -> None:
    async with World() as world:
        client = await world.connect()
        client.owner.link.send(encode(Probe()))
        client.raw(bad)
        assert await client.packet() == encode(Probe()), "what was queued goes out first"
        assert (await client.closing())[0] == code
        assert client.owner.link.closed
        assert client.owner.link.close_code == code
        client.raw(ws_close(1000))
        await client.close()
        await until(lambda: client.owner.closed)
        assert client.owner.closed[0][0] == code
        assert len(client.owner.commands) == 1


async def test_the_reason_of_a_refusal_shows_the_value_and_the_limit() -> None:
    async with World() as world:
        for bad, said in (
            (ws(BINARY, b"", size=65_537), b"65537 > 65536"),
            (ws(3, b"x"), b"opcode=0x3"),
            (ws(BINARY, bytes(40_000), fin=False) + ws(CONT, bytes(30_000)), b"above 65,536 bytes"),
        ):
            client = await world.connect()
            client.raw(bad)
            assert said in (await client.closing())[1]


@pytest.mark.parametrize(
    "tail",
    [
        ws_close(1000) + ws(3, b"x"),
        ws_close(1000) + ws(PING) + ws(3, b"x"),
        ws_close(1000) + ws_close(1000),
        ws(3, b"x") + ws(3, b"x") * 1_000,
        ws(TEXT, b"x") + ws(3, b"x"),
        ws(BINARY, b"\xc1") + ws(3, b"x"),
    ],
)
async def test_garbage_behind_an_end_changes_nothing(tail: bytes) -> None:
    async with World() as world:
        client = await world.connect()
        client.raw(tail)
        await client.closing()
        await client.eof()
        await until(lambda: client.owner.closed)


async def test_after_garbage_nothing_more_is_read() -> None:
    async with World() as world:
        client = await world.connect()
        client.raw(ws(3, b"x"))
        assert (await client.closing())[0] == CloseCode.PROTOCOL
        for _ in range(50):
            client.raw(bytes(65_536))
        await client.eof()
        await until(lambda: client.owner.closed)
        assert client.owner.closed[0][0] == CloseCode.PROTOCOL


async def test_a_peer_that_sends_garbage_and_reads_nothing_is_ended_by_the_sweep() -> None:
    async with World() as world:
        client = await world.connect(receive_bytes=4_096)
        client.writer.transport.pause_reading()
        fill(client.owner.link, bytes(8_192), 65_536)
        client.raw(ws(3, b"x"))
        await until(lambda: client.owner.link.closed)
        await asyncio.sleep(0.05)
        assert client.owner.closed == []
        assert world.later(1_100) == 1
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(CloseCode.PROTOCOL, False)]


@pytest.mark.parametrize(
    "code", [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 9999, 65_535]
)
async def test_a_close_code_that_is_not_assigned_is_refused(code: int) -> None:
    async with World() as world:
        client = await world.connect()
        client.raw(ws_close(code))
        assert (await client.closing())[0] == CloseCode.PROTOCOL
        # Nothing more is to come from it, so nothing is waited for.
        await client.eof()
        await until(lambda: client.owner.closed)
        assert client.owner.closed[0][0] == CloseCode.PROTOCOL


@pytest.mark.parametrize("behind", [ws_close(None), ws_close(1001), ws(BINARY, b"late", rsv=7), ws(7)])
async def test_what_comes_behind_the_peers_close_frame_changes_nothing(behind: bytes) -> None:
    async with World() as world:
        client = await world.connect()
        client.raw(ws_close(1000, b"bye") + behind)
        assert await client.closing() == (1000, b"")
        await client.eof()
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(1000, True)]


@pytest.mark.parametrize("code", [1000, 1003, 1007, 1011, 1012, 1014, 3000, 3999, 4000, 4999])
async def test_a_close_code_that_is_assigned_is_echoed(code: int) -> None:
    async with World() as world:
        client = await world.connect()
        client.raw(ws_close(code, b"r" * 123))
        assert await client.closing() == (code, b"")
        await client.eof()


@pytest.mark.parametrize(("payload", "code"), [(b"\x03", 1002), (b"\x03\xe8\xc3\x28", 1007)])
async def test_a_close_frame_with_half_a_code_or_a_reason_that_is_not_utf8_is_refused(
    payload: bytes, code: int
) -> None:
    async with World() as world:
        client = await world.connect()
        client.raw(ws(CLOSE, payload))
        assert (await client.closing())[0] == code
        await client.eof()


async def test_fragments_are_joined_with_control_frames_between_them() -> None:
    async with World() as world:
        client = await world.connect()
        whole = command("x" * 5_000) + command("y")
        pieces = [whole[i : i + 250] for i in range(0, len(whole), 250)]
        client.raw(ws(BINARY, b"", fin=False))
        for piece in pieces:
            client.raw(ws(CONT, piece, fin=False))
            client.raw(ws(PING, b"between") + ws(PONG, b"unasked"))
        client.raw(ws(CONT, b""))
        await until(lambda: len(client.owner.commands) == 3)
        assert client.owner.commands[1:] == [
            (Op.REFRESH, command("x" * 5_000)), (Op.REFRESH, command("y")),
        ]  # fmt: skip
        for _ in pieces:
            assert await client.frame() == (PONG, b"between")


async def test_a_message_of_64_fragments_and_64_kib_is_taken() -> None:
    async with World() as world:
        client = await world.connect()
        whole = command("x" * 60_000)
        whole += b"\x92\x09\xda" + struct.pack(">H", MAX_PACKET_BYTES - len(whole) - 5)
        whole += b"y" * (MAX_PACKET_BYTES - len(whole))
        assert len(whole) == MAX_PACKET_BYTES
        client.raw(ws(BINARY, b"", fin=False) + ws(CONT, b"", fin=False) * 62 + ws(CONT, whole))
        await until(lambda: len(client.owner.commands) == 3)
        client.send(whole)
        await until(lambda: len(client.owner.commands) == 5)
        assert not client.owner.link.closed


async def test_a_websocket_ping_is_answered_with_its_payload_and_counts_as_a_sign_of_life() -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        await until(lambda: world.hub.now_ms() > link.last_recv_ms() + 1)
        before = link.last_recv_ms()
        for payload in (b"", b"p" * 125):
            client.raw(ws(PING, payload))
            assert await client.frame() == (PONG, payload)
        assert link.last_recv_ms() > before
        client.raw(ws(PONG, b"unasked"))
        client.send(encode(Ping()))
        assert isinstance(await client.message(), Pong)


async def test_pings_of_a_flood_are_answered_in_order_and_the_newest_always() -> None:
    async with World() as world:
        client = await world.connect()
        client.raw(b"".join(ws(PING, b"%05d" % i) for i in range(2_000)))
        answered = []
        while not answered or answered[-1] != 1_999:
            kind, payload = await client.frame()
            assert kind == PONG
            answered.append(int(payload))
        assert answered == sorted(set(answered))
        assert len(answered) < 2_000


async def test_touch_keeps_a_link_out_of_the_wheels_sweep() -> None:
    async with World() as world:
        client = await world.connect()
        link = client.owner.link
        await until(lambda: world.hub.now_ms() > link.last_recv_ms() + 20)
        client.raw(ws(BINARY, b"", fin=False))
        before = link.last_recv_ms()
        await until(lambda: link.last_recv_ms() > before)
        assert world.wheel.sweep(link.last_recv_ms() + 10, 15, 10) == []
        assert world.wheel.sweep(link.last_recv_ms() + 15, 15, 10) == [link.slot]


# ------------------------------------------------------------------------------------- bounds and deadlines


async def test_no_auth_in_time_closes_and_auth_takes_the_deadline_away() -> None:
    async with World(auth_ms=5_000) as world:
        late = await world.connect(auth=False)
        good = await world.connect()
        assert world.later(4_000) == 0
        assert world.later(5_100) == 1
        assert await late.closing() == (CloseCode.AUTH, b"no AUTH in time")
        assert not good.owner.link.closed
        late.raw(ws_close(1000))
        await until(lambda: late.owner.closed)
        assert late.owner.closed == [(CloseCode.AUTH, True)]


async def test_a_message_that_is_not_finished_in_time_closes() -> None:
    async with World(fragment_ms=10_000) as world:
        client = await world.connect()
        client.raw(ws(BINARY, b"x", fin=False) + ws(CONT, b"x", fin=False) + ws(PING))
        await client.frame()
        assert world.later(9_000) == 0
        assert world.later(10_100) == 1
        assert (await client.closing())[0] == CloseCode.SLOW


@pytest.mark.parametrize("size", [1, 5, 3_000, 4_999])
async def test_a_websocket_frame_that_is_not_finished_in_time_closes(size: int) -> None:
    async with World(fragment_ms=10_000) as world:
        stuck, good = await world.connect(), await world.connect()
        stuck.raw(ws(BINARY, bytes(5_000))[:size])
        await asyncio.sleep(0.02)
        assert world.later(10_100) == 0, "it may have begun just now"
        assert world.later(20_300) == 1
        assert await stuck.closing() == (CloseCode.SLOW, b"a frame was not finished in time")
        assert not good.owner.link.closed


async def test_a_silent_peer_and_one_that_goes_on_are_no_concern_of_that_deadline() -> None:
    async with World(fragment_ms=10_000) as world:
        client = await world.connect()
        client.send(command("x" * 60_000))
        await until(lambda: len(client.owner.commands) == 2)
        for ms in (10_100, 20_300, 30_500):
            assert world.later(ms) == 0
        half = ws(BINARY, command("half"))
        client.raw(half[:5])
        await asyncio.sleep(0.02)
        assert world.later(40_700) == 0
        client.raw(half[5:])
        await until(lambda: len(client.owner.commands) == 3)
        assert world.later(51_000) == 0


def fill(link: CoreConnection, frame: bytes, upto: int) -> int:
    """Send until more than `upto` wait; how many frames that were."""
    sent = 0
    while link.buffered_bytes() <= upto and not link.closed:
        link.send(frame)
        sent += 1
        assert sent < 10_000
    return sent


async def test_a_peer_that_does_not_read_overflows_and_gets_everything_once_it_reads() -> None:
    async with World(soft_bytes=262_144, hard_bytes=524_288) as world:
        client = await world.connect(receive_bytes=4_096)
        client.writer.transport.pause_reading()
        link = client.owner.link
        frame = bytes(8_192)
        sent = fill(link, frame, 200_000)
        assert not link.overflow
        sent += fill(link, frame, 262_144)
        assert link.overflow
        client.raw(ws(PING, b"alive"))
        await until(lambda: world.hub.counters()["packets_in"] >= 1)
        before = link.last_recv_ms()
        await until(lambda: link.last_recv_ms() >= before)
        client.writer.transport.resume_reading()
        got, pongs = 0, 0
        while got < sent * len(frame) or pongs == 0:
            kind, payload = await client.frame()
            if kind == PONG:
                pongs += 1
            else:
                assert kind == BINARY
                got += len(payload)
        assert got == sent * len(frame)
        assert not link.overflow
        assert link.buffered_bytes() == 0
        link.send(encode(Probe()))
        assert await client.packet() == encode(Probe())


async def test_beyond_the_hard_bound_the_link_is_aborted() -> None:
    async with World(soft_bytes=262_144, hard_bytes=524_288) as world:
        good = await world.connect()
        client = await world.connect(receive_bytes=4_096)
        client.writer.transport.pause_reading()
        link = client.owner.link
        most = 0
        while not link.closed:
            most = max(most, link.buffered_bytes())
            client.owner.quietly(link.send, bytes(8_192))
        assert 524_288 - 8_192 <= most <= 524_288
        assert world.hub.counters()["overflows"] == 1
        await until(lambda: client.owner.closed)
        assert client.owner.closed == [(1006, False)]
        good.send(encode(Ping()))
        assert isinstance(await good.message(), Pong)


async def test_much_in_one_tick_is_no_overflow_for_a_peer_that_reads() -> None:
    async with World(soft_bytes=262_144, hard_bytes=524_288) as world:
        client = await world.connect()
        link = client.owner.link
        for i in range(40):
            link.send(i.to_bytes(2, "big") + bytes(9_998))
            if i % 4 == 3:
                await asyncio.sleep(0.005)
        got = b""
        while len(got) < 400_000:
            got += await client.packet()
        assert [got[i * 10_000 + 1] for i in range(40)] == list(range(40))
        assert not link.closed


async def test_close_reaches_a_slow_reader_behind_what_was_queued() -> None:
    async with World(hard_bytes=1 << 20) as world:
        client = await world.connect(receive_bytes=4_096)
        client.writer.transport.pause_reading()
        link = client.owner.link
        sent = fill(link, bytes(8_192), 262_144)
        link.close(4408, "slow")
        client.writer.transport.resume_reading()
        got = 0
        while True:
            kind, payload = await client.frame()
            if kind == CLOSE:
                break
            got += len(payload)
        assert (got, payload) == (sent * 8_192, struct.pack(">H", 4408) + b"slow")


async def test_a_ping_flood_without_reading_is_bounded() -> None:
    async with World() as world:
        client = await world.connect(receive_bytes=4_096)
        client.writer.transport.pause_reading()
        link = client.owner.link
        fill(link, bytes(8_192), 65_536)
        held = link.buffered_bytes()
        for _ in range(20):
            client.raw(ws(PING, b"p" * 125) * 1_000)
            seen = link.last_recv_ms()
            await until(lambda seen=seen: link.last_recv_ms() > seen)  # type: ignore[misc]
        assert link.buffered_bytes() <= held + 33 * 127


async def test_counters_count_frames_packets_and_payload_bytes() -> None:
    async with World() as world:
        client = await world.connect()
        client.send(encode(Ping()), command("1"))
        packet = await client.packet()
        assert world.hub.counters() == {
            "frames_in": 3, "frames_out": 1, "packets_in": 2, "packets_out": 1,
            "bytes_in": len(AUTH) + len(encode(Ping())) + len(command("1")), "bytes_out": len(packet),
            "pings": 1, "ack_frames": 0, "overflows": 0, "bad_seals": 0,
        }  # fmt: skip


async def test_an_ended_link_keeps_nothing_alive() -> None:
    async with World() as world:
        await world.connect()
        gc.collect()
        gc.disable()
        try:
            owner = world.owners[0]
            link = owner.link
            link.abort()
            await until(lambda: owner.closed)
            await asyncio.sleep(0)
            assert link.owner is None
            before = sys.getrefcount(link)
            world.owners.clear()
            del owner.link
            assert sys.getrefcount(link) == before - 1 == 2
        finally:
            gc.enable()


def test_another_minor_of_picows_is_refused() -> None:
    program = 'import picows; picows.__version__ = "2.4.0"; import fastim._core.conn'
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"fastim was built against picows {core.PICOWS} and finds 2.4.0" in ended.stderr


# ------------------------------------------------------------------------------------------------ the fuzz


def honest(rng: random.Random) -> bytes:
    choice = rng.randrange(5)
    if choice == 0:
        return encode(Ping())
    if choice == 1:
        return encode(Ack(rng.choice([0, 1, 2, 3, 99])))
    if choice == 2:
        return encode(Acks([rng.randrange(1 << 20) for _ in range(rng.randrange(5))]))
    if choice == 3:
        return command("x" * rng.randrange(300))
    return msgspec.msgpack.encode([rng.randrange(128), {"a": [1, None, 2.5]}, b"bin", "text", -5])


def hostile(rng: random.Random) -> bytes:
    """One WebSocket frame, or a few, with something wrong in most of them."""
    payload = b"".join(honest(rng) for _ in range(rng.randrange(1, 4)))
    choice = rng.randrange(12)
    if choice == 0:
        return rng.randbytes(rng.randrange(1, 60))
    if choice <= 3:
        broken = bytearray(payload)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return ws(BINARY, bytes(broken[: rng.randrange(1, len(broken) + 1)]))
    if choice == 4:
        return ws(BINARY, rng.randbytes(rng.randrange(200)))
    if choice == 5:
        return ws(rng.randrange(16), payload, fin=rng.random() < 0.7, rsv=rng.choice([0, 0, 1, 2, 4]))
    if choice == 6:
        return ws(BINARY, payload, size=rng.choice([0, 1, 125, 126, 65_535, 65_537, 1 << 31, 1 << 62]))
    if choice == 7:
        return ws_close(rng.randrange(65_536), rng.randbytes(rng.randrange(20)))
    if choice == 8:
        return ws(PING, rng.randbytes(rng.randrange(126))) * rng.randrange(1, 30)
    if choice == 9:
        cut = rng.randrange(len(payload))
        return ws(BINARY, payload[:cut], fin=False) + ws(PING) + ws(CONT, payload[cut:])
    if choice == 10:
        return ws(BINARY, payload, mask=rng.choice([None, b"\0\0\0\0", rng.randbytes(4)]))
    return ws(BINARY, payload)


@pytest.mark.timeout(240)
async def test_hostile_packets_end_their_own_link_and_disturb_nobody() -> None:
    rng = random.Random(6455)
    async with World(config={"failures_per_minute": 1_000_000}) as world:
        bystander = await world.connect()
        bystander.owner.on = lambda _op, frame: bystander.owner.link.send(frame)
        attacker: Client | None = None
        sent = links = 0
        while sent < PACKETS_OF_FUZZ:
            if attacker is None or attacker.owner.link.closed:
                if attacker is not None:
                    await attacker.close()
                    world.clients.remove(attacker)
                attacker = await world.connect(auth=rng.random() < 0.8)
                if rng.random() < 0.7:
                    attacker.owner.link.bind(world.acks.open())
                links += 1
            burst = [hostile(rng) for _ in range(rng.randrange(1, 8))]
            sent += len(burst)
            data = b"".join(burst)
            cut = rng.randrange(len(data)) if rng.random() < 0.3 else len(data)
            attacker.raw(data[:cut])
            await asyncio.sleep(0)
            attacker.raw(data[cut:])
            if rng.random() < 0.01:
                attacker.reset()
            if rng.random() < 0.1:
                text = command(str(sent))
                bystander.send(text)
                assert await bystander.packet() == text
            for _ in range(3):
                await asyncio.sleep(0)
        assert links > 1_000
        assert not bystander.owner.link.closed
        bystander.send(encode(Ping()))
        assert isinstance(await bystander.message(), Pong)
        del world.owners[1:-1]
