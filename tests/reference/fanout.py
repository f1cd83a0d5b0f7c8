"""What the members of a fan-out may and must have got, said slowly.

Messages are numbered 0, 1, 2 … as they are published. A stay is the time between add and remove.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stay:
    earliest: int
    """The first message that may come: published before, and not known to be written to everybody."""
    first: int
    """The first that must come."""
    end: int | None = None
    """One past the last that may come; None while the member is there."""


class Room:
    """The stays of every member, by name."""

    def __init__(self) -> None:
        self.published = 0
        self.flushed = 0
        """So many were written to everybody."""
        self.stays: dict[str, list[Stay]] = {}

    def add(self, name: str) -> None:
        stays = self.stays.setdefault(name, [])
        if not stays or stays[-1].end is not None:
            stays.append(Stay(self.flushed, self.published))

    def remove(self, name: str) -> None:
        stays = self.stays.get(name)
        if stays and stays[-1].end is None:
            stays[-1].end = self.published

    def publish(self) -> int:
        self.published += 1
        return self.published - 1

    def members(self) -> set[str]:
        return {name for name, stays in self.stays.items() if stays[-1].end is None}

    def faults(self, name: str, got: list[int]) -> list[str]:
        """Why `got`, everything that came to this member, cannot be right; empty when it can."""
        found = []
        if sorted(set(got)) != got:
            found.append(f"{name}: repeated or out of order")
        stays = self.stays.get(name, [])
        ends = [self.published if stay.end is None else stay.end for stay in stays]
        allowed = {n for stay, end in zip(stays, ends, strict=True) for n in range(stay.earliest, end)}
        if set(got) - allowed:
            found.append(f"{name}: {sorted(set(got) - allowed)} came to no member")
        for number, (stay, end) in enumerate(zip(stays, ends, strict=True)):
            # What the next stay may bring says nothing about this one.
            following = stays[number + 1].earliest if number + 1 < len(stays) else end
            due = list(range(stay.first, min(end, following)))
            came = [n for n in got if n in due]
            if came != due[: len(came)]:
                found.append(f"{name}: a hole in {came} of {due}")
            if stay.end is None and came != due:
                found.append(f"{name}: {sorted(set(due) - set(came))} did not come")
        return found
