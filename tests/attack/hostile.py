"""What an attacker sends: every rule of the wire broken in turn, and then at random.

Hides how bytes become hostile. Made with msgpack and by hand, never with the codec under attack.

 Script   one connection: what it says instead of a request, or behind the upgrade, before or after its AUTH
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any, Final

import msgpack
import msgspec

from fastim import protocol
from fastim.protocol import Op
from tests.leaks import MARK
from tests.unit.conn_world import BINARY, CLOSE, CONT, PING, PONG, REQUEST, TEXT, ws, ws_close

BODY: Final = f"{MARK}-body".encode()
"""In every message that is sent; it must be in no log."""
TOKEN: Final = f"{MARK}-token"
"""In every token that is refused; the same."""

CONV: Final = "p:alice:bob"
ME: Final = b"mallory00"
"""Stands for the attacker in what is sent; every attacker's name is as long."""
ID: Final = bytes(range(16))
WHOLE: Final = ws_close(1000)
pack: Final = msgpack.Packer(use_bin_type=True).pack


class Script(msgspec.Struct, frozen=True):
    """One connection."""

    name: str
    raw: bytes = b""
    """Said in place of a request."""
    refused: tuple[bytes, ...] = ()
    """Packets whose frames are refused one by one and end nothing."""
    last: bytes = b""
    """Ends the connection, or should."""
    auth: bool = False
    """Behind a login; otherwise at once behind the request."""
    wait_s: float = 0.0
    """The server must end it within so long, of a peer that says no more; 0: the peer says goodbye itself."""
    answers: int = 0
    """So many refusals come later, from dispatch; then it ends."""
    crowd: bool = False
    """As one device too many of somebody who has five."""
    resume: bool = False
    """Comes back after its login, and says that it has seen more than was sent."""


def packet(*frames: bytes) -> bytes:
    return ws(BINARY, b"".join(frames))


def frame(*values: Any) -> bytes:
    return bytes(pack([int(values[0]), *values[1:]]))


# ----------------------------------------------------------------------------------------- WebSocket


def websocket() -> Iterator[tuple[str, bytes]]:
    """Bytes behind the upgrade that are no messages."""
    yield "no mask", ws(BINARY, b"x", mask=None)
    for rsv in range(1, 8):
        yield f"rsv {rsv}", ws(BINARY, frame(2), rsv=rsv)
    for opcode in (*range(3, 8), *range(11, 16)):
        yield f"opcode {opcode}", ws(opcode, b"x")
    for opcode in (CLOSE, PING, PONG):
        yield f"fragmented control {opcode}", ws(opcode, b"x", fin=False)
        yield f"large control {opcode}", ws(opcode, b"x" * 126)
    yield "text", ws(TEXT, b"hello")
    yield "text fragment", ws(TEXT, b"hel", fin=False) + ws(CONT, b"lo")
    yield "continuation of nothing", ws(CONT, b"x")
    yield "message inside another", ws(BINARY, b"x", fin=False) + ws(BINARY, b"y")
    yield "65 fragments", ws(BINARY, b"", fin=False) + ws(CONT, b"", fin=False) * 64
    yield "too large in fragments", ws(BINARY, b"x" * 40_000, fin=False) + ws(CONT, b"x" * 40_000)
    yield "too large", ws(BINARY, b"x" * 65_537)
    yield "says too large", ws(BINARY, b"", size=1 << 40, length_form=64)
    yield "length with its top bit", ws(BINARY, b"", size=1 << 63, length_form=64)
    yield "short length in 16 bits", ws(BINARY, b"x" * 125, length_form=16)
    yield "short length in 64 bits", ws(BINARY, b"x" * 200, length_form=64)
    for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65_535):
        yield f"close code {code}", ws_close(code)
    yield "half a close code", ws(CLOSE, b"\x03")
    yield "reason that is not UTF-8", ws(CLOSE, b"\x03\xe8\xc3\x28")
    yield "two closes", ws_close(1000) + ws_close(1000)
    yield "request again", REQUEST + b"\r\n"


# -------------------------------------------------------------------------------------------- packets


