"""What the parts count for themselves, as metrics, at the moment somebody scrapes.

The parts count in plain integers that only grow; a scrape adds what has grown since the last one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final, Protocol

from fastim import observe
from fastim.app.access import Access
from fastim.app.dispatching import Dispatching
from fastim.bus.base import DISPATCH_GROUP, NODE_GROUP, SUBMIT, UNDELIVERED, Bus
from fastim.errors import Unavailable


class _Grows(Protocol):
    def inc(self, amount: float = 1) -> None: ...


_NODE: Final[Mapping[str, tuple[_Grows, ...]]] = {
    "acked": (observe.ACKS, observe.OBLIGATIONS_MOVED.labels("acked")),
    "expired": (observe.OBLIGATIONS_MOVED.labels("expired"),),
    "probes": (observe.PROBES,),
    "submitted": (observe.SUBMITTED.labels("ws"),),
}
_DISPATCH: Final[Mapping[str, tuple[_Grows, ...]]] = {
    "created": (observe.OBLIGATIONS_CREATED,),
    "stored": (observe.APPENDED.labels("stored"),),
    "repeated": (observe.APPENDED.labels("repeated"),),
    "nudges": (observe.NUDGES,),
    "parked": (observe.PARKS,),
    "push_ok": (observe.PUSHES.labels("ok"),),
    "push_gone": (observe.PUSHES.labels("gone"),),
    "push_retry": (observe.PUSHES.labels("retry"),),
    "push_gave_up": (observe.PUSHES.labels("gave_up"),),
    "push_expired": (observe.PUSHES.labels("expired"),),
    "push_no_vendor": (observe.PUSHES.labels("no_vendor"),),
    "push_silent": (observe.PUSHES.labels("silent"),),
}


class Figures:
    """Of one process, as far as it has the parts."""

    def __init__(self, bus: Bus, dispatching: Dispatching | None, access: Access | None) -> None:
        self._bus = bus
        self._dispatching = dispatching
        self._access = access
        self._seen: dict[tuple[str, str], int] = {}

    async def collect(self) -> None:
        """Bring every metric up to date."""
        if self._access is not None:
            node = self._access.node
            self._take("node", node.flows(), _NODE)
            observe.SESSIONS.set(node.sessions)
            observe.IN_FLIGHT.set(len(self._access.acks))
            # An inbox is named after its boot: a label must not grow with every start.
            await self._lag("inbox", node.inbox, NODE_GROUP)
        if self._dispatching is not None:
            self._take("dispatch", self._dispatching.dispatch.flows.as_dict(), _DISPATCH)
            for topic in (SUBMIT, UNDELIVERED):
                await self._lag(topic, topic, DISPATCH_GROUP)

    async def _lag(self, label: str, topic: str, group: str) -> None:
        """A bus that is away is seen by what stays as it was."""
        with contextlib.suppress(Unavailable):
            observe.BUS_LAG.labels(label).set(await self._bus.lag(topic, group))

    def _take(self, part: str, counts: Mapping[str, int], named: Mapping[str, tuple[_Grows, ...]]) -> None:
        for name, count in counts.items():
            grown = count - self._seen.get((part, name), 0)
            if not grown:
                continue
            self._seen[part, name] = count
            for metric in named.get(name, ()):
                metric.inc(grown)
            if name in named:
                continue
            if name.startswith("refused."):
                observe.APPENDED.labels(name.removeprefix("refused.")).inc(grown)
            else:
                observe.FLOWS.labels(part, name).inc(grown)
