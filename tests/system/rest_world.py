"""REST on a real socket, with the real store, bus, presence and dispatch behind it; no node."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from fastim.api.http import HttpServer
from fastim.api.ingress import Ingress
from fastim.api.rest import Rest, RestLimits, Status
from fastim.auth import Algorithm, Authenticator, Scope, SigningKey, mint
from fastim.bus.memory import MemoryBus
from fastim.clock import SystemClock
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.service import Dispatch
from fastim.model import DEFAULT_KINDS
from fastim.node.commands import SendRate
from fastim.node.upgrade import Balancers, FailureLimit
from fastim.presence.memory import MemoryPresence
from fastim.store.sqlite import SqliteStore
from tests.faults.recording_vendor import RecordingVendor

KEY = SigningKey("test", "k1", Algorithm.HS256, secrets.token_bytes(32))
BOOT = 3


def token(user: str, *scopes: Scope, ttl_s: int = 7_200, now_s: int | None = None) -> str:
    now = int(time.time()) if now_s is None else now_s
    return mint(KEY, user, scopes or (Scope.CLIENT,), audience="fastim", ttl_s=ttl_s, now_s=now)


ALICE = token("alice")
BOB = token("bob")
MALLORY = token("mallory")
SHOP = token("shop", Scope.SERVICE)
ROOT = token("root", Scope.ADMIN)


class World:
    """One server and a client of it."""

    def __init__(self) -> None:
        self.status = Status()
        self.status.waiting_for = list
        self.fatal: list[BaseException] = []
        self.store: Any = None
        self.bus: MemoryBus
        self.presence: MemoryPresence
        self.dispatch: Dispatch
        self.failures: FailureLimit
        self.http: HttpServer
        self.client: httpx.AsyncClient

    @property
    def port(self) -> int:
        return self.http.addresses[0][1]

    async def get(self, path: str, token: str = "", **options: Any) -> httpx.Response:
        return await self.client.get(path, headers=bearer(token) | options.pop("headers", {}), **options)

    async def post(self, path: str, body: Any, token: str = "", **options: Any) -> httpx.Response:
        headers = bearer(token) | options.pop("headers", {})
        return await self.client.post(path, json=body, headers=headers, **options)

    async def send(self, body: dict[str, Any], token: str = SHOP) -> httpx.Response:
        return await self.post("/v1/messages", body, token)

    async def sent(self, conv: str, text: str, sender: str, **fields: Any) -> dict[str, Any]:
        """Send as a service; it must work."""
        answer = await self.send({"conv": conv, "body": text, "sender": sender, **fields})
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def raw(self, request: bytes, *, until_closed: bool = True) -> bytes:
        """Bytes in, bytes out, on a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        try:
            async with asyncio.timeout(10):
                return await reader.read(-1 if until_closed else 65_536)
        finally:
            writer.close()


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The answer is this problem; returns it."""
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert found["status"] == status
    assert found["type"] == f"urn:fastim:error:{code}"
    return found


@asynccontextmanager
async def world(
    directory: Path,
    *,
    limits: RestLimits | None = None,
    reply_timeout_ms: int = 5_000,
    max_connections: int = 100,
    request_timeout_ms: int = 5_000,
    answer_timeout_ms: int = 10_000,
    failures_per_minute: int = 100,
    balancers: tuple[str, ...] = (),
    rate: tuple[int, int] = (1_000, 1_000),
    dispatching: bool = True,
    durable: bool = False,
) -> AsyncIterator[World]:
    here = World()
    clock = SystemClock()
    here.store = await SqliteStore.open(directory / "data")
    here.bus = MemoryBus()
    here.presence = MemoryPresence(clock)
    here.dispatch = Dispatch(
        here.store, here.bus, here.presence, [RecordingVendor()], clock=clock, rng=random.Random(1),
        limits=DispatchLimits(reconnect_window_ms=0), on_fatal=here.fatal.append,
    )  # fmt: skip
    if dispatching:
        await here.dispatch.start()
    else:
        await here.bus.ensure("submit")
    ingress = Ingress(
        here.bus, BOOT, durable=durable, reply_timeout_ms=reply_timeout_ms, max_waiting=100,
        on_fatal=here.fatal.append,
    )  # fmt: skip
    await ingress.start()
    here.failures = FailureLimit(failures_per_minute, clock)
    rest = Rest(
        store=here.store, presence=here.presence, ingress=ingress,
        verify=Authenticator([KEY.verifier()], "fastim", clock).verify, rate=SendRate(clock, *rate),
        failures=here.failures, balancers=Balancers(balancers), clock=clock, kinds=DEFAULT_KINDS,
        limits=limits or RestLimits(request_timeout_ms=request_timeout_ms), status=here.status,
        on_fatal=here.fatal.append,
    )  # fmt: skip
    await rest.start()
    here.http = HttpServer(
        rest.application, tls=None, max_connections=max_connections, request_timeout_ms=request_timeout_ms,
        answer_timeout_ms=answer_timeout_ms,
    )  # fmt: skip
    await here.http.start("127.0.0.1", 0)
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{here.port}", trust_env=False
        ) as here.client:
            yield here
    finally:
        await ingress.stop()
        await here.http.stop(1.0)
        await here.dispatch.stop()
        await here.store.close()
    assert not here.fatal, here.fatal