def packets() -> Iterator[tuple[str, bytes]]:
    """Messages that are no packets of frames."""
    yield "empty", b""
    yield "no array", b"\x01"
    yield "map", b"\x81\x01\x02"
    yield "no op", b"\x90"
    for value in (b"\xc0", b"\xc3", b"\xa1x", b"\xcb" + bytes(8), b"\x90", b"\x80"):
        yield f"op {value.hex()}", b"\x91" + value
    for op in (b"\xff", b"\xcc\x80", b"\xd3" + b"\x80" + bytes(7), b"\xcf" + b"\xff" * 8):
        yield f"op {op.hex()}", b"\x91" + op
    yield "array of 257", b"\x92\x05\xdc\x01\x01" + b"\x01" * 257
    yield "array of 2^32-1", b"\xdd\xff\xff\xff\xff\x05"
    yield "map of 65", b"\x92\x05\xde\x00\x41" + b"\x01\x02" * 65
    for depth in (8, 9, 60, 1_000, 65_000):
        yield f"depth {depth}", b"\x92\x05" + b"\x91" * depth + b"\x01"
    for lead in (0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8):
        yield f"extension {lead:x}", bytes([0x92, 5, lead]) + bytes(20)
    yield "0xc1", b"\x92\x05\xc1"
    yield "65 frames", frame(2) * 65
    yield "long string", b"\x92\x05\xdb\xff\xff\xff\xff" + b"x" * 50
    yield "long bytes", b"\x92\x05\xc6\x00\x01\x00\x01" + b"x" * 60
    whole = send(CONV)
    for cut in range(1, len(whole)):
        yield f"cut at {cut}", whole[:cut]


# --------------------------------------------------------------------------------------------- layouts

_WRONG: Final[tuple[Any, ...]] = (
    None, True, -1, -(1 << 63), 1 << 32, 1 << 53, (1 << 64) - 1, 1.5, float("nan"), "", "x" * 200,
    "x" * 9_000, b"", b"x" * 5_000, [], [1] * 60, [[1]], {}, {"a": 1}, [b"x" * 17], [[ID, 1]], "\0", "..",
    "{}:*", "p:b:a",
)  # fmt: skip
_NOT_UTF8: Final = b"\xa4\xff\xfe\xc3\x28"
_SOUND: Final[dict[type, Any]] = {
    msgspec.inspect.IntType: 1,
    msgspec.inspect.StrType: "x",
    msgspec.inspect.BytesType: ID,
    msgspec.inspect.BoolType: True,
    msgspec.inspect.FloatType: 1.0,
}


def _sound(kind: Any) -> Any:
    """A value that a field takes."""
    if isinstance(kind, msgspec.inspect.ListType):
        return [_sound(kind.item_type)]
    if isinstance(kind, msgspec.inspect.TupleType):
        return [_sound(one) for one in kind.item_types]
    if isinstance(kind, msgspec.inspect.StructType):
        return [_sound(field.type) for field in kind.fields]
    if isinstance(kind, msgspec.inspect.BytesType) and kind.min_length == 32:
        return bytes(32)
    return _SOUND[type(kind)]


def layouts() -> Iterator[tuple[str, bytes]]:
    """Every op that has a layout, with every field of it wrong in every way, and cut at every field."""
    for op in Op:
        shape = msgspec.inspect.type_info(protocol._FRAME_TYPES[op])
        assert isinstance(shape, msgspec.inspect.StructType)
        sound = [_sound(field.type) for field in shape.fields]
        for at, field in enumerate(shape.fields):
            yield f"{op.name} without {field.name}", frame(op, *sound[:at])
            for wrong in _WRONG:
                yield (
                    f"{op.name}.{field.name} = {wrong!r:.40}",
                    frame(op, *sound[:at], wrong, *sound[at + 1 :]),
                )
            head = bytes([0x90 | at + 2]) if at < 14 else b"\xdc" + struct.pack(">H", at + 2)
            values = b"".join(pack(value) for value in (int(op), *sound[:at]))
            yield f"{op.name}.{field.name} not UTF-8", head + values + _NOT_UTF8
    for wrong in _WRONG:
        for at in range(6):
            item: list[Any] = [ID, 1, b"x", 0, 0, []]
            item[at] = wrong
            yield f"SEND item {at} = {wrong!r:.40}", frame(Op.SEND, CONV, [item])


