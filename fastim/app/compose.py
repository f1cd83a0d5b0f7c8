"""One process with everything in it, on the embedded ports: what is made, in which order it starts and ends.

 start   store ─▶ boot ─▶ bus ─▶ dispatch (recovers, then takes sends) ─▶ node ─▶ api inbox ─▶ ws, REST listen
 stop    GOAWAY, no new sockets ─▶ sockets closed over the drain window ─▶ REST finishes what it has in hand
         ─▶ node flushes ─▶ dispatch finishes its batch ─▶ the settled mark moves once more ─▶ store

Nothing listens before what it needs is ready, and nothing is closed before what uses it has ended.

A1  a start that fails leaves nothing open              tests/system/test_app.py
A2  after stop() everything acknowledged is settled     same
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from fastim import observe
from fastim._core.acks import AckTable
from fastim._core.conn import CoreHub
from fastim._core.wheel import Wheel
from fastim.api.http import HttpServer
from fastim.api.ingress import Ingress
from fastim.api.rest import Rest, RestLimits, Status
from fastim.app.figures import Figures
from fastim.auth import Authenticator, Scope, SigningKey, create_dev_key
from fastim.bus.memory import MemoryBus
from fastim.clock import Clock, SystemClock
from fastim.config import Config, split_address
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.service import Dispatch
from fastim.errors import UsageError
from fastim.node.commands import SendRate
from fastim.node.limits import NodeLimits
from fastim.node.server import Listener, ListenerConfig, attach_core_metrics
from fastim.node.service import Node, encode_error
from fastim.node.tls import dev_certificate, make_server_context, reload_certificate
from fastim.node.upgrade import Balancers, FailureLimit
from fastim.presence.memory import MemoryPresence
from fastim.protocol import CloseCode
from fastim.push.base import PushVendor
from fastim.push.webhook import WebhookVendor
from fastim.sealing import SealKeys, SharedKey, StaticKey
from fastim.store.sqlite import SqliteStore

_log = logging.getLogger("fastim.app")

REST_STOP_S: Final = 2.0
ANSWER_SLACK_MS: Final = 30_000
"""How long a REST answer may take beyond the wait for its message to be stored."""


class App:
    """The parts are public for tests. on_fatal may be called more than once, always on the loop."""

    def __init__(
        self,
        config: Config,
        *,
        on_fatal: Callable[[BaseException], None],
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        self.clock = clock or SystemClock()
        self.status = Status()
        self.status.waiting_for = self._waiting_for
        self.status.metrics = self._metrics
        self.boot = 0
        self.dev_key: SigningKey | None = None
        self.dev_cert: Path | None = None
        self._on_fatal = on_fatal
        self._certificates: list[tuple[ssl.SSLContext, Path, Path]] = []
        self._vendors: list[PushVendor] = []
        self._ends: list[tuple[str, Callable[[], Awaitable[Any]]]] = []
        """What undoes the start so far; run backwards."""

    # ---------------------------------------------------------------------------------------------- start

    async def start(self) -> None:
        """Raises UsageError for what somebody configured, Unavailable for a store that cannot be opened."""
        try:
            await self._start()
        except BaseException:
            await self._undo()
            raise

    async def _start(self) -> None:
        config, clock = self.config, self.clock
        self._make_directory()
        authenticator = self._authenticator()
        self.store = await SqliteStore.open(config.store_path)
        self._ends.append(("store", self.store.close))
        self.boot = await self.store.next_boot(config.node.name)
        self.bus = MemoryBus(bound=config.bus.bound_records)
        # A generation is never below one that an earlier process used.
        self.presence = MemoryPresence(clock, self.boot << 32)
        self._make_vendors()
        rng = random.Random()
        self.dispatch = Dispatch(
            self.store, self.bus, self.presence, self._vendors, clock=clock, rng=rng,
            limits=dispatch_limits(config), kinds=config.kind_rules,
            holder=f"{config.node.name}.{self.boot}", on_fatal=self._on_fatal,
        )  # fmt: skip
        self._ends.append(("dispatch", self._stop_dispatch))
        await self.dispatch.start()
        self._make_node(authenticator, rng)
        self._ends.append(("node", self.node.stop))
        await self.node.start()
        self.figures = Figures(self.bus, self.dispatch.flows, self.node, self._acks)
        self.failures = FailureLimit(config.node.failures_per_minute, clock)
        await self._start_ingress()
        await self._start_listener()
        await self._start_rest(authenticator)

    def _make_directory(self) -> None:
        path = self.config.data_path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.config.store_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"data_dir is {str(path)!r}: {error.strerror}") from None

    def _authenticator(self) -> Authenticator:
        keys = self.config.token_keys()
        if self.config.dev:
            self.dev_key = create_dev_key(self.config.data_path)
            keys.append(self.dev_key.verifier())
        return Authenticator(
            keys, self.config.auth.audience, self.clock,
            on_failure=lambda reason: observe.AUTH_REFUSED.labels(reason).inc(),
        )  # fmt: skip

    def _make_vendors(self) -> None:
        webhook = self.config.push.webhook
        if webhook.url:
            secret = webhook.secret.get_secret_value().encode()
            deadline_ms = self.config.dispatch.push_deadline_ms
            vendor = WebhookVendor(webhook.url, secret, self.clock, deadline_ms=deadline_ms)
            self._vendors.append(vendor)
            self._ends.append(("webhook", vendor.close))

    def _make_node(self, authenticator: Authenticator, rng: random.Random) -> None:
        config = self.config
        self._acks, wheel = AckTable(), Wheel()
        self._hub = CoreHub(
            asyncio.get_running_loop(), self._acks, wheel, encode_error=encode_error,
            auth_ms=config.node.auth_timeout_ms,
        )  # fmt: skip
        self.node = Node(
            config.node.name, self.boot, store=self.store, bus=self.bus, presence=self.presence,
            hub=self._hub, acks=self._acks, wheel=wheel,
            verify=lambda token: authenticator.verify(token, need=Scope.CLIENT),
            clock=self.clock, rng=rng, limits=node_limits(config), kinds=config.kind_rules,
            seals=seal_keys(config), on_fatal=self._on_fatal,
        )  # fmt: skip
        authenticator.on_revoked(self.node.revoke)

    async def _start_ingress(self) -> None:
        api = self.config.api
        self.ingress = Ingress(
            self.bus, self.boot, reply_timeout_ms=api.reply_timeout_ms, max_waiting=api.max_waiting,
            on_fatal=self._on_fatal,
        )  # fmt: skip
        self._ends.append(("ingress", self.ingress.stop))
        await self.ingress.start()

    async def _start_rest(self, authenticator: Authenticator) -> None:
        config = self.config
        rest = Rest(
            store=self.store, presence=self.presence, ingress=self.ingress, verify=authenticator.verify,
            rate=SendRate(self.clock, config.node.rate_per_s, config.node.rate_burst),
            failures=self.failures, balancers=Balancers(config.node.balancers), clock=self.clock,
            kinds=config.kind_rules, limits=rest_limits(config), status=self.status, on_fatal=self._on_fatal,
        )  # fmt: skip
        await rest.start()
        self.http = HttpServer(
            rest.application, tls=self._tls(config.api.tls_cert, config.api.tls_key),
            max_connections=config.api.max_connections, request_timeout_ms=config.api.request_timeout_ms,
            answer_timeout_ms=config.api.reply_timeout_ms + ANSWER_SLACK_MS,
        )  # fmt: skip
        self._ends.append(("rest", lambda: self.http.stop(REST_STOP_S)))
        await self.http.start(*split_address(config.api.listen))

    async def _start_listener(self) -> None:
        node = self.config.node
        cert, key = node.tls_cert, node.tls_key
        if self.config.dev and not node.plain and not cert:
            made = dev_certificate(self.config.data_path)
            self.dev_cert = made[0]
            cert, key = str(made[0]), str(made[1])
        host, port = split_address(node.listen)
        listening = ListenerConfig(
            host=host, port=port, tls=self._tls(cert, key), dev=self.config.dev,
            balancers=tuple(node.balancers), proxy_protocol=node.proxy_protocol,
            origins=frozenset(node.origins), max_connections=node.max_connections,
            failures_per_minute=node.failures_per_minute,
            handshake_timeout_s=node.handshake_timeout_ms / 1000, tls_timeout_s=node.tls_timeout_ms / 1000,
            sndbuf_bytes=node.sndbuf_bytes, backlog=node.backlog,
        )  # fmt: skip
        self.listener = Listener(listening, self._hub, self.clock, self.failures)
        self._ends.append(("sockets", self._close_sockets))
        await self.listener.start()
        detach = attach_core_metrics(self._hub)

        async def forget_hub() -> None:
            detach()

        self._ends.append(("core metrics", forget_hub))

    def _tls(self, cert: str, key: str) -> ssl.SSLContext | None:
        if not cert:
            return None
        context = make_server_context(Path(cert), Path(key))
        self._certificates.append((context, Path(cert), Path(key)))
        return context

    def reload_certificates(self) -> None:
        """Read every certificate again. One that cannot be used is reported, and the old one stays."""
        for context, cert, key in self._certificates:
            try:
                reload_certificate(context, cert, key)
            except UsageError as error:
                _log.error("the certificate was not replaced", extra={"reason": str(error)})
            else:
                _log.info("the certificate was read again", extra={"file": str(cert)})

    # ------------------------------------------------------------------------------------------------ stop

    async def stop(self, reason: str = "restart", *, window_ms: int | None = None) -> bool:
        """End in order; False if a part could not end well. Safe to call twice, and after a failed start."""
        self.status.draining = self.status.draining or reason
        window_ms = self.config.node.drain_window_ms if window_ms is None else window_ms
        if hasattr(self, "listener"):
            self.listener.draining = True
            self.node.go_away(window_ms, reason)
            self.listener.stop_accepting()
            await self.listener.close_all(CloseCode.RESTART, reason, window_ms)
        return await self._undo()

    async def _undo(self) -> bool:
        good = True
        while self._ends:
            name, end = self._ends.pop()
            try:
                await end()
            except Exception:
                # What it could not finish, the next start takes up: it is in the store, or was not accepted.
                good = False
                _log.exception("%s did not end well", name)
        return good

    async def _close_sockets(self) -> None:
        self.listener.stop_accepting()
        await self.listener.close_all(CloseCode.RESTART)

    async def _stop_dispatch(self) -> None:
        await self.dispatch.stop()
        await self.dispatch.move_mark()

    # ---------------------------------------------------------------------------------------------- status

    def _waiting_for(self) -> list[str]:
        parts = {"dispatch": self.dispatch.ready, "node": self.node.ready}
        return [name for name, ready in parts.items() if not ready]

    async def _metrics(self) -> bytes:
        await self.figures.collect()
        return observe.exposition()


def dispatch_limits(config: Config) -> DispatchLimits:
    limits = _named(config.dispatch, DispatchLimits)
    wanted = config.dispatch.unknown_users
    limits["refuse_unknown"] = not config.dev if wanted == "auto" else wanted == "refuse"
    return DispatchLimits(**limits)


def node_limits(config: Config) -> NodeLimits:
    return NodeLimits(**(_named(config.node, NodeLimits) | _named(config.presence, NodeLimits)))


def seal_keys(config: Config) -> SealKeys | None:
    """What connections may be sealed with; with --dev also a key of the data directory. Raises UsageError."""
    node = config.node
    statics = [StaticKey.from_file(row.name, Path(row.file)) for row in node.seal_keys]
    if config.dev and not statics:
        statics.append(StaticKey.of_directory("dev", config.data_path))
    if not statics:
        return None
    shared = [SharedKey.from_file(row.name, Path(row.file)) for row in node.seal_shared]
    return SealKeys(statics, shared, required=node.require_sealed)


def rest_limits(config: Config) -> RestLimits:
    limits = _named(config.api, RestLimits)
    return RestLimits(**(limits | {"origins": frozenset(config.api.origins)}))


def _named(section: Any, limits: Any) -> dict[str, Any]:
    """The section's values that the limits have under the same name."""
    return {name: getattr(section, name) for name in limits.__struct_fields__ if hasattr(section, name)}
