"""Errors of a client, against which the server cannot help: the judges must see them all the same."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastim import model
from fastim import protocol as p
from fastim._core.frame import split
from tests.simulation.devices import App
from tests.simulation.planted.stage import (
    B,
    from_a,
    from_b,
    patch,
    planted,
    stage,
    when,
)
from tests.simulation.scenario import FaultPlan


@planted(
    "ack before persist",
    ("loss", "ledger"),
    1,
    stage(FaultPlan(5.2, "restart_app", 0.0, B), sends=(from_a(5.0),), slow_s=0.3),
)
def _(stack: ExitStack) -> None:
    """A device acknowledges what it has received, and stores it when it gets round to it."""
    on_packet = App.on_packet

    def acked_on_arrival(self: Any, packet: bytes) -> None:
        on_packet(self, packet)
        frames = [p.decode(op, packet[start:end]) for op, start, end in split(packet)]
        newest = max((getattr(frame, "tag", 0) for frame in frames), default=0)
        if newest and self.live and self.device.plan.acks:
            self._send(p.Ack(newest))

    patch(stack, App, "on_packet", acked_on_arrival)


@planted(
    "no dedupe",
    ("duplicate",),
    1,
    stage(sends=(from_a(5.0),), triggers=(when("b/d0 shows", 1, "crash"),)),
)
def _(stack: ExitStack) -> None:
    """A device shows whatever comes, also what it has."""
    ordered = App.ordered

    def shown_again(self: Any, conv: str, epoch: int, seq: int, tag: int, what: Any) -> None:
        if not isinstance(what, p.Skip) and seq <= self.phone.last[conv]:
            self.show(conv, what)
        ordered(self, conv, epoch, seq, tag, what)

    patch(stack, App, "ordered", shown_again)


@planted(
    "no reorder",
    ("order", "loss"),
    2,
    stage(sends=(from_a(5.0, 5), from_b(6.0)), offline=(4.0, 8.0)),
)
def _(stack: ExitStack) -> None:
    """A device shows what comes, when it comes, and takes the highest for where it stands."""

    def at_once(self: Any, conv: str, epoch: int, seq: int, tag: int, what: Any) -> None:
        last = what.to_seq if isinstance(what, p.Skip) else seq
        if last <= self.phone.last[conv]:
            self.stored(tag)
        else:
            self.apply(conv, [tag], what)

    patch(stack, App, "ordered", at_once)


@planted(
    "own messages re-ordered by the outbox",
    ("order",),
    1,
    stage(FaultPlan(4.99, "bus_away", 3.0), sends=(from_a(5.0, 5),)),
)
def _(stack: ExitStack) -> None:
    """A device does not wait for the answer to one SEND before it sends the next of the conversation."""

    def pump(self: Any, conv: str) -> None:
        flying = self.__dict__.setdefault("planted_flying", set())
        for sub in list(self.phone.outbox[conv]):
            if self.live and sub.client_id not in flying:
                flying.add(sub.client_id)
                self.device.heard_of[sub.client_id.hex()] = sub
                item = p.SendItem(sub.client_id, model.Kind.TEXT, sub.body, sub.loss_time_ms, sub.flags)
                self._send(p.Send(conv, [item]))
                self.world.outside.call_later(2.0, again, self, conv, sub)

    def again(self: Any, conv: str, sub: Any) -> None:
        self.planted_flying.discard(sub.client_id)
        if not self.over.is_set():
            pump(self, conv)

    patch(stack, App, "pump", pump)
