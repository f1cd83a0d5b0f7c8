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
MAX_SEALED_BYTES: Final = 65_501
"""Of a packet inside SEALED: header and tag take the rest."""
MAX_FRAMES_PER_PACKET: Final = 64
MAX_SEND_BATCH: Final = 32
MAX_ACK_IDS: Final = 256
MAX_MENTIONS: Final = 50
MAX_HISTORY_LIMIT: Final = 200
MAX_SIGNAL_BYTES: Final = 1_024


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
    DONE = 53
    JOINED = 54
    SETTING_MARK = 55


RESERVED: Final = frozenset(
    {
        Op.JOIN, Op.LEAVE, Op.SIGNAL, Op.RECALL, Op.EDIT, Op.DELETE, Op.CLEAR, Op.SETTING, Op.BLOCK,
        Op.WATCH, Op.UNWATCH, Op.RECEIVED,
    }
)  # fmt: skip
"""Client ops that are laid out, decoded, and answered ERROR("unsupported") until their own feature lands."""


class CloseCode(enum.IntEnum):
    """4000-4499 and 1001, 1006, 1012: reconnect. 4500 and above, 1002, 1003, 1007-1009: not by itself."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL = 1002
    TEXT_REFUSED = 1003
    TOO_BIG = 1009
    INTERNAL = 1011
    RESTART = 1012
    TRY_LATER = 1013
    """A backend of the node is away."""
    IDLE = 4000
    """No frame for idle_ms."""
    HALF_OPEN = 4008
    SLOW = 4408
    DRAINING = 4410
    KEYS_ENDED = 4411
    """The keys of a sealed connection were used up, and the client did not ask for new ones."""
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
ClientId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Token = Annotated[str, msgspec.Meta(max_length=8_192)]
Mentions = Annotated[list[Str64], msgspec.Meta(max_length=MAX_MENTIONS)]
Key32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Frame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of every frame: a positional msgpack array tagged by its op."""


class Auth(Frame, tag=int(Op.AUTH), frozen=True):
    """First frame, within 5 s. `session`, `tag`, `user_cursor` ask to resume ("" and 0: a new session).

    user_cursor is the newest LEVEL.user_cursor the client has stored, 0 for none.
    """

    version_min: U32
    version_max: U32
    token: Token
    device: Str64
    device_class: Annotated[str, msgspec.Meta(max_length=16)] = "app"
    session: Str64 = ""
    tag: U32 = 0
    user_cursor: U53 = 0
    agent: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Ping(Frame, tag=int(Op.PING), frozen=True):
    """Liveness; answered by PONG."""


class Ack(Frame, tag=int(Op.ACK), frozen=True):
    """Everything up to and including `tag` is stored on the client."""

    tag: U32


class Acks(Frame, tag=int(Op.ACKS), frozen=True):
    """The listed messages are stored on the client (the design's 回包, one by one)."""

    msg_ids: Annotated[list[U53], msgspec.Meta(max_length=MAX_ACK_IDS)]


