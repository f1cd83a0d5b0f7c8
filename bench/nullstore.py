"""The server of S4: `fastim serve` in which the store costs next to nothing, and nothing else is changed.

    python -m bench.nullstore serve --dev --config FILE      and whatever else `fastim serve` takes

Hands out seqs and msg_ids, and moves cursors as S13 says, in dictionaries on the loop. Bodies are not kept,
so what needs them is not there: a client that falls behind, a retry or a restart ends the server with an
error, and the row with it. What `fastim audit` says of a real store is written into the data directory at
the end (AUDIT).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fastim.app import compose
from fastim.config import Config
from fastim.model import parse_conv
from fastim.store.base import (
    Appended,
    AppendedFrame,
    AppendFrame,
    AppendStatus,
    Behind,
    ConvPage,
    Device,
    Flush,
    FlushResult,
    MessageStore,
    OpenRange,
    Park,
)

AUDIT: Final = "null-audit.json"
_STORED: Final = AppendStatus.STORED
_LEVEL: Final = FlushResult(())


class _Conv:
    """A conversation: its head, and how far each member's one device has it."""

    __slots__ = ("cursors", "head", "members")

    def __init__(self, members: tuple[str, ...]) -> None:
        self.members = members
        self.head = 0
        self.cursors = dict.fromkeys(members, 0)


class NullStore:
    """As much of MessageStore as 1:1 messages between people who are here and listen."""

    def __init__(self, audit: Path) -> None:
        self._audit = audit
        self._convs: dict[str, _Conv] = {}
        self._msg_id = 0
        self._mark = 0
        self._due = 0
        self._parked = 0

    async def append(self, frames: Sequence[AppendFrame], now_ms: int) -> list[AppendedFrame]:
        convs, msg_id, out = self._convs, self._msg_id, []
        for frame in frames:
            conv = convs.get(frame.conv)
            if conv is None:
                conv = convs[frame.conv] = _Conv(parse_conv(frame.conv).members or ())
            items = []
            for item in frame.items:
                msg_id += 1
                seq = conv.head = conv.head + 1
                items.append(Appended(_STORED, msg_id, seq, seq, now_ms, item.loss_time_ms))
            out.append(AppendedFrame(frame.conv, 1, tuple(items), conv.members))
        self._msg_id = msg_id
        return out

    async def flush(self, flush: Flush) -> FlushResult:
        self._due += len(flush.due)
        gaps: list[tuple[str, str, Behind]] = []
        for settled in flush.settled:
            conv = self._convs[settled.conv]
            cursor = conv.cursors[settled.user]
            if settled.from_seq > cursor + 1:
                gaps.append((settled.user, settled.device, Behind(settled.conv, cursor, conv.head, 1)))
            elif settled.to_seq > cursor:
                conv.cursors[settled.user] = settled.to_seq
        return FlushResult(tuple(gaps)) if gaps else _LEVEL

    async def park(self, parks: Sequence[Park], now_ms: int) -> list[bool]:
        self._parked += len(parks)
        return [True] * len(parks)

    # -- logging in

    async def register_device(self, user: str, device: str, device_class: str, now_ms: int) -> Device:
        return Device(user, device, device_class, now_ms, now_ms)

    async def conversations(
        self, user: str, device: str, since_version: int, limit: int, now_ms: int
    ) -> ConvPage:
        return ConvPage((), 0, more=False)

    async def unread(self, user: str, conv: str | None = None) -> tuple[int, list[tuple[str, int]]]:
        return 0, []

    async def version(self, user: str) -> int:
        return 0

    # -- what looks for work now and then

    async def next_due_ms(self) -> int:
        return 0

    async def next_push_ms(self) -> int:
        return 0

    async def settled_mark(self) -> int:
        return self._mark

    async def settle(self, msg_id: int) -> None:
        self._mark = msg_id

    async def head_msg_id(self) -> int:
        return self._msg_id

    async def unsettled(self, upto_msg_id: int) -> list[OpenRange]:
        return []

    async def next_boot(self, node: str) -> int:
        return 1

    async def close(self) -> None:
        self._audit.write_text(json.dumps(self.audit()))

    def audit(self) -> dict[str, int]:
        """open: obligations whose ack never came. All but the first two must be zero."""
        convs = self._convs.values()
        return {
            "messages": self._msg_id,
            "conversations": len(convs),
            "open": sum(conv.head - cursor for conv in convs for cursor in conv.cursors.values()),
            "unsettled": self._msg_id - self._mark,
            "due": self._due,
            "parked": self._parked,
        }


async def open_store(config: Config, *, read_only: bool = False) -> MessageStore:
    return NullStore(config.data_path / AUDIT)  # type: ignore[return-value]  # see the module


def main() -> None:
    from fastim.cli import main as fastim

    assert compose.open_store.__module__ == "fastim.app.backends", "stores are opened elsewhere now"
    compose.open_store = open_store
    fastim()


if __name__ == "__main__":
    main()
