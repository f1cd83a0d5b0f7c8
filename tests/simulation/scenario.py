"""What happens in a run, drawn from its seed before the run starts: people, sends, faults.

Pure data, so that a failing seed can be read (`--verbose` prints it). The system under test draws from a
generator of its own, so a change in the code does not change the plan.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

from fastim.model import Flag

WARM_UP_S: Final = 1.0
"""Everybody who ever comes connects once before the first send and the first fault."""


@dataclass
class DevicePlan:
    """One device. It is connected from the start except in `offline` (from, to) seconds."""

    user: str
    device: str
    acks: bool = True
    offline: list[tuple[float, float]] = field(default_factory=list)
    returns: bool = True
    acks_single: bool = False
    """It acknowledges messages one by one (ACKS), as they are stored."""
    slow_s: float = 0.0
    """It takes this long to read each packet."""
    rtt_s: float = 0.02


@dataclass
class SendPlan:
    at_s: float
    device: tuple[str, str] | None
    """None: a service caller."""
    sender: str
    conv: str
    loss_after_ms: int
    """0: must never be lost."""
    count: int = 1
    flags: int = 0
    size: int = 0
    """The body is filled up to so many bytes."""


@dataclass
class FaultPlan:
    at_s: float
    kind: str
    for_s: float = 0.0
    device: tuple[str, str] | None = None
    number: int = 0

    def __str__(self) -> str:
        who = "" if self.device is None else f" {self.device[0]}/{self.device[1]}"
        return f"{self.at_s:7.3f} {self.kind}{who} for {self.for_s:.3f} s, n={self.number}"


@dataclass
class Trigger:
    """A directed nemesis: a fault at the moment at which something is told for the n-th time."""

    told: str
    """Part of a line of the trace."""
    nth: int
    fault: FaultPlan
    """Its at_s counts from that moment."""


@dataclass
class Plan:
    seed: int
    devices: list[DevicePlan] = field(default_factory=list)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sends: list[SendPlan] = field(default_factory=list)
    faults: list[FaultPlan] = field(default_factory=list)
    triggers: list[Trigger] = field(default_factory=list)
    placed: dict[str, str] = field(default_factory=dict)
    """User -> the node that is dialled while it listens (of a cluster; others dial any)."""
    end_s: float = 30.0
    """No fault and no send after this; then everything must settle."""
    settle_s: float = 260.0

    def users(self) -> list[str]:
        return list(dict.fromkeys(device.user for device in self.devices))

    def lines(self) -> list[str]:
        out = [f"seed {self.seed}: {len(self.sends)} sends until {self.end_s:.1f} s"]
        out += [f"  {device}" for device in self.devices]
        out += [f"  {send}" for send in self.sends]
        out += [f"  fault {fault}" for fault in self.faults]
        return out


FAULTS: Final = (
    # (kind, weight)
    ("cut", 6),
    ("half_open", 3),
    ("stall", 2),
    ("restart_app", 3),
    ("crash", 4),
    ("power", 3),
    ("crash_in_commit", 2),
    ("crash_again", 1),
    ("pause", 2),
    ("presence_flush", 3),
    ("disk_full", 2),
    ("slow_disk", 2),
    ("stop", 1),
    ("bus_away", 2),
    ("presence_away", 2),
    ("slow_presence", 2),
    ("jitter", 2),
    ("clock_jump", 1),
)


CLUSTER_FAULTS: Final = (
    ("cut", 4),
    ("half_open", 2),
    ("stall", 1),
    ("restart_app", 2),
    ("jitter", 1),
    ("node_kill", 6),
    ("node_pause", 5),
    ("node_stop", 2),
    ("dispatch_kill", 5),
    ("dispatch_pause", 4),
    ("dispatch_stop", 1),
    ("presence_flush", 3),
    ("flush_while_paused", 2),
    ("presence_away", 2),
    ("slow_presence", 1),
    ("bus_away", 3),
    ("slow_bus", 1),
    ("store_away", 2),
    ("slow_store", 1),
)
LENGTHS_S: Final = (0.05, 0.5, 3.0, 9.0, 14.0)
CLUSTER_LENGTHS_S: Final = (0.05, 0.5, 3.0, 6.0, 9.0, 12.0, 16.0, 25.0)
"""Around the ends of leases, adoptions and memberships."""


def draw_cluster(seed: int) -> Plan:
    """The same people and sends; faults of processes and servers, some as long as an adoption."""
    return draw(seed, CLUSTER_FAULTS, CLUSTER_LENGTHS_S)


def draw(
    seed: int,
    faults: tuple[tuple[str, int], ...] = FAULTS,
    lengths_s: tuple[float, ...] = LENGTHS_S,
) -> Plan:
    """The plan of a seed. Quiet runs, stormy runs, and runs with one kind of fault all occur."""
    rng = random.Random(f"plan {seed}")
    plan = Plan(seed)
    plan.end_s = rng.choice((12.0, 20.0, 30.0)) if rng.random() < 0.95 else 150.0
    names = [f"u{n}" for n in range(rng.randint(2, 4))]
    for user in names:
        for number in range(rng.choice((1, 1, 2))):
            plan.devices.append(DevicePlan(user, f"d{number}", rtt_s=rng.choice((0.005, 0.04, 0.3))))
    if rng.random() < 0.35:
        plan.devices.append(DevicePlan("mute", "d0", acks=False, returns=rng.random() < 0.7))
    if rng.random() < 0.5:
        start = rng.uniform(WARM_UP_S, 4.0)
        plan.devices.append(DevicePlan("late", "d0", offline=[(start, plan.end_s)]))
    if rng.random() < 0.5:
        plan.devices.append(
            DevicePlan("gone", "d0", offline=[(rng.uniform(WARM_UP_S, 6.0), 1e9)], returns=False)
        )
    if rng.random() < 0.25:
        # A second device that nobody has seen before it connects in the middle.
        plan.devices.append(DevicePlan(rng.choice(names), "new", offline=[(0.0, rng.uniform(3.0, 10.0))]))
    if rng.random() < 0.15:
        # A user whom nobody has ever seen until then: clients may not write to him, services may.
        plan.devices.append(DevicePlan("fresh", "d0", offline=[(0.0, rng.uniform(3.0, 10.0))]))
    for device in plan.devices:
        if device.user in names and rng.random() < 0.4:
            at = rng.uniform(2.0, plan.end_s - 3.0)
            device.offline.append((at, at + rng.choice((0.5, 3.0, 8.0, plan.end_s))))
        device.acks_single = rng.random() < 0.3
        if rng.random() < 0.1:
            device.slow_s = rng.choice((0.01, 0.1))
    everybody = plan.users()
    convs: list[tuple[str, tuple[str, ...]]] = []
    if len(everybody) > 2 or rng.random() < 0.5:
        members = tuple(rng.sample(everybody, rng.randint(2, len(everybody))))
        plan.groups["g:team"] = members
        convs.append(("g:team", members))
    for first in everybody:
        for second in everybody:
            if first < second and rng.random() < 0.5:
                convs.append((f"p:{first}:{second}", (first, second)))
    if not convs:
        convs.append((f"p:{names[0]}:{names[1]}", (names[0], names[1])))
    convs = convs[:4]
    senders = [d for d in plan.devices if d.user in names]
    for _ in range(rng.randint(5, 25)):
        conv, members = rng.choice(convs)
        at = rng.uniform(WARM_UP_S, plan.end_s - 1.0)
        loss = rng.choice((0, 0, 0, 0, 0, 0, 400, 3_000, 15_000, 3_600_000))
        count = rng.choice((1, 1, 1, 2, 5))
        size = rng.choice((2_000, 20_000, 60_000)) if rng.random() < 0.1 else 0
        flags = rng.choice((0, 0, 0, 0, int(Flag.NO_PUSH), int(Flag.SILENT)))
        if rng.random() < 0.05:
            user = rng.choice(everybody)
            plan.sends.append(SendPlan(at, None, "system", f"s:{user}", loss, 1, flags, size))
            continue
        able = [d for d in senders if d.user in members]
        if not able or rng.random() < 0.2:
            plan.sends.append(SendPlan(at, None, rng.choice(members), conv, loss, 1, flags, size))
        else:
            device = rng.choice(able)
            where = (device.user, device.device)
            plan.sends.append(SendPlan(at, where, device.user, conv, loss, count, flags, size))
    if rng.random() < 0.15:
        # One burst that fills the window of 128 messages.
        conv, members = rng.choice(convs)
        able = [d for d in senders if d.user in members]
        if able:
            device = rng.choice(able)
            at = rng.uniform(WARM_UP_S, plan.end_s - 2.0)
            plan.sends.append(SendPlan(at, (device.user, device.device), device.user, conv, 0, 150))
    plan.sends.sort(key=lambda s: s.at_s)
    mood = rng.random()
    if mood < 0.08:
        kinds: tuple[str, ...] = ()
    elif mood < 0.4:
        kinds = (rng.choice([k for k, _ in faults]),) * rng.randint(1, 4)
    else:
        kinds = tuple(rng.choices([k for k, _ in faults], [w for _, w in faults], k=rng.randint(1, 8)))
    for kind in kinds:
        at = rng.uniform(WARM_UP_S, plan.end_s - 1.0)
        if plan.sends and rng.random() < 0.6:
            # Near a send, where something is under way.
            at = max(WARM_UP_S, rng.choice(plan.sends).at_s + rng.choice((0.0, 0.002, 0.01, 0.03, 0.1, 1.0)))
        at = min(at, plan.end_s - 0.5)
        device = rng.choice(plan.devices)
        for_s = min(rng.choice(lengths_s), plan.end_s - at)
        plan.faults.append(FaultPlan(at, kind, for_s, (device.user, device.device), rng.randrange(60)))
    plan.faults.sort(key=lambda f: f.at_s)
    return plan
