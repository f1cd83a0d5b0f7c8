"""The store port: the timeline, the cursors, and every durable fact about an obligation.

The store is the truth. An obligation is (message, user) for every member at that seq except the sender;
control events (kind >= 32) carry none, though they are streamed and moved over by cursors. It is open while
it lies above the furthest cursor of the user's devices, no fate row but PARKED covers it, and its deadline
has not passed.
tests/contract/store.py proves these promises against every implementation:

S1   seq = last + 1 per conversation, no holes, under concurrency
S2   the same (sender, conv, client_id) returns the first result for >= 7 days; other content is a conflict
S3   append returned => survives kill -9 and power loss
S4   paging never repeats or hides under concurrent append
S5   marks (cursor, read) only move forward
S6   unread is exact; own messages are excluded
S7   stream = exactly what is above the position, oldest first, with Skips for what is never shown
S8   a membership change is visible to the next read
S9   shard_of(conv) is stable across versions (golden vectors)
S10  scan gives every message once, in append order
S11  a due row (and a push row) is claimed by one holder until its claim ends
S12  a fence is for ever, and at most one live adopter works on it; an open boot is listed until it is ended
S13  cursors, fate rows and due rows of one flush are one transaction; so are a park's fate row, push row
     and due-row deletion

Times here are wall-clock unix milliseconds given by the caller. Every method raises StoreUnavailable
(temporary: disk full, busy; else closed or corrupt). In one process nothing of that call is stored then. Over
a network it may be, and over several databases in part, each (user, conv) and each frame whole or not at all;
the same call again finds what it did.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from fastim.model import MSG_ID_SHARD_BITS, Fate, Message

SHARDS: Final = 1 << MSG_ID_SHARD_BITS


def shard_of(conv: str) -> int:
    """Which of the 64 shards a conversation lives on, for ever (promise Store.S9)."""
    return zlib.crc32(conv.encode()) & (SHARDS - 1)


# --------------------------------------------------------------------------------------------- append


class AppendItem(msgspec.Struct, frozen=True, gc=False):
    """One message to append.

    loss_time_ms is as the sender sent it; ttl_ms is its kind's default, fixed into a deadline by the first
    append when loss_time_ms is 0. The content hash covers kind, body, loss_time_ms, flags and mentions.
    """

    client_id: bytes
    kind: int
    body: bytes
    loss_time_ms: int = 0
    flags: int = 0
    mentions: tuple[str, ...] = ()
    ttl_ms: int = 0
    countable: bool = True


class AppendFrame(msgspec.Struct, frozen=True, gc=False):
    """The messages of one SEND frame: stored in order, all or a prefix."""

    conv: str
    sender: str
    items: tuple[AppendItem, ...]
    read_seq: int = 0
    require_known: bool = True
    """Refuse a recipient nobody has ever seen (clients); False for service callers."""


class AppendStatus(enum.IntEnum):
    """What append did with one item."""

    STORED = 1
    REPEATED = 2
    """Known client_id with the same content: the first result again."""
    CONFLICT = 3
    EXPIRED = 4
    """Unknown client_id and past its deadline: refused, never stored."""
    NOT_MEMBER = 5
    UNKNOWN_USER = 6
    UNKNOWN_GROUP = 7
    NOT_REACHED = 8
    """An earlier item of the frame was refused; retryable."""


class Appended(msgspec.Struct, frozen=True, gc=False):
    """Result for one item; the ids are 0 unless STORED or REPEATED."""

    status: AppendStatus
    msg_id: int = 0
    seq: int = 0
    cseq: int = 0
    ts_ms: int = 0
    loss_time_ms: int = 0


class AppendedFrame(msgspec.Struct, frozen=True, gc=False):
    """Result for one frame. members: everybody who is a member at these seqs, the sender included.

    For `s:` the members are the one user.
    """

    conv: str
    epoch: int
    items: tuple[Appended, ...]
    members: tuple[str, ...]


# ------------------------------------------------------------------------------- reading a conversation


class Gap(msgspec.Struct, frozen=True, gc=False):
    """Seqs that this user is never shown; reason is a model.SkipReason."""

    conv: str
    from_seq: int
    to_seq: int
    reason: int


class StreamPage(msgspec.Struct, frozen=True, gc=False):
    """Contiguous: entries cover position+1 .. to_seq without a hole. to_seq == head means level."""

    entries: tuple[Message | Gap, ...]
    to_seq: int
    head: int
    epoch: int


class Behind(msgspec.Struct, frozen=True, gc=False):
    """A conversation whose head is above a device's cursor."""

    conv: str
    cursor: int
    head: int
    epoch: int


