"""Hand events to the app: every message and gap once, in order; everything else as its newest state.

Messages and gaps come from the store's feed, so an app that is slow costs disk, not memory. Signals (read
marks, list entries, delivery states, the connection) are kept by what they are about, the newest of each.
Between one event and the request for the next, the app has it: `taken` is one ahead of `done`.

 store.feed ──page──▶ at hand (<= FEED_PAGE) ──┐
                                              ├─ in turns ─▶ next()
 signals, one per subject ────────────────────┘

F1  a message is handed over once, also when the app restarts in between    tests/unit/test_client_feed.py
F2  its deadline is compared when it is handed over, not before             same
F3  memory is bounded by what can be signalled, whatever the app does       same
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import msgspec

from fastim.client.events import (
    Connected,
    ConvChanged,
    Disconnected,
    Event,
    Gone,
    Message,
    ReadMark,
    StateChanged,
)
from fastim.client.localstore import FEED_PAGE, LocalStore, Placed, Snapshot
from fastim.errors import StoreUnavailable, UsageError
from fastim.model import SkipReason, is_expired

MAX_SIGNALS: Final = 10_000
"""More subjects than that without anybody asking: the oldest are forgotten; the store knows them."""


class Feed:
    """One consumer. `server_now_ms` is the server's clock."""

    def __init__(self, store: LocalStore, snapshot: Snapshot, server_now_ms: Callable[[], int]) -> None:
        self._store = store
        self._server_now_ms = server_now_ms
        self._again = snapshot.taken
        """Up to here entries were handed over before, to a process that is gone."""
        self._taken = snapshot.done
        self._newest = snapshot.newest
        self._at_hand: deque[Placed] = deque()
        self._at_hand_to = snapshot.done
        """Everything up to this position is, or was, at hand."""
        self._signals: dict[object, Event] = {}
        self._signals_first = True
        self._more = asyncio.Event()
        self._busy = False
        self._closed = False
        self._failure: BaseException | None = None
        self.on_progress: Callable[[], None] = lambda: None
        """Called when the app has taken something out of the feed."""

    @property
    def waiting(self) -> int:
        """Entries of the feed that the app has not taken."""
        return self._newest - self._taken

    def committed(self, placed: list[Placed]) -> None:
        """These are stored now."""
        if not placed:
            return
        if self._at_hand_to == self._newest and len(self._at_hand) + len(placed) <= FEED_PAGE:
            self._at_hand.extend(placed)
            self._at_hand_to = placed[-1][0]
        self._newest = placed[-1][0]
        self._more.set()

    def publish(self, signals: Iterable[Event]) -> None:
        """Newer signals about the same subject take the place of older ones."""
        for signal in signals:
            subject = _subject(signal)
            self._signals.pop(subject, None)
            self._signals[subject] = signal
        while len(self._signals) > MAX_SIGNALS:
            del self._signals[next(iter(self._signals))]
        self._more.set()

    def reload(self, snapshot: Snapshot) -> None:
        """The store was opened again: what it holds is the truth, how far the app is we know ourselves."""
        self._newest = max(snapshot.newest, self._taken)
        self._at_hand.clear()
        self._at_hand_to = self._taken
        self._more.set()

    def close(self, *, orderly: bool) -> None:
        """Nothing more is handed over. orderly: the app is done with what it has."""
        if orderly and not self._closed:
            with suppress(StoreUnavailable):
                self._store.mark(self._taken, self._taken)
        self._closed = True
        self._more.set()

    def fail(self, failure: BaseException) -> None:
        """The client cannot go on: whoever waits for events hears it."""
        self._failure = failure
        self._more.set()

    async def next(self) -> Event | None:
        """The next event; None when the client is closed. Asking says that the one before is done.

        Raises UsageError for a second consumer, StoreUnavailable, and what made the client fail.
        """
        if self._busy:
            raise UsageError("events are handed to one consumer; another one waits already")
        self._busy = True
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                if self._closed:
                    return None
                event = await self._next()
                if event is not None:
                    return event
        finally:
            self._busy = False

    async def _next(self) -> Event | None:
        """One step: an event, or something that may lead to one."""
        entries = self._taken < self._newest
        if self._signals and (self._signals_first or not entries):
            self._signals_first = False
            return self._signals.pop(next(iter(self._signals)))
        if not entries:
            self._more.clear()
            self._store.mark(self._taken, self._taken)
            await self._more.wait()
            return None
        self._signals_first = True
        if not self._at_hand:
            newest = self._newest
            placed = await self._store.waiting(self._taken, FEED_PAGE)
            self._at_hand.extend(placed)
            self._at_hand_to = placed[-1][0] if placed else newest
            if not placed:
                self._taken = newest
            return None
        return self._hand_over()

    def _hand_over(self) -> Event:
        """No await between the mark and the return: only a kill of the process can come between."""
        position, entry = self._at_hand[0]
        self._store.mark(position, self._taken)
        self._at_hand.popleft()
        self._taken = position
        self.on_progress()
        if isinstance(entry, Gone):
            return entry
        if is_expired(entry.loss_time_ms, self._server_now_ms()):
            return Gone(entry.conv, entry.seq, entry.seq, SkipReason.EXPIRED)
        if position <= self._again:
            return msgspec.structs.replace(entry, again=True)
        return entry


def _subject(signal: Event) -> object:
    match signal:
        case Connected() | Disconnected():
            return "connection"
        case ConvChanged():
            return ("list", signal.conv)
        case ReadMark():
            return ("read", signal.conv, signal.user)
        case StateChanged():
            return signal.client_id
        case Message() | Gone():
            raise UsageError("messages come through the store, not as signals")