# ------------------------------------------------------------------------------------- requests in sessions


def send(conv: str, body: bytes = BODY, client_id: bytes = ID, *, kind: int = 1, loss: int = 0) -> bytes:
    return frame(Op.SEND, conv, [[client_id, kind, body, loss]])


def refusals() -> Iterator[tuple[str, bytes]]:
    """Frames that are understood, refused, and end nothing."""
    for op in (0, *range(26, 32), *range(56, 128)):
        yield f"op {op}", frame(op, 1, 2, 3)
    for op in Op:
        if op >= 32 or op in protocol.RESERVED:
            shape = msgspec.inspect.type_info(protocol._FRAME_TYPES[op])
            assert isinstance(shape, msgspec.inspect.StructType)
            yield op.name, frame(op, *(_sound(field.type) for field in shape.fields))
    for conv in (
        "", "p:", "p:alice", "p:bob:alice", "p:alice:alice", "p:alice:bob:carol", "x:alice", "alice", "g:",
        "g:a b", "s:\0", "g:{}:*", "p:\u0430lice:bob", "P:alice:bob", "g:../../etc", "r:", "p:alice:bob\n",
        "g:" + "x" * 65,
    ):  # fmt: skip
        yield f"send into {conv!r}", send(conv)
        yield f"history of {conv!r}", frame(Op.HISTORY, 1, conv)
    for conv in ("p:alice:bob", "s:alice", "s:mallory00", "r:lobby"):
        yield f"send into {conv}", send(conv)
        yield f"read of {conv}", frame(Op.READ, conv, 1)
        yield f"pull of {conv}", frame(Op.PULL, conv, 1, 2)
        yield f"history of {conv}", frame(Op.HISTORY, 7, conv)
    yield "history of a group", frame(Op.HISTORY, 8, "g:secret")
    yield "read of a group", frame(Op.READ, "g:secret", 5)
    for first, last in ((0, 1), (2, 1), (0, 0)):
        yield f"pull {first}-{last}", frame(Op.PULL, "p:mallory00:x", first, last)
    for limit in (0, 201, (1 << 32) - 1):
        yield f"history of {limit}", frame(Op.HISTORY, 9, "p:mallory00:x", 0, 0, 0, 0, limit)
        yield f"convs of {limit}", frame(Op.CONVS, 10, 0, limit)
    yield "unknown kind", send("p:mallory00:x", kind=63)
    yield "huge kind", send("p:mallory00:x", kind=(1 << 32) - 1)
    yield "refresh with nothing", frame(Op.REFRESH, "")
    yield "refresh with noise", frame(Op.REFRESH, TOKEN)
    yield "refresh with three parts", frame(Op.REFRESH, f"eyJhbGciOiJub25lIn0.{TOKEN}.")
    yield "ack of nothing", frame(Op.ACKS, [1, 2, 3])


# ----------------------------------------------------------------------------------------------- requests


def _request(old: bytes = b"", new: bytes = b"", *more: bytes) -> bytes:
    assert old in REQUEST
    return REQUEST.replace(old, new, 1) + b"".join(line + b"\r\n" for line in more) + b"\r\n"