class BehindPage(msgspec.Struct, frozen=True, gc=False):
    """version: everything that changed up to it is listed here or was already level."""

    items: tuple[Behind, ...]
    version: int
    more: bool


class ConvState(msgspec.Struct, frozen=True, gc=False):
    """A conversation as one user's list shows it. last is None for an empty conversation."""

    conv: str
    version: int
    head: int
    epoch: int
    read: int
    unread: int
    mention_seq: int
    cursor: int
    last: Message | None


class ConvPage(msgspec.Struct, frozen=True, gc=False):
    """Changed conversations in version order."""

    items: tuple[ConvState, ...]
    version: int
    more: bool


# ------------------------------------------------------------------------ cursors, fates, due rows, push


class Settled(msgspec.Struct, frozen=True, gc=False):
    """A device settled from_seq..to_seq of a conversation: ACKED, or EXPIRED/RECALLED for a Skip it acked.

    own: the range is the sender's own message on the sending device: it moves the cursor, writes no fate.
    """

    user: str
    device: str
    conv: str
    from_seq: int
    to_seq: int
    fate: Fate
    own: bool = False
    attempt: int = 0


class DueRequest(msgspec.Struct, frozen=True, gc=False):
    """Ask for a due row (user, conv). Written only if an open obligation lies above the user's furthest
    cursor. An existing row keeps min(from_seq) and its attempts; its due_at_ms moves only if `urgent`, and
    only to an earlier moment.
    """

    user: str
    conv: str
    from_seq: int
    due_at_ms: int
    urgent: bool = False


class Leveled(msgspec.Struct, frozen=True, gc=False):
    """A device acknowledged LEVEL: what changed up to `version` is in the cursors, this flush included."""

    user: str
    device: str
    version: int


class Flush(msgspec.Struct, frozen=True, gc=False):
    """One transaction (S13), written by a node."""

    settled: tuple[Settled, ...]
    due: tuple[DueRequest, ...]
    node: str
    now_ms: int
    levels: tuple[Leveled, ...] = ()


class FlushResult(msgspec.Struct, frozen=True, gc=False):
    """gaps: cursors that did not move because from_seq - 1 was above them; the device must be streamed
    from `cursor` (its fate rows were written all the same)."""

    gaps: tuple[tuple[str, str, Behind], ...]
    """(user, device, where the cursor stands)"""


class DueRow(msgspec.Struct, frozen=True, gc=False):
    """A claimed due row. attempt: firings so far since the cursor last moved."""

    user: str
    conv: str
    from_seq: int
    due_at_ms: int
    attempt: int


class DueFiring(msgspec.Struct, frozen=True, gc=False):
    """dispatch decided to nudge: count the attempt, fire again at next_due_ms unless cleared before.

    attempt: the claimed row's + 1, or the same for a wait. If the cursor moved since the claim, a nudge
    is the first again.
    """

    user: str
    conv: str
    attempt: int
    next_due_ms: int


class Park(msgspec.Struct, frozen=True, gc=False):
    """Park every open obligation of the user in from_seq..to_seq and delete the due row.

    What the due row covers below from_seq is parked with it; what it covers above to_seq keeps it. An
    obligation that is parked already stays as it is, and rings nobody again.
    push: also upsert the push row, not before push_at_ms, and not within collapse_ms of the last push
    for the same (user, conv); a push inside the window waits for its end.
    """

    user: str
    conv: str
    from_seq: int
    to_seq: int
    push: bool
    push_at_ms: int
    collapse_ms: int
    attempt: int = 0


class PushRow(msgspec.Struct, frozen=True, gc=False):
    """A claimed push: something of the user is still open in the conversation."""

    user: str
    conv: str
    msg_id: int
    """Newest pending one."""
    sender: str
    kind: int
    flags: int
    body: bytes
    pending: int
    badge: int
    expires_ms: int
    attempt: int
    push_id: str


class OpenRange(msgspec.Struct, frozen=True, gc=False):
    """Messages of a conversation above the settled mark."""

    conv: str
    from_seq: int
    to_seq: int
    members: tuple[str, ...]


class ObligationState(enum.IntEnum):
    """For the audit and the trace. The first five are Fate values."""

    ACKED = 1
    RECALLED = 2
    EXPIRED = 3
    UNDELIVERABLE = 4
    PARKED = 5
    DUE = 6
    """In flight: a due row covers it."""
    UNSETTLED = 7
    """In flight: above the settled mark."""
    LOST = 8
    """None of the above. There must be none, ever."""


