"""The api of a process: REST, and the inbox to which dispatch answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from fastim.api.http import HttpServer
from fastim.api.ingress import Ingress
from fastim.api.rest import Rest, RestLimits, Status
from fastim.app.ground import Ground, named
from fastim.bus.base import inbox_topic
from fastim.config import Config, split_address
from fastim.errors import Unavailable
from fastim.node.commands import SendRate
from fastim.node.upgrade import Balancers

_log = logging.getLogger("fastim.app")

REST_STOP_S: Final = 2.0
ANSWER_SLACK_MS: Final = 30_000
"""How long a REST answer may take beyond the wait for its message to be stored."""


class Answering:
    """Made when the backends are open; `listen` is last."""

    http: HttpServer

    def __init__(self, ground: Ground, boot: int, status: Status) -> None:
        api = ground.config.api
        self._ground = ground
        self._status = status
        self.boot = boot
        self._leasing: asyncio.Task[None] | None = None
        self.ingress = Ingress(
            ground.bus, boot, name=api.name, durable=not ground.config.embedded,
            reply_timeout_ms=api.reply_timeout_ms, max_waiting=api.max_waiting, on_fatal=ground.on_fatal,
        )  # fmt: skip

    async def start(self) -> None:
        """The inbox. Between processes it is told apart from a dead one as a node's is: an open boot in the
        store, a lease in presence."""
        ground = self._ground
        if not ground.config.embedded:
            ground.ends.push("api inbox", self._forget_inbox)
            await ground.store.open_boot(ground.config.api.name, self.boot)
            lease = (ground.config.api.name, self.boot, ground.config.presence.lease_ms)
            await ground.presence.open_lease(*lease)
            self._leasing = asyncio.create_task(self._hold_lease(*lease), name="api.lease")
        ground.ends.push("ingress", self.ingress.stop)
        await self.ingress.start()

    async def listen(self) -> None:
        """Raises UsageError."""
        ground, config = self._ground, self._ground.config
        rest = Rest(
            store=ground.store, presence=ground.presence, ingress=self.ingress,
            verify=ground.authenticator.verify,
            rate=SendRate(ground.clock, config.node.rate_per_s, config.node.rate_burst),
            failures=ground.failures, balancers=Balancers(config.node.balancers), clock=ground.clock,
            kinds=config.kind_rules, limits=rest_limits(config), status=self._status,
            on_fatal=ground.on_fatal,
        )  # fmt: skip
        await rest.start()
        self.http = HttpServer(
            rest.application, tls=ground.tls(config.api.tls_cert, config.api.tls_key),
            max_connections=config.api.max_connections, request_timeout_ms=config.api.request_timeout_ms,
            answer_timeout_ms=config.api.reply_timeout_ms + ANSWER_SLACK_MS,
        )  # fmt: skip
        ground.ends.push("rest", lambda: self.http.stop(REST_STOP_S))
        await self.http.start(*split_address(config.api.listen))

    async def _hold_lease(self, name: str, boot: int, ttl_ms: int) -> None:
        presence = self._ground.presence
        while True:
            await asyncio.sleep(self._ground.config.presence.renew_ms / 1000)
            try:
                if not await presence.renew(name, boot, ttl_ms):
                    await presence.open_lease(name, boot, ttl_ms)
            except Unavailable as error:
                _log.warning("presence did not answer: %s", error.detail)

    async def _forget_inbox(self) -> None:
        """Nobody waits for what is still in it. What fails here is left to who adopts dead inboxes."""
        ground, name = self._ground, self._ground.config.api.name
        if self._leasing is not None:
            self._leasing.cancel()
            await asyncio.gather(self._leasing, return_exceptions=True)
        with contextlib.suppress(Unavailable):
            await ground.bus.delete(inbox_topic(name, self.boot))
            await ground.store.end_boot(name, self.boot)
        with contextlib.suppress(Unavailable):
            await ground.presence.end_lease(name, self.boot)


def rest_limits(config: Config) -> RestLimits:
    limits = named(config.api, RestLimits)
    return RestLimits(**(limits | {"origins": frozenset(config.api.origins)}))
