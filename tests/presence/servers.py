"""What tests of Redis presence ask of real servers, and servers with settings of their own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import redis

from fastim.presence.redis import RedisPresence
from fastim.presence.shards import Address, Target
from tests.contract.presence import fresh

_START_S = 10.0


def with_prefix(url: str) -> str:
    """Keys of its own on a server that others use too."""
    return f"{url}?prefix={fresh('test')}:"


def through(url: str, port: int) -> str:
    """The same single server behind a proxy on another port."""
    address = Target(url).seeds[0]
    return url.replace(f"{address[0]}:{address[1]}", f"127.0.0.1:{port}")


@contextlib.contextmanager
def asked(url: str, at: Address | None = None, **options: Any) -> Iterator[redis.Redis]:
    """An independent client of one server."""
    host, port = at or Target(url).seeds[0]
    client = redis.Redis(host, port, protocol=2, decode_responses=True, **options)
    try:
        yield client
    finally:
        client.close()


@contextlib.asynccontextmanager
async def presence_at(url: str, **options: int) -> AsyncIterator[RedisPresence]:
    """Closed afterwards, whatever happens."""
    presence = RedisPresence(url, **options)
    try:
        yield presence
    finally:
        await presence.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(program: str, directory: Path, *settings: str) -> Iterator[None]:
    """A Redis or Valkey process of this test."""
    directory.mkdir()
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [program, "--save", "", "--dir", str(directory), "--bind", "127.0.0.1", *settings],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + _START_S
            while "Ready to accept connections" not in (directory / "log").read_text():
                assert process.poll() is None, (directory / "log").read_text()
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.02)
            yield
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(directory)