def requests() -> Iterator[tuple[str, bytes]]:
    """What is no upgrade."""
    yield "path", _request(b"/v1/ws", b"/admin")
    yield "path with dots", _request(b"/v1/ws", b"/v1/../v1/ws")
    yield "query", _request(b"/v1/ws", f"/v1/ws?token={TOKEN}".encode())
    yield "origin", _request(b"", b"", b"Origin: https://evil.example")
    yield "null origin", _request(b"", b"", b"Origin: null")
    yield "no host", _request(b"Host: test\r\n", b"")
    yield "two hosts", _request(b"", b"", b"Host: other")
    yield "no upgrade", _request(b"Upgrade: websocket\r\n", b"")
    yield "version 8", _request(b"Version: 13", b"Version: 8")
    yield "no key", _request(b"Key: dGhlIHNhbXBsZSBub25jZQ==", b"Key: ")
    yield "short key", _request(b"Key: dGhlIHNhbXBsZSBub25jZQ==", b"Key: dGhl")
    yield "POST", REQUEST.replace(b"GET", b"POST", 1) + b"\r\n"
    yield "HTTP/1.0", REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0", 1) + b"\r\n"
    yield "body", _request(b"", b"", b"Content-Length: 5") + b"hello"
    yield "folded", _request(b"", b"", b" folded: x")
    yield "200 headers", _request(b"", b"", *[b"X-%d: x" % n for n in range(200)])
    yield "header of 20 KB", _request(b"", b"", b"X: " + b"x" * 20_000)
    yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n"
    yield "PROXY", b"PROXY TCP4 10.0.0.1 10.0.0.1 1 2\r\n" + _request()
    yield "zeros", bytes(400) + b"\r\n\r\n"


# ------------------------------------------------------------------------------------------------ scripts


def auth(token: str, device: str = "d0", kind: str = "app", *more: Any, low: int = 1, high: int = 1) -> bytes:
    return frame(Op.AUTH, low, high, token, device, kind, *more)


def catalogue(token: str) -> Iterator[Script]:
    """Every rule once; `token` is good, for what is wrong in an AUTH besides it."""
    for name, data in requests():
        yield Script(f"request: {name}", raw=data)
    for after in (False, True):
        for name, data in websocket():
            yield Script(f"websocket: {name}", last=data, auth=after)
        for name, content in packets():
            yield Script(f"packet: {name}", last=ws(BINARY, content), auth=after)
        for name, one in layouts():
            if after or name.startswith(("AUTH", "REKEY")):
                yield Script(f"layout: {name}", last=packet(one), auth=after)
        yield Script("seal", last=packet(frame(Op.SEALED, 1, 1, bytes(40))), auth=after)
    for name, one in refusals():
        # What the store refuses is answered later.
        yield Script(f"refused: {name}", refused=(packet(one),), auth=True, answers=name.endswith("a group"))
        yield Script(f"before AUTH: {name}", last=packet(one))
    yield from _identities(token)
    yield Script("ack beyond", last=packet(frame(Op.ACK, 1 << 31)), auth=True)
    for name, one in (
        ("no tag", frame(Op.ACK)), ("tag below", frame(Op.ACK, -1)), ("tag above", frame(Op.ACK, 1 << 32)),
        ("tag text", frame(Op.ACK, "1")), ("no ids", frame(Op.ACKS)), ("ids text", frame(Op.ACKS, "1")),
        ("id below", frame(Op.ACKS, [-1])), ("id above", frame(Op.ACKS, [1 << 60])),
        ("id null", frame(Op.ACKS, [None])),
    ):  # fmt: skip
        yield Script(f"ack: {name}", last=packet(one), auth=True)
    yield from _floods()
    yield Script("silent", wait_s=30.0)
    yield Script("half a frame", last=ws(BINARY, bytes(100))[:50], auth=True, wait_s=40.0)
    yield Script("half a message", last=ws(BINARY, b"x", fin=False), auth=True, wait_s=40.0)