class SendItem(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One message of a SEND."""

    client_id: ClientId
    kind: U32
    body: bytes
    loss_time_ms: U53 = 0
    flags: U32 = 0
    mentions: Mentions = []


class Send(Frame, tag=int(Op.SEND), frozen=True):
    """1 to 32 messages for one conversation, stored in order: all, or a prefix.

    read_seq: the highest seq that the sender's screen had shown; 0 leaves the read mark alone.
    """

    conv: ConvName
    items: Annotated[list[SendItem], msgspec.Meta(min_length=1, max_length=MAX_SEND_BATCH)]
    read_seq: U53 = 0


class Read(Frame, tag=int(Op.READ), frozen=True):
    """The user has seen everything up to seq. Only moves forward. private: do not tell the peers."""

    conv: ConvName
    seq: U53
    private: bool = False


class Pull(Frame, tag=int(Op.PULL), frozen=True):
    """The client lacks from_seq..to_seq: answered by tagged MSG and SKIP frames that leave no hole."""

    conv: ConvName
    from_seq: U53
    to_seq: U53


class History(Frame, tag=int(Op.HISTORY), frozen=True):
    """One page of a conversation, newest first (before_seq) or oldest first (after_seq). 0 = unbounded."""

    req: U32
    conv: ConvName
    before_seq: U53 = 0
    after_seq: U53 = 0
    from_ms: U53 = 0
    to_ms: U53 = 0
    limit: U32 = 50


class Refresh(Frame, tag=int(Op.REFRESH), frozen=True):
    """A newer token for this connection; must name the same user."""

    token: Token


class Convs(Frame, tag=int(Op.CONVS), frozen=True):
    """The conversations that changed after `user_cursor`, as CHANGES pages with this `req`."""

    req: U32
    user_cursor: U53 = 0
    limit: U32 = 100


class Sync(Frame, tag=int(Op.SYNC), frozen=True):
    """Stream again whatever lies above this device's cursors in conversations changed after user_cursor."""

    user_cursor: U53 = 0


class Sealed(Frame, tag=int(Op.SEALED), frozen=True):
    """A packet in an AES-256-GCM box, alone in its own packet; opened by fastim._core.sealed.

    What stands before the box is its associated data. counter: 1 for the first of the connection, +1 each,
    whatever the key.
    """

    key_id: U32
    counter: U53
    box: bytes


class Rekey(Frame, tag=int(Op.REKEY), frozen=True):
    """Agree on keys towards the named static key of the server, by an ephemeral X25519 key; answered by KEYS.

    The first frame of a connection, in clear, or later inside SEALED. key_id: above the one before.
    """

    key_id: U32
    ephemeral: Key32
    static: Str64
    shared: Str64 = ""
    """Name of a pre-shared key that is mixed in, "" for none."""


# -- reserved: laid out now, served by features to come; answered by DONE{req} unless said otherwise.


class Join(Frame, tag=int(Op.JOIN), frozen=True):
    """Enter a room until LEAVE or the end of the connection; answered by JOINED.

    offset and epoch: the last ROOM_MSG seen, to get what the room's ring still holds above it.
    """

    req: U32
    room: Str64
    credential: Token = ""
    offset: U53 = 0
    epoch: U32 = 0


class Leave(Frame, tag=int(Op.LEAVE), frozen=True):
    """Leave a room."""

    req: U32
    room: Str64


class Signal(Frame, tag=int(Op.SIGNAL), frozen=True):
    """Ephemeral: no seq, no store, no ack, no push, gone after 5 s. 1 typing, 2 stopped; from 64: custom."""

    conv: ConvName
    signal: U32
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_SIGNAL_BYTES)] = b""


class Recall(Frame, tag=int(Op.RECALL), frozen=True):
    """Take back a message of one's own; an event of its own with client_id, answered by SENT."""

    conv: ConvName
    client_id: ClientId
    seq: U53


class Edit(Frame, tag=int(Op.EDIT), frozen=True):
    """A new body for a message of one's own; an event of its own, answered by SENT."""

    conv: ConvName
    client_id: ClientId
    seq: U53
    body: bytes
    mentions: Mentions = []


class Delete(Frame, tag=int(Op.DELETE), frozen=True):
    """for_all: an event of its own, answered by SENT. Otherwise only for this user, on all his devices."""

    req: U32
    conv: ConvName
    seqs: Annotated[list[U53], msgspec.Meta(min_length=1, max_length=MAX_ACK_IDS)]
    for_all: bool = False
    client_id: Annotated[bytes, msgspec.Meta(max_length=16)] = b""


class Clear(Frame, tag=int(Op.CLEAR), frozen=True):
    """Hide the conversation up to seq from this user, on all his devices."""

    req: U32
    conv: ConvName
    seq: U53


class Setting(Frame, tag=int(Op.SETTING), frozen=True):
    """A value kept for the user and told to his other devices (drafts, mutes); an empty value removes it."""

    req: U32
    key: Annotated[str, msgspec.Meta(min_length=1, max_length=160)]
    value: Annotated[bytes, msgspec.Meta(max_length=4_096)] = b""


class Block(Frame, tag=int(Op.BLOCK), frozen=True):
    """Refuse what `user` sends from now on, or take it again."""

    req: U32
    user: Str64
    on: bool


