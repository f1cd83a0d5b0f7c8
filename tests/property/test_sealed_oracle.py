"""The sealed stream against its slow twin, with changes of keys and frames that somebody has touched."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastim._core.cipher import Opener, Sealer
from fastim._core.sealed import SealedStream
from fastim.errors import PeerError
from tests.reference import sealing as slow

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("packet"), st.binary(max_size=300)),
        st.tuples(st.just("packed"), st.binary(max_size=300)),
        st.tuples(st.just("touched"), st.tuples(st.integers(0, 10_000), st.integers(1, 255))),
        st.tuples(st.just("renew"), st.just(b"")),
    ),
    max_size=12,
)


def key(number: int, up: bool) -> tuple[bytes, bytes]:
    return bytes([number, up] * 16), bytes([number, up, 0, 7])


def halves(number: int) -> tuple[Sealer, Opener]:
    """Of the server."""
    return Sealer(*key(number, False)), Opener(*key(number, True))


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_a_stream_takes_what_its_twin_takes(steps: list[tuple[str, object]]) -> None:
    number = 1
    stream = SealedStream(1, *halves(1), client=False)
    up, down = slow.Stream(slow.UP, 1, *key(1, True)), slow.Stream(slow.DOWN, 1, *key(1, False))
    reader, writer = (
        slow.Stream(slow.UP, 1, *key(1, True)), slow.Stream(slow.DOWN, 1, *key(1, False)),
    )  # fmt: skip
    for kind, value in steps:
        if kind == "renew":
            if stream.pending:
                continue
            number += 1
            stream.renew(number, *halves(number))
            writer.renew(number, *key(number, False))
            down.renew(number, *key(number, False))
            up.renew(number, *key(number, True))
            # Its twin knows no time at which both hold: the next frame is under the new key.
            reader.renew(number, *key(number, True))
        elif kind == "touched":
            assert isinstance(value, tuple)
            at, by = value
            frame = bytearray(up.seal(b"content"))
            up.counter -= 1
            frame[at % len(frame)] ^= by
            for end in (stream, reader):
                with pytest.raises(PeerError, match="bad_seal"):
                    end.open(bytes(frame))
        else:
            assert isinstance(value, bytes)
            frame_bytes = up.seal(value, msgpack.packb if kind == "packed" else None)
            assert stream.open(frame_bytes) == reader.open(frame_bytes) == value
            sealed = stream.seal(value)
            assert sealed == writer.seal(value)
            assert down.open(sealed) == value


@settings(max_examples=1_000, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_no_bytes_make_a_stream_raise_anything_else(data: bytes, with_head: bool) -> None:
    stream = SealedStream(1, *halves(1), client=False)
    with contextlib.suppress(PeerError):
        stream.open(b"\x94\x18\x01\x01\xc4" + bytes([len(data)]) + data if with_head else data)
        raise AssertionError("taken")
