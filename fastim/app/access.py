"""The node of a process: sockets of clients, sessions, delivery."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fastim._core.acks import AckTable
from fastim._core.conn import CoreHub
from fastim._core.wheel import Wheel
from fastim.app.ground import Ground, named
from fastim.auth import Scope
from fastim.clock import SystemClock
from fastim.config import Config, split_address
from fastim.errors import Fenced, Unavailable
from fastim.node.limits import NodeLimits
from fastim.node.server import Listener, ListenerConfig, attach_core_metrics
from fastim.node.service import Node, encode_error
from fastim.node.tls import dev_certificate
from fastim.protocol import CloseCode
from fastim.sealing import SealKeys, SharedKey, StaticKey

_log = logging.getLogger("fastim.app")

RETURN_MOST_S: Final = 2.0
"""Longest pause between two tries to come back after a fence."""


class Access:
    """Made when the backends are open; `start` needs nobody, `listen` is last: then clients come."""

    listener: Listener

    def __init__(self, ground: Ground, boot: int) -> None:
        self._ground = ground
        self.dev_cert: Path | None = None
        self._returning: asyncio.Task[None] | None = None
        self._leaving = False
        self.acks, self._wheel = AckTable(), Wheel()
        self.hub = CoreHub(
            asyncio.get_running_loop(), self.acks, self._wheel, encode_error=encode_error,
            auth_ms=ground.config.node.auth_timeout_ms,
        )  # fmt: skip
        self.node = self._make(boot)
        ground.authenticator.on_revoked(lambda token_id: self.node.revoke(token_id))

    @property
    def boot(self) -> int:
        return self.node.boot

    def _make(self, boot: int) -> Node:
        ground, config = self._ground, self._ground.config
        authenticator = ground.authenticator
        return Node(
            config.node.name, boot, store=ground.store, bus=ground.bus, presence=ground.presence,
            hub=self.hub, acks=self.acks, wheel=self._wheel,
            verify=lambda token: authenticator.verify(token, need=Scope.CLIENT),
            clock=ground.clock, rng=ground.rng, limits=node_limits(config), kinds=config.kind_rules,
            seals=seal_keys(config), adoptable=not config.embedded, on_fatal=ground.on_fatal,
            on_fenced=self._on_fenced,
        )  # fmt: skip

    async def start(self) -> None:
        """Inbox and lease."""
        self._ground.ends.push("node", self._stop)
        await self.node.start()

    async def _stop(self) -> None:
        self._leaving = True
        if self._returning is not None:
            await asyncio.wait({self._returning})
        await self.node.stop()

    def _on_fenced(self, error: Fenced) -> None:
        """This boot was adopted, its sockets are closed: clients find the next boot, or another node."""
        self._returning = asyncio.create_task(self._come_back(), name="node.return")

    async def _come_back(self) -> None:
        """The same listener and the same hub under a new boot. Tried until it works: nobody waits for it."""
        ground, tried = self._ground, 0
        await self.node.stop()
        while not self._leaving:
            try:
                self.node = self._make(await ground.store.next_boot(ground.config.node.name))
                await self.node.start()
            except (Unavailable, Fenced) as error:
                tried += 1
                _log.warning("the node cannot come back yet: %s", error)
                await asyncio.sleep(min(0.1 * 2**tried, RETURN_MOST_S))
            except Exception as error:
                ground.on_fatal(error)
                return
            else:
                _log.info("the node is back", extra={"boot": self.node.boot})
                return

    async def listen(self) -> None:
        """Raises UsageError."""
        ground, node = self._ground, self._ground.config.node
        cert, key = node.tls_cert, node.tls_key
        if ground.config.dev and not node.plain and not cert:
            made = dev_certificate(ground.config.data_path)
            self.dev_cert = made[0]
            cert, key = str(made[0]), str(made[1])
        host, port = split_address(node.listen)
        listening = ListenerConfig(
            host=host, port=port, tls=ground.tls(cert, key), dev=ground.config.dev,
            balancers=tuple(node.balancers), proxy_protocol=node.proxy_protocol,
            origins=frozenset(node.origins), max_connections=node.max_connections,
            failures_per_minute=node.failures_per_minute,
            handshake_timeout_s=node.handshake_timeout_ms / 1000, tls_timeout_s=node.tls_timeout_ms / 1000,
            sndbuf_bytes=node.sndbuf_bytes, backlog=node.backlog, reuse_port=node.workers > 1,
        )  # fmt: skip
        self.listener = Listener(listening, self.hub, ground.clock, ground.failures)
        ground.ends.push("sockets", self._close_sockets)
        await self.listener.start()
        detach = attach_core_metrics(self.hub)

        async def forget_hub() -> None:
            detach()

        ground.ends.push("core metrics", forget_hub)

    async def leave(self, reason: str, window_ms: int) -> None:
        """Send the clients elsewhere, spread over the window; nobody new is taken."""
        if not hasattr(self, "listener"):
            return
        self.listener.draining = True
        self.node.go_away(window_ms, reason)
        self.listener.stop_accepting()
        await self.listener.close_all(CloseCode.RESTART, reason, window_ms)

    async def _close_sockets(self) -> None:
        self.listener.stop_accepting()
        await self.listener.close_all(CloseCode.RESTART)

    def waiting_for(self) -> Mapping[str, bool]:
        return {"node": self.node.ready}


def prepare_development(config: Config) -> None:
    """Make what --dev makes before several processes would make it at once."""
    if not config.dev:
        return
    ground = Ground(config, SystemClock(), lambda error: None)
    ground.make_directory()
    _ = ground.authenticator
    seal_keys(config)
    if not config.node.plain and not config.node.tls_cert:
        dev_certificate(config.data_path)


def node_limits(config: Config) -> NodeLimits:
    return NodeLimits(**(named(config.node, NodeLimits) | named(config.presence, NodeLimits)))


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