class Watch(Frame, tag=int(Op.WATCH), frozen=True):
    """Tell this session about the presence of these users too; <= 500 per session."""

    req: U32
    users: Annotated[list[Str64], msgspec.Meta(min_length=1, max_length=250)]


class Unwatch(Frame, tag=int(Op.UNWATCH), frozen=True):
    """The reverse."""

    req: U32
    users: Annotated[list[Str64], msgspec.Meta(min_length=1, max_length=250)]


class Received(Frame, tag=int(Op.RECEIVED), frozen=True):
    """Delivered receipt, cumulative, 1:1 only, opt-in: the peer may be told. Never answered."""

    conv: ConvName
    seq: U53


# ------------------------------------------------------------------------------------ server -> client


class Msg(Frame, tag=int(Op.MSG), frozen=True):
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


class Sent(Frame, tag=int(Op.SENT), frozen=True):
    """The messages are stored for good. Its ACK moves this device's cursor over its own messages."""

    tag: int
    conv: str
    epoch: int
    items: list[SentItem]


class Skip(Frame, tag=int(Op.SKIP), frozen=True):
    """from_seq..to_seq will never be shown; counts as delivered for the client's ordering."""

    tag: int
    conv: str
    from_seq: int
    to_seq: int
    reason: int
    epoch: int = 0


class Hello(Frame, tag=int(Op.HELLO), frozen=True):
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


class Pong(Frame, tag=int(Op.PONG), frozen=True):
    """last_tag: the last tag sent on this connection; a client that has not seen it has lost frames."""

    server_ms: int
    last_tag: int
    user_cursor: int
    heads: list[tuple[str, int]] = []
    """Reserved: [g:<group>, head] of large groups that moved, [r:<room>, members] of joined rooms."""


class Error(Frame, tag=int(Op.ERROR), frozen=True):
    """A request was refused. `op` names it; client_id or req say which one, when it had one."""

    op: int
    code: str
    detail: str
    retryable: bool = False
    retry_after_ms: int = 0
    client_id: bytes = b""
    req: int = 0
    conv: str = ""


class Level(Frame, tag=int(Op.LEVEL), frozen=True):
    """Everything that changed up to user_cursor was sent before: store it after persisting that."""

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


class Changes(Frame, tag=int(Op.CHANGES), frozen=True):
    """A page of changed conversations. req 0: sent by itself after a cold HELLO."""

    req: int
    items: list[ConvChange]
    user_cursor: int
    more: bool


class ReadMark(Frame, tag=int(Op.READ_MARK), frozen=True):
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


class HistoryPage(Frame, tag=int(Op.HISTORY_PAGE), frozen=True):
    """Messages in seq order, each an untagged MSG tail as an array of its own; recalled ones have no body."""

    req: int
    conv: str
    messages: list[HistoryItem]
    more: bool


class Goaway(Frame, tag=int(Op.GOAWAY), frozen=True):
    """The node will close soon: connect elsewhere at a random moment within window_ms."""

    window_ms: int
    reason: str = ""


class Probe(Frame, tag=int(Op.PROBE), frozen=True):
    """The server asks for a sign of life; any frame answers, PING is enough."""


class Head(Frame, tag=int(Op.HEAD), frozen=True):
    """Large groups: the group is at seq; members catch up by cursor."""

    tag: int
    conv: str
    seq: int


class Kicked(Frame, tag=int(Op.KICKED), frozen=True):
    """Sent before a 45xx close that policy decided."""

    reason: str
    by_device: str = ""


class Refreshed(Frame, tag=int(Op.REFRESHED), frozen=True):
    """The newer token was taken; it ends at expires_ms."""

    expires_ms: int


class SealedDown(Frame, tag=int(Op.SEALED_DOWN), frozen=True):
    """SEALED in the other direction."""

    key_id: int
    counter: int
    box: bytes


class Keys(Frame, tag=int(Op.KEYS), frozen=True):
    """Answer to REKEY; the last frame of its packet, and the last before the new keys hold.

    proof: that the sender holds the static key. room and what follows are reserved: the key of a room on the
    node that seals for it, inside SEALED_DOWN.
    """

    key_id: int
    ephemeral: bytes
    proof: bytes
    room: str = ""
    node: str = ""
    boot: int = 0
    secret: bytes = b""


