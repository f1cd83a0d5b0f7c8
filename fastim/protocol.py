"""The wire: what a packet holds, which frames exist, how each is laid out.

A packet is one binary WebSocket message: 1 to 64 frames back to back. A frame is a msgpack array whose first
element is the op; the rest are positional. A reader ignores elements after those it knows, fills missing
ones at the end with their defaults, and answers an op it does not know with ERROR("unsupported"). So both
sides can be upgraded alone; VERSION changes only when that is not enough.

Hides layouts and versions; sans-I/O. The hot half (splitting, ACK, the head of MSG) is fastim._core.frame,
and tests/unit/test_protocol.py holds both to the same golden frames in tests/vectors/.
Described for other implementers in docs/protocol.md. Source: seed, "接入层设计"; semantics.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from fastim.errors import PeerError
from fastim.model import Message

VERSION: Final = 1
SUBPROTOCOL: Final = "fastim.v1"
MAX_PACKET_BYTES: Final = 65_536
MAX_FRAMES_PER_PACKET: Final = 64
MAX_SEND_BATCH: Final = 32
MAX_ACK_IDS: Final = 256
MAX_MENTIONS: Final = 50
MAX_HISTORY_LIMIT: Final = 200


class Op(enum.IntEnum):
    """First element of every frame. Below 32: client to server; from 32: server to client."""

    AUTH = 1
    PING = 2
    ACK = 3
    ACKS = 4
    SEND = 5
    READ = 6
    PULL = 7
    HISTORY = 8
    REFRESH = 9
    CONVS = 10
    SYNC = 11
    JOIN = 12
    LEAVE = 13
    SIGNAL = 14
    RECALL = 15
    EDIT = 16
    DELETE = 17
    CLEAR = 18
    SETTING = 19
    BLOCK = 20
    WATCH = 21
    UNWATCH = 22
    RECEIVED = 23
    SEALED = 24
    REKEY = 25

    MSG = 32
    SENT = 33
    SKIP = 34
    HELLO = 35
    PONG = 36
    ERROR = 37
    LEVEL = 38
    CHANGES = 39
    READ_MARK = 40
    HISTORY_PAGE = 41
    GOAWAY = 42
    PROBE = 43
    HEAD = 44
    SIGNALLED = 45
    ROOM_MSG = 46
    RECEIPT = 47
    PRESENCE = 48
    KICKED = 49
    REFRESHED = 50
    SEALED_DOWN = 51
    KEYS = 52


RESERVED: Final = frozenset(
    {
        Op.JOIN, Op.LEAVE, Op.SIGNAL, Op.RECALL, Op.EDIT, Op.DELETE, Op.CLEAR, Op.SETTING, Op.BLOCK,
        Op.WATCH, Op.UNWATCH, Op.RECEIVED, Op.SEALED, Op.REKEY,
    }
)  # fmt: skip
"""Client ops of the vocabulary that answer ERROR("unsupported") until their own feature lands."""


class CloseCode(enum.IntEnum):
    """4000-4499 and 1001, 1006, 1012: reconnect. 4500 and above, 1002, 1003, 1007-1009: not by itself."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL = 1002
    TEXT_REFUSED = 1003
    TOO_BIG = 1009
    INTERNAL = 1011
    RESTART = 1012
    IDLE = 4000
    """No frame for idle_ms."""
    HALF_OPEN = 4008
    SLOW = 4408
    DRAINING = 4410
    AUTH = 4501
    KICKED = 4503
    REVOKED = 4505
    REPLACED = 4507
    """The same device connected again; this connection is the older one."""
    BAD_FRAME = 4509


def reconnects(code: int) -> bool:
    """Whether a client connects again by itself after this close code (1006 = no close frame seen)."""
    return 4000 <= code <= 4499 or code in (1000, 1001, 1005, 1006, 1011, 1012, 1013, 1014)


# ------------------------------------------------------------------------------------ client -> server

Str64 = Annotated[str, msgspec.Meta(max_length=64)]
ConvName = Annotated[str, msgspec.Meta(max_length=131)]
U53 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]


