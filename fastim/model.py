"""The words everybody uses: identifiers, kinds of message, messages, fates.

Hides the textual forms: what a user id may hold, how a conversation is named, how a msg_id is packed.
Nothing here does I/O or reads a clock.
Source: seed, "消息可达性" and "会话上下文管理"; the numbers come from docs/protocol.md.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from fastim.errors import PeerError

# ----------------------------------------------------------------------------------------------- ids

_ID = re.compile(r"[A-Za-z0-9_.@-]{1,64}\Z")
_ID_RULE: Final = "1-64 characters of A-Za-z0-9_.@-"

EPOCH_MS: Final = 1_577_836_800_000
"""2020-01-01T00:00:00Z: the zero of the 41 bits of milliseconds in a msg_id."""
MSG_ID_SHARD_BITS: Final = 6
MSG_ID_COUNTER_BITS: Final = 6
MAX_SAFE_INT: Final = (1 << 53) - 1
"""JavaScript's largest exact integer; every number on the wire stays at or below it."""


def check_id(what: str, value: object) -> str:
    """Return `value` if it is a legal user, group, room or device id.

    Raises PeerError("bad_id") that shows the value (shortened) and the rule.
    """
    if isinstance(value, str) and _ID.match(value):
        return value
    raise PeerError("bad_id", f"{what} is {str(value)[:80]!r}; must be {_ID_RULE}")


def pair_conv(user: str, other: str) -> str:
    """The 1:1 conversation of two different users: `p:<a>:<b>` with a < b bytewise."""
    if user == other:
        raise PeerError("bad_conv", f"a 1:1 conversation needs two users; both are {user!r}")
    first, second = (user, other) if user < other else (other, user)
    return f"p:{first}:{second}"


class Conv(msgspec.Struct, frozen=True):
    """A parsed conversation name. `type` is one of p g s r; `members` is known only for p and s."""

    name: str
    type: str
    ident: str
    """The group, room or user id; for p the two ids with their colon."""
    members: tuple[str, ...] | None

    @property
    def is_stored(self) -> bool:
        return self.type != "r"


def parse_conv(name: object) -> Conv:
    """Parse `p:<a>:<b>` (a < b bytewise), `g:<gid>`, `s:<uid>` or `r:<room>`.

    Raises PeerError("bad_conv") for anything else, the non-canonical order included.
    """
    if isinstance(name, str) and len(name) <= 131:
        head, _, rest = name.partition(":")
        if head in ("g", "s", "r") and _ID.match(rest):
            return Conv(name, head, rest, (rest,) if head == "s" else None)
        if head == "p":
            first, colon, second = rest.partition(":")
            if colon and _ID.match(first) and _ID.match(second) and first < second:
                return Conv(name, "p", rest, (first, second))
    raise PeerError(
        "bad_conv",
        f"conv is {str(name)[:140]!r}; must be p:<a>:<b> with a < b, g:<group>, s:<user> or r:<room>, "
        f"each id {_ID_RULE}",
    )


def client_id_text(client_id: bytes) -> str:
    """The 32 hex digits by which REST, logs and the command line name a client_id."""
    return client_id.hex()


def check_client_id(value: object) -> bytes:
    """Return `value` if it is 16 bytes. Raises PeerError("bad_client_id")."""
    if isinstance(value, bytes) and len(value) == 16:
        return value
    size = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
    raise PeerError("bad_client_id", f"client_id is {size}; must be 16 bytes (UUIDv7)")


# --------------------------------------------------------------------------------------------- kinds


class Kind(enum.IntEnum):
    """Message types. The number is on the wire and in the store; it never changes meaning."""

    TEXT = 1
    IMAGE = 2
    VOICE = 3
    VIDEO = 4
    FILE = 5
    LOCATION = 6
    CARD = 7
    CUSTOM = 8
    # Control events have a seq like any message but are never countable and never pushed.
    MEMBER = 32
    RECALL = 33
    EDIT = 34
    DELETE = 35


FIRST_EVENT_KIND: Final = int(Kind.MEMBER)
"""Control events: they take a seq and are streamed, but nobody owes their delivery."""


class KindRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The weight of a message type (seed: 特定消息类型加权重). One row of the `kinds` configuration table."""

    kind: int
    name: str
    ttl_ms: int = 0
    """Default time to live, fixed into loss_time_ms by the first append; 0 = must never be lost."""
    countable: bool = True
    push: bool = True
    preview: str = ""
    """What vendor push and conversation lists show; "" = the text itself, for text."""
    max_body_bytes: int = 61_440


MAX_BODY_BYTES: Final = 61_440
"""So that a MSG around it fits the 64 KiB frame limit."""

DEFAULT_KINDS: Final[dict[int, KindRule]] = {
    rule.kind: rule
    for rule in (
        KindRule(Kind.TEXT, "text"),
        KindRule(Kind.IMAGE, "image", preview="[image]"),
        KindRule(Kind.VOICE, "voice", preview="[voice]"),
        KindRule(Kind.VIDEO, "video", preview="[video]"),
        KindRule(Kind.FILE, "file", preview="[file]"),
        KindRule(Kind.LOCATION, "location", preview="[location]"),
        KindRule(Kind.CARD, "card", preview="[card]"),
        KindRule(Kind.CUSTOM, "custom", preview="[message]"),
    )
}

FALLBACK_PREVIEW: Final = "[message]"

# ------------------------------------------------------------------------------------------ messages


class Flag(enum.IntFlag):
    """Bits of `flags` in SEND and MSG."""

    NONE = 0
    NO_PUSH = 1
    SILENT = 2
    """Delivered and stored, not countable."""
    MENTION_ALL = 4
    SEALED = 8
    """The body is end-to-end encrypted: never previewed, never indexed."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """A stored message, as history and catch-up read it.

    body is opaque bytes: UTF-8 text for kind text, a msgpack map for the other named kinds.
    """

    conv: str
    seq: int
    msg_id: int
    cseq: int
    epoch: int
    sender: str
    client_id: bytes
    kind: int
    flags: int
    ts_ms: int
    loss_time_ms: int
    body: bytes
    mentions: tuple[str, ...] = ()
    recalled: bool = False

    def expired(self, wall_ms: int) -> bool:
        """0 never expires; otherwise expired strictly after the deadline."""
        return is_expired(self.loss_time_ms, wall_ms)


def is_expired(loss_time_ms: int, wall_ms: int) -> bool:
    """The one place that compares a deadline with the clock (seed: 如果当前时间大于 lossTime 时间则丢弃)."""
    return loss_time_ms != 0 and wall_ms > loss_time_ms


def preview(kind: int, flags: int, body: bytes, kinds: Mapping[int, KindRule], most_chars: int) -> str:
    """What a list or a phone shows of a message: its text, cut, or the words of its kind.

    End-to-end encrypted bodies and unknown kinds are never looked into; most_chars 0 shows no text at all.
    """
    rule = kinds.get(kind)
    if flags & Flag.SEALED or rule is None or most_chars <= 0:
        return FALLBACK_PREVIEW
    if rule.preview or kind != Kind.TEXT:
        return rule.preview or FALLBACK_PREVIEW
    text = " ".join(body[: most_chars * 4].decode(errors="ignore").split())
    return text[:most_chars] or FALLBACK_PREVIEW


class Fate(enum.IntEnum):
    """What became of an obligation (message, user). Stored in fate rows; the number never changes.

    STORED -> ROUTED -> WRITTEN -> ACKED
       |         |         `-> UNDELIVERED -> (due) -> ROUTED | PARKED | EXPIRED
       `---------+-> PARKED (+ push) -> ACKED by a later sync | EXPIRED | UNDELIVERABLE
    EXPIRED only if loss_time_ms != 0 and past; RECALLED at any time before ACKED.
    When rows of several fates cover a message, the strongest counts, in this order.
    """

    ACKED = 1
    RECALLED = 2
    EXPIRED = 3
    UNDELIVERABLE = 4
    PARKED = 5


class SkipReason(enum.IntEnum):
    """Why a SKIP covers a range of seqs."""

    EXPIRED = 1
    RECALLED = 2
    DELETED = 3
    NOT_MEMBER = 4
    RETENTION = 5


class DeviceClass(enum.StrEnum):
    """The classes over which device policies decide."""

    APP = "app"
    WEB = "web"
    DESKTOP = "desktop"
    PAD = "pad"


class Role(enum.IntEnum):
    """Of a group member."""

    MEMBER = 1
    ADMIN = 2
    OWNER = 3


MAX_GROUP_MEMBERS: Final = 500
"""Groups up to this size get a change-index row per member; larger ones come with their own issue."""
