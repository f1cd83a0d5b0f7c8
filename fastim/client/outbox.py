"""What this device wants to say: in order, one SEND under way per conversation, the same ids until answered.

Hides batching, resending and what an answer means for the messages behind it. Sans-I/O; what is in here is
already in the local store, and leaves both only by `accepted` or a final refusal.

 queued ──next of its conversation──▶ under way ──SENT──▶ gone, its seq is known
    ▲                                    │ ├──ERROR, final──▶ gone, refused
    └──────── connection lost ───────────┘ └──ERROR, retryable, or silence──▶ sent again, same client_id

X1  at most one SEND frame per conversation is under way             tests/unit/test_client_outbox.py
X2  messages of a conversation are first sent in the order of `n`    same
Source: semantics, "Send".
"""

from __future__ import annotations

import random
from typing import Final

import msgspec

from fastim.protocol import MAX_SEND_BATCH, Error, Send, SendItem

RESEND_MS: Final = (2_000, 4_000, 8_000, 16_000, 30_000)
RESEND_LEAST_MS: Final = 250
"""Full jitter may draw nearly nothing; a repeat within a round trip only costs."""
_ITEM_OVERHEAD_BYTES: Final = 64
_FRAME_OVERHEAD_BYTES: Final = 256


class Unsent(msgspec.Struct, array_like=True):
    """A message of this device that has no seq yet. `n` orders the sends of the device."""

    n: int
    client_id: bytes
    conv: str
    kind: int
    body: bytes
    loss_time_ms: int
    flags: int
    mentions: tuple[str, ...]
    read_seq: int
    created_ms: int
    refused: str = ""
    """The code of the final refusal, "" while it waits."""
    detail: str = ""

    def wire_bytes(self) -> int:
        """An upper bound of what it adds to a SEND."""
        return len(self.body) + sum(len(user) + 2 for user in self.mentions) + _ITEM_OVERHEAD_BYTES


class _Line:
    """The messages of one conversation."""

    __slots__ = ("alone", "flight", "resend_at_ms", "tries", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[bytes, Unsent] = {}
        """By client_id, in order; the first ones may be under way."""
        self.flight: list[bytes] = []
        """client_ids of the SEND under way, answered ones included."""
        self.resend_at_ms = 0
        self.tries = 0
        self.alone = False
        """A SEND was refused without saying which message: send one at a time to find out."""


class Outbox:
    """All conversations of a device. max_frame_bytes: what the server takes in one frame."""

    def __init__(self, rng: random.Random, max_frame_bytes: int) -> None:
        self._rng = rng
        self.max_frame_bytes = max_frame_bytes
        self._lines: dict[str, _Line] = {}
        self._convs: dict[bytes, str] = {}
        """client_id -> conversation."""

    def __len__(self) -> int:
        return len(self._convs)

    def add(self, unsent: Unsent) -> None:
        """At the end of its conversation's line."""
        line = self._lines.setdefault(unsent.conv, _Line())
        line.waiting[unsent.client_id] = unsent
        self._convs[unsent.client_id] = unsent.conv

    def entries(self) -> list[Unsent]:
        """Everything that waits or is under way, in no order."""
        return [unsent for line in self._lines.values() for unsent in line.waiting.values()]

    def find(self, client_id: bytes) -> Unsent | None:
        conv = self._convs.get(client_id)
        return None if conv is None else self._lines[conv].waiting[client_id]

    def remove(self, client_id: bytes) -> Unsent | None:
        """Take it out: accepted, finally refused, or discarded by the app."""
        conv = self._convs.pop(client_id, None)
        if conv is None:
            return None
        line = self._lines[conv]
        unsent = line.waiting.pop(client_id)
        if not line.waiting:
            del self._lines[conv]
        elif not any(other in line.waiting for other in line.flight):
            self._land(line)
        return unsent

    def connected(self, mono_ms: int) -> None:
        """What was under way on the last connection goes first, at once."""
        for line in self._lines.values():
            line.resend_at_ms = mono_ms
            line.tries = 0

    def due(self, mono_ms: int) -> list[Send]:
        """The frames to write now."""
        return [
            self._fly(conv, line, mono_ms)
            for conv, line in self._lines.items()
            if not line.flight or line.resend_at_ms <= mono_ms
        ]

    def next_due_ms(self) -> int | None:
        """0: something can be sent at once. O(conversations with something to send)."""
        if any(not line.flight for line in self._lines.values()):
            return 0
        return min((line.resend_at_ms for line in self._lines.values()), default=None)

    def refused(self, error: Error, mono_ms: int) -> list[Unsent]:
        """An ERROR for a SEND. Returns what is refused for good, and no longer in here."""
        if error.client_id:
            unsent = self.find(error.client_id)
            hit = [] if unsent is None else [unsent]
            line = None if unsent is None else self._lines[unsent.conv]
        else:
            line = self._lines.get(error.conv)
            hit = [] if line is None else [line.waiting[i] for i in line.flight if i in line.waiting]
        if line is None or not hit:
            return []
        if error.retryable:
            line.resend_at_ms = mono_ms + max(error.retry_after_ms, self._backoff_ms(line.tries - 1))
            return []
        if len(hit) > 1:
            line.alone = True
            self._land(line)
            return []
        self.remove(hit[0].client_id)
        hit[0].refused, hit[0].detail = error.code, error.detail
        return hit

    def _land(self, line: _Line) -> None:
        line.flight = []
        line.tries = 0
        line.resend_at_ms = 0

    def _fly(self, conv: str, line: _Line, mono_ms: int) -> Send:
        if not line.flight:
            line.flight = self._batch(line)
        line.resend_at_ms = mono_ms + self._backoff_ms(line.tries)
        line.tries += 1
        batch = [line.waiting[client_id] for client_id in line.flight if client_id in line.waiting]
        items = [
            SendItem(one.client_id, one.kind, one.body, one.loss_time_ms, one.flags, list(one.mentions))
            for one in batch
        ]
        return Send(conv, items, max(one.read_seq for one in batch))

    def _batch(self, line: _Line) -> list[bytes]:
        """The first messages that fit into one frame."""
        most = 1 if line.alone else MAX_SEND_BATCH
        room = self.max_frame_bytes - _FRAME_OVERHEAD_BYTES
        batch: list[bytes] = []
        for client_id, unsent in line.waiting.items():
            room -= unsent.wire_bytes()
            if len(batch) == most or (batch and room < 0):
                break
            batch.append(client_id)
        return batch

    def _backoff_ms(self, tries: int) -> int:
        longest = RESEND_MS[min(max(tries, 0), len(RESEND_MS) - 1)]
        return max(RESEND_LEAST_MS, int(self._rng.uniform(0, longest)))
