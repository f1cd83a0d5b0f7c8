"""What every store decides alike: who is in a conversation by its name, what a message's content is, how a
page of a stream is filled, how seqs become ranges.

Nothing here reads a database. Both stores use it, and the contract suite holds them to it
(tests/contract/store.py); only the hash of contents the embedded store has on its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final, NamedTuple

from fastim.errors import PeerError
from fastim.model import Message, SkipReason, is_expired
from fastim.store.base import AppendItem, Gap

EPOCH: Final = 1
FOREVER: Final = 1 << 62
FATE_SPAN: Final = 1_000
"""A fate row covers at most so many seqs: all rows that touch a seq lie within this of it."""

Range = tuple[int, int]


class Span(NamedTuple):
    """The seqs a member is shown, both ends included."""

    first: int
    last: int


WHOLE: Final = (Span(1, FOREVER),)


def named_members(conv: str) -> tuple[str, ...] | None:
    """The members of p: and s:, which are in the name; None for every other type."""
    head, _, rest = conv.partition(":")
    if head == "s":
        return (rest,)
    if head == "p":
        first, _, second = rest.partition(":")
        return (first, second)
    return None


def content_hash(item: AppendItem) -> bytes:
    """Of the fields as sent; 8 bytes are plenty to tell two contents of one client_id apart."""
    mentions = "\n".join(item.mentions).encode() if item.mentions else b""
    head = b"%d:%d:%d:%b\0" % (item.kind, item.loss_time_ms, item.flags, mentions)
    return blake2b(head + item.body, digest_size=8).digest()


def forbidden(user: str, conv: str) -> PeerError:
    """The same for a conversation of others and for one that is not: nobody learns which exist."""
    return PeerError("forbidden", f"{user} is not in {conv}")


def seen(spans: Iterable[Span], seq: int) -> bool:
    """Whether one of the spans holds seq."""
    return any(first <= seq <= last for first, last in spans)


def runs(seqs: Iterable[int]) -> list[Range]:
    """Rising seqs as ranges."""
    out: list[Range] = []
    for seq in seqs:
        if out and seq == out[-1][1] + 1:
            out[-1] = (out[-1][0], seq)
        else:
            out.append((seq, seq))
    return out


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Sorted and without overlap."""
    out: list[Range] = []
    for first, last in sorted(ranges):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], last))
        else:
            out.append((first, last))
    return out


def cut(first: int, last: int) -> Iterable[Range]:
    """A range in pieces of at most FATE_SPAN seqs."""
    if last - first < FATE_SPAN:
        return ((first, last),)
    return [(start, min(start + FATE_SPAN - 1, last)) for start in range(first, last + 1, FATE_SPAN)]


class Page:
    """A stream page while it is filled: messages as they are, runs of what is never shown as one Gap."""

    def __init__(self, conv: str, position: int, max_bytes: int) -> None:
        self.entries: list[Message | Gap] = []
        self.position = position
        self._conv = conv
        self._left_bytes = max_bytes
        self._holds_one = False

    def skip(self, to_seq: int, reason: int) -> None:
        """Everything up to to_seq is never shown."""
        first = self.position + 1
        last = self.entries[-1] if self.entries else None
        if isinstance(last, Gap) and last.reason == reason:
            first = last.from_seq
            self.entries.pop()
        self.entries.append(Gap(self._conv, first, to_seq, int(reason)))
        self.position = to_seq

    def take(self, message: Message, now_ms: int) -> bool:
        """False if the page has no room for it. The first message always has."""
        if message.recalled:
            self.skip(message.seq, SkipReason.RECALLED)
        elif is_expired(message.loss_time_ms, now_ms):
            self.skip(message.seq, SkipReason.EXPIRED)
        else:
            size = len(message.body)
            if size > self._left_bytes and self._holds_one:
                return False
            self._left_bytes -= size
            self._holds_one = True
            self.entries.append(message)
            self.position = message.seq
        return True
