"""What REST takes and gives, as JSON: every body, every query, every answer, with its limits.

The OpenAPI document is made from these, so a limit stands in one place. Unknown fields are refused: a
misspelt deadline must not become a message that never expires.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec

from fastim.errors import PeerError
from fastim.model import Conv, Kind, KindRule, Message, check_id, client_id_text, preview
from fastim.protocol import MAX_HISTORY_LIMIT, MAX_MENTIONS
from fastim.store.base import ConvState, Member, Trace

PREVIEW_CHARS: Final = 80
_U53 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]
_Page = Annotated[int, msgspec.Meta(ge=1, le=MAX_HISTORY_LIMIT)]
_Flags = Annotated[int, msgspec.Meta(ge=0, le=15)]
_Mentions = Annotated[list[str], msgspec.Meta(max_length=MAX_MENTIONS)]


class Taken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what callers send."""


class Given(msgspec.Struct, frozen=True):
    """Base of what callers get."""


# ------------------------------------------------------------------------------------------------- taken


class SendBody(Taken, frozen=True):
    """One message. `client_id` is its idempotency key for at least 7 days; one is made if it is missing."""

    conv: str
    sender: str = ""
    """On whose behalf; a client's token sends as its own user only."""
    kind: int | str = "text"
    """A number or a name of the table of kinds."""
    body: str | None = None
    """Text, or:"""
    body_base64: bytes | None = None
    client_id: str = ""
    """32 hexadecimal digits or a UUID."""
    loss_time_ms: _U53 = 0
    """Unix milliseconds after which it is never shown; 0 = it must not be lost."""
    flags: _Flags = 0
    """1 no push, 2 silent, 4 mention all, 8 sealed."""
    mentions: _Mentions = []


class GroupBody(Taken, frozen=True):
    """A group with a fixed list of members, the owner among them or added to them."""

    group: str
    owner: str
    members: list[str]


class ConversationsQuery(Taken, frozen=True):
    """since: a version from an earlier answer; what changed after it."""

    since: _U53 = 0
    limit: _Page = 100


class UnreadQuery(Taken, frozen=True):
    """conv: only this one; the badge is always of all."""

    conv: str = ""


class HistoryQuery(Taken, frozen=True):
    """The newest page, or the one below before_seq, or above after_seq; from_ms and to_ms narrow it."""

    user: str = ""
    """As whom an admin reads."""
    before_seq: _U53 = 0
    after_seq: _U53 = 0
    from_ms: _U53 = 0
    to_ms: _U53 = 0
    limit: _Page = 50


class TraceQuery(Taken, frozen=True):
    """user: only this user's part. sender: of which sender, where a client_id is ambiguous."""

    user: str = ""
    sender: str = ""


class NoQuery(Taken, frozen=True):
    """No parameters."""


# ------------------------------------------------------------------------------------------------- given


class SentAnswer(Given, frozen=True):
    """The message is stored for good; a repeat gets the first answer again."""

    msg_id: int
    seq: int
    ts_ms: int
    client_id: str
    conv: str


class TakenAnswer(Given, frozen=True):
    """The message is safe and will be stored, or refused: `trace` tells, and so does a repeat under the same
    client_id."""

    client_id: str
    conv: str
    trace: str


class GroupAnswer(Given, frozen=True):
    """seq: of the event that made the group."""

    group: str
    conv: str
    seq: int


class MessageAnswer(Given, frozen=True, omit_defaults=True):
    """A stored message. `body` for text, `body_base64` for everything else; neither where it was recalled."""

    msg_id: int
    conv: str
    seq: int
    cseq: int
    epoch: int
    sender: str
    client_id: str
    kind: str
    ts_ms: int
    loss_time_ms: int = 0
    flags: int = 0
    mentions: tuple[str, ...] = ()
    recalled: bool = False
    body: str | None = None
    body_base64: bytes | None = None


class HistoryAnswer(Given, frozen=True):
    """In seq order. more: there is at least one further page in the same direction."""

    conv: str
    messages: list[MessageAnswer]
    more: bool


class LastMessage(Given, frozen=True):
    """preview: empty for callers who may not read the conversation."""

    seq: int
    sender: str
    kind: str
    ts_ms: int
    preview: str


class ConversationAnswer(Given, frozen=True):
    """One row of a user's list."""

    conv: str
    version: int
    head: int
    epoch: int
    read: int
    unread: int
    mention_seq: int
    last: LastMessage | None


class ConversationsAnswer(Given, frozen=True):
    """Oldest change first. version: ask with since=version for what changes later, or for the next page."""

    user: str
    conversations: list[ConversationAnswer]
    version: int
    more: bool


class DeviceAnswer(Given, frozen=True):
    """A connected device."""

    device: str
    device_class: str
    since_ms: int


class OnlineAnswer(Given, frozen=True):
    """Where the user is connected now."""

    user: str
    online: bool
    devices: list[DeviceAnswer]


class UnreadOf(Given, frozen=True):
    """A conversation with something unread."""

    conv: str
    unread: int


class UnreadAnswer(Given, frozen=True):
    """badge: over all conversations."""

    user: str
    badge: int
    conversations: list[UnreadOf]


class TracedMessage(Given, frozen=True):
    """The message without its body."""

    msg_id: int
    conv: str
    seq: int
    sender: str
    client_id: str
    kind: str
    flags: int
    ts_ms: int
    loss_time_ms: int
    body_bytes: int
    recalled: bool


class TracedObligation(Given, frozen=True):
    """state: acked recalled expired undeliverable parked due unsettled lost."""

    user: str
    state: str


