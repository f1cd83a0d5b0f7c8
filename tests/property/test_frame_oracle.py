"""fastim._core.frame accepts exactly what its slow twin accepts, with the same spans."""

from __future__ import annotations

import random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastim._core import frame
from fastim.errors import PeerError
from tests.reference import frame as oracle

CASES = 20_000


def verdict(split: object, data: bytes) -> object:
    """The spans, or the code of the refusal."""
    try:
        return split(data)  # type: ignore[operator]
    except PeerError as error:
        return error.code


def a_value(rng: random.Random, depth: int = 0) -> object:
    """A value that the wire may or may not allow; limits are met often."""
    kinds = 8 if depth > 9 else 10
    kind = rng.randrange(kinds)
    if kind == 0:
        return rng.choice([0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**64 - 1])
    if kind == 1:
        return rng.choice([-1, -32, -33, -128, -129, -32_769, -(2**31) - 1, -(2**63)])
    if kind == 2:
        return "x" * rng.choice([0, 1, 31, 32, 255, 256, 700])
    if kind == 3:
        return b"x" * rng.choice([0, 1, 255, 256, 3000])
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return rng.random()
    if kind == 6:
        return rng.randrange(128)
    if kind == 7:
        return msgpack.ExtType(5, b"abcd") if rng.random() < 0.05 else "é漢"
    if kind == 8:
        return [a_value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 3, 15, 16]))]
    return {index: a_value(rng, depth + 1) for index in range(rng.choice([0, 1, 2, 15, 16]))}


def a_packet(rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        count = rng.choice([0, 63, 64, 65])
        return msgpack.packb([rng.randrange(128)]) * count
    out = b""
    for _ in range(rng.choice([1, 1, 2, 3])):
        op: object = (
            rng.randrange(128) if rng.random() < 0.97 else rng.choice([128, -1, "x", 2**64 - 1, None])
        )
        value: object = [op, *(a_value(rng) for _ in range(rng.randrange(4)))]
        if rng.random() < 0.1:
            value = [op, [0] * rng.choice([255, 256, 257]), {n: n for n in range(rng.choice([63, 64, 65]))}]
        if rng.random() < 0.1:
            nested: object = 1
            for _ in range(rng.choice([6, 7, 8])):
                nested = [nested] if rng.random() < 0.5 else {1: nested}
            value = [op, nested]
        out += msgpack.packb(value)
    return out


def mutated(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        if not changed:
            break
        at = rng.randrange(min(len(changed), 64))
        what = rng.randrange(4)
        if what == 0:
            changed[at] = rng.randrange(256)
        elif what == 1:
            del changed[at:]
        elif what == 2:
            changed[at:at] = rng.randbytes(rng.randrange(1, 6))
        else:
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_split_agrees_with_the_oracle_on_random_and_mutated_packets(seed: int) -> None:
    rng = random.Random(seed)
    accepted = refused = 0
    for _ in range(CASES // 4):
        good = a_packet(rng)
        for data in (good, mutated(rng, good), rng.randbytes(rng.randrange(40))):
            expected = verdict(oracle.split, data)
            assert verdict(frame.split, data) == expected, data.hex()
            accepted += expected != "bad_frame"
            refused += expected == "bad_frame"
    assert accepted > CASES // 8
    assert refused > CASES // 8


@given(st.binary(max_size=200))
@settings(max_examples=2000, deadline=None)
def test_no_bytes_crash_split_or_parse_ack(data: bytes) -> None:
    assert verdict(frame.split, data) == verdict(oracle.split, data)
    assert verdict(frame.parse_ack, data) == verdict(oracle.parse_ack, data)


@given(st.sampled_from([3, 3, 3, 2, 130]), st.integers(-5, 2**33), st.lists(st.integers(0, 9), max_size=20))
@settings(max_examples=500, deadline=None)
def test_parse_ack_agrees_with_the_oracle(op: int, tag: int, more: list[int]) -> None:
    data = msgpack.packb([op, tag, *more])
    assert verdict(frame.parse_ack, data) == verdict(oracle.parse_ack, data)


@given(st.sets(st.integers(0, 2**64 - 1) | st.integers(0, 60), max_size=60))
@settings(max_examples=500, deadline=None)
def test_ranges_agrees_with_the_oracle(values: set[int]) -> None:
    ascending = sorted(values)
    out = frame.ranges(ascending)
    assert out == oracle.ranges(ascending)
    assert sum(last - first + 1 for first, last in out) == len(values)
