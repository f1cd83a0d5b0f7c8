"""Who takes part in a kill run, who talks to whom, and how each device misbehaves. Drawn from the seed.

steady   the SDK, restarted now and then, its local store kept
shaky    the SDK, with spells: offline, deaf, mute, restarted
mute     never the SDK: reads, never acknowledges, to the end
gone     connects once, then never again
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

GROUP = "g:team"


@dataclass(frozen=True)
class DevicePlan:
    user: str
    device: str
    manner: str
    """steady, shaky, mute or gone."""


@dataclass
class Cast:
    devices: list[DevicePlan] = field(default_factory=list)
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """conv -> users; s: conversations have one."""
    callers: list[str] = field(default_factory=list)
    """Names of the REST senders."""

    def users(self) -> list[str]:
        return list(dict.fromkeys(plan.user for plan in self.devices))

    def convs_of(self, user: str) -> list[str]:
        """Where a person may send: pairs and groups, not s:."""
        return [conv for conv, users in self.members.items() if user in users and conv[0] != "s"]


def pair(first: str, second: str) -> str:
    low, high = sorted((first, second))
    return f"p:{low}:{high}"


def draw(rng: random.Random, *, pairs: int = 6, group: int = 8, callers: int = 2) -> Cast:
    """A group of `group`, `pairs` 1:1 conversations, some users with two devices, callers writing to s:."""
    cast = Cast()
    team = [f"team{n}" for n in range(group)]
    cast.members[GROUP] = tuple(team)
    for n, user in enumerate(team):
        cast.devices.append(DevicePlan(user, "d0", "shaky" if n % 3 == 1 else "steady"))
        if n < 2:
            cast.devices.append(DevicePlan(user, "d1", "shaky"))
    for n in range(pairs):
        left, right = f"left{n}", f"right{n}"
        cast.members[pair(left, right)] = (left, right)
        cast.devices.append(DevicePlan(left, "d0", "steady"))
        cast.devices.append(DevicePlan(right, "d0", "shaky" if n % 2 else "steady"))
        if n == 0:
            cast.devices.append(DevicePlan(right, "d1", "shaky"))
    for manner in ("mute", "gone"):
        friend = rng.choice(team)
        cast.members[pair(friend, manner)] = tuple(sorted((friend, manner)))
        cast.devices.append(DevicePlan(manner, "d0", manner))
    for n in range(callers):
        cast.callers.append(f"caller{n}")
    for user in [*rng.sample(team, 3), "left0", "mute", "gone"]:
        cast.members[f"s:{user}"] = (user,)
    return cast
