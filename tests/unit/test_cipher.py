"""AES-256-GCM boxes: published vectors, spent nonces, and what a forger tries (X1-X3 of the module)."""

from __future__ import annotations

import pytest

from fastim._core import cipher
from fastim._core.cipher import (
    BACKEND,
    MAX_FRAMES_PER_KEY,
    PREFIX_BYTES,
    REKEY_FRAMES,
    TAG_BYTES,
    Opener,
    Sealer,
)
from fastim.errors import PeerError, UsageError

KEY = bytes(range(32))
PREFIX = b"c2s\0"
BACKENDS = ["cryptography", *(["pycryptodome"] if BACKEND == "pycryptodome" else [])]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(backend: str, counter: int = 0) -> tuple[Sealer, Opener]:
    return (
        Sealer(KEY, PREFIX, backend=backend, counter=counter),
        Opener(KEY, PREFIX, backend=backend, counter=counter),
    )


def test_the_compiled_primitives_are_used_where_the_processor_has_them() -> None:
    from Crypto.Util import _cpu_features

    able = _cpu_features.have_aes_ni() and _cpu_features.have_clmul()
    assert (BACKEND == "pycryptodome") == able


def test_a_box_opens_to_what_was_sealed(backend: str) -> None:
    sealer, opener = pair(backend)
    for number, size in enumerate((0, 1, 15, 16, 17, 128, 511, 512, 513, 65_536), 1):
        data = bytes(n * 7 & 0xFF for n in range(size))
        box = sealer.seal(b"header", data)
        assert len(box) == size + TAG_BYTES
        assert sealer.counter == number
        assert opener.open(number, b"header", box) == data


def test_the_nonce_is_prefix_and_counter(backend: str) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealer = Sealer(KEY, PREFIX, backend=backend, counter=0x0102_03)
    box = sealer.seal(b"aad", b"text")
    assert AESGCM(KEY).decrypt(PREFIX + (0x0102_04).to_bytes(8, "big"), box, b"aad") == b"text"


def test_no_two_frames_share_a_nonce_and_equal_texts_differ(backend: str) -> None:
    sealer, _ = pair(backend)
    boxes = {sealer.seal(b"", b"same") for _ in range(2_000)}
    assert len(boxes) == 2_000
    assert sealer.counter == 2_000


@pytest.mark.parametrize("counter", [0, 1, 3, 4, 1 << 40, (1 << 64) - 1])
def test_only_the_next_counter_is_taken(backend: str, counter: int) -> None:
    sealer, opener = pair(backend)
    opener.open(1, b"", sealer.seal(b"", b"first"))
    box = sealer.seal(b"", b"second")
    with pytest.raises(PeerError, match="bad_seal"):
        opener.open(counter, b"", box)
    assert opener.counter == 1
    assert opener.open(2, b"", box) == b"second"


def test_every_flipped_bit_is_refused_and_changes_nothing(backend: str) -> None:
    sealer, opener = pair(backend)
    box = sealer.seal(b"head", b"seventeen bytes!!")
    for bit in range(len(box) * 8):
        forged = bytearray(box)
        forged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError, match="bad_seal"):
            opener.open(1, b"head", bytes(forged))
    assert opener.counter == 0
    assert opener.open(1, b"head", box) == b"seventeen bytes!!"


@pytest.mark.parametrize("size", range(TAG_BYTES + 6))
def test_a_truncated_box_is_refused(backend: str, size: int) -> None:
    sealer, opener = pair(backend)
    box = sealer.seal(b"", b"secret")
    if size == len(box):
        return
    with pytest.raises(PeerError, match="bad_seal"):
        opener.open(1, b"", box[:size])


def test_other_associated_data_key_or_prefix_is_refused(backend: str) -> None:
    sealer, opener = pair(backend)
    box = sealer.seal(b"head", b"text")
    for other, aad in (
        (opener, b"heaD"),
        (opener, b""),
        (opener, b"head\0"),
        (Opener(bytes(32), PREFIX, backend=backend), b"head"),
        (Opener(KEY, b"s2c\0", backend=backend), b"head"),
    ):
        with pytest.raises(PeerError, match="bad_seal"):
            other.open(1, aad, box)


@pytest.mark.parametrize("counter", [0, 7, MAX_FRAMES_PER_KEY])
def test_a_key_ends(backend: str, counter: int) -> None:
    sealer = Sealer(KEY, PREFIX, backend=backend, counter=counter, frames=2)
    opener = Opener(KEY, PREFIX, backend=backend, counter=counter, frames=1)
    for text in (b"first", b"last"):
        assert sealer.left == (2 if text == b"first" else 1)
        box = sealer.seal(b"", text)
        if text == b"first":
            opener.open(counter + 1, b"", box)
    with pytest.raises(UsageError, match="new keys are due"):
        sealer.seal(b"", b"one too many")
    assert (sealer.left, sealer.counter) == (0, counter + 2)
    with pytest.raises(PeerError, match="bad_seal"):
        opener.open(counter + 2, b"", box)
    assert (opener.left, opener.counter) == (0, counter + 1)


def test_a_key_is_good_for_twice_what_makes_new_ones_due() -> None:
    assert Sealer(KEY, PREFIX).left == Sealer(KEY, PREFIX).frames == MAX_FRAMES_PER_KEY == 2 * REKEY_FRAMES
    for frames in (0, MAX_FRAMES_PER_KEY + 1):
        with pytest.raises(UsageError, match="limits 1 and"):
            Sealer(KEY, PREFIX, frames=frames)


@pytest.mark.parametrize(
    ("key", "prefix", "counter"),
    [
        (b"short", PREFIX, 0),
        (KEY, b"", 0),
        (KEY, bytes(PREFIX_BYTES + 1), 0),
        (KEY, PREFIX, (1 << 53) - MAX_FRAMES_PER_KEY),
        (KEY, PREFIX, 1 << 53),
    ],
)
def test_a_wrong_key_prefix_or_counter_is_the_callers_fault(key: bytes, prefix: bytes, counter: int) -> None:
    with pytest.raises(UsageError):
        Sealer(key, prefix, counter=counter)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="backend"):
        Sealer(KEY, PREFIX, backend="rot13")


def test_a_box_has_a_limit(backend: str) -> None:
    sealer, _ = pair(backend)
    with pytest.raises(UsageError, match="1,048,577"):
        sealer.seal(b"", bytes((1 << 20) + 1))
    assert sealer.counter == 0


def test_no_key_is_shown_by_its_object() -> None:
    sealer, _ = pair(BACKEND)
    assert KEY.hex() not in repr(sealer)
    assert not hasattr(sealer, "key")


def test_keys_are_counted_on_a_checked_build() -> None:
    before = cipher.live()["keys"]
    sealer = Sealer(KEY, PREFIX)
    assert cipher.live()["keys"] - before == (1 if cipher.DEBUG else 0)
    del sealer
