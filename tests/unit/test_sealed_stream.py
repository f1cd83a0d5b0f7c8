"""The sealed stream: one order for both keys of a change, and no word about what is wrong (D1-D3)."""

from __future__ import annotations

import struct

import msgpack
import pytest

from fastim import protocol
from fastim._core import frame as core
from fastim._core import sealed
from fastim._core.cipher import TAG_BYTES, Opener, Sealer
from fastim._core.sealed import MAX_INNER_BYTES, SealedStream
from fastim.errors import PeerError, UsageError

Halves = tuple[Sealer, Opener]


def keys(number: int, frames: int = 1_000) -> tuple[Halves, Halves]:
    """(client's, server's) sealer and opener of the number-th agreement."""
    up, down = bytes([number, 1] * 16), bytes([number, 2] * 16)
    client = Sealer(up, b"up--", frames=frames), Opener(down, b"down", frames=frames)
    server = Sealer(down, b"down", frames=frames), Opener(up, b"up--", frames=frames)
    return client, server


def pair(frames: int = 1_000) -> tuple[SealedStream, SealedStream]:
    client, server = keys(1, frames)
    return SealedStream(1, *client, client=True), SealedStream(1, *server, client=False)


def refused(stream: SealedStream, frame: bytes) -> None:
    """Not taken, and the same words for every reason."""
    with pytest.raises(PeerError) as error:
        stream.open(frame)
    assert (error.value.code, error.value.detail) == ("bad_seal", "")
    assert error.value.__cause__ is None


def test_a_packet_opens_to_what_was_sealed_both_ways() -> None:
    client, server = pair()
    for size in (0, 1, 15, 16, 127, 65_000, MAX_INNER_BYTES):
        packet = bytes(n * 7 & 0xFF for n in range(size))
        for one, other in ((client, server), (server, client)):
            frame = one.seal(packet)
            assert packet not in frame or size < 2
            assert len(frame) <= protocol.MAX_PACKET_BYTES
            assert other.open(frame) == packet


def test_a_frame_is_laid_out_as_the_protocol_says() -> None:
    client, server = pair()
    for number in (1, 2, 3):
        up, down = client.seal(b"\x91\x02"), server.seal(b"\x91\x2b")
        found = protocol.decode(protocol.Op.SEALED, up)
        assert isinstance(found, protocol.Sealed)
        assert (found.key_id, found.counter, len(found.box)) == (1, number, 2 + TAG_BYTES)
        assert msgpack.unpackb(down)[:3] == [protocol.Op.SEALED_DOWN, 1, number]
        assert core.split(up) == [(protocol.Op.SEALED, 0, len(up))]
        assert up.index(found.box) == core.SEALED_HEADER_BYTES


def test_the_largest_content_makes_the_largest_packet() -> None:
    client, _ = pair()
    assert len(client.seal(bytes(MAX_INNER_BYTES))) == protocol.MAX_PACKET_BYTES
    assert MAX_INNER_BYTES == protocol.MAX_SEALED_BYTES
    with pytest.raises(UsageError, match="65,502 bytes; limit 65,501"):
        client.seal(bytes(MAX_INNER_BYTES + 1))
    assert client.used == 1


def test_a_frame_comes_once_and_in_order() -> None:
    client, server = pair()
    frames = [client.seal(bytes([n])) for n in range(4)]
    assert server.open(frames[0]) == b"\0"
    for wrong in (frames[0], frames[2], frames[3]):
        refused(server, wrong)
    assert server.open(frames[1]) == b"\1"


def test_a_frame_of_the_other_direction_is_refused() -> None:
    client, server = pair()
    refused(client, client.seal(b"to the server"))
    refused(server, server.seal(b"to the client"))
    # Nor with the other op in front.
    up = bytearray(client.seal(b"x"))
    up[1] = protocol.Op.SEALED_DOWN
    refused(client, bytes(up))


