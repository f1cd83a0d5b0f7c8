"""A lane gives every request its own replies, whoever stops waiting, and ends every request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import ResponseError

from fastim.errors import PresenceUnavailable
from fastim.presence.lane import Lane
from fastim.presence.shards import Address, Target, pack
from tests.contract.presence import fresh
from tests.faults.proxy import Proxy
from tests.presence.servers import asked

DEADLINE_S = 0.5


@asynccontextmanager
async def lane_to(url: str, address: Address | None = None) -> AsyncIterator[Lane]:
    target = Target(url)
    lane = Lane("it", target.connection(address or target.seeds[0], DEADLINE_S), DEADLINE_S)
    try:
        yield lane
    finally:
        await lane.close()


@asynccontextmanager
async def lane_through_proxy(url: str) -> AsyncIterator[tuple[Lane, Proxy]]:
    async with Proxy(*Target(url).seeds[0]) as proxy, lane_to(url, ("127.0.0.1", proxy.port)) as lane:
        yield lane, proxy


def echo(word: str) -> bytes:
    return pack((b"ECHO", word))


async def answer(lane: Lane, word: str) -> Any:
    (reply,) = await lane.ask(echo(word), 1)
    return reply.decode()


async def test_what_is_asked_together_goes_in_one_round_trip(redis_server: str) -> None:
    async with lane_to(redis_server) as lane:
        words = [f"word{number}" for number in range(300)]
        assert await asyncio.gather(*(answer(lane, word) for word in words)) == words
        assert (lane.round_trips, lane.commands) == (1, 300)


async def test_what_comes_meanwhile_goes_in_the_next_round_trip(redis_server: str) -> None:
    async with lane_through_proxy(redis_server) as (lane, proxy):
        assert await answer(lane, "first") == "first"
        proxy.stall()
        early = asyncio.create_task(answer(lane, "early"))
        await asyncio.sleep(0.01)
        late = [asyncio.create_task(answer(lane, f"late{number}")) for number in range(100)]
        await asyncio.sleep(0.01)
        proxy.flow()
        assert await early == "early"
        assert await asyncio.gather(*late) == [f"late{number}" for number in range(100)]
        assert lane.round_trips == 3


async def test_several_commands_of_a_request_are_answered_in_order(redis_server: str) -> None:
    async with lane_to(redis_server) as lane:
        replies = await lane.ask(echo("a") + pack((b"LPOP", fresh("k"))) + echo("b"), 3)
        assert replies == [b"a", None, b"b"]


async def test_an_error_reply_is_one_of_the_replies(redis_server: str) -> None:
    async with lane_to(redis_server) as lane:
        good, bad = lane.ask(echo("a") + pack((b"NOSUCH",)) + echo("b"), 3), lane.ask(echo("c"), 1)
        first, error, last = await good
        assert (first, last, await bad) == (b"a", b"b", [b"c"])
        assert isinstance(error, ResponseError)


async def test_the_reply_to_a_cancelled_request_reaches_nobody(redis_server: str) -> None:
    async with lane_through_proxy(redis_server) as (lane, proxy):
        await answer(lane, "first")
        proxy.stall()
        given_up = asyncio.create_task(answer(lane, "given up"))
        await asyncio.sleep(0.01)
        kept = asyncio.create_task(answer(lane, "kept"))
        given_up.cancel()
        await asyncio.sleep(0.01)
        proxy.flow()
        assert await kept == "kept"
        assert await answer(lane, "after") == "after"
        assert len(proxy.links) == 1


async def test_what_is_cancelled_before_its_batch_leaves_is_never_sent(redis_server: str) -> None:
    async with lane_through_proxy(redis_server) as (lane, proxy):
        key = fresh("k")
        await answer(lane, "first")
        proxy.stall()
        under_way = lane.ask(echo("under way"), 1)
        await asyncio.sleep(0.01)
        lane.ask(pack((b"INCR", key)), 1).cancel()
        kept = lane.ask(pack((b"INCR", key)), 1)
        proxy.flow()
        assert await under_way == [b"under way"]
        assert await kept == [1]


async def test_a_request_that_is_not_answered_in_time_fails_and_its_reply_reaches_nobody(
    redis_server: str,
) -> None:
    async with lane_through_proxy(redis_server) as (lane, proxy):
        await answer(lane, "first")
        proxy.stall()
        with pytest.raises(PresenceUnavailable, match="no answer within 500 ms") as error:
            await answer(lane, "too late")
        assert error.value.temporary
        proxy.flow()
        assert await answer(lane, "after") == "after"
        assert len(proxy.links) == 2


async def test_a_lost_connection_fails_what_was_under_way_and_the_next_request_has_a_new_one(
    redis_server: str,
) -> None:
    async with lane_through_proxy(redis_server) as (lane, proxy):
        await answer(lane, "first")
        proxy.stall()
        under_way = asyncio.create_task(answer(lane, "under way"))
        await asyncio.sleep(0.01)
        proxy.cut()
        with pytest.raises(PresenceUnavailable):
            await under_way
        assert await answer(lane, "after") == "after"


async def test_a_server_that_went_away_while_nobody_asked_is_not_noticed(redis_server: str) -> None:
    async with lane_to(redis_server) as lane:
        await answer(lane, "first")
        (number,) = await lane.ask(pack((b"CLIENT", b"ID")), 1)
        with asked(redis_server) as server:
            server.client_kill_filter(_id=number)
        await asyncio.sleep(0.02)
        assert await answer(lane, "after") == "after"


async def test_a_connection_that_was_reset_while_nobody_asked_costs_one_request(redis_server: str) -> None:
    async with lane_through_proxy(redis_server) as (lane, proxy):
        await answer(lane, "first")
        proxy.cut()
        await asyncio.sleep(0.02)
        with pytest.raises(PresenceUnavailable):
            await answer(lane, "given up")
        assert await answer(lane, "after") == "after"


async def test_a_refused_connection_fails_at_once(redis_server: str) -> None:
    async with lane_through_proxy(redis_server) as (lane, proxy):
        proxy.refused = True
        for _ in range(3):
            with pytest.raises(PresenceUnavailable):
                await asyncio.wait_for(answer(lane, "x"), 0.2)
        proxy.refused = False
        assert await answer(lane, "after") == "after"


async def test_a_wrong_password_is_unavailable(redis_server: str) -> None:
    address = Target(redis_server).seeds[0]
    url = f"redis://nobody:wrong@{address[0]}:{address[1]}/0"
    async with lane_to(url) as lane:
        with pytest.raises(PresenceUnavailable, match="invalid username-password"):
            await answer(lane, "x")


async def test_closing_fails_what_waits_and_what_comes(redis_server: str) -> None:
    async with lane_through_proxy(redis_server) as (lane, proxy):
        await answer(lane, "first")
        proxy.stall()
        under_way = asyncio.create_task(answer(lane, "under way"))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(answer(lane, "waiting"))
        await asyncio.sleep(0)
        await lane.close()
        for task in (under_way, waiting):
            with pytest.raises(PresenceUnavailable, match="closed"):
                await task
        with pytest.raises(PresenceUnavailable, match="closed"):
            await answer(lane, "too late")


async def test_the_server_counts_one_read_for_a_batch(redis_server: str) -> None:
    async with lane_to(redis_server) as lane:
        await answer(lane, "first")
        with asked(redis_server) as server:
            before = server.info("stats")["total_reads_processed"]
            await asyncio.gather(*(answer(lane, "x" * 20) for _ in range(200)))
            assert server.info("stats")["total_reads_processed"] - before <= 2
