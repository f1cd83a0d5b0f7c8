"""What survives the app: positions, messages, the outbox, the list, read marks, the resume ticket.

The port and the implementation in memory; the durable one is sqlitestore.SqliteLocalStore. A batch is what
one turn of the client learned: it is stored as a whole or not at all, and acknowledged only then.

The feed: what has to be handed to the app, exactly once and in order, gets a position when it is committed,
1, 2, 3 ... `mark(taken, done)` says how far the app is: everything up to `taken` was handed over, and it came
back for more after `done`. So taken - done is 0 or 1, and 1 after a crash means: that one, perhaps.

D1  commit returned ⇒ the batch survives what the store promises to   tests/unit/test_client_localstore.py
D2  the feed gives every entry once, in the order of the commits      same
D3  a message that comes again under another epoch is not fed again   same
Source: semantics, "Deliver and ack"; docs/adr/0050.
"""

from __future__ import annotations

import bisect
from collections import deque
from typing import Final, Protocol

import msgspec

from fastim.client.events import Gone, Message
from fastim.client.outbox import Unsent
from fastim.model import FIRST_EVENT_KIND, Flag

Placed = tuple[int, Message | Gone]
"""(position in the feed, what to show)."""


class ConvRow(msgspec.Struct):
    """Everything about one conversation but its messages."""

    conv: str
    epoch: int = 0
    start: int = 0
    """This device holds every message above `start` up to `last` that may be shown; older ones are paged."""
    last: int = 0
    """Everything up to here was stored, or will never be shown."""
    version: int = 0
    """Of the newest list entry that came."""
    head: int = 0
    read: int = 0
    read_told: int = 0
    """The read mark as the server knows it."""
    read_private: bool = False
    unread: int = 0
    counted: int = 0
    """`unread` is right for everything up to this seq."""
    mention_seq: int = 0
    limited: bool = False
    last_sender: str = ""
    last_kind: int = 0
    last_ts_ms: int = 0
    preview: str = ""


class Ticket(msgspec.Struct):
    """What AUTH asks to resume with, and whose store this is."""

    user: str = ""
    session: str = ""
    tag: int = 0
    """Everything up to this tag of the session is stored."""
    user_cursor: int = 0
    """Of the last LEVEL."""
    list_cursor: int = 0
    """The conversation list is complete up to this version."""


class Snapshot(msgspec.Struct):
    """What the store holds, without the messages."""

    ticket: Ticket
    convs: list[ConvRow]
    outbox: list[Unsent]
    """In the order of n; refused ones included."""
    reads: list[tuple[str, str, int]]
    """(conv, user, seq): read marks of the peers."""
    taken: int
    done: int
    newest: int
    """Position of the newest entry of the feed."""


class Reset(msgspec.Struct, frozen=True, gc=False):
    """What is stored of the conversation belongs to another epoch: kept only to know it again."""

    conv: str


class Batch(msgspec.Struct):
    """One transaction. Applied in the order of the fields."""

    feed: list[Message | Gone | Reset] = []
    pages: list[Message] = []
    """From history: stored, not fed."""
    convs: dict[str, ConvRow] = {}
    queued: list[Unsent] = []
    closed: list[bytes] = []
    """client_ids that leave the outbox."""
    refused: list[Unsent] = []
    reads: dict[tuple[str, str], int] = {}
    ticket: Ticket | None = None

    def __bool__(self) -> bool:
        return bool(
            self.feed or self.convs or self.queued or self.closed or self.refused or self.reads
            or self.pages or self.ticket is not None
        )  # fmt: skip


class LocalStore(Protocol):
    """Used by one client at a time, one call at a time; `mark` may come in between.

    Every method may raise StoreUnavailable; nothing of that call is stored then. `open` may be called again
    after that.
    """

    max_waiting: int
    """So many entries of the feed may wait for the app before the client stops reading; 0 = any number."""

    async def open(self, device: str) -> Snapshot:
        """Raises UsageError when the store belongs to another device."""
        ...

    async def commit(self, batch: Batch) -> list[Placed]:
        """Store the batch; returns its `feed` with positions, without what was fed under another epoch."""
        ...

    async def waiting(self, after: int, limit: int) -> list[Placed]:
        """The feed above a position, oldest first, at most `limit`."""
        ...

    async def page(self, conv: str, above_seq: int, below_seq: int, limit: int) -> list[Message]:
        """The newest `limit` messages with above_seq < seq < below_seq, in seq order."""
        ...

    async def count(self, conv: str, above_seq: int, not_by: str) -> int:
        """Countable messages above a seq that others than `not_by` sent."""
        ...

    def floor(self, conv: str) -> int:
        """Messages up to this seq were dropped to save room, 0 for none; `page` goes no further down."""
        ...

    def mark(self, taken: int, done: int) -> None:
        """Remember how far the app is. Cheap: microseconds, in the loop; survives a kill of the process."""
        ...

    async def close(self) -> None: ...


