"""The slow Vigil: keeps every look ever taken, and judges each boot from all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    asked_ms: int
    answered_ms: int
    boots: tuple[tuple[str, int, bool], ...]
    """(node, boot, fenced)"""
    live: frozenset[tuple[str, int]] | None


class SlowVigil:
    def __init__(self, after_ms: int, gap_ms: int) -> None:
        self.after_ms = after_ms
        self.gap_ms = gap_ms
        self.looks: list[Look] = []

    def look(self, look: Look) -> list[tuple[str, int]]:
        self.looks.append(look)
        return [
            (node, boot)
            for node, boot, fenced in look.boots
            if fenced or self.missing_ms((node, boot)) >= self.after_ms
        ]

    def missing_ms(self, start: tuple[str, int]) -> int:
        """From the answer of the first to the question of the last of the looks that all miss it."""
        run: list[Look] = []
        for look in reversed(self.looks):
            open_then = any((node, boot) == start for node, boot, _ in look.boots)
            if not open_then or look.live is None or start in look.live:
                break
            if run and run[-1].asked_ms - look.answered_ms > self.gap_ms:
                break
            run.append(look)
        return max(0, run[0].asked_ms - run[-1].answered_ms) if run else -1
