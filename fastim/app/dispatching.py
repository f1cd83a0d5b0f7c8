"""The dispatcher of a process: storing, routing, retries, push."""

from __future__ import annotations

from collections.abc import Mapping

from fastim.app.ground import Ground, named
from fastim.config import Config
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.service import Dispatch
from fastim.push.base import PushVendor
from fastim.push.webhook import WebhookVendor


class Dispatching:
    """Made when the backends are open."""

    def __init__(self, ground: Ground, boot: int) -> None:
        config = ground.config
        self._ground = ground
        self.boot = boot
        self.dispatch = Dispatch(
            ground.store, ground.bus, ground.presence, self._vendors(), clock=ground.clock, rng=ground.rng,
            limits=dispatch_limits(config), kinds=config.kind_rules, holder=f"{config.dispatch.name}.{boot}",
            on_fatal=ground.on_fatal,
        )  # fmt: skip

    def _vendors(self) -> list[PushVendor]:
        config = self._ground.config
        webhook = config.push.webhook
        if not webhook.url:
            return []
        secret = webhook.secret.get_secret_value().encode()
        deadline_ms = config.dispatch.push_deadline_ms
        vendor = WebhookVendor(webhook.url, secret, self._ground.clock, deadline_ms=deadline_ms)
        self._ground.ends.push("webhook", vendor.close)
        return [vendor]

    async def start(self) -> None:
        """Recover what an earlier process of an embedded bus left, then take sends."""
        self._ground.ends.push("dispatch", self._stop)
        await self.dispatch.start()

    async def _stop(self) -> None:
        await self.dispatch.stop()
        await self.dispatch.move_mark()

    def waiting_for(self) -> Mapping[str, bool]:
        return {"dispatch": self.dispatch.ready}


def dispatch_limits(config: Config) -> DispatchLimits:
    limits = named(config.dispatch, DispatchLimits)
    wanted = config.dispatch.unknown_users
    limits["refuse_unknown"] = not config.dev if wanted == "auto" else wanted == "refuse"
    if not config.embedded:
        limits["submit_partitions"] = config.bus.submit_partitions
        limits["undelivered_partitions"] = config.bus.undelivered_partitions
        # What an embedded bus forgets, Kafka keeps: docs/adr/0100.
        limits["mark_interval_ms"] = 0
    return DispatchLimits(**limits)
