"""What the parts count for themselves, as metrics, at the moment somebody scrapes.

The parts count in plain integers that only grow; a scrape adds what has grown since the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from fastim import observe
from fastim._core.acks import AckTable
from fastim.bus.base import DISPATCH_GROUP, NODE_GROUP, SUBMIT, UNDELIVERED, Bus
from fastim.dispatch.ledger import Flows
from fastim.node.service import Node


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
    """Of one process."""

    def __init__(self, bus: Bus, flows: Flows, node: Node, acks: AckTable) -> None:
        self._bus = bus
        self._flows = flows
        self._node = node
        self._acks = acks
        self._seen: dict[tuple[str, str], int] = {}

    async def collect(self) -> None:
        """Bring every metric up to date."""
        self._take("node", self._node.flows(), _NODE)
        self._take("dispatch", self._flows.as_dict(), _DISPATCH)
        observe.SESSIONS.set(self._node.sessions)
        observe.IN_FLIGHT.set(len(self._acks))
        topics = {SUBMIT: DISPATCH_GROUP, UNDELIVERED: DISPATCH_GROUP, self._node.inbox: NODE_GROUP}
        for topic, group in topics.items():
            # An inbox is named after its boot: a label must not grow with every start.
            label = "inbox" if topic == self._node.inbox else topic
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
