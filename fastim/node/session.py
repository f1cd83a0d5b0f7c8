"""What a node knows of one device: its window, what it lacks, and the inbox records that wait for it.

A session outlives its connection by resume_ttl_ms, so that a hot resume can replay what was under way. Data
and small rules only; who moves what is in delivery (live), catchup (behind) and handshake (birth and end).

 conversation:  LEVEL ──live, room──▶ LEVEL
                LEVEL ──window full, sync, gap, nudge, pull──▶ BEHIND ──streamed to the head──▶ LEVEL
                any   ──ack timed out──▶ BEHIND, paused ──nudge, progress, sync, pull──▶ BEHIND

N1  a live message is written only to a conversation that is LEVEL       tests/system/test_delivery.py
N2  a Heard whose version changed while a page was read voids the page   tests/system/test_catchup.py
"""

from __future__ import annotations

from typing import Final

import msgspec

from fastim.auth import Identity
from fastim.bus.base import Record
from fastim.model import Fate
from fastim.node.link import Link

_MAY_SEND_KEPT: Final = 256
CURSOR: Final = -1
"""A position that says: from the device's durable cursor, read it then."""


class Entry(msgspec.Struct, eq=False):
    """An inbox record that was taken: settled when nothing holds it any more and a flush has committed."""

    record: Record
    holds: int = 0


class Parcel(msgspec.Struct, eq=False):
    """One tagged frame under way.

    conv "" is a frame that settles nothing (LEVEL, or a hole in the tags after a hot resume).
    fate None moves the cursor without writing a fate: own messages, and what is not this user's to settle.
    data, for a replay: the shared tail of a MSG, the whole frame of any other.
    version, of a LEVEL: what the device has when it acknowledges it.
    """

    session: Session
    conv: str
    from_seq: int
    to_seq: int
    msg_id: int
    fate: Fate | None
    data: bytes
    is_msg: bool
    entry: Entry | None = None
    version: int = 0


class Heard:
    """A conversation that is BEHIND."""

    __slots__ = ("covered", "dup", "paused", "position", "retry_mono_ms", "upto", "version")

    def __init__(self, position: int, upto: int, *, dup: bool, paused: bool) -> None:
        self.position = position
        """Everything up to here was written on this session; CURSOR: unknown."""
        self.upto = upto
        """The highest seq heard of: level means at or above it."""
        self.dup = dup
        self.paused = paused
        """Nothing is streamed until a nudge, a request or progress: the peer did not acknowledge."""
        self.covered = 0
        """While it is paused: a due row was asked for from this seq on; 0: none was."""
        self.version = 0
        self.retry_mono_ms = 0


class Sync:
    """One pass over what changed: pages of the change index, then LEVEL when all of it was streamed."""

    __slots__ = ("paged", "reached", "since", "waiting")

    def __init__(self, since: int) -> None:
        self.since = since
        self.reached = 0
        self.paged = False
        self.waiting: set[str] = set()


class Session:
    """One authenticated device."""

    __slots__ = (
        "ack_slot", "asked_mono_ms", "badge", "behind", "busy", "choked", "detached_mono_ms",
        "device", "device_class", "ended", "full_since_mono_ms", "generation", "head_version", "id",
        "identity", "joining", "level_version", "link", "may_send", "probed_mono_ms", "queued",
        "replayed", "requests", "retries", "ring", "stalled", "sync", "tag", "user",
    )  # fmt: skip

    def __init__(self, session_id: str, identity: Identity, device: str, device_class: str) -> None:
        self.id = session_id
        self.believe(identity)
        self.user = identity.user
        self.device = device
        self.device_class = device_class
        self.generation = 0
        """Of its presence attachment; 0 = not attached."""
        self.link: Link | None = None
        self.ack_slot = -1
        self.tag = 0
        self.ring: list[tuple[int, Parcel]] = []
        """Without a connection: what was under way, by tag."""
        self.replayed: dict[str, list[tuple[int, int]]] = {}
        """After a hot resume, until its sync is paged: conv -> the (from_seq, to_seq) that are under way."""
        self.behind: dict[str, Heard] = {}
        self.sync: Sync | None = None
        self.level_version = 0
        """The newest change-index version that the device has acknowledged or brought."""
        self.head_version = 0
        """The newest change-index version that this node has read for the user."""
        self.badge = 0
        self.detached_mono_ms = 0
        self.full_since_mono_ms = 0
        """The window or write buffer has been full since then without an ack; 0 = it is not."""
        self.choked = False
        """Its write buffer was found full; room in it is progress, as an ack is."""
        self.probed_mono_ms = 0
        """The newest PROBE."""
        self.asked_mono_ms = 0
        """The first PROBE after which nothing has come; 0 = there is none."""
        self.retries: dict[str, int] = {}
        """conv -> repeats by this node since the last ack of the device."""
        self.requests = 0
        self.joining = False
        """Between AUTH and HELLO: nothing else may be written yet."""
        self.queued = False
        self.busy = False
        self.stalled = False
        """Its stream waits for the next sweep: store away, or too much unwritten."""
        self.ended = False

    def believe(self, identity: Identity) -> None:
        """From now on the session speaks for this token."""
        self.identity = identity
        self.may_send: set[str] = set()
        """Conversations that this token was allowed to write to before."""

    def note_may_send(self, conv: str) -> None:
        """Authorised: who may write to a name depends on the token alone (members of groups: the store)."""
        if len(self.may_send) >= _MAY_SEND_KEPT:
            self.may_send.clear()
        self.may_send.add(conv)

    @property
    def syncing(self) -> bool:
        """Until the pages of the sync are read, nobody can say which conversations are LEVEL."""
        return self.sync is not None and not self.sync.paged

    @property
    def open_link(self) -> Link | None:
        """The connection, once HELLO was written to it: what needs no tag goes there or nowhere."""
        return None if self.joining else self.link

    def reached(self, conv: str, cursor: int) -> int:
        """How far a replay has the conversation without a hole above the cursor; the cursor if not at all."""
        for from_seq, to_seq in sorted(self.replayed.get(conv, ())):
            if from_seq > cursor + 1:
                break
            cursor = max(cursor, to_seq)
        return cursor

    def next_tag(self) -> int:
        self.tag += 1
        return self.tag

    def put_behind(
        self, conv: str, upto: int, position: int, *, dup: bool = False, paused: bool = False
    ) -> Heard:
        """Move a conversation to BEHIND, or keep it there from the lower of two positions (CURSOR wins)."""
        heard = self.behind.get(conv)
        if heard is None:
            heard = self.behind[conv] = Heard(position, upto, dup=dup, paused=paused)
            return heard
        heard.upto = max(heard.upto, upto)
        if position < heard.position or paused != heard.paused:
            heard.position = min(heard.position, position)
            heard.version += 1
        heard.dup = heard.dup or dup
        heard.paused = paused
        if not paused:
            heard.covered = 0
        return heard

    def note_live(self, conv: str, seq: int) -> bool:
        """A live message of a conversation that is BEHIND only raises what was heard. False: it is LEVEL."""
        heard = self.behind.get(conv)
        if heard is None:
            return False
        if seq > heard.upto:
            heard.upto = seq
        return True

    def wants_stream(self) -> bool:
        """Whether there is anything that a connection would be given now."""
        if self.link is None or self.ended or self.joining:
            return False
        return self.syncing or any(not heard.paused for heard in self.behind.values())
