"""Members come, go and end at random while messages are published: each gets what its slow twin says."""

from __future__ import annotations

import asyncio
import random

import pytest

from fastim._core.fanout import Fanout
from tests.reference.fanout import Room
from tests.unit.conn_world import Client, World, until
from tests.unit.test_fanout import check, message

STEPS = 300


@pytest.mark.parametrize("seed", range(12))
async def test_every_member_gets_what_was_published_while_it_was_one(seed: int) -> None:
    order = random.Random(seed)
    async with World(sends_a_tick=order.choice([1, 3, 7, 2_048])) as world:
        fan, room = Fanout(world.hub, order.choice([0, 0, 2])), Room()
        clients: dict[str, Client] = {}
        for _ in range(order.randint(1, 12)):
            clients[str(len(clients))] = await world.connect()
        for _ in range(STEPS):
            await step(order, world, fan, room, clients)
        await until(lambda: fan.waiting == 0)
        for name, client in clients.items():
            await check(client, room, name)


async def step(
    order: random.Random, world: World, fan: Fanout, room: Room, clients: dict[str, Client]
) -> None:
    name = order.choice(list(clients))
    link = clients[name].owner.link
    match order.choices(["publish", "add", "remove", "end", "tick", "settle"], [40, 20, 12, 3, 20, 5])[0]:
        case "publish":
            # Refused while too much waits to be written to many, one send a tick.
            size = order.choice([0, 0, 100, 5_000])
            if fan.publish(message(room.published, size), high=order.random() < 0.1):
                room.publish()
        case "add":
            fan.add(link)
            room.add(name)
        case "remove":
            fan.remove(link)
            room.remove(name)
        case "end":
            link.close(4503) if order.random() < 0.5 else link.abort()
            room.remove(name)
            del clients[name]
            clients[f"{name}+"] = await world.connect()
        case "tick":
            for _ in range(order.randint(1, 3)):
                await asyncio.sleep(0)
        case "settle":
            await until(lambda: fan.waiting == 0)
            room.flushed = room.published
    assert len(fan) == len(room.members())
    assert (link in fan) == (name in room.members() and not link.closed)
