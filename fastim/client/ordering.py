"""Order inside a conversation: what may be shown now, what waits, what is asked for again.

Hides the holding of early frames, epochs, and when a hole is pulled. Sans-I/O, no clock: the caller says
what time it is. An item is whatever the caller hands in; it comes back exactly once, in `applied` (now is its
turn) or in `done` (known, overtaken by a Skip, of another epoch), unless the connection is lost before.

 UNKNOWN ──first frame is seq 1, or start()──▶ KNOWN(last)
 KNOWN: to <= last ─▶ done │ from <= last+1 <= to ─▶ applied │ from > last+1 ─▶ held ──HOLD_MS──▶ pulled

O1  applied covers last+1, last+2, ... without a hole, each seq once    tests/property/test_client_ordering.py
O2  every item comes back exactly once                                  same
O3  a hole is pulled, and again until it is filled                      tests/unit/test_client_ordering.py
Source: semantics, "Deliver and ack".
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

T = TypeVar("T")

HOLD_MS: Final = 500
REPULL_MS: Final = 4_000
"""First wait for the answer of a pull; doubles up to REPULL_MOST_MS."""
REPULL_MOST_MS: Final = 30_000
UNKNOWN_MS: Final = 5_000
"""How long a conversation that this device has never heard of waits for its place in the list."""
MAX_HELD: Final = 512
"""Frames held in all conversations; more are only remembered as missing. The server's window is 128."""


class Outcome(Generic[T]):
    """What one call made possible."""

    __slots__ = ("applied", "done", "reset")

    def __init__(self) -> None:
        self.applied: list[tuple[int, int, T]] = []
        """(from_seq, to_seq, item) in order: these seqs are covered now, and were not before."""
        self.done: list[T] = []
        """Nothing is to be shown for these."""
        self.reset = False
        """The conversation has another epoch: what was stored of it is another history."""


class _Conv(Generic[T]):
    __slots__ = ("arrivals", "due_ms", "epoch", "held", "last", "notices", "tries")

    def __init__(self, epoch: int, last: int | None) -> None:
        self.epoch = epoch
        self.last = last
        """None: where this device starts is not known yet."""
        self.held: list[tuple[int, int, int, T]] = []
        """(from_seq, arrival, to_seq, item), sorted."""
        self.notices: list[tuple[int, T | None]] = []
        """(seq, item): the conversation is known to reach so far."""
        self.arrivals = 0
        self.due_ms = 0
        """When the hole is pulled; 0 = there is none."""
        self.tries = 0


