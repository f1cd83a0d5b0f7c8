"""How an error is planted, and the directed nemesis that brings it out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

from tests.simulation.scenario import DevicePlan, FaultPlan, Plan, SendPlan, Trigger


@dataclass(frozen=True)
class Planted:
    """One error."""

    name: str
    story: str
    kinds: tuple[str, ...]
    seed: int
    plant: Callable[[ExitStack], None]
    plan: Callable[[Plan], None] | None = None
    model: str = "single"


PLANTED: dict[str, Planted] = {}


def planted(
    name: str,
    kinds: tuple[str, ...],
    seed: int,
    plan: Callable[[Plan], None] | None = None,
    model: str = "single",
) -> Callable[[Callable[[ExitStack], None]], Callable[[ExitStack], None]]:
    def register(plant: Callable[[ExitStack], None]) -> Callable[[ExitStack], None]:
        PLANTED[name] = Planted(name, (plant.__doc__ or "").strip(), kinds, seed, plant, plan, model)
        return plant

    return register


def patch(stack: ExitStack, owner: Any, name: str, replacement: Any) -> Any:
    """Replace an attribute for the run; returns what it was."""
    before = getattr(owner, name)
    stack.enter_context(mock.patch.object(owner, name, replacement))
    return before


def does_nothing(*_args: Any, **_kwargs: Any) -> None:
    """In place of a step that was forgotten."""


A: Final = ("a", "d0")
B: Final = ("b", "d0")
TALK: Final = "p:a:b"
GONE: Final = 1e9


def stage(
    *faults: FaultPlan,
    sends: tuple[SendPlan, ...] = (),
    triggers: tuple[Trigger, ...] = (),
    offline: tuple[float, float] | None = None,
    slow_s: float = 0.0,
    acks: bool = True,
    devices_of_b: int = 1,
    end_s: float = 15.0,
) -> Callable[[Plan], None]:
    """A directed nemesis: a and b, and exactly this; the seed only draws the timing.

    offline, slow_s, acks: of b, who does not come back if he is offline until GONE.
    """

    def bend(plan: Plan) -> None:
        plan.devices = [DevicePlan("a", "d0", rtt_s=0.002)]
        for number in range(devices_of_b):
            plan.devices.append(
                DevicePlan(
                    "b",
                    f"d{number}",
                    acks=acks,
                    offline=[offline] if offline else [],
                    returns=offline is None or offline[1] != GONE,
                    slow_s=slow_s,
                    rtt_s=0.005,
                )
            )
        plan.groups = {}
        plan.sends = list(sends)
        plan.faults = sorted(faults, key=lambda fault: fault.at_s)
        plan.triggers = [Trigger(one.told, one.nth, one.fault) for one in triggers]
        plan.end_s = end_s

    return bend


def cluster_stage(
    *faults: FaultPlan, placed: dict[str, str] | None = None, **more: Any
) -> Callable[[Plan], None]:
    """The same in a cluster: a dials n2 and b n1, while they listen. number of a fault: 0 is n1 or d1."""
    bend = stage(*faults, **more)

    def bend_and_place(plan: Plan) -> None:
        bend(plan)
        plan.placed = {"a": "n2", "b": "n1"} if placed is None else placed

    return bend_and_place


def dead_then_killed(at_s: float) -> Callable[[Plan], None]:
    """b's connection is dead and nobody knows; a message is written to it; the server is killed."""
    return stage(
        FaultPlan(4.9, "half_open", 0.0, B),
        FaultPlan(at_s, "crash"),
        sends=(from_a(5.5),),
        offline=(5.0, GONE),
    )


def cut_before_it_reads() -> Callable[[Plan], None]:
    """b has received the message and not read it when its connection ends; it never comes back."""
    return stage(FaultPlan(5.3, "cut", 0.0, B), sends=(from_a(5.0),), offline=(5.3, GONE), slow_s=2.0)


def from_a(at_s: float, count: int = 1) -> SendPlan:
    return SendPlan(at_s, A, "a", TALK, 0, count)


def from_b(at_s: float, count: int = 1) -> SendPlan:
    return SendPlan(at_s, B, "b", TALK, 0, count)


def when(
    told: str, nth: int, kind: str, after_s: float = 0.0, device: tuple[str, str] | None = None
) -> Trigger:
    """A fault at the moment at which the trace says something for the n-th time."""
    return Trigger(told, nth, FaultPlan(after_s, kind, 0.0, device))