def _identities(token: str) -> Iterator[Script]:
    none = b"eyJhbGciOiJub25lIn0"
    bad = {
        "empty": "", "noise": TOKEN, "8 KB": TOKEN * 400, "alg none": f"{none.decode()}.{TOKEN}.",
        "cut": token[:-1], "turned": token[:-4] + "AAAA", "nul": token + "\0", "two": token + token,
    }  # fmt: skip
    for name, text in bad.items():
        yield Script(f"token: {name}", last=packet(auth(text)))
    for low, high in ((0, 0), (2, 9), (9, 2), ((1 << 32) - 1, (1 << 32) - 1)):
        yield Script(f"version {low}-{high}", last=packet(auth(token, low=low, high=high)))
    for device in ("", "a b", "\0", "x" * 64 + " ", "../x", "{}:*", "é"):
        yield Script(f"device {device!r}", last=packet(auth(token, device)))
    for kind in ("", "root", "APP", "\0"):
        yield Script(f"device class {kind!r}", last=packet(auth(token, "d0", kind)))
    yield Script("something behind AUTH", last=packet(auth(token, "early"), frame(Op.CONVS, 1)))
    yield Script("AUTH twice in a packet", last=packet(auth(token, "early"), auth(token, "early")))
    yield Script("AUTH again", refused=(packet(auth(token)),), auth=True)
    yield Script("refresh for another", refused=(packet(frame(Op.REFRESH, token)),), auth=True)
    yield Script("a sixth device", crowd=True)
    for name, ephemeral, static in (("name", b"\7" * 32, "nobody"), ("point", bytes(32), "dev")):
        yield Script(f"keys: {name}", last=packet(frame(Op.REKEY, 1, ephemeral, static)))


def _floods() -> Iterator[Script]:
    """More than a limit lets through, at once."""
    rng = random.Random(3)
    bodies = [send("p:mallory00:x", client_id=rng.randbytes(16)) for _ in range(64)]
    yield Script("sends", refused=tuple(packet(*bodies) for _ in range(2)), auth=True)
    asks = [frame(Op.HISTORY, number, "p:mallory00:x") for number in range(64)]
    yield Script("questions", refused=(packet(*asks),), auth=True)
    pulls = [frame(Op.PULL, f"g:none{number}", 1, 2) for number in range(1_088)]
    batches = tuple(packet(*pulls[at : at + 64]) for at in range(0, len(pulls), 64))
    yield Script("pulls", refused=batches, auth=True)
    large = send("p:mallory00:x", BODY * 3_270, rng.randbytes(16))
    yield Script("large body", refused=(packet(large),), auth=True)
    late = {
        "same id, other content": (send("p:mallory00:x", b"one"), send("p:mallory00:x", b"another")),
        "expired": (send("p:mallory00:x", client_id=rng.randbytes(16), loss=1),),
        "unknown group": (send("g:nobody", client_id=rng.randbytes(16)),),
    }
    for name, frames in late.items():
        yield Script(name, refused=tuple(map(packet, frames)), auth=True, answers=1)
    yield Script("resume beyond", auth=True, resume=True)


class Random:
    """Hostile scripts without end, from a seed."""

    def __init__(self, seed: int, batch: int) -> None:
        self._rng = random.Random(seed)
        self._batch = batch
        self._ends = [*websocket()]
        self._packets = [*packets()]
        self._layouts = [*layouts()]
        self._refusals = [one for _, one in refusals()]
        self._sound = [one for name, one in self._layouts if " = " not in name] + self._refusals

    def next(self) -> Script:
        """Mostly sessions with many refusals; among them requests, and what comes before AUTH."""
        rng = self._rng
        last = self._last()
        if rng.random() < 0.5:
            return Script("random, before AUTH", last=last)
        frames = [rng.choice(self._refusals) for _ in range(self._batch)]
        batches = tuple(packet(*frames[at : at + 64]) for at in range(0, len(frames), 64))
        return Script("random, in a session", refused=batches, last=last, auth=True)

    def _last(self) -> bytes:
        rng = self._rng
        match rng.randrange(8):
            case 0:
                return rng.choice(self._ends)[1]
            case 1:
                return ws(BINARY, rng.choice(self._packets)[1])
            case 2 | 3:
                return packet(rng.choice(self._layouts)[1])
            case 4:
                return ws(BINARY, rng.randbytes(rng.randrange(200)))
            case 5:
                return rng.randbytes(rng.randrange(2, 200))
            case 6:
                return ws(BINARY, self._mutated())
            case _:
                whole = rng.choice(self._sound)
                return ws(BINARY, whole[: rng.randrange(len(whole))])

    def _mutated(self) -> bytes:
        rng = self._rng
        data = bytearray(rng.choice(self._sound))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.randrange(256)
                case _:
                    data[at:at] = rng.randbytes(rng.randrange(1, 5))
        return bytes(data)
