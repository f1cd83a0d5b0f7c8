"""What an app sees: messages, conversations, its own sends, and events.

Plain values. Times are unix milliseconds; `seq` counts inside a conversation, from 1, without holes.
"""

from __future__ import annotations

import enum

import msgspec

from fastim.model import FIRST_EVENT_KIND


class Delivery(enum.StrEnum):
    """How far an own message got."""

    QUEUED = "queued"
    """In the outbox of this device; it survives the app."""
    SENT = "sent"
    """Stored by the server for good."""
    REFUSED = "refused"
    """Never going to be sent as it is; `code` says why."""
    READ = "read"
    """Somebody else in the conversation has read that far."""


class Message(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A message, as an event (shown once, in order) and in history.

    body: UTF-8 text for kind text, a msgpack map for the other named kinds, opaque when flags has SEALED.
    """

    conv: str
    seq: int
    msg_id: int
    sender: str
    client_id: bytes
    kind: int
    """A fastim.model.Kind."""
    body: bytes
    ts_ms: int
    """When the server stored it."""
    loss_time_ms: int = 0
    """It must not be shown after this moment; 0 = never lost."""
    flags: int = 0
    """fastim.model.Flag bits."""
    mentions: tuple[str, ...] = ()
    epoch: int = 0
    cseq: int = 0
    """Countable messages up to here; 0 where this device did not learn it (own messages)."""
    again: bool = False
    """As an event: it was handed over before, to a process that ended before it asked for the next event.
    Whether somebody has seen it only the app can know."""

    @property
    def text(self) -> str:
        """The body as text; bytes that are not UTF-8 are replaced."""
        return self.body.decode(errors="replace")

    @property
    def is_control(self) -> bool:
        """A control event of the timeline (members changed, for one), not somebody's message."""
        return self.kind >= FIRST_EVENT_KIND


class Gone(msgspec.Struct, frozen=True, gc=False):
    """from_seq..to_seq will never be shown. reason is a fastim.model.SkipReason."""

    conv: str
    from_seq: int
    to_seq: int
    reason: int


class StateChanged(msgspec.Struct, frozen=True, gc=False):
    """An own message of this device was accepted or refused."""

    client_id: bytes
    conv: str
    state: Delivery
    seq: int = 0
    msg_id: int = 0
    code: str = ""
    detail: str = ""


class ReadMark(msgspec.Struct, frozen=True, gc=False):
    """`user` has read up to seq: a peer, or this user on another device."""

    conv: str
    user: str
    seq: int


class ConvChanged(msgspec.Struct, frozen=True, gc=False):
    """The entry of this conversation in `Client.conversations()` is different now."""

    conv: str


class Connected(msgspec.Struct, frozen=True, gc=False):
    """Authenticated. resumed: 0 new session, 1 hot, 2 cold."""

    user: str
    session: str
    resumed: int


class Disconnected(msgspec.Struct, frozen=True, gc=False):
    """No connection. final: the client does not try again by itself; otherwise it does in retry_in_s.

    code: the close code, 1006 when there was none, 0 when no connection came about.
    reason: for people. refused: the code of the ERROR that refused AUTH, "" otherwise.
    """

    code: int
    reason: str
    final: bool
    retry_in_s: float = 0.0
    refused: str = ""


Event = Message | Gone | StateChanged | ReadMark | ConvChanged | Connected | Disconnected


class Conversation(msgspec.Struct, frozen=True, gc=False):
    """A conversation as a list shows it."""

    conv: str
    head: int
    """Newest seq that this device knows of."""
    read: int
    """This user has read up to here, on any device."""
    unread: int
    mention_seq: int
    """Newest message that mentions this user, 0 for none."""
    limited: bool
    """Older history was cut by the server's retention."""
    last_sender: str
    last_kind: int
    last_ts_ms: int
    preview: str


class HistoryPage(msgspec.Struct, frozen=True, gc=False):
    """Messages in seq order. more: there are older ones."""

    messages: list[Message]
    more: bool