class Obligation(msgspec.Struct, frozen=True, gc=False):
    """Derived from timeline, fate rows, due rows and the settled mark."""

    msg_id: int
    conv: str
    seq: int
    client_id: bytes
    sender: str
    user: str
    state: ObligationState


class FateRow(msgspec.Struct, frozen=True, gc=False):
    """A stored fate over a range of seqs."""

    user: str
    device: str
    conv: str
    from_seq: int
    to_seq: int
    fate: Fate
    node: str
    attempt: int
    ts_ms: int


class Trace(msgspec.Struct, frozen=True, gc=False):
    """Where a message went: itself, each obligation's state, the fate rows and due rows that touch it."""

    message: Message
    obligations: tuple[Obligation, ...]
    fates: tuple[FateRow, ...]
    due: tuple[DueRow, ...]
    cursors: tuple[tuple[str, str, int], ...]
    """(user, device, cursor)"""


# ---------------------------------------------------------------------------------------------- people


class Member(msgspec.Struct, frozen=True, gc=False):
    """A membership: shown seqs with join_seq <= seq < leave_seq (leave_seq 0 = still in)."""

    user: str
    role: int
    join_seq: int
    leave_seq: int


class Device(msgspec.Struct, frozen=True, gc=False):
    """A device of a user as the store remembers it.

    level: the newest Leveled version; only moves forward (S5).
    """

    user: str
    device: str
    device_class: str
    first_seen_ms: int
    last_seen_ms: int
    level: int = 0


class OpenBoot(msgspec.Struct, frozen=True, gc=False):
    """A start of a node whose inbox may hold something: open_boot was called for it, end_boot was not."""

    node: str
    boot: int
    fenced: bool