class Frame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of every frame: a positional msgpack array tagged by its op."""


class Auth(Frame, tag=int(Op.AUTH)):
    """First frame, within 5 s. `session`, `tag`, `user_cursor` ask to resume ("" and 0: a new session).

    user_cursor is the newest LEVEL.user_cursor the client has stored, 0 for none.
    """

    version_min: U32
    version_max: U32
    token: Annotated[str, msgspec.Meta(max_length=8_192)]
    device: Str64
    device_class: Annotated[str, msgspec.Meta(max_length=16)] = "app"
    session: Str64 = ""
    tag: U32 = 0
    user_cursor: U53 = 0
    agent: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Ping(Frame, tag=int(Op.PING)):
    """Liveness; answered by PONG."""


class Ack(Frame, tag=int(Op.ACK)):
    """Everything up to and including `tag` is stored on the client."""

    tag: U32


class Acks(Frame, tag=int(Op.ACKS)):
    """The listed messages are stored on the client (the design's 回包, one by one)."""

    msg_ids: Annotated[list[U53], msgspec.Meta(max_length=MAX_ACK_IDS)]


class SendItem(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One message of a SEND."""

    client_id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    kind: U32
    body: bytes
    loss_time_ms: U53 = 0
    flags: U32 = 0
    mentions: Annotated[list[Str64], msgspec.Meta(max_length=MAX_MENTIONS)] = []


class Send(Frame, tag=int(Op.SEND)):
    """1 to 32 messages for one conversation, stored in order: all, or a prefix.

    read_seq: the highest seq that the sender's screen had shown; 0 leaves the read mark alone.
    """

    conv: ConvName
    items: Annotated[list[SendItem], msgspec.Meta(min_length=1, max_length=MAX_SEND_BATCH)]
    read_seq: U53 = 0


class Read(Frame, tag=int(Op.READ)):
    """The user has seen everything up to seq. Only moves forward. private: do not tell the peers."""

    conv: ConvName
    seq: U53
    private: bool = False


class Pull(Frame, tag=int(Op.PULL)):
    """The client lacks from_seq..to_seq: answered by tagged MSG and SKIP frames that leave no hole."""

    conv: ConvName
    from_seq: U53
    to_seq: U53


class History(Frame, tag=int(Op.HISTORY)):
    """One page of a conversation, newest first (before_seq) or oldest first (after_seq). 0 = unbounded."""

    req: U32
    conv: ConvName
    before_seq: U53 = 0
    after_seq: U53 = 0
    from_ms: U53 = 0
    to_ms: U53 = 0
    limit: U32 = 50


class Refresh(Frame, tag=int(Op.REFRESH)):
    """A newer token for this connection; must name the same user."""

    token: Annotated[str, msgspec.Meta(max_length=8_192)]


class Convs(Frame, tag=int(Op.CONVS)):
    """The conversations that changed after `user_cursor`, as CHANGES pages with this `req`."""

    req: U32
    user_cursor: U53 = 0
    limit: U32 = 100


class Sync(Frame, tag=int(Op.SYNC)):
    """Stream again whatever lies above this device's cursors in conversations changed after user_cursor."""

    user_cursor: U53 = 0


# ------------------------------------------------------------------------------------ server -> client


class Msg(Frame, tag=int(Op.MSG)):
    """A stored message. tag 0: needs no ack (large groups). dup: was possibly sent before on this session.

    The elements from msg_id on are the same bytes for every recipient (`encode_msg_tail`).
    """

    tag: int
    dup: bool
    msg_id: int
    conv: str
    seq: int
    cseq: int
    epoch: int
    sender: str
    client_id: bytes
    kind: int
    ts_ms: int
    loss_time_ms: int
    flags: int
    body: bytes
    mentions: list[str] = []


class SentItem(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One accepted message."""

    client_id: bytes
    msg_id: int
    seq: int
    ts_ms: int


class Sent(Frame, tag=int(Op.SENT)):
    """The messages are stored for good. Its ACK moves this device's cursor over its own messages."""

    tag: int
    conv: str
    epoch: int
    items: list[SentItem]


class Skip(Frame, tag=int(Op.SKIP)):
    """from_seq..to_seq will never be shown; counts as delivered for the client's ordering."""

    tag: int
    conv: str
    from_seq: int
    to_seq: int
    reason: int
    epoch: int = 0


class Hello(Frame, tag=int(Op.HELLO)):
    """Authenticated. resumed: 0 new session, 1 hot (unacked frames follow as they were), 2 cold."""

    version: int
    session: str
    user: str
    device: str
    server_ms: int
    resumed: int
    heartbeat_ms: int
    idle_ms: int
    resume_ttl_ms: int
    window_messages: int
    window_bytes: int
    max_packet_bytes: int
    badge: int
    user_cursor: int
    """The user's newest change-index version at this moment."""


class Pong(Frame, tag=int(Op.PONG)):
    """last_tag: the last tag sent on this connection; a client that has not seen it has lost frames."""

    server_ms: int
    last_tag: int
    user_cursor: int
    heads: list[tuple[str, int]] = []


class Error(Frame, tag=int(Op.ERROR)):
    """A request was refused. `op` names it; client_id or req say which one, when it had one."""

    op: int
    code: str
    detail: str
    retryable: bool = False
    retry_after_ms: int = 0
    client_id: bytes = b""
    req: int = 0
    conv: str = ""


class Level(Frame, tag=int(Op.LEVEL)):
    """Everything that changed up to user_cursor was sent before this frame: store it after persisting that."""

    tag: int
    user_cursor: int


class ConvChange(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One conversation of the user, as lists show it."""

    conv: str
    version: int
    head: int
    epoch: int
    read: int
    unread: int
    mention_seq: int
    limited: bool
    last_sender: str
    last_kind: int
    last_ts_ms: int
    preview: str
    cursor: int = 0
    """This device's durable cursor; a client that holds nothing may start here and page history."""


class Changes(Frame, tag=int(Op.CHANGES)):
    """A page of changed conversations. req 0: sent by itself after a cold HELLO."""

    req: int
    items: list[ConvChange]
    user_cursor: int
    more: bool


class ReadMark(Frame, tag=int(Op.READ_MARK)):
    """`user` (possibly this one, on another device) has read conv up to seq. unread: of this user, or -1."""

    conv: str
    user: str
    seq: int
    unread: int = -1


class HistoryItem(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A message in a history page: the fields of MSG from msg_id on."""

    msg_id: int
    conv: str
    seq: int
    cseq: int
    epoch: int
    sender: str
    client_id: bytes
    kind: int
    ts_ms: int
    loss_time_ms: int
    flags: int
    body: bytes
    mentions: list[str] = []


class HistoryPage(Frame, tag=int(Op.HISTORY_PAGE)):
    """Messages in seq order, each an untagged MSG tail as an array of its own; recalled ones have no body."""

    req: int
    conv: str
    messages: list[HistoryItem]
    more: bool


class Goaway(Frame, tag=int(Op.GOAWAY)):
    """The node will close soon: connect elsewhere at a random moment within window_ms."""

    window_ms: int
    reason: str = ""


class Probe(Frame, tag=int(Op.PROBE)):
    """The server asks for a sign of life; any frame answers, PING is enough."""


class Head(Frame, tag=int(Op.HEAD)):
    """Large groups: the group is at seq; members catch up by cursor."""

    tag: int
    conv: str
    seq: int


class Kicked(Frame, tag=int(Op.KICKED)):
    """Sent before a 45xx close that policy decided."""

    reason: str
    by_device: str = ""


class Refreshed(Frame, tag=int(Op.REFRESHED)):
    """The newer token was taken; it ends at expires_ms."""

    expires_ms: int


ClientFrame = Auth | Ping | Ack | Acks | Send | Read | Pull | History | Refresh | Convs | Sync
ServerFrame = (
    Msg | Sent | Skip | Hello | Pong | Error | Level | Changes | ReadMark | HistoryPage | Goaway | Probe | Head
    | Kicked | Refreshed
)  # fmt: skip

# --------------------------------------------------------------------------------------------- codec

encode: Final = msgspec.msgpack.Encoder().encode
"""Any frame to its bytes. Frames may be joined back to back into a packet."""

MSG_TAIL_ELEMENTS: Final = 13
MSG_PREFIX_BYTES: Final = 10
"""dc 00 10 (array of 16) · 20 (op MSG) · ce tag (u32) · c2|c3 (dup): what differs per recipient."""

_FRAME_TYPES: Final[dict[int, type[Frame]]] = {
    int(kind.__struct_config__.tag): kind  # type: ignore[arg-type]
    for kind in (*ClientFrame.__args__, *ServerFrame.__args__)
}
_DECODERS: Final = {op: msgspec.msgpack.Decoder(kind).decode for op, kind in _FRAME_TYPES.items()}


def encode_msg_tail(message: Message) -> bytes:
    """The 13 elements of MSG that are the same for every recipient, without an array header."""
    item = HistoryItem(
        message.msg_id, message.conv, message.seq, message.cseq, message.epoch, message.sender,
        message.client_id, message.kind, message.ts_ms, message.loss_time_ms, message.flags, message.body,
        list(message.mentions),
    )  # fmt: skip
    return encode(item)[1:]


def encode_msg(tag: int, dup: bool, tail: bytes) -> bytes:
    """One MSG frame from a shared tail."""
    return b"\xdc\x00\x10\x20\xce" + tag.to_bytes(4, "big") + (b"\xc3" if dup else b"\xc2") + tail


def decode(op: int, frame: bytes | memoryview) -> Frame:
    """Decode and validate one frame whose op is known from the split.

    Raises PeerError("unsupported") for an op without a layout, PeerError("bad_frame") with the reason.
    """
    decoder = _DECODERS.get(op)
    if decoder is None:
        raise PeerError("unsupported", f"op {op} is not supported by protocol version {VERSION}")
    try:
        return decoder(frame)
    except msgspec.MsgspecError as error:
        raise PeerError("bad_frame", f"op {op}: {error}") from None