class Ordering(Generic[T]):
    """The positions of all conversations of a device."""

    def __init__(self) -> None:
        self._convs: dict[str, _Conv[T]] = {}
        self._holes: dict[str, _Conv[T]] = {}
        """Those with due_ms set."""
        self._held = 0

    # -- positions

    def load(self, conv: str, epoch: int, last: int) -> None:
        """A position from the local store."""
        self._convs[conv] = _Conv(epoch, last)

    def last(self, conv: str) -> int | None:
        """Everything up to here was applied; None for a conversation whose start is unknown."""
        state = self._convs.get(conv)
        return None if state is None else state.last

    def epoch(self, conv: str) -> int:
        state = self._convs.get(conv)
        return 0 if state is None else state.epoch

    @property
    def level(self) -> bool:
        """Whether nothing is held and no hole is open."""
        return not self._holes

    # -- frames

    def offer(self, conv: str, epoch: int, from_seq: int, to_seq: int, item: T, mono_ms: int) -> Outcome[T]:
        """A frame that covers from_seq..to_seq. epoch 0: the frame does not say."""
        state, out = self._enter(conv, epoch)
        if state.last is None and from_seq <= 1:
            state.last = 0
        if state.last is not None and to_seq <= state.last:
            out.done.append(item)
        elif state.last is None or from_seq > state.last + 1:
            self._hold(state, from_seq, to_seq, item)
        else:
            out.applied.append((state.last + 1, to_seq, item))
            state.last = to_seq
        self._drain(conv, state, out, mono_ms)
        return out

    def heard(self, conv: str, epoch: int, seq: int, item: T | None, mono_ms: int) -> Outcome[T]:
        """The conversation reaches `seq`, whose content is not at hand. `item` is done once it is reached."""
        state, out = self._enter(conv, epoch)
        state.notices.append((seq, item))
        self._drain(conv, state, out, mono_ms)
        return out

    def start(self, conv: str, epoch: int, cursor: int, mono_ms: int) -> Outcome[T]:
        """The list says where this device starts. Ignored for a conversation whose position is known.

        What was sent already is not cut off: the start is below the first held frame.
        """
        state, out = self._enter(conv, epoch)
        if state.last is None:
            state.last = min(cursor, state.held[0][0] - 1) if state.held else cursor
            if state.due_ms:
                state.due_ms = min(state.due_ms, mono_ms + HOLD_MS)  # an ordinary hole from now on
        self._drain(conv, state, out, mono_ms)
        return out

    def lost(self) -> None:
        """The connection is gone: what was held comes again, from the server."""
        for conv in [conv for conv, state in self._convs.items() if state.last is None]:
            del self._convs[conv]
        for state in self._holes.values():
            state.held.clear()
            state.notices.clear()
            state.due_ms = 0
        self._holes.clear()
        self._held = 0

    # -- holes

    def next_due_ms(self) -> int | None:
        """When `pulls` has something to say. O(open holes)."""
        return min((state.due_ms for state in self._holes.values()), default=None)

    def pulls(self, mono_ms: int) -> Iterator[tuple[str, int, int]]:
        """(conv, from_seq, to_seq) to ask for now. A start that nobody could tell is 0: all of it."""
        for conv, state in self._holes.items():
            if state.due_ms > mono_ms:
                continue
            if state.last is None:
                state.last = 0
            state.due_ms = mono_ms + min(REPULL_MS << min(state.tries, 8), REPULL_MOST_MS)
            state.tries += 1
            yield conv, state.last + 1, self._hole_end(state)

    @staticmethod
    def _hole_end(state: _Conv[T]) -> int:
        return state.held[0][0] - 1 if state.held else max(seq for seq, _ in state.notices)

    # -- inside

    def _enter(self, conv: str, epoch: int) -> tuple[_Conv[T], Outcome[T]]:
        out = Outcome[T]()
        state = self._convs.get(conv)
        if state is None:
            state = self._convs[conv] = _Conv(epoch, None)
        elif epoch and state.epoch != epoch:
            if state.epoch:
                self._reset(conv, state, out)
            state.epoch = epoch
        return state, out

    def _reset(self, conv: str, state: _Conv[T], out: Outcome[T]) -> None:
        out.reset = True
        self._holes.pop(conv, None)
        out.done += [item for _, _, _, item in state.held]
        out.done += [item for _, item in state.notices if item is not None]
        self._held -= len(state.held)
        state.held.clear()
        state.notices.clear()
        state.tries = 0
        state.due_ms = 0
        if state.last is not None:
            state.last = 0

    def _hold(self, state: _Conv[T], from_seq: int, to_seq: int, item: T) -> None:
        if self._held >= MAX_HELD:
            state.notices.append((to_seq, item))
            return
        state.arrivals += 1
        bisect.insort(state.held, (from_seq, state.arrivals, to_seq, item))
        self._held += 1

    def _drain(self, conv: str, state: _Conv[T], out: Outcome[T], mono_ms: int) -> None:
        """Take what has become next out of `held`, and see whether a hole is left."""
        last = state.last
        if last is not None and (state.held or state.notices):
            taken = 0
            for from_seq, _, to_seq, item in state.held:
                if from_seq > last + 1:
                    break
                taken += 1
                if to_seq <= last:
                    out.done.append(item)
                else:
                    out.applied.append((last + 1, to_seq, item))
                    last = to_seq
            del state.held[:taken]
            self._held -= taken
            state.last = last
            out.done += [item for seq, item in state.notices if seq <= last and item is not None]
            state.notices = [notice for notice in state.notices if notice[0] > last]
        if not state.held and not state.notices:
            if state.due_ms:
                state.due_ms = 0
                state.tries = 0
                del self._holes[conv]
        elif out.applied or not state.due_ms:
            # Frames flow: their hole is closing by itself, and is pulled only if they stop.
            state.due_ms = mono_ms + (UNKNOWN_MS if state.last is None else HOLD_MS)
            state.tries = 0
            self._holes[conv] = state