def countable(message: Message) -> bool:
    """Whether it counts as unread, by the rules of the built-in kinds."""
    return message.kind < FIRST_EVENT_KIND and not message.flags & Flag.SILENT


class MemoryLocalStore:
    """Forgets everything with the process: for tools, tests, and devices that may show things again.

    keep: messages per conversation that stay for `page`; older ones come from the server.
    """

    def __init__(self, *, keep: int = 1_000, max_waiting: int = 1_000) -> None:
        self.max_waiting = max_waiting
        self._keep = keep
        self._device = ""
        self._ticket = Ticket()
        self._convs: dict[str, ConvRow] = {}
        self._messages: dict[str, dict[int, Message]] = {}
        self._seqs: dict[str, list[int]] = {}
        self._floor: dict[str, int] = {}
        self._old: dict[str, set[int]] = {}
        """conv -> msg_ids of earlier epochs."""
        self._outbox: dict[bytes, Unsent] = {}
        self._reads: dict[tuple[str, str], int] = {}
        self._feed: deque[Placed] = deque()
        self._newest = 0
        self._taken = 0
        self._done = 0

    async def open(self, device: str) -> Snapshot:
        self._device = device
        return Snapshot(
            msgspec.structs.replace(self._ticket),
            [msgspec.structs.replace(row) for row in self._convs.values()],
            sorted(self._outbox.values(), key=lambda unsent: unsent.n),
            [(conv, user, seq) for (conv, user), seq in self._reads.items()],
            self._taken, self._done, self._newest,
        )  # fmt: skip

    async def commit(self, batch: Batch) -> list[Placed]:
        placed: list[Placed] = []
        for entry in batch.feed:
            if isinstance(entry, Reset):
                self._retire(entry.conv)
                continue
            if isinstance(entry, Message) and self._put(entry):
                continue
            self._newest += 1
            placed.append((self._newest, entry))
        self._feed.extend(placed)
        for message in batch.pages:
            self._put(message)
        for conv, row in batch.convs.items():
            self._convs[conv] = msgspec.structs.replace(row)
        for conv in {entry.conv for entry in (*batch.feed, *batch.pages)}:
            self._trim(conv)
        self._outbox.update((unsent.client_id, unsent) for unsent in (*batch.queued, *batch.refused))
        for client_id in batch.closed:
            self._outbox.pop(client_id, None)
        self._reads.update(batch.reads)
        if batch.ticket is not None:
            self._ticket = msgspec.structs.replace(batch.ticket)
        return placed

    def _retire(self, conv: str) -> None:
        old = self._old.setdefault(conv, set())
        old.update(message.msg_id for message in self._messages.pop(conv, {}).values())
        self._seqs.pop(conv, None)
        self._floor.pop(conv, None)

    def _put(self, message: Message) -> bool:
        """Store it; whether it is known from another epoch."""
        by_seq = self._messages.setdefault(message.conv, {})
        if message.seq not in by_seq:
            bisect.insort(self._seqs.setdefault(message.conv, []), message.seq)
        by_seq[message.seq] = message
        return message.msg_id in self._old.get(message.conv, ())

    def _trim(self, conv: str) -> None:
        seqs = self._seqs.get(conv, [])
        excess = len(seqs) - self._keep
        if excess <= 0:
            return
        for seq in seqs[:excess]:
            del self._messages[conv][seq]
        self._floor[conv] = seqs[excess - 1]
        del seqs[:excess]

    async def waiting(self, after: int, limit: int) -> list[Placed]:
        skip = next((n for n, (position, _) in enumerate(self._feed) if position > after), len(self._feed))
        return [self._feed[n] for n in range(skip, min(skip + limit, len(self._feed)))]

    async def page(self, conv: str, above_seq: int, below_seq: int, limit: int) -> list[Message]:
        seqs = self._seqs.get(conv, [])
        end = bisect.bisect_left(seqs, below_seq)
        begin = max(bisect.bisect_right(seqs, above_seq), end - limit)
        return [self._messages[conv][seq] for seq in seqs[begin:end]]

    async def count(self, conv: str, above_seq: int, not_by: str) -> int:
        seqs = self._seqs.get(conv, [])
        messages = self._messages.get(conv, {})
        above = (messages[seq] for seq in seqs[bisect.bisect_right(seqs, above_seq) :])
        return sum(1 for message in above if message.sender != not_by and countable(message))

    def floor(self, conv: str) -> int:
        return self._floor.get(conv, 0)

    def mark(self, taken: int, done: int) -> None:
        self._taken, self._done = taken, done
        feed = self._feed
        while feed and feed[0][0] <= done:
            feed.popleft()

    async def close(self) -> None:
        pass


FEED_PAGE: Final = 128
"""Entries of the feed that are read at once, and kept at hand for an app that keeps up."""
