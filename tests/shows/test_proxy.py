"""The faulty TCP proxy does what its words say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.faults.proxy import Proxy

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def echo_through_proxy(delay_s: float = 0.0) -> AsyncIterator[tuple[Proxy, Ends]]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1_000):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, Proxy("127.0.0.1", server.sockets[0].getsockname()[1], delay_s=delay_s) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        yield proxy, (reader, writer)
        writer.transport.abort()


async def hears(ends: Ends, text: bytes, within_s: float = 0.2) -> bytes:
    ends[1].write(text)
    try:
        return await asyncio.wait_for(ends[0].read(100), within_s)
    except TimeoutError:
        return b"nothing"


async def test_bytes_pass_both_ways() -> None:
    async with echo_through_proxy() as (proxy, ends):
        assert await hears(ends, b"abc") == b"abc"
        assert (proxy.links[0].up, proxy.links[0].down) == (3, 3)


async def test_delay_is_paid_each_way() -> None:
    async with echo_through_proxy(0.1) as (_, ends):
        assert await hears(ends, b"abc", 0.15) == b"nothing"
        assert await hears(ends, b"", 0.5) == b"abc"


async def test_stall_holds_bytes_until_flow() -> None:
    async with echo_through_proxy() as (proxy, ends):
        assert await hears(ends, b"a") == b"a"
        proxy.stall()
        assert await hears(ends, b"b") == b"nothing"
        proxy.flow()
        assert await hears(ends, b"") == b"b"


async def test_drop_swallows_both_ways_and_keeps_sockets_open() -> None:
    async with echo_through_proxy() as (proxy, ends):
        assert await hears(ends, b"a") == b"a"
        assert proxy.drop() == 1
        assert await hears(ends, b"b") == b"nothing"
        assert proxy.links[0].thrown_away == 1
        assert not proxy.links[0].closed.is_set()
        assert proxy.live() == []


async def test_cut_resets_the_client() -> None:
    async with echo_through_proxy() as (proxy, ends):
        assert await hears(ends, b"a") == b"a"
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(ends[0].read(100), 1)


async def test_end_of_stream_passes_on_and_refused_connections_end() -> None:
    async with echo_through_proxy() as (proxy, ends):
        ends[1].write_eof()
        assert await asyncio.wait_for(ends[0].read(100), 1) == b""
        proxy.refused = True
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(100), 1) == b""
        writer.close()
