"""Who was owed what, and what every screen showed: lost, duplicated, out of order, by the clients alone.

Knows nothing of the server. A message is owed to the peer from the moment its sender heard SENT (or a REST
caller his answer); a screen owes it once, and the messages of a conversation in the order of their seqs.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Verdict:
    """The figures of a run; all but the first three must be 0."""

    accepted: int = 0
    shown: int = 0
    refused: int = 0
    """Asked too fast, or past their deadline: counted, no fault of the server."""
    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    unanswered: int = 0

    def add(self, other: dict[str, int]) -> None:
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def good(self) -> bool:
        return not (self.lost or self.duplicated or self.out_of_order or self.unanswered)

    def line(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items())


@dataclass
class Judge:
    """The registry of one process. Calls come from many greenlets."""

    owed: dict[int, str] = field(default_factory=dict)
    """msg_id -> the user whose screen owes it."""
    screens: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    """user -> msg_id -> how often it was shown."""
    newest: dict[tuple[str, str], int] = field(default_factory=dict)
    out_of_order: int = 0
    refused: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def accepted(self, msg_id: int, recipient: str) -> None:
        self.owed[msg_id] = recipient

    def shown(self, user: str, conv: str, seq: int, msg_id: int) -> None:
        with self._lock:
            screen = self.screens[user]
            screen[msg_id] = screen.get(msg_id, 0) + 1
            if seq <= self.newest.get((user, conv), 0) and screen[msg_id] == 1:
                self.out_of_order += 1
            self.newest[user, conv] = max(seq, self.newest.get((user, conv), 0))

    def missing(self) -> int:
        return sum(1 for msg_id, user in list(self.owed.items()) if msg_id not in self.screens[user])

    def verdict(self, unanswered: int) -> Verdict:
        """unanswered: sends that were still in an outbox when the run had come to rest."""
        shown = sum(sum(screen.values()) for screen in self.screens.values())
        repeated = sum(count - 1 for screen in self.screens.values() for count in screen.values())
        return Verdict(
            len(self.owed), shown, self.refused, self.missing(), repeated, self.out_of_order, unanswered
        )
