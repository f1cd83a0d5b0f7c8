"""What the entry of a conversation says, and who is believed when the server and the messages here differ.

The server counts up to the head of its entry, also what is still on its way; what is counted here is right up
to the newest message here. `counted` remembers which, so that nothing counts twice.

R1  unread is what the server would say of the messages that are here    tests/unit/test_client_device.py
"""

from __future__ import annotations

from typing import Final

from fastim.client.events import Message
from fastim.client.localstore import ConvRow, countable
from fastim.model import DEFAULT_KINDS, FIRST_EVENT_KIND, preview
from fastim.protocol import ConvChange

PREVIEW_CHARS: Final = 80


def restart(row: ConvRow) -> None:
    """Another epoch: everything that is a seq begins again."""
    row.start = row.last = row.head = row.counted = row.unread = 0
    row.read = row.read_told = row.mention_seq = 0


def note_message(row: ConvRow, message: Message, user: str) -> None:
    """The newest message here, as the server will tell it in its next CHANGES."""
    if message.kind >= FIRST_EVENT_KIND or message.seq < row.head:
        return
    row.last_sender, row.last_kind, row.last_ts_ms = message.sender, message.kind, message.ts_ms
    row.preview = preview(message.kind, message.flags, message.body, DEFAULT_KINDS, PREVIEW_CHARS)
    if message.sender == user or message.seq <= row.counted:
        return
    row.counted = message.seq
    if message.seq > row.read and countable(message):
        row.unread += 1
    if user in message.mentions:
        row.mention_seq = message.seq


def merge(row: ConvRow, item: ConvChange) -> bool:
    """A list entry of the server; False when a newer one is known."""
    if item.version < row.version:
        return False
    row.version = item.version
    row.limited = item.limited
    row.mention_seq = max(row.mention_seq, item.mention_seq)
    row.read_told = max(row.read_told, item.read)
    if item.head >= row.head:
        row.head = item.head
        row.last_sender, row.last_kind, row.last_ts_ms = item.last_sender, item.last_kind, item.last_ts_ms
        row.preview = item.preview
        if item.read >= row.read:
            row.read, row.unread, row.counted = item.read, item.unread, item.head
    return True


def count_above(row: ConvRow, told: int) -> bool:
    """The read mark moved: what is unread above it. told: as the server says, -1 if it did not.

    True: every message above the mark is here, and the store has to count them.
    """
    if row.read >= row.last:
        row.unread, row.counted = 0, row.last
        return False
    if row.read >= row.start:
        row.counted = row.last
        return True
    if told >= 0:
        row.unread = told
    return False
