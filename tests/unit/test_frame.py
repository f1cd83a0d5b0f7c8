"""What split refuses and says, and the bytes of MSG."""

from __future__ import annotations

import msgpack
import pytest

from fastim import protocol
from fastim._core import frame
from fastim.errors import PeerError, UsageError


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "the packet has 0 frames; at least 1"),
        (b"\x91\x02" * 32_769, "the packet is 65,538 bytes; limit 65,536"),
        (b"\x91\x02" * 65, "the packet has 65 frames or more; limit 64"),
        (b"\x80", "a frame starts with 0x80 at byte 0; must be an array"),
        (b"\x91\x02\xc0", "a frame starts with 0xc0 at byte 2; must be an array"),
        (b"\x90", "the frame at byte 0 has 0 elements; at least 1, the op"),
        (b"\x91\xcc\x80", "the op of the frame at byte 0 is 128; limits 0 and 127"),
        (b"\x91\xff", "the op of the frame at byte 0 is -1; limits 0 and 127"),
        (b"\x91\xa1x", "0xa1 at byte 1 is not an integer"),
        (b"\x92\x02", "the value at byte 2 is 1 bytes; 0 are left"),
        (b"\x92\x02\xc6\xff\xff\xff\xff", "the value at byte 2 is 4,294,967,300 bytes; 5 are left"),
        (b"\xdd\xff\xff\xff\xff\x02", "the array at byte 0 has 4,294,967,295 elements; limit 256"),
        (b"\x92\x02\xdc\x01\x01", "the array at byte 2 has 257 elements; limit 256"),
        (b"\x92\x02\xde\x00\x41", "the map at byte 2 has 65 entries; limit 64"),
        (b"\x92\x02" + b"\x91" * 7 + b"\x91\x00", "nesting at byte 10 is 9 deep; limit 8"),
        (b"\x92\x02\xd4\x01\x01", "0xd4 at byte 2 is an extension type; none is allowed"),
        (b"\x92\x02\xc1", "0xc1 at byte 2 is no msgpack type"),
    ],
)
def test_a_refusal_shows_value_and_limit(data: bytes, detail: str) -> None:
    with pytest.raises(PeerError) as refused:
        frame.split(data)
    assert refused.value.code == "bad_frame"
    assert refused.value.detail == detail


def test_spans_cover_the_packet() -> None:
    parts = [msgpack.packb(value) for value in ([2], [5, b"body", {"a": [1]}], [127, None])]
    spans = frame.split(memoryview(b"".join(parts)))
    assert [op for op, _, _ in spans] == [2, 5, 127]
    assert [b"".join(parts)[start:end] for _, start, end in spans] == parts


def test_a_packet_at_every_limit_is_accepted() -> None:
    assert len(frame.split(b"\x91\x02" * 64)) == 64
    body = 65_536 - len(b"\x92\x05\xc5__")
    assert frame.split(msgpack.packb([5, b"x" * body])) == [(5, 0, 65_536)]
    assert frame.split(b"\x92\x02" + b"\x91" * 7 + b"\x00") == [(2, 0, 10)]
    assert len(frame.split(msgpack.packb([2, *range(255)]))) == 1


def test_split_reads_any_buffer_and_holds_none() -> None:
    data = bytearray(b"\x91\x02")
    frame.split(data)
    with pytest.raises(PeerError):
        frame.split(data[:1])
    data.append(0)  # a held buffer would refuse to be resized
    with pytest.raises(TypeError):
        frame.split("text")  # type: ignore[arg-type]


@pytest.mark.parametrize("tag", [0, 1, 127, 128, 65_536, 2**32 - 1])
def test_ack_is_read_with_every_width_of_its_tag(tag: int) -> None:
    assert frame.parse_ack(msgpack.packb([3, tag])) == tag
    assert frame.parse_ack(msgpack.packb([3, tag, "from a newer client"])) == tag
    assert frame.parse_ack(b"\xdc\x00\x02\xcc\x03\xcf" + tag.to_bytes(8, "big")) == tag


@pytest.mark.parametrize("value", [[3], [2, 1], [3, -1], [3, 2**32], [3, "1"], [3, None], 3, {3: 1}])
def test_what_is_no_ack_is_refused(value: object) -> None:
    with pytest.raises(PeerError, match="bad_frame"):
        frame.parse_ack(msgpack.packb(value))


@pytest.mark.parametrize("tag", [0, 1, 0x01020304, 2**32 - 1])
@pytest.mark.parametrize("dup", [False, True])
def test_the_head_of_msg_is_what_protocol_lays_out(tag: int, dup: bool) -> None:
    tail = b"".join(map(msgpack.packb, (9, "p:a:b", 1, 1, 0, "a", b"i" * 16, 1, 5, 0, 0, b"body", ["c"])))
    built = frame.build_msg(tag, dup, tail)
    assert built == protocol.encode_msg(tag, dup, tail)
    assert built == frame.msg_prefix(tag, dup) + tail
    assert len(frame.msg_prefix(tag, dup)) == frame.MSG_PREFIX_BYTES
    assert frame.split(built) == [(frame.OP_MSG, 0, len(built))]
    assert msgpack.unpackb(built)[:3] == [protocol.Op.MSG, tag, dup]
    assert len(msgpack.unpackb(built)) == len(protocol.Msg.__struct_fields__) + 1


@pytest.mark.parametrize("tag", [-1, 2**32])
def test_a_tag_that_is_no_u32_is_refused(tag: int) -> None:
    with pytest.raises(UsageError, match="limits 0 and 4294967295"):
        frame.build_msg(tag, False, b"")


def test_the_two_halves_of_the_codec_agree() -> None:
    assert (frame.OP_PING, frame.OP_ACK, frame.OP_MSG) == (
        protocol.Op.PING,
        protocol.Op.ACK,
        protocol.Op.MSG,
    )
    assert frame.MAX_PACKET_BYTES == protocol.MAX_PACKET_BYTES
    assert frame.MAX_FRAMES == protocol.MAX_FRAMES_PER_PACKET


def test_ranges_keeps_the_ends_of_u64() -> None:
    top = 2**64 - 1
    assert frame.ranges([0, 1, 5, top - 1, top]) == [(0, 1), (5, 5), (top - 1, top)]
    assert frame.ranges([]) == []


@pytest.mark.parametrize("values", [[2, 1], [1, 1], [-1], [2**64]])
def test_ranges_refuses_what_is_not_ascending_u64(values: list[int]) -> None:
    with pytest.raises(UsageError):
        frame.ranges(values)