class MessageStore(Protocol):
    """The port. Batched calls return results in the order of their arguments."""

    # -- timeline
    async def append(self, frames: Sequence[AppendFrame], now_ms: int) -> list[AppendedFrame]:
        """One transaction for the whole batch. See S1, S2, S3; moves the sender's read mark by read_seq."""
        ...

    async def stream(
        self, user: str, conv: str, after_seq: int, now_ms: int, *, limit: int, max_bytes: int
    ) -> StreamPage:
        """What lies above after_seq for this user (S7). At least one entry unless level.

        limit counts seqs. Raises PeerError("forbidden") as history does, and so do position and read.
        """
        ...

    async def history(
        self,
        user: str,
        conv: str,
        *,
        before_seq: int,
        after_seq: int,
        from_ms: int,
        to_ms: int,
        limit: int,
        now_ms: int,
    ) -> tuple[list[Message], bool]:
        """A page in seq order and whether there is more; only what the user may see, expired ones left out.

        The newest below before_seq, or with only after_seq the oldest above it; 0 = unbounded. from_ms and
        to_ms both included.
        Raises PeerError("forbidden") for a conversation the user is not in, the same for one that is not.
        """
        ...

    async def find(self, *, msg_id: int = 0, client_id: bytes = b"", sender: str = "") -> Message | None:
        """By msg_id, or the newest with this client_id (and sender, if given)."""
        ...

    async def scan(self, after_msg_id: int, limit: int) -> list[Message]:
        """Append order (S10). A page may be shorter than asked for; an empty one is the end."""
        ...

    # -- catching up
    async def behind(self, user: str, device: str, since_version: int, limit: int) -> BehindPage:
        """Conversations changed after since_version whose head is above the device's cursor."""
        ...

    async def position(self, user: str, device: str, conv: str) -> Behind:
        """The device's cursor and the conversation's head."""
        ...

    async def conversations(
        self, user: str, device: str, since_version: int, limit: int, now_ms: int
    ) -> ConvPage:
        """The user's conversation list, or what changed in it after since_version."""
        ...

    async def version(self, user: str) -> int:
        """The user's newest change-index version, the unprojected tail included."""
        ...

    # -- marks and fates
    async def flush(self, flush: Flush) -> FlushResult:
        """S13. Moves cursors forward, appends fate rows, upserts due rows; a due row of a (user, conv) whose
        cursor moved starts its attempts again, and is deleted when nothing open is left above the furthest
        cursor of the user's devices (the expired among them get their EXPIRED fate row)."""
        ...

    async def read(self, user: str, conv: str, seq: int, now_ms: int) -> tuple[int, int]:
        """Move the read mark forward (clamped to head). Returns (read mark, unread after it)."""
        ...

    async def unread(self, user: str, conv: str | None = None) -> tuple[int, list[tuple[str, int]]]:
        """(badge, [(conv, unread > 0)]); with `conv` the list holds only that one."""
        ...

    async def recount(self, user: str) -> list[tuple[str, int, int]]:
        """Recompute unread from the timeline: [(conv, stored, counted)] where they differ; must be empty."""
        ...

    # -- due rows and push
    async def next_due_ms(self) -> int:
        """The earliest moment at which a due row may be claimed, 0 if none: its due_at_ms, or the end of the
        claim on it. Cheap: no transaction."""
        ...

    async def claim_due(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[DueRow]:
        """Claim due rows (S11). Rows with nothing open are cleared on the way and not returned."""
        ...

    async def fire_due(self, holder: str, firings: Sequence[DueFiring], now_ms: int) -> list[bool]:
        """True where the row is still this holder's and something is still open: nudge now."""
        ...

    async def park(self, parks: Sequence[Park], now_ms: int) -> list[bool]:
        """S13. True where at least one obligation was still open and is parked now."""
        ...

    async def next_push_ms(self) -> int:
        """The earliest moment a push row may be claimed, 0 if none."""
        ...

    async def claim_push(self, holder: str, now_ms: int, claim_ms: int, limit: int) -> list[PushRow]:
        """Claim push rows; a row whose user has acked meanwhile is deleted, not returned."""
        ...

    async def finish_push(self, holder: str, row: PushRow, now_ms: int, *, retry_at_ms: int) -> None:
        """retry_at_ms 0: done (sent or gone); the row remembers the moment for the collapse window."""
        ...

    # -- recovery and audit
    async def settled_mark(self) -> int:
        """Every obligation of messages up to this msg_id has a fate row or a due row."""
        ...

    async def settle(self, msg_id: int) -> None:
        """Move the settled mark forward."""
        ...

    async def head_msg_id(self) -> int:
        """The newest msg_id, 0 for an empty store."""
        ...

    async def unsettled(self, upto_msg_id: int) -> list[OpenRange]:
        """Ranges above the settled mark up to upto_msg_id, by conversation. O(messages above the mark)."""
        ...

    async def obligations(
        self, after_msg_id: int, limit_messages: int, now_ms: int
    ) -> tuple[list[Obligation], int]:
        """The next messages' obligations with their states, and the msg_id reached (0 = at the end).

        A page may end before limit_messages.
        """
        ...

    async def trace(self, msg_id: int, now_ms: int) -> Trace | None:
        """One message's whole story."""
        ...

    # -- groups and devices
    async def create_group(self, group: str, owner: str, members: Sequence[str], now_ms: int) -> int:
        """Create `g:<group>` with a fixed member list (<= 500, owner included); the event takes seq 1.

        Same call again: the same seq. Raises PeerError("conflict") if it exists with other members.
        """
        ...

    async def members(self, conv: str) -> list[Member]:
        """All memberships ever, in join order; for p and s the implied ones. Empty: no such group."""
        ...

    async def register_device(self, user: str, device: str, device_class: str, now_ms: int) -> Device:
        """Remember the device. A new one starts at the furthest cursors of the user's other devices."""
        ...

    async def devices(self, user: str) -> list[Device]:
        """The devices of a user; empty for a user nobody has ever seen."""
        ...

    # -- nodes
    async def next_boot(self, node: str) -> int:
        """1, 2, 3 ... per node, durable."""
        ...

    async def open_boot(self, node: str, boot: int) -> None:
        """Before the boot's inbox is created, on a bus that outlives the process: whoever forgets the boot
        (a flushed presence), it is listed here. Again: nothing happens."""
        ...

    async def open_boots(self) -> list[OpenBoot]:
        """Every open boot, by node and boot."""
        ...

    async def end_boot(self, node: str, boot: int) -> None:
        """The boot's inbox is gone for good. Its fence stays. Again, or never opened: nothing happens."""
        ...

    async def fence(self, node: str, boot: int, holder: str, now_ms: int, claim_ms: int) -> bool:
        """Fence the boot for ever and claim its adoption (S12); False while another holder's claim lives."""
        ...

    async def fenced(self, node: str, boot: int) -> bool:
        """Whether the boot was ever fenced."""
        ...

    async def close(self) -> None:
        """Finish what was taken, then close."""
        ...
