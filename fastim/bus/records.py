"""What travels on the bus, as positional msgpack like the wire, so that versions may differ by one.

    submit       Submit (key = conv) | ReadNotice          node, api -> dispatch
    undelivered  Undelivered (key = user)                  node -> dispatch
    inbox.*      Deliver | Reply | Nudge | Mark | Kick     dispatch, node -> node, api

`undelivered` and Nudge carry references, never bodies: the message is in the store.
"""

from __future__ import annotations

from typing import Final

import msgspec

from fastim.protocol import SendItem, SentItem


class BusRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base: a positional msgpack array tagged by a small integer."""


class Submit(BusRecord, tag=1, frozen=True):
    """One SEND frame, authorised and within limits. The answer goes as Reply to `reply_to`."""

    conv: str
    sender: str
    device: str
    session: str
    """The sending session (a request id when `service`): skipped on delivery, addressed by the Reply."""
    reply_to: str
    items: list[SendItem]
    read_seq: int = 0
    service: bool = False
    """From REST or gRPC with a caller's credential: may address s:<uid> and users never seen."""
    trace: str = ""


class ReadNotice(BusRecord, tag=2, frozen=True):
    """`user` read conv up to seq (already stored): tell his other devices, and peers unless private."""

    conv: str
    user: str
    seq: int
    session: str
    private: bool


class Undelivered(BusRecord, tag=3, frozen=True):
    """No ack came, or the connection went away. The due row is already stored; this only wakes dispatch."""

    user: str
    device: str
    conv: str
    from_seq: int
    attempt: int
    reason: str


class Deliver(BusRecord, tag=4, frozen=True):
    """One stored message for every local session of `users` except `skip_session`: one per node, not member.

    tail is the part of MSG that is the same for all recipients (protocol.encode_msg_tail).
    """

    conv: str
    seq: int
    msg_id: int
    loss_time_ms: int
    sender: str
    users: list[str]
    skip_session: str
    tail: bytes


class Refusal(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Why one message of a SEND was not stored."""

    client_id: bytes
    code: str
    detail: str
    retryable: bool
    retry_after_ms: int = 0


class Reply(BusRecord, tag=5, frozen=True):
    """What became of a Submit: the stored prefix and the refused rest. For `session` of `user` only."""

    session: str
    user: str
    conv: str
    epoch: int
    sent: list[SentItem]
    refused: list[Refusal]


class Nudge(BusRecord, tag=6, frozen=True):
    """Stream `conv` from the cursor to the user's sessions on this node."""

    user: str
    conv: str
    attempt: int


class Mark(BusRecord, tag=7, frozen=True):
    """READ_MARK for every local session of `to_users` except skip_session."""

    conv: str
    user: str
    seq: int
    to_users: list[str]
    skip_session: str


class Kick(BusRecord, tag=8, frozen=True):
    """Close the session of an attachment that a newer generation replaced."""

    user: str
    device: str
    session: str
    generation: int
    code: int
    reason: str


SubmitRecord = Submit | ReadNotice
InboxRecord = Deliver | Reply | Nudge | Mark | Kick

MALFORMED: Final = (msgspec.MsgspecError, UnicodeDecodeError)
"""What decoding raises for bytes that are no record; msgspec lets the second through for bad UTF-8."""

Payload = bytes | BusRecord
"""What a bus carries: a record, or (from another process) its bytes."""

encode = msgspec.msgpack.Encoder().encode
_decode_submit: Final = msgspec.msgpack.Decoder(SubmitRecord).decode
_decode_undelivered: Final = msgspec.msgpack.Decoder(Undelivered).decode
_decode_inbox: Final = msgspec.msgpack.Decoder(InboxRecord).decode


def decode_submit(value: Payload) -> SubmitRecord:
    """Raises one of MALFORMED for bytes that are no such record."""
    return _decode_submit(value) if type(value) is bytes else value  # type: ignore[return-value]


def decode_undelivered(value: Payload) -> Undelivered:
    """Raises one of MALFORMED for bytes that are no such record."""
    return _decode_undelivered(value) if type(value) is bytes else value  # type: ignore[return-value]


def decode_inbox(value: Payload) -> InboxRecord:
    """Raises one of MALFORMED for bytes that are no such record."""
    return _decode_inbox(value) if type(value) is bytes else value  # type: ignore[return-value]