class TracedFate(Given, frozen=True):
    """A stored fate that covers the message."""

    user: str
    device: str
    from_seq: int
    to_seq: int
    fate: str
    node: str
    attempt: int
    ts_ms: int


class TracedDue(Given, frozen=True):
    """A retry that waits."""

    user: str
    from_seq: int
    due_at_ms: int
    attempt: int


class TracedCursor(Given, frozen=True):
    """Up to where a device has acknowledged the conversation."""

    user: str
    device: str
    cursor: int


class TraceAnswer(Given, frozen=True):
    """Where a message went."""

    message: TracedMessage
    obligations: list[TracedObligation]
    fates: list[TracedFate]
    due: list[TracedDue]
    cursors: list[TracedCursor]


class StatusAnswer(Given, frozen=True):
    """ok or ready."""

    status: str


# -------------------------------------------------------------------------------------- from and to our words


def new_client_id(wall_ms: int) -> bytes:
    """A UUIDv7."""
    random = os.urandom(10)
    return (
        wall_ms.to_bytes(6, "big")
        + bytes([0x70 | random[0] & 0x0F, random[1], 0x80 | random[2] & 0x3F])
        + random[3:]
    )


def read_client_id(text: str) -> bytes:
    """32 hexadecimal digits, or a UUID with its dashes. Raises PeerError("bad_client_id")."""
    if len(text) in (32, 36):
        try:
            value = uuid.UUID(text)
        except ValueError:
            pass
        else:
            if text.lower() in (value.hex, str(value)):
                return value.bytes
    detail = f"client_id is {text[:80]!r}; must be 32 hexadecimal digits or a UUID"
    raise PeerError("bad_client_id", detail)


def read_kind(kind: int | str, kinds: Mapping[int, KindRule]) -> KindRule:
    """Raises PeerError("unknown_kind") with the names there are."""
    for rule in kinds.values():
        if kind in (rule.kind, rule.name):
            return rule
    names = " ".join(rule.name for rule in kinds.values())
    raise PeerError("unknown_kind", f"kind is {str(kind)[:80]!r}; must be one of {names}, or its number")


def read_content(body: SendBody, rule: KindRule) -> bytes:
    """Raises PeerError("bad_request") for none or two bodies, PeerError("too_big")."""
    if (body.body is None) == (body.body_base64 is None):
        raise PeerError("bad_request", "a message needs one of body and body_base64")
    content = body.body.encode() if body.body is not None else body.body_base64 or b""
    if len(content) > rule.max_body_bytes:
        detail = f"body is {len(content):,} bytes; limit {rule.max_body_bytes:,} for {rule.name}"
        raise PeerError("too_big", detail)
    return content


def read_mentions(names: list[str]) -> list[str]:
    return [check_id("mention", name) for name in names]


def kind_name(kind: int, kinds: Mapping[int, KindRule]) -> str:
    rule = kinds.get(kind)
    if rule is not None:
        return rule.name
    return Kind(kind).name.lower() if kind in set(Kind) else str(kind)


def show_message(message: Message, kinds: Mapping[int, KindRule]) -> MessageAnswer:
    text: str | None = None
    if message.kind == Kind.TEXT and not message.recalled:
        with contextlib.suppress(UnicodeDecodeError):
            text = message.body.decode()
    raw = None if message.recalled or text is not None else message.body
    return MessageAnswer(
        message.msg_id, message.conv, message.seq, message.cseq, message.epoch, message.sender,
        client_id_text(message.client_id), kind_name(message.kind, kinds), message.ts_ms,
        message.loss_time_ms, message.flags, message.mentions, message.recalled, text, raw,
    )  # fmt: skip


def show_conversation(
    state: ConvState, kinds: Mapping[int, KindRule], *, previews: bool
) -> ConversationAnswer:
    last = None
    if state.last is not None:
        message = state.last
        shown = ""
        if previews and not message.recalled:
            shown = preview(message.kind, message.flags, message.body, kinds, PREVIEW_CHARS)
        last = LastMessage(message.seq, message.sender, kind_name(message.kind, kinds), message.ts_ms, shown)
    return ConversationAnswer(
        state.conv, state.version, state.head, state.epoch, state.read, state.unread, state.mention_seq, last
    )


def show_trace(trace: Trace, kinds: Mapping[int, KindRule], user: str) -> TraceAnswer:
    """user: only his part; "" for all."""
    message = trace.message

    def wanted(name: str) -> bool:
        return user in ("", name)

    return TraceAnswer(
        TracedMessage(
            message.msg_id, message.conv, message.seq, message.sender, client_id_text(message.client_id),
            kind_name(message.kind, kinds), message.flags, message.ts_ms, message.loss_time_ms,
            len(message.body), message.recalled,
        ),
        [
            TracedObligation(one.user, one.state.name.lower())
            for one in trace.obligations
            if wanted(one.user)
        ],
        [
            TracedFate(
                row.user, row.device, row.from_seq, row.to_seq, row.fate.name.lower(), row.node, row.attempt,
                row.ts_ms,
            )
            for row in trace.fates
            if wanted(row.user)
        ],
        [
            TracedDue(row.user, row.from_seq, row.due_at_ms, row.attempt)
            for row in trace.due
            if wanted(row.user)
        ],
        [TracedCursor(name, device, cursor) for name, device, cursor in trace.cursors if wanted(name)],
    )  # fmt: skip


def is_member_at(members: list[Member], user: str, conv: Conv, seq: int) -> bool:
    """Whether the user is shown this seq. members: the store's rows of a group."""
    if conv.members is not None:
        return user in conv.members
    return any(
        row.user == user and row.join_seq <= seq and (row.leave_seq == 0 or seq < row.leave_seq)
        for row in members
    )
