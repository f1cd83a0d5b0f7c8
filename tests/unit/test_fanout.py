"""One message to many links, over real sockets: order, membership, bounds, and who cannot take it."""

from __future__ import annotations

import asyncio
import gc
import random
import ssl
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastim._core.fanout import BATCH_BYTES, LOG_BYTES, NORMAL_BYTES, Fanout
from fastim._core.sealed import MAX_INNER_BYTES
from fastim.errors import UsageError
from fastim.node.server import dev_certificate, make_server_context
from fastim.protocol import CloseCode, Probe, Refresh, encode
from tests.reference.fanout import Room
from tests.unit.conn_world import REQUEST, Client, World, until
from tests.unit.test_conn_sealed import agree

PROBE = encode(Probe())


def message(number: int, size: int = 0) -> bytes:
    """A frame that says its number."""
    return encode(Refresh(f"{number:08d}" + "x" * size))


def number_in(packet: bytes) -> int:
    start = packet.index(b"0")
    return int(packet[start : start + 8])


async def ticks(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def seat(world: World, fan: Fanout, count: int, **options: Any) -> list[Client]:
    clients = [await world.connect(**options) for _ in range(count)]
    for client in clients:
        fan.add(client.owner.link)
    return clients


async def slow_member(world: World, fan: Fanout) -> Client:
    """A member that does not read, with as much in its socket as goes in."""
    client = await world.connect(receive_bytes=4_096)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    fan.add(client.owner.link)
    for _ in range(400):
        if client.owner.link.buffered_bytes():
            return client
        fan.publish(message(0, 8_000))
        await ticks(2)
    raise AssertionError("its socket takes everything")


def reads(client: Client) -> None:
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------- delivery


@pytest.mark.parametrize("size", [2, 125, 126, 127, 65_000, MAX_INNER_BYTES])
async def test_a_packet_of_any_size_arrives_whole(size: int) -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        clients = await seat(world, fan, 3)
        packet = random.Random(size).randbytes(size)
        assert fan.publish(packet)
        for client in clients:
            assert await client.packet() == packet
        assert (fan.published, fan.written, fan.skipped, fan.cut) == (1, 3, 0, 0)


@pytest.mark.parametrize("size", [0, 1, MAX_INNER_BYTES + 1, 65_536])
async def test_a_packet_outside_the_limits_is_refused(size: int) -> None:
    async with World() as world:
        with pytest.raises(UsageError, match="limits 2 and 65,501"):
            Fanout(world.hub).publish(bytes(size))


async def test_what_is_published_in_one_tick_leaves_in_order_and_in_one_write() -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        (client,) = await seat(world, fan, 1)
        before = world.hub.counters()["packets_out"]
        for number in range(50):
            fan.publish(message(number))
        assert fan.written == 0
        await ticks(2)
        assert fan.written == 50
        assert world.hub.counters()["packets_out"] - before == 50
        assert [number_in(await client.packet()) for _ in range(50)] == list(range(50))


async def test_a_message_leaves_behind_what_the_link_has_queued() -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        clients = await seat(world, fan, 6)
        for client in clients[:3]:
            client.owner.link.send(message(1))
        fan.publish(message(2))
        for client in clients[3:]:
            client.owner.link.send(message(1))
        for client in clients:
            assert [number_in(await client.packet()) for _ in range(2)] == [1, 2]


async def test_publishing_to_nobody_is_fine_and_keeps_nothing() -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        for number in range(10_000):
            assert fan.publish(message(number))
        (client,) = await seat(world, fan, 1)
        fan.publish(message(7))
        assert number_in(await client.packet()) == 7
        assert fan.written == 1


async def test_an_owner_is_not_called_by_publish() -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        for client in await seat(world, fan, 5):
            client.owner.busy = True
        fan.publish(message(1), high=True)
        await ticks()
        for owner in world.owners:
            owner.busy = False


# --------------------------------------------------------------------------------------------- membership


async def test_members_are_counted_once_and_known() -> None:
    async with World() as world:
        fan, other = Fanout(world.hub), Fanout(world.hub)
        clients = await seat(world, fan, 5)
        links = [client.owner.link for client in clients]
        fan.add(links[0])
        assert len(fan) == 5
        assert all(link in fan and link not in other for link in links)
        fan.remove(links[1])
        fan.remove(links[1])
        assert (len(fan), links[1] in fan, links[4] in fan) == (4, False, True)
        other.remove(links[0])
        fan.clear()
        assert (len(fan), links[0] in fan) == (0, False)


async def test_a_link_of_another_hub_is_refused() -> None:
    async with World() as world, World() as elsewhere:
        client = await elsewhere.connect()
        fan = Fanout(world.hub)
        with pytest.raises(UsageError, match="another hub"):
            fan.add(client.owner.link)
        assert client.owner.link not in fan
        fan.remove(client.owner.link)


async def test_who_was_removed_gets_nothing_more_not_even_what_was_published() -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        clients = await seat(world, fan, 4)
        fan.publish(message(1))
        fan.remove(clients[0].owner.link)
        await ticks()
        clients[0].owner.link.send(PROBE)
        assert await clients[0].packet() == PROBE
        for client in clients[1:]:
            assert number_in(await client.packet()) == 1


@pytest.mark.parametrize("how", ["close", "abort", "peer leaves", "peer resets", "peer says close"])
async def test_a_link_that_ends_leaves_by_itself(how: str) -> None:
    async with World() as world:
        fan, second = Fanout(world.hub), Fanout(world.hub)
        clients = await seat(world, fan, 5)
        for client in clients[1:3]:
            second.add(client.owner.link)
        gone = clients[2]
        match how:
            case "close":
                gone.owner.link.close(4503)
                assert len(fan) == 4
            case "abort":
                gone.owner.link.abort()
                assert len(fan) == 4
            case "peer leaves":
                await gone.close()
            case "peer resets":
                gone.reset()
            case _:
                gone.raw(b"\x88\x80\0\0\0\0")
        await until(lambda: len(fan) == 4)
        assert len(second) == 1
        fan.publish(message(3))
        second.publish(message(4))
        for client in clients[:2] + clients[3:]:
            assert number_in(await client.packet()) == 3
        assert number_in(await clients[1].packet()) == 4
        assert gone.owner.link not in fan
        fan.add(gone.owner.link)
        assert len(fan) == 4, "a closed link is taken by nobody"


async def test_who_takes_the_slot_of_a_member_gets_nothing() -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        clients = await seat(world, fan, 3)
        slot = clients[1].owner.link.slot
        await clients[1].close()
        await until(lambda: clients[1].owner.closed)
        late = await world.connect()
        assert late.owner.link.slot == slot
        fan.publish(message(1))
        await ticks()
        late.owner.link.send(PROBE)
        assert await late.packet() == PROBE
        assert fan.written == 2


async def test_a_link_sits_in_many_fanouts_and_leaves_any() -> None:
    async with World() as world:
        fans = [Fanout(world.hub) for _ in range(40)]
        clients = [await world.connect() for _ in range(4)]
        order = random.Random(1)
        for client in clients:
            for fan in order.sample(fans, len(fans)):
                fan.add(client.owner.link)
        for fan in fans[::2]:
            fan.remove(clients[0].owner.link)
        await clients[1].close()
        await until(lambda: clients[1].owner.closed)
        assert [len(fan) for fan in fans] == [2, 3] * 20
        for number, fan in enumerate(fans):
            fan.publish(message(number))
        assert sorted([number_in(await clients[0].packet()) for _ in range(20)]) == list(range(1, 40, 2))
        assert sorted([number_in(await clients[3].packet()) for _ in range(40)]) == list(range(40))


async def test_a_fanout_lives_as_long_as_it_has_members() -> None:
    async with World() as world:
        clients = [await world.connect() for _ in range(2)]
        fan = Fanout(world.hub)
        for client in clients:
            fan.add(client.owner.link)
        references = sys.getrefcount(fan)
        for client in clients:
            fan.remove(client.owner.link)
        assert sys.getrefcount(fan) == references - 1
        fan.add(clients[0].owner.link)
        fan.publish(message(1))
        del fan
        assert number_in(await clients[0].packet()) == 1


async def test_a_hub_that_is_dropped_with_members_is_collected() -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        await seat(world, fan, 3)
        fan.publish(message(1))
        mark = weakref.ref(world.owners[0])
    world.owners.clear()
    world.clients.clear()
    del fan
    gc.collect()
    assert mark() is None


# ----------------------------------------------------------------------------------------------------- when


async def test_without_load_a_message_leaves_at_once_whatever_the_budget() -> None:
    async with World() as world:
        fan = Fanout(world.hub, 5_000)
        (client,) = await seat(world, fan, 1)
        fan.publish(message(1))
        await ticks(2)
        assert fan.written == 1
        assert number_in(await client.packet()) == 1


async def test_under_load_messages_gather_until_the_budget_is_over() -> None:
    async with World() as world:
        fan = Fanout(world.hub, 60)
        (client,) = await seat(world, fan, 1)
        start = asyncio.get_running_loop().time()
        fan.publish(message(0))
        await ticks()
        for number in (1, 2, 3):
            fan.publish(message(number))
        await ticks()
        assert fan.written == 1
        assert [number_in(await client.packet()) for _ in range(4)] == [0, 1, 2, 3]
        assert 0.05 < asyncio.get_running_loop().time() - start < 2.0


async def test_a_whole_batch_does_not_wait_for_the_budget() -> None:
    async with World() as world:
        fan = Fanout(world.hub, 10_000)
        (client,) = await seat(world, fan, 1)
        fan.publish(message(0))
        await ticks()
        for number in range(1, 20):
            fan.publish(message(number, 4_000))
        got = [number_in(await client.packet()) for _ in range(16)]
        assert got == list(range(16)), "the first batch and one of 64 KiB; what is left waits"
        assert fan.written < 20


async def test_a_budget_above_the_limit_is_refused() -> None:
    async with World() as world:
        with pytest.raises(UsageError, match="limit 10,000"):
            Fanout(world.hub, 10_001)


async def test_a_broadcast_is_cut_into_ticks() -> None:
    async with World(sends_a_tick=4) as world:
        fan = Fanout(world.hub)
        clients = await seat(world, fan, 10)
        for number in range(6):
            fan.publish(message(number))
            world.hub._tick()  # type: ignore[attr-defined]
            assert fan.written == 10 * number + 4
            await until(lambda number=number: fan.written == 10 * (number + 1))  # type: ignore[misc]
        for client in clients:
            assert [number_in(await client.packet()) for _ in range(6)] == list(range(6))


async def test_two_broadcasts_take_turns() -> None:
    async with World(sends_a_tick=4) as world:
        large, small = Fanout(world.hub), Fanout(world.hub)
        await seat(world, large, 20)
        await seat(world, small, 2)
        large.publish(message(1))
        small.publish(message(2))
        world.hub._tick()  # type: ignore[attr-defined]
        assert (large.written, small.written) == (4, 0)
        world.hub._tick()  # type: ignore[attr-defined]
        assert (large.written, small.written) == (6, 2)
        await until(lambda: large.written == 20)


async def test_members_who_come_and_go_during_a_broadcast_get_it_once_or_not_at_all() -> None:
    for seed in range(30):
        order = random.Random(seed)
        async with World(sends_a_tick=3) as world:
            fan, room = Fanout(world.hub), Room()
            clients = await seat(world, fan, 12)
            for number in range(12):
                room.add(str(number))
            outside = [await world.connect() for _ in range(4)]
            fan.publish(message(room.publish()))
            world.hub._tick()  # type: ignore[attr-defined]
            for number in order.sample(range(12), order.randint(1, 8)):
                fan.remove(clients[number].owner.link)
                room.remove(str(number))
            room.flushed = 1  # who comes while a batch is written does not get it
            for number, client in enumerate(outside, 12):
                fan.add(client.owner.link)
                room.add(str(number))
            fan.publish(message(room.publish()))
            for number, client in enumerate(clients + outside):
                await check(client, room, str(number))


async def check(client: Client, room: Room, name: str) -> None:
    """Read up to a mark that is sent last."""
    if name in room.members():
        got = [number_in(await client.packet())]
        while got[-1] < room.published - 1:
            got.append(number_in(await client.packet()))
    else:
        got = []
    client.owner.link.send(PROBE)
    while (packet := await client.packet()) != PROBE:
        got.append(number_in(packet))
    assert room.faults(name, got) == []


# ------------------------------------------------------------------------------------- who cannot take it


async def test_a_member_that_does_not_read_is_skipped_and_counted_and_holds_nobody_up() -> None:
    async with World(config={"sndbuf_bytes": 16_384}) as world:
        fan = Fanout(world.hub)
        slow = await slow_member(world, fan)
        others = await seat(world, fan, 3)
        start, written = fan.published, fan.written
        for number in range(1_000):
            fan.publish(message(number, 1_000))
            await ticks(1)
        await until(lambda: fan.written + fan.skipped == written + 4_000)
        assert 900 < fan.skipped < 1_000
        assert NORMAL_BYTES - 2_000 < slow.owner.link.buffered_bytes() <= NORMAL_BYTES
        assert (len(fan), fan.cut, slow.owner.closed, fan.published) == (4, 0, [], start + 1_000)
        for client in others:
            assert [number_in(await client.packet()) for _ in range(1_000)] == list(range(1_000))
        # What it was given is whole and in order, and when it has read it is served again.
        reads(slow)
        await until(lambda: slow.owner.link.buffered_bytes() == 0)
        fan.publish(message(1_000))
        got = [number_in(await slow.packet()) for _ in range(start + 1_001 - fan.skipped)]
        assert got == [*[0] * start, *range(1_000 - fan.skipped), 1_000]


async def test_a_member_without_room_for_a_high_message_is_closed_4408() -> None:
    async with World(config={"sndbuf_bytes": 16_384}) as world:
        fan = Fanout(world.hub)
        slow = await slow_member(world, fan)
        (other,) = await seat(world, fan, 1)
        sent = 0
        while len(fan) == 2:
            assert fan.publish(message(sent, 8_000), high=True)
            sent += 1
            await ticks()
            assert slow.owner.link.buffered_bytes() <= world.hub.soft_bytes + 100
            assert sent < 100
        assert sent > (world.hub.soft_bytes - NORMAL_BYTES) // 8_100
        assert (fan.cut, fan.skipped, slow.owner.link.close_code) == (1, 0, CloseCode.SLOW)
        assert [number_in(await other.packet()) for _ in range(sent)] == list(range(sent))
        reads(slow)
        assert await slow.closing() == (4408, b"no room for a message that is not skipped")


async def test_a_high_message_has_room_where_normal_ones_are_skipped() -> None:
    async with World(config={"sndbuf_bytes": 16_384}) as world:
        fan = Fanout(world.hub)
        slow = await slow_member(world, fan)
        while not fan.skipped:
            fan.publish(message(0, 8_000))
            await ticks(2)
        skipped = fan.skipped
        fan.publish(message(1, 8_000), high=True)
        await ticks()
        assert (fan.skipped, fan.cut, len(fan)) == (skipped, 0, 1)
        reads(slow)
        while number_in(await slow.packet()) == 0:
            pass


async def test_a_short_write_is_finished_by_the_transport_before_anything_else() -> None:
    async with World(config={"sndbuf_bytes": 8_192}) as world:
        fan = Fanout(world.hub)
        client = await slow_member(world, fan)
        before = fan.published
        reads(client)
        for number in range(10):
            fan.publish(message(2 * number + 1, 6_000))
            await ticks(2)
            client.owner.link.send(message(2 * number + 2, 10))
            await ticks(2)
        got = [number_in(await client.packet()) for _ in range(before + 20)]
        assert got == [0] * before + list(range(1, 21))


async def test_a_log_that_is_full_refuses_until_it_was_written() -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        (client,) = await seat(world, fan, 1)
        taken = 0
        while fan.publish(message(taken, 1_000)):
            taken += 1
        assert LOG_BYTES - 2_000 < taken * len(message(0, 1_000)) <= LOG_BYTES
        assert not fan.publish(message(0, 2_000))
        assert (fan.refused, fan.published) == (2, taken + 2)
        assert [number_in(await client.packet()) for _ in range(taken)] == list(range(taken))
        assert fan.publish(message(7))
        assert number_in(await client.packet()) == 7
        for number in range(4):
            assert fan.publish(message(number, 65_000)), "four packets of nearly a batch each"
        assert not fan.publish(message(9, 65_000))
        assert [number_in(await client.packet()) for _ in range(4)] == list(range(4))


def test_a_batch_always_fits_an_empty_queue() -> None:
    assert MAX_INNER_BYTES + 4 <= BATCH_BYTES <= NORMAL_BYTES


# ------------------------------------------------------------------------------------------- TLS and seals


def tls_config(tmp_path: Path) -> dict[str, Any]:
    return {"tls": make_server_context(*dev_certificate(tmp_path)), "sndbuf_bytes": 16_384}


async def tls_member(world: World, fan: Fanout) -> Client:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client = Client(*await asyncio.open_connection("127.0.0.1", world.port, ssl=context, limit=1 << 22))
    world.clients.append(client)
    client.raw(REQUEST + b"\r\n")
    await client.reader.readuntil(b"\r\n\r\n")
    client.owner = world.owners[-1]
    fan.add(client.owner.link)
    return client


async def test_tls_members_get_every_message_in_order(tmp_path: Path) -> None:
    async with World(config=tls_config(tmp_path)) as world:
        fan = Fanout(world.hub)
        clients = [await tls_member(world, fan) for _ in range(4)]
        for number in range(200):
            fan.publish(message(number, 500))
            if number % 3 == 0:
                clients[0].owner.link.send(message(number, 10))
            await ticks(number % 2)
        for client in clients[1:]:
            assert [number_in(await client.packet()) for _ in range(200)] == list(range(200))
        assert (fan.written, fan.skipped) == (800, 0)


async def test_a_tls_member_that_does_not_read_is_skipped_and_then_served_again(tmp_path: Path) -> None:
    async with World(config=tls_config(tmp_path)) as world:
        fan = Fanout(world.hub)
        slow = await tls_member(world, fan)
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
        sent = 0
        while not fan.skipped:
            fan.publish(message(sent, 8_000))
            sent += 1
            await ticks(1)
        assert slow.owner.link.buffered_bytes() <= NORMAL_BYTES
        reads(slow)
        await until(lambda: slow.owner.link.buffered_bytes() == 0)
        whole = fan.written
        fan.publish(message(sent))
        assert [number_in(await slow.packet()) for _ in range(whole + 1)] == [*range(whole), sent]


async def test_sealed_members_get_the_same_messages_in_their_own_seals() -> None:
    async with World() as world:
        fan = Fanout(world.hub)
        plain = await world.connect()
        tunnels = [await agree(world) for _ in range(3)]
        for link in (plain.owner.link, *[tunnel.link for tunnel in tunnels]):
            fan.add(link)
        packets = [message(1), message(2, 200) + message(3), message(4, 65_000), bytes([0x91, 60]) * 64]
        for packet in packets:
            fan.publish(packet)
        for packet in packets:
            assert await plain.packet() == packet
        for tunnel in tunnels:
            tunnel.link.send(PROBE)
            for packet in [*packets, PROBE]:
                assert await tunnel.packet() == packet
        assert fan.written == 16


async def test_a_sealed_member_that_does_not_read_is_skipped_before_anything_is_sealed() -> None:
    async with World(config={"sndbuf_bytes": 16_384}) as world:
        fan = Fanout(world.hub)
        tunnel = await agree(world, receive_bytes=4_096)
        tunnel.client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        fan.add(tunnel.link)
        sent = 0
        while not fan.skipped:
            fan.publish(message(sent, 2_000))
            sent += 1
            await ticks(2)
        # The counters of the seals have no holes: all of it opens.
        reads(tunnel.client)
        assert [number_in(await tunnel.packet()) for _ in range(fan.written)] == list(range(fan.written))


# ------------------------------------------------------------------------------------------------- memory


async def test_memory_stays_flat_over_members_and_messages(peak_kb: Callable[[], int]) -> None:
    async with World() as world:
        clients = [await world.connect() for _ in range(20)]
        links = [client.owner.link for client in clients]
        packet = message(1, 3_000)

        async def churn() -> None:
            fan = Fanout(world.hub)
            for link in links:
                fan.add(link)
            fan.publish(packet)
            fan.publish(packet)
            await ticks(2)
            assert fan.written == 40
            fan.clear()
            for client in clients:
                await client.packet()
                await client.packet()

        for _ in range(40):
            await churn()
        references = sys.getrefcount(packet)
        before = peak_kb()
        for _ in range(200):
            await churn()
        assert peak_kb() - before < 2048
        assert sys.getrefcount(packet) == references