def test_each_flipped_bit_and_each_cut_is_refused() -> None:
    client, server = pair()
    frame = client.seal(b"seventeen bytes!!")
    for bit in range(len(frame) * 8):
        forged = bytearray(frame)
        forged[bit // 8] ^= 1 << bit % 8
        refused(server, bytes(forged))
    for size in range(len(frame)):
        refused(server, frame[:size])
        refused(server, frame[size + 1 :])
    for more in (b"\0", b"\xc0", frame):
        refused(server, frame + more)
    assert server.open(frame) == b"seventeen bytes!!"


def test_a_header_written_otherwise_is_another_header() -> None:
    """The bytes before the box are proved, not the values they stand for."""
    client, server = pair()
    frame = client.seal(b"text")
    box = frame[core.SEALED_HEADER_BYTES :]
    refused(server, msgpack.packb([24, 1, 1, box]))
    refused(server, b"\xdc\0\4" + frame[1:])


@pytest.mark.parametrize(
    "forged",
    [
        [24, 1, 1],
        [24, 1, 1, b"\0" * 20, None],
        [24, 1, 1, "\0" * 20],
        [24, 1, 1, [0] * 20],
        [24, 1, 1, b"\0" * 15],
        [24, 1, 1, b""],
        [24, 0, 1, b"\0" * 20],
        [24, 2, 1, b"\0" * 20],
        [24, -1, 1, b"\0" * 20],
        [24, 1 << 32, 1, b"\0" * 20],
        [24, (1 << 32) + 1, 1, b"\0" * 20],
        [24, 1, 0, b"\0" * 20],
        [24, 1, -1, b"\0" * 20],
        [24, 1, 1 << 53, b"\0" * 20],
        [24, 1, (1 << 64) - 1, b"\0" * 20],
        [24, 1.0, 1, b"\0" * 20],
        [51, 1, 1, b"\0" * 20],
        [2],
        [],
        {24: 1},
        24,
        None,
    ],
)
def test_what_is_no_sealed_frame_is_refused(forged: object) -> None:
    _, server = pair()
    refused(server, msgpack.packb(forged))
    refused(server, b"")


def test_a_box_may_be_written_with_any_width_of_length() -> None:
    client, server = keys(1)
    stream = SealedStream(1, *server, client=False)
    for number, length in enumerate((b"\xc4\x14", b"\xc5\0\x14", b"\xc6\0\0\0\x14"), 1):
        head = b"\x94\x18\x01" + bytes([number]) + length
        assert stream.open(head + client[0].seal(head, b"text")) == b"text"


# ---------------------------------------------------------------------------------------- new keys


def change(client: SealedStream, server: SealedStream, number: int = 2) -> tuple[Halves, bytes]:
    """The server has answered REKEY: (the client's new halves, the frame with KEYS)."""
    new_client, new_server = keys(number)
    answer = server.seal(b"KEYS")
    server.renew(number, *new_server)
    return new_client, answer


def test_new_keys_change_each_direction_at_one_frame() -> None:
    client, server = pair()
    assert server.open(client.seal(b"REKEY")) == b"REKEY"
    before = server.seal(b"before")
    new_client, answer = change(client, server)
    behind = server.seal(b"behind")
    late = [client.seal(b"late 1"), client.seal(b"late 2")]
    assert (server.key_id, server.open_key_id, server.pending) == (2, 1, True)

    assert client.open(before) == b"before"
    assert client.open(answer) == b"KEYS"
    client.renew(2, *new_client)
    assert (client.key_id, client.open_key_id, client.pending) == (2, 2, False)
    assert client.open(behind) == b"behind"

    new = client.seal(b"new")
    assert [server.open(frame) for frame in late] == [b"late 1", b"late 2"]
    assert server.pending
    assert server.open(new) == b"new"
    assert (server.open_key_id, server.pending) == (2, False)


def test_the_counter_goes_on_under_the_new_key() -> None:
    client, server = pair()
    for _ in range(5):
        server.open(client.seal(b"old"))
    new_client, answer = change(client, server)
    client.open(answer)
    client.renew(2, *new_client)
    frame = client.seal(b"new")
    assert msgpack.unpackb(frame)[:3] == [24, 2, 6]
    assert server.open(frame) == b"new"
    assert client.used == server.used == 1


def test_no_frame_is_lost_between_two_keys() -> None:
    """Whoever drops the last frames under the old key is found out by the first under the new."""
    client, server = pair()
    new_client, answer = change(client, server)
    client.seal(b"dropped on the way")
    client.open(answer)
    client.renew(2, *new_client)
    refused(server, client.seal(b"new"))
    assert server.pending


def test_an_old_key_is_void_once_the_new_one_was_used() -> None:
    client, server = pair()
    old, _ = keys(1)
    new_client, answer = change(client, server)
    client.open(answer)
    client.renew(2, *new_client)
    server.open(client.seal(b"new"))
    head = b"\x94\x18\x01\x02\xc4\x14"
    old[0].seal(b"", b"")
    refused(server, head + old[0].seal(head, b"text"))


def test_the_client_takes_nothing_more_under_the_old_key() -> None:
    client, server = pair()
    _, old_server = keys(1)
    new_client, answer = change(client, server)
    client.open(answer)
    client.renew(2, *new_client)
    head = b"\x94\x33\x01\x02\xc4\x14"
    old_server[0].seal(b"", b"")
    refused(client, head + old_server[0].seal(head, b"text"))


def test_a_forged_frame_under_the_new_key_changes_nothing() -> None:
    client, server = pair()
    new_client, answer = change(client, server)
    late = client.seal(b"late")
    client.open(answer)
    client.renew(2, *new_client)
    frame = bytearray(client.seal(b"new"))
    frame[-1] ^= 1
    refused(server, bytes(frame))
    assert server.open(late) == b"late"


def test_one_change_at_a_time_and_ids_only_grow() -> None:
    client, server = pair()
    new_client, answer = change(client, server)
    _, third = keys(3)
    with pytest.raises(UsageError, match="one change at a time"):
        server.renew(3, *third)
    client.open(answer)
    for number in (0, 1):
        with pytest.raises(UsageError, match=f"key_id is {number}; must be above 1"):
            client.renew(number, *new_client)
    client.renew(2, *new_client)
    server.open(client.seal(b"new"))
    server.renew(3, *third)


def test_a_key_that_was_used_is_not_taken() -> None:
    client, _ = keys(1)
    client[0].seal(b"", b"")
    with pytest.raises(UsageError, match="must be new"):
        SealedStream(1, *client, client=True)


def test_both_directions_end_with_their_key() -> None:
    client, server = pair(frames=3)
    for number in range(3):
        assert (client.left, server.left) == (3 - number, 3 - number)
        server.open(client.seal(b"up"))
    assert (client.left, server.left, client.used) == (0, 0, 3)
    with pytest.raises(UsageError, match="new keys are due"):
        client.seal(b"one too many")
    refused(server, struct.pack(">BBBBBB", 0x94, 24, 1, 4, 0xC4, 16) + bytes(16))
    assert client.open(server.seal(b"down")) == b"down"


def test_streams_are_counted_on_a_checked_build() -> None:
    before = sealed.live()["streams"]
    streams = pair()
    assert sealed.live()["streams"] - before == (2 if sealed.DEBUG else 0)
    del streams
