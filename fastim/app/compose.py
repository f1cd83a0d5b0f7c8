"""One process: which parts it has, in which order they start and end.

 serve     dispatch, node and api over embedded backends, or over servers
 node      access to clients        ┐
 dispatch  storing and routing      ├ over servers, several of each
 api       REST                     ┘

 start   store ─▶ boots ─▶ bus ─▶ dispatch (recovers, takes sends) ─▶ node ─▶ api inbox ─▶ ws, REST listen
 stop    GOAWAY, no new sockets ─▶ sockets closed over the drain window ─▶ REST finishes what it has in hand
         ─▶ node flushes ─▶ dispatch finishes its batch ─▶ the settled mark moves once more ─▶ bus, store

Nothing listens before what it needs is ready, and nothing is closed before what uses it has ended.

A1  a start that fails leaves nothing open              tests/system/test_app.py
A2  after stop() everything acknowledged is settled     same
A3  parts in processes of their own keep everything, whichever of them is killed or stands still
                                                        tests/system/test_cluster.py
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

from fastim import observe
from fastim.api.http import HttpServer
from fastim.api.rest import Status
from fastim.app.access import Access
from fastim.app.answering import Answering
from fastim.app.backends import make_bus, make_presence, open_store
from fastim.app.dispatching import Dispatching, dispatch_limits
from fastim.app.figures import Figures
from fastim.app.ground import Ground
from fastim.app.statuspage import StatusPage
from fastim.auth import SigningKey
from fastim.clock import Clock, SystemClock
from fastim.config import Config, Role, split_address
from fastim.dispatch.service import Dispatch
from fastim.dispatch.settled import ask_due_above
from fastim.errors import StoreUnavailable
from fastim.node.server import Listener
from fastim.node.service import Node

_log = logging.getLogger("fastim.app")

_STATUS_CONNECTIONS: Final = 64
_STATUS_MS: Final = 5_000


class _Part(Protocol):
    def waiting_for(self) -> Mapping[str, bool]: ...


class App:
    """The parts are public for tests. on_fatal may be called more than once, always on the loop."""

    def __init__(
        self,
        config: Config,
        *,
        on_fatal: Callable[[BaseException], None],
        clock: Clock | None = None,
        role: Role = "serve",
    ) -> None:
        self.config = config
        self.role = role
        self.clock = clock or SystemClock()
        self.ground = Ground(config, self.clock, on_fatal)
        self.status = Status()
        self.status.waiting_for = self._waiting_for
        self.status.metrics = self._metrics
        self.access: Access | None = None
        self.dispatching: Dispatching | None = None
        self.answering: Answering | None = None
        self._figures: Figures | None = None
        self._rebuilding: set[asyncio.Task[None]] = set()
        self._on_fatal = on_fatal

    # ---------------------------------------------------------------------------------------------- start

    async def start(self) -> None:
        """Raises UsageError for what somebody configured, Unavailable for a backend that does not answer."""
        try:
            await self._start()
        except BaseException:
            await self.ground.ends.run()
            raise

    async def _start(self) -> None:
        config, ground = self.config, self.ground
        ground.make_directory()
        if self._has("node", "api"):
            _ = ground.authenticator  # what is wrong with a key is said before anything is opened
        ground.store = await open_store(config)
        ground.ends.push("store", ground.store.close)
        boots = await self._boots()
        ground.bus = make_bus(config, f"{self.role}.{self.name}", self._on_gap, ground.ends)
        ground.presence = make_presence(config, self.clock, boots.get("node", 0))
        ground.ends.push("presence", ground.presence.close)
        if self._has("dispatch"):
            self.dispatching = Dispatching(ground, boots["dispatch"])
            await self.dispatching.start()
        if self._has("node"):
            self.access = Access(ground, boots["node"])
            await self.access.start()
        if self._has("api"):
            self.answering = Answering(ground, boots["api"], self.status)
            await self.answering.start()
        self._figures = Figures(ground.bus, self.dispatching, self.access)
        if self.access is not None:
            await self.access.listen()
        if self.answering is not None:
            await self.answering.listen()
        await self._show_status()

    def _has(self, *parts: str) -> bool:
        return self.role == "serve" or self.role in parts

    async def _boots(self) -> dict[str, int]:
        """Every part counts its starts under a name of its own."""
        config, boots = self.config, {}
        names = {
            "node": config.node.name,
            "dispatch": f"dispatch:{config.dispatch.name}",
            "api": f"api:{config.api.name}",
        }
        for part, name in names.items():
            if self._has(part):
                boots[part] = await self.ground.store.next_boot(name)
        return boots

    def _on_gap(self, topic: str) -> None:
        """What the bus lost of a node's inbox the store has: sessions look, and who has none gets due rows.

        Of `undelivered` nothing is owed (its due rows are durable), and what is lost of `submit` was never
        accepted; the bus has counted an alarm.
        """
        if self.access is None or topic != self.access.node.inbox:
            return
        self.access.node.look_again()
        task = asyncio.create_task(self._rebuild(), name="app.rebuild")
        self._rebuilding.add(task)
        task.add_done_callback(self._rebuilding.discard)

    async def _rebuild(self) -> None:
        store, limits = self.ground.store, dispatch_limits(self.config)
        while True:
            try:
                now_ms = self.clock.wall_ms()
                asked = await ask_due_above(
                    store, await store.head_msg_id(), now_ms + limits.first_due_ms, now_ms,
                    f"{self.name}.{self.boot}", limits.recover_batch,
                )  # fmt: skip
            except StoreUnavailable as error:
                _log.warning("what the bus lost cannot be rebuilt yet: %s", error)
                await asyncio.sleep(limits.retry_most_ms / 1000)
            else:
                _log.warning("rebuilt from the store what the bus lost", extra={"due_rows": asked})
                return

    async def _show_status(self) -> None:
        """/health, /ready and /metrics of a process without REST."""
        config = self.config
        listen = {"node": config.node.status_listen, "dispatch": config.dispatch.status_listen}.get(self.role)
        if not listen:
            return
        page = HttpServer(
            StatusPage(self.status), tls=None, max_connections=_STATUS_CONNECTIONS,
            request_timeout_ms=_STATUS_MS, answer_timeout_ms=_STATUS_MS,
        )  # fmt: skip
        self.ground.ends.push("status", lambda: page.stop(0.0))
        await page.start(*split_address(listen))

    # ------------------------------------------------------------------------------------------------ stop

    async def stop(self, reason: str = "restart", *, window_ms: int | None = None) -> bool:
        """End in order; False if a part could not end well. Safe to call twice, and after a failed start."""
        self.status.draining = self.status.draining or reason
        if self.access is not None:
            window_ms = self.config.node.drain_window_ms if window_ms is None else window_ms
            await self.access.leave(reason, window_ms)
        for task in self._rebuilding:
            task.cancel()
        return await self.ground.ends.run()

    # ---------------------------------------------------------------------------------------------- status

    def _waiting_for(self) -> list[str]:
        parts: list[_Part] = [part for part in (self.dispatching, self.access) if part is not None]
        return [name for part in parts for name, ready in part.waiting_for().items() if not ready]

    async def _metrics(self) -> bytes:
        if self._figures is not None:
            await self._figures.collect()
        return observe.exposition()

    # ----------------------------------------------------------------------------- what it is, and its parts

    @property
    def name(self) -> str:
        """Of this process among those of its role."""
        config = self.config
        return {"dispatch": config.dispatch.name, "api": config.api.name}.get(self.role, config.node.name)

    @property
    def boot(self) -> int:
        """How often this part was started."""
        part = self.access or self.dispatching or self.answering
        return part.boot if part is not None else 0

    @property
    def node(self) -> Node:
        assert self.access is not None
        return self.access.node

    @property
    def listener(self) -> Listener:
        assert self.access is not None
        return self.access.listener

    @property
    def dispatch(self) -> Dispatch:
        assert self.dispatching is not None
        return self.dispatching.dispatch

    @property
    def http(self) -> HttpServer:
        assert self.answering is not None
        return self.answering.http

    @property
    def dev_key(self) -> SigningKey | None:
        return self.ground.dev_key

    @property
    def dev_cert(self) -> Path | None:
        return self.access.dev_cert if self.access is not None else None

    def reload_certificates(self) -> None:
        """For SIGHUP."""
        self.ground.reload_certificates()