# -- reserved


class Signalled(Frame, tag=int(Op.SIGNALLED), frozen=True):
    """Somebody's SIGNAL; forget it 5 s after ts_ms."""

    conv: str
    sender: str
    signal: int
    ts_ms: int
    body: bytes = b""


class RoomMsg(Frame, tag=int(Op.ROOM_MSG), frozen=True):
    """A message of a room: not stored, never acked. offset +1 each within an epoch of the room's ring.

    priority: 0 normal (may be skipped for a slow member, which shows as a hole in offset), 1 high (never).
    """

    room: str
    epoch: int
    offset: int
    sender: str
    client_id: bytes
    kind: int
    ts_ms: int
    loss_time_ms: int
    flags: int
    priority: int
    body: bytes


class Joined(Frame, tag=int(Op.JOINED), frozen=True):
    """In the room. recovered: all ROOM_MSG above the JOIN's offset follow; otherwise some are lost."""

    req: int
    room: str
    epoch: int
    offset: int
    members: int
    recovered: bool = False


class Receipt(Frame, tag=int(Op.RECEIPT), frozen=True):
    """A device of `user` has received the conversation up to seq."""

    conv: str
    user: str
    seq: int


class PresenceItem(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """state: 0 offline, 1 online, 2 background. last_active_ms: 0 when unknown or hidden."""

    user: str
    state: int
    last_active_ms: int = 0
    device_classes: list[str] = []


class Presence(Frame, tag=int(Op.PRESENCE), frozen=True):
    """Changes among the watched users, coalesced over 1 s. resync: forget what was known before."""

    items: list[PresenceItem]
    resync: bool = False


class Done(Frame, tag=int(Op.DONE), frozen=True):
    """The request was carried out."""

    req: int


class SettingMark(Frame, tag=int(Op.SETTING_MARK), frozen=True):
    """Another device of the user changed a setting."""

    key: str
    value: bytes
    version: int


ClientFrame = (
    Auth | Ping | Ack | Acks | Send | Read | Pull | History | Refresh | Convs | Sync
    | Join | Leave | Signal | Recall | Edit | Delete | Clear | Setting | Block | Watch | Unwatch | Received
    | Sealed | Rekey
)  # fmt: skip
ServerFrame = (
    Msg | Sent | Skip | Hello | Pong | Error | Level | Changes | ReadMark | HistoryPage | Goaway | Probe
    | Head | Kicked | Refreshed
    | Signalled | RoomMsg | Joined | Receipt | Presence | SealedDown | Keys | Done | SettingMark
)  # fmt: skip

# --------------------------------------------------------------------------------------------- codec

encode: Final = msgspec.msgpack.Encoder().encode
"""Any frame to its bytes. Frames may be joined back to back into a packet."""

MSG_TAIL_ELEMENTS: Final = 13
MSG_PREFIX_BYTES: Final = 10
"""dc 00 10 (array of 16) · 20 (op MSG) · ce tag (u32) · c2|c3 (dup): what differs per recipient."""

_FRAME_TYPES: Final[dict[int, type[Frame]]] = {
    int(kind.__struct_config__.tag): kind for kind in (*ClientFrame.__args__, *ServerFrame.__args__)
}
_DECODERS: Final = {op: msgspec.msgpack.Decoder(kind).decode for op, kind in _FRAME_TYPES.items()}


def history_item(message: Message) -> HistoryItem:
    """A stored message as the wire shows it."""
    return HistoryItem(
        message.msg_id, message.conv, message.seq, message.cseq, message.epoch, message.sender,
        message.client_id, message.kind, message.ts_ms, message.loss_time_ms, message.flags, message.body,
        list(message.mentions),
    )  # fmt: skip


def encode_msg_tail(message: Message) -> bytes:
    """The 13 elements of MSG that are the same for every recipient, without an array header."""
    return encode(history_item(message))[1:]


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
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        # msgspec lets the decoder's own error through for text that is not UTF-8.
        raise PeerError("bad_frame", f"op {op}: {error}") from None
